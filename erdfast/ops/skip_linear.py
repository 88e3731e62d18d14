"""The Linear(2D -> D) of a long skip without joining its inputs: two products that add into one tensor (U-ViT).

    out = [x, skip] W^T + b = x W1^T + b + skip W2^T            W = [W1, W2]
    dx = dout W1,   dskip = dout W2,   dW = [dout^T x, dout^T skip]

The joined input is neither written nor read nor kept for the backward pass (2D numbers a token, each way), and both
halves of dW are products that write into one tensor. In bfloat16 and float16 the first product is rounded before the
second is added to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fused import FusedOp

METHODS = ("joined", "products")
"""`products` saves traffic, which is nothing beside the products on a CPU: forward and backward on an AVX-512 core take
6.0 ms of CPU time joined and 6.4 as products at 128x18x128 in float32, 154 and 150 at 8x258x768; 3.5 and 3.6, 79 and 77
under bf16 autocast. So a CPU joins."""


def skip_linear(
    x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None = None, *, method: str | None = None
) -> Tensor:
    """`F.linear(torch.cat([x, skip], dim=-1), weight, bias)`.

    Args:
        x: (..., D), floating point.
        skip: (..., E), of any floating dtype; computed with in that of x.
        weight: (M, D + E), of x's dtype; under autocast of any floating dtype (float64 only with float64).
        bias: (M,) or None, likewise.
        method: "joined" writes the joined input, "products" is the way above; by default the faster of the device.

    Returns:
        (..., M), in the dtype of F.linear: that of autocast where it is on, else x's. Differentiable once (any number
        of times if "joined").

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the method is unknown.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    _check(x, skip, weight, bias)
    if (method or ("joined" if x.device.type == "cpu" else "products")) == "joined":
        return F.linear(torch.cat([x, skip.to(x.dtype)], dim=-1), weight, bias)
    dtype = torch.get_autocast_dtype(x.device.type) if _lowered(x) else x.dtype  # autocast does not see into the op
    rows = [t.to(dtype).reshape(-1, t.shape[-1]) for t in (x, skip)]
    out = _skip_linear(*rows, weight.to(dtype), None if bias is None else bias.to(dtype))
    return out.view(*x.shape[:-1], weight.shape[0])


def _lowered(x: Tensor) -> bool:
    """Whether autocast chooses the dtype of the product; it leaves float64 alone."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _check(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = x.dim() > 0 and skip.dim() > 0 and weight.dim() == 2 and x.shape[:-1] == skip.shape[:-1]
    if not fits or weight.shape[1] != x.shape[-1] + skip.shape[-1]:
        shapes = f"{tuple(x.shape)}, {tuple(skip.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"skip_linear needs x (..., D), skip (..., E) and weight (M, D + E), not {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; weight {tuple(weight.shape)} needs ({weight.shape[0]},)")
    for name, tensor in (("x", x), ("skip", skip), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be floating point")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}")
        agrees = tensor.dtype == x.dtype or (_lowered(x) and tensor.dtype != torch.float64)
        if not (agrees or tensor is skip):
            raise ValueError(f"{name} is {tensor.dtype}, but x {x.dtype}: they must agree unless autocast casts them")


def _compute(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    first, second = weight.t().split([x.shape[1], skip.shape[1]])
    out = torch.mm(x, first) if bias is None else torch.addmm(bias, x, first)
    return out.addmm_(skip, second)


def _fake(x, skip, weight, bias):
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, skip, weight, _ = inputs
    ctx.save_for_backward(x, skip, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError("skip_linear is differentiable once; use method='joined' for second derivatives")
    needs = ctx.needs_input_grad
    grads = _skip_linear_grad(grad, *ctx.saved_tensors, list(needs))
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


def _compute_grad(grad: Tensor, x: Tensor, skip: Tensor, weight: Tensor, want: list[bool]) -> list[Tensor]:
    """Gradients of x, skip, weight and bias, empty where they are not wanted."""
    none = [grad.new_empty(0) for _ in want]
    D = x.shape[1]
    grad_x = grad.mm(weight[:, :D]) if want[0] else none[0]
    grad_skip = grad.mm(weight[:, D:]) if want[1] else none[1]
    grad_weight = none[2]
    if want[2]:
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        torch.mm(grad.t(), x, out=grad_weight[:, :D])
        torch.mm(grad.t(), skip, out=grad_weight[:, D:])
    return [grad_x, grad_skip, grad_weight, grad.sum(0) if want[3] else none[3]]


def _fake_grad(grad, x, skip, weight, want):
    like = (x, skip, weight, weight[:, 0])
    return [t.new_empty(t.shape) if wanted else grad.new_empty(0) for t, wanted in zip(like, want, strict=True)]


_skip_linear = FusedOp("skip_linear", _compute, _fake, setup_context=_setup_context, backward=_backward)
_skip_linear_grad = FusedOp("skip_linear_grad", _compute_grad, _fake_grad)
