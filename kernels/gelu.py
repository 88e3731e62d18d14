"""GELU and its gradient, computed in float32 (Hendrycks & Gimpel, "Gaussian error linear units").

    exact    y = x Phi(x), Phi(x) = (1 + erf(x / sqrt 2)) / 2        dy/dx = Phi(x) + x phi(x)
    tanh     y = x s, s = sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3), which is x (1 + tanh u) / 2
             dy/dx = s + x s (1 - s) 2 u'

The backward pass recomputes everything from x. Per element, s being the bytes of a number:

    forward     read   s     written  s     flops  10 (tanh) or 16 (exact) and an exponential
    backward    read  2s     written  s     flops  17 (tanh) or 20 (exact) and an exponential

The exact form takes Phi from formula 7.1.26 of Abramowitz and Stegun, within 7.5e-8 of it, which is the rounding of a
float32 near 1: CUDA's own erf costs so many instructions that a GPU waits for them and not for its memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import load_float

BLOCK = 2048
"""Eight elements to each of a program's 256 threads: 16 bytes of bf16 and fp16, twice 16 of float32."""

NUM_WARPS = 8

TAIL_RATE = tl.constexpr(0.3275911 * 0.7071067811865476)
"""p / sqrt(2) of the formula."""
TAIL_1, TAIL_2, TAIL_3, TAIL_4, TAIL_5 = (
    tl.constexpr(0.5 * a) for a in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
)
"""Half its coefficients: Phi is half of 1 + erf."""
TANH_SLOPE = tl.constexpr(1.5957691216057308)
"""2 sqrt(2/pi): the slope of 2 u at 0."""
DENSITY = tl.constexpr(0.3989422804014327)
"""1 / sqrt(2 pi): the normal density at 0."""
CUBIC = tl.constexpr(0.044715)
CUBIC_SLOPE = tl.constexpr(0.134145)


@triton.jit
def normal_distribution(x):
    """(Phi(x), exp(-x^2/2)): the second is a factor of the first, and of the density."""
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + TAIL_RATE * tl.abs(x))
    tail = t * (TAIL_1 + t * (TAIL_2 + t * (TAIL_3 + t * (TAIL_4 + t * TAIL_5)))) * bell
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def gelu_kernel(y_ptr, x_ptr, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < tl.minimum(numel - start, BLOCK).to(tl.int32)
    x = load_float(x_ptr + start + i, mask)
    if TANH:
        y = x * tl.sigmoid(x * (1.0 + x * x * CUBIC) * TANH_SLOPE)
    else:
        phi, _ = normal_distribution(x)
        y = x * phi
    tl.store(y_ptr + start + i, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_grad_kernel(grad_x_ptr, grad_y_ptr, x_ptr, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    """One program: BLOCK elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    mask = i < tl.minimum(numel - start, BLOCK).to(tl.int32)
    x = load_float(x_ptr + start + i, mask)
    if TANH:
        s = tl.sigmoid(x * (1.0 + x * x * CUBIC) * TANH_SLOPE)
        # In this order: where x is large, s * (1 - s) is 0 before the square overflows.
        slope = s + x * s * (1.0 - s) * ((1.0 + x * x * CUBIC_SLOPE) * TANH_SLOPE)
    else:
        phi, bell = normal_distribution(x)
        slope = phi + x * bell * DENSITY
    grad = load_float(grad_y_ptr + start + i, mask) * slope
    tl.store(grad_x_ptr + start + i, grad.to(grad_x_ptr.dtype.element_ty), mask=mask)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU of a contiguous float32, bfloat16 or float16 tensor, of its shape and dtype.

    Args:
        x: any shape; the caller has checked it.
        approximate: "none" or "tanh".
    """
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(x.numel(), BLOCK),)
            gelu_kernel[grid](y, x, x.numel(), TANH=approximate == "tanh", BLOCK=BLOCK, num_warps=NUM_WARPS)
    return y


def gelu_grad(grad_y: Tensor, x: Tensor, approximate: str) -> Tensor:
    """The gradient of x, of its dtype; both are contiguous and of one shape."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            grid, tanh = (triton.cdiv(x.numel(), BLOCK),), approximate == "tanh"
            gelu_grad_kernel[grid](grad_x, grad_y, x, x.numel(), TANH=tanh, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return grad_x
