"""The gate of a SwiGLU MLP: y = silu(a) * b for the two halves [a, b] of one Linear's output.

Backward recomputes from the input and writes the gradient of both halves into one tensor: nothing is split or joined.
Computed in float32 (float64 for float64 input).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import KERNEL_DTYPES, launcher, resolve_backend
from .fused import FusedOp


def swiglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(a) * b, where a is the first half of the last dimension and b the second (the order of LightningDiT's w12).

    Args:
        x: (..., 2M); float32, bfloat16 or float16 (float64 for the reference). Kernels take contiguous tensors.
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        (..., M), x's dtype. Differentiable once (any number of times by the reference).

    Raises:
        ValueError: the last dimension is odd, another dtype, or the back end cannot run; the message says which.
    """
    if x.dim() == 0 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last dimension must be two halves")
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"x is {x.dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))} or torch.float64")
    backend = resolve_backend(backend, x.device, x.dtype, op="swiglu", backends=("reference", "triton"))
    if backend == "reference":
        return _reference(x)
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, not contiguous; call .contiguous() or use backend='reference'")
    return _swiglu(x, backend)


def _reference(x: Tensor) -> Tensor:
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(a) * b).to(x.dtype)


def _compute(x: Tensor, backend: str) -> Tensor:
    return launcher(backend, "swiglu").swiglu(x)


def _fake(x, backend):
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("swiglu is differentiable once; use backend='reference' for second derivatives")
    (x,) = ctx.saved_tensors
    # A Linear delivers contiguous gradients; only reductions (an expanded scalar) do not.
    return _swiglu_grad(grad.contiguous(), x, ctx.backend), None


def _compute_grad(grad: Tensor, x: Tensor, backend: str) -> Tensor:
    return launcher(backend, "swiglu").swiglu_grad(grad, x)


def _fake_grad(grad, x, backend):
    return x.new_empty(x.shape)


_swiglu = FusedOp("swiglu", _compute, _fake, setup_context=_setup_context, backward=_backward)
_swiglu_grad = FusedOp("swiglu_grad", _compute_grad, _fake_grad)
