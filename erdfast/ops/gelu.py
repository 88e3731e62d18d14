"""GELU between the two Linears of an MLP, alone or behind the first of them.

    exact    y = x Phi(x)                                            Phi the normal distribution function
    tanh     y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))

The backward pass recomputes from the input. Sums and functions are float32 (float64 for float64 input).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import launcher, resolve_backend
from .fused import FusedOp

APPROXIMATIONS = ("none", "tanh")


def gelu(x: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """GELU of every element.

    Args:
        x: any shape; float32, bfloat16 or float16 (float64 for the reference). Kernels take contiguous tensors.
        approximate: "none" (exact) or "tanh".
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        Shape and dtype of x. Differentiable once (any number of times by the reference).

    Raises:
        ValueError: an unknown name, or the back end cannot run; the message says which.
    """
    _check_approximate(approximate)
    backend = resolve_backend(backend, x.device, x.dtype, op="gelu", backends=("reference", "triton"))
    if backend == "reference":
        return F.gelu(x, approximate=approximate)
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, not contiguous; call .contiguous() or use backend='reference'")
    return _gelu(x, approximate, backend)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "none", *, backend: str | None = None
) -> Tensor:
    """`gelu(F.linear(x, weight, bias))`; where nobody needs gradients the matrix product applies it by itself.

    That is so on CUDA for "tanh" with a bias: cuBLASLt has the approximation as an epilogue of the product, and the
    hidden layer is written once instead of twice. (With gradients the layer before the GELU must be kept anyway.)

    Args:
        x: (..., D), floating point.
        weight: (M, D).
        bias: (M,) or None.
        approximate: "none" (exact) or "tanh".
        backend: of the GELU where it is a pass of its own; "reference" and "triton" use no epilogue.

    Returns:
        (..., M), in the dtype of F.linear: that of autocast where it is on.

    Raises:
        ValueError: as `gelu`.
    """
    _check_approximate(approximate)
    if backend is None and approximate == "tanh" and bias is not None and _epilogue_fits(x, weight, bias):
        return _linear_gelu_epilogue(x, weight, bias)
    return gelu(F.linear(x, weight, bias), approximate, backend=backend)


def _check_approximate(approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"unknown approximation {approximate!r}; choose from {', '.join(APPROXIMATIONS)}")


def _epilogue_fits(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad)
    return x.device.type == "cuda" and x.dtype != torch.float64 and not needs_grad


def _linear_gelu_epilogue(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):  # which does not know this product
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    # On CUDA use_gelu means the tanh approximation on every path (PyTorch #104061); on a CPU it is the exact one.
    product = torch._addmm_activation  # pyright: ignore[reportPrivateImportUsage]
    out = product(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return out.view(*x.shape[:-1], weight.shape[0])


def _compute(x: Tensor, approximate: str, backend: str) -> Tensor:
    return launcher(backend, "gelu").gelu(x, approximate)


def _fake(x, approximate, backend):
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.approximate, ctx.backend = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("gelu is differentiable once; use backend='reference' for second derivatives")
    (x,) = ctx.saved_tensors
    # A Linear delivers contiguous gradients; only reductions (an expanded scalar) do not.
    return _gelu_grad(grad.contiguous(), x, ctx.approximate, ctx.backend), None, None


def _compute_grad(grad: Tensor, x: Tensor, approximate: str, backend: str) -> Tensor:
    return launcher(backend, "gelu").gelu_grad(grad, x, approximate)


def _fake_grad(grad, x, approximate, backend):
    return x.new_empty(x.shape)


_gelu = FusedOp("gelu", _compute, _fake, setup_context=_setup_context, backward=_backward)
_gelu_grad = FusedOp("gelu_grad", _compute_grad, _fake_grad)
