"""Second stage of the gradients of modulated_norm.py: the partial sums of its programs, added up in a fixed order.

    dgate = sum dx * branch         dshift = sum dy       dscale = weight * sum dy * h + bias * sum dy
    dweight = sum (1 + scale) dy * h                      dbias = sum (1 + scale) dy

over the chunks of a sample, or over those of all samples. 4 bytes read per partial sum, one or two flops; the results
are smaller by the number of chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .layout import load_float

SUM_CHUNKS, SUM_CHANNELS = 16, 128
"""Tile of the second stage for one sample."""

CHANNEL_ROWS, CHANNEL_BLOCK = 256, 16
"""Tile of the second stage over all samples: 64 bytes of a row, so that even D = 384 is 24 programs."""


class Wanted(NamedTuple):
    """Which gradients `modulated_norm_grad` computes besides that of x."""

    gate: bool = False
    shift: bool = False
    scale: bool = False
    weight: bool = False
    bias: bool = False


@triton.jit
def add_sample_sums_kernel(
    grad_shift_ptr,
    grad_scale_ptr,
    grad_gate_ptr,
    partials_ptr,
    weight_ptr,
    bias_ptr,
    width,
    chunks,
    NORM_SUMS: tl.constexpr,
    GATE_SUM: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For shift, scale and gate: (B, chunks, K, D) -> (B, D) each. One program: BLOCK channels of one sample."""
    blocks = tl.cdiv(width, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    d = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    sums: tl.constexpr = 2 * NORM_SUMS + GATE_SUM
    sum_dy = tl.zeros([BLOCK], tl.float32)
    sum_dy_h = tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        chunk = step * CHUNKS + tl.arange(0, CHUNKS)
        mask = (chunk < chunks)[:, None] & inside[None, :]
        partials = partials_ptr + b * chunks * width * sums
        where = chunk[:, None] * width * sums + d[None, :]
        if NORM_SUMS:
            sum_dy += tl.sum(load_float(partials + where, mask), axis=0)
            sum_dy_h += tl.sum(load_float(partials + width + where, mask), axis=0)
        if GATE_SUM:
            sum_gate += tl.sum(load_float(partials + width * 2 * NORM_SUMS + where, mask), axis=0)
    out = b * width + d
    if grad_shift_ptr is not None:
        tl.store(grad_shift_ptr + out, sum_dy.to(grad_shift_ptr.dtype.element_ty), mask=inside)
    if grad_scale_ptr is not None:
        if weight_ptr is not None:
            sum_dy_h *= load_float(weight_ptr + d, inside)
        if bias_ptr is not None:
            sum_dy_h += sum_dy * load_float(bias_ptr + d, inside)
        tl.store(grad_scale_ptr + out, sum_dy_h.to(grad_scale_ptr.dtype.element_ty), mask=inside)
    if grad_gate_ptr is not None:
        tl.store(grad_gate_ptr + out, sum_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_channel_sums_kernel(
    grad_weight_ptr,
    grad_bias_ptr,
    partials_ptr,
    scale_ptr,
    width,
    chunks,
    total,
    scale_stride,
    SUMS: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For weight and bias: (B * chunks, K, D) -> (D,) each. One program: BLOCK channels of the whole batch."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    sum_dn = tl.zeros([BLOCK], tl.float32)
    sum_dn_h = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        i = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (i < total)[:, None] & inside[None, :]
        where = i[:, None] * width * SUMS + d[None, :]
        dy = load_float(partials_ptr + where, mask)
        dy_h = load_float(partials_ptr + width + where, mask)
        if scale_ptr is not None:
            gain = 1.0 + load_float(scale_ptr + ((i // chunks)[:, None] * scale_stride + d[None, :]), mask)
            dy *= gain
            dy_h *= gain
        sum_dn += tl.sum(dy, axis=0)
        sum_dn_h += tl.sum(dy_h, axis=0)
    if grad_weight_ptr is not None:
        tl.store(grad_weight_ptr + d, sum_dn_h.to(grad_weight_ptr.dtype.element_ty), mask=inside)
    if grad_bias_ptr is not None:
        tl.store(grad_bias_ptr + d, sum_dn.to(grad_bias_ptr.dtype.element_ty), mask=inside)


def row_stride(tensor: Tensor | None) -> int:
    """Of a (B, D) tensor; None is never read."""
    return 0 if tensor is None else tensor.stride(0)


def add_sums(
    partials: Tensor,
    grads: list[Tensor | None],
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    chunks: int,
    norm_sums: bool,
    want: Wanted,
) -> None:
    """At most one kernel for what each sample has of its own, and one for what all share.

    Args:
        partials: (B * chunks, K, D) float32: the sums of dy and of dy * h if `norm_sums`, then that of dx * branch if
            the gate's gradient is wanted, over the rows of a program; K is 3, 2 or 1.
        grads: for gate, shift, scale, weight and bias, contiguous tensors that are written; None if not wanted.
        scale, weight, bias: those of `modulated_norm`.
    """
    total, sums, width = partials.shape
    grad_gate, grad_shift, grad_scale, grad_weight, grad_bias = grads
    if want.gate or want.shift or want.scale:
        add_sample_sums_kernel[(total // chunks * triton.cdiv(width, SUM_CHANNELS),)](
            grad_shift,
            grad_scale,
            grad_gate,
            partials,
            weight,
            bias,
            width,
            chunks,
            NORM_SUMS=norm_sums,
            GATE_SUM=want.gate,
            STEPS=triton.cdiv(chunks, SUM_CHUNKS),
            CHUNKS=SUM_CHUNKS,
            BLOCK=SUM_CHANNELS,
            num_warps=4,
        )
    if want.weight or want.bias:
        add_channel_sums_kernel[(triton.cdiv(width, CHANNEL_BLOCK),)](
            grad_weight,
            grad_bias,
            partials,
            scale,
            width,
            chunks,
            total,
            row_stride(scale),
            SUMS=sums,
            STEPS=triton.next_power_of_2(triton.cdiv(total, CHANNEL_ROWS)),
            ROWS=CHANNEL_ROWS,
            BLOCK=CHANNEL_BLOCK,
            num_warps=4,
        )
