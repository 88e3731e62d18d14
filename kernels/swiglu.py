"""SwiGLU's gate and its gradient, computed in float32 (Shazeer, "GLU variants improve transformer").

    y = silu(a) * b,   x = [a, b],   silu(a) = a * s,   s = sigmoid(a)
    da = dy * b * s * (1 + a * (1 - s))          db = dy * a * s

x is a row of 2M numbers, first the M of a, then those of b. The backward pass recomputes everything from x and writes
both halves of its gradient in place of two tensors that are joined afterwards. Per element of y, s_x being the bytes of
a number:

    forward     read  2 s_x     written    s_x     flops  4 and an exponential
    backward    read  3 s_x     written  2 s_x     flops  9 and an exponential
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import load_float

MAX_BLOCK = 1024
"""Columns of a program: eight to each of 128 threads, 16 bytes of bf16. M = 2048, 3072 and 4096 are whole blocks."""

MIN_BLOCK = 256


def column_block(half: int) -> int:
    """Columns of a program, for rows of `half` results."""
    return min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(half)))


@triton.jit
def swiglu_kernel(y_ptr, x_ptr, half, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row."""
    blocks = tl.cdiv(half, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < half
    a = load_float(x_ptr + row * 2 * half + columns, mask)
    b = load_float(x_ptr + (row * 2 * half + half) + columns, mask)
    y = a * tl.sigmoid(a) * b
    tl.store(y_ptr + row * half + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_grad_kernel(grad_x_ptr, grad_y_ptr, x_ptr, half, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one row, in both halves."""
    blocks = tl.cdiv(half, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < half
    a = load_float(x_ptr + row * 2 * half + columns, mask)
    b = load_float(x_ptr + (row * 2 * half + half) + columns, mask)
    grad = load_float(grad_y_ptr + row * half + columns, mask)
    s = tl.sigmoid(a)
    grad_a = grad * b * s * (1.0 + a * (1.0 - s))
    grad_b = grad * a * s
    dtype = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + row * 2 * half + columns, grad_a.to(dtype), mask=mask)
    tl.store(grad_x_ptr + (row * 2 * half + half) + columns, grad_b.to(dtype), mask=mask)


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b of a contiguous (..., 2M) float32, bfloat16 or float16 tensor: (..., M) of its dtype."""
    half = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], half), dtype=x.dtype, device=x.device)
    if y.numel():
        block = column_block(half)
        with torch.cuda.device_of(x):
            grid = (y.numel() // half * triton.cdiv(half, block),)
            swiglu_kernel[grid](y, x, half, BLOCK=block, num_warps=block // 256)
    return y


def swiglu_grad(grad_y: Tensor, x: Tensor) -> Tensor:
    """The gradient of x, (..., 2M) of its dtype, for that of y, (..., M); both are contiguous."""
    half = x.shape[-1] // 2
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        block = column_block(half)
        with torch.cuda.device_of(x):
            grid = (grad_y.numel() // half * triton.cdiv(half, block),)
            swiglu_grad_kernel[grid](grad_x, grad_y, x, half, BLOCK=block, num_warps=block // 256)
    return grad_x
