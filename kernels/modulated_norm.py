"""Residual, norm and modulation in one pass, and their gradients in another (DiT, sec. 3.2; LayerNorm, RMSNorm).

    r = x + gate * branch                        the residual stream, rounded to its dtype
    n = (r - mean(r)) * rstd * weight + bias     mean and rstd over the channels; RMSNorm: mean = 0
    y = n * (1 + scale) + shift

x, branch, r and y are (B, L, D); gate, shift and scale (B, D); weight and bias (D,). Branch, gate, shift, scale, weight
and bias may each be absent, and so may the norm: then the kernels are a gated residual and its gradient.

With dn = dy * (1 + scale), g = dn * weight and h = (r - mean) * rstd:

    dx = dr + rstd * (g - mean(g) - h * mean(g * h))         RMSNorm: without mean(g)
    dbranch = gate * dx         dgate = sum_l dx * branch
    dshift = sum_l dy           dscale = sum_l dy * n
    dweight = sum_bl dn * h     dbias = sum_bl dn

All sums over rows come from three numbers a channel: the sums of dy, dy * h and dx * branch over the rows of a program,
which belong to one sample. norm_sums.py adds them up in a fixed order, so that results repeat bit for bit, and no
sample's depend on the batch size.

Per element, s_t being the bytes of one number of tensor t (absent tensors count nothing):

    forward     read  s_x + s_branch                  written  s_r (if there is a branch) + s_y     flops  11
    backward    read  s_r + s_y + s_r + s_branch      written  s_x + s_branch                       flops  21

and in the backward another 8 to 12 bytes written and read for every GRAD_ROWS elements, for the partial sums.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import load_float
from .norm_sums import Wanted, add_sums, row_stride

NORMS = {"none": 0, "rms": 1, "layer": 2}
"""How many numbers each norm keeps of a row."""

MAX_WIDTH = 4096
"""Channels: a program holds whole rows, eight numbers of each to a thread of at most 16 warps."""

ROWS = 2
"""Rows of a program in the forward pass: they share the barriers of a reduction and one read of gain and offset. At
width 1152 it takes 53 registers, so that an SM holds four programs (92 and two with 4 rows)."""

GRAD_ROWS = 32
"""Rows of a program in the backward pass, at most. Partial sums of 32 rows are 4% of the traffic of a float32 stream
with a bf16 branch; at 256 tokens and 64 samples there are 512 programs."""

GRAD_STAGES = 3
"""Rows of which the backward pass has loads under way, the one in hand included: the others arrive in shared memory
(49 KiB at width 1152, two programs to an SM) while a row waits at the barriers of its reductions."""


def row_block(width: int) -> int:
    """Lanes for a row."""
    return max(256, triton.next_power_of_2(width))


def forward_warps(block: int, reduces: bool = True) -> int:
    """Eight numbers of a row to a thread, 16 bytes of bf16; sixteen where four warps then hold the row: reductions wait
    for fewer. (An H200 takes 120 us for 128x258x1152 with 4 warps, 128 with 8, 152 with 16.)"""
    return max(min(4, block // 256), block // 512) if reduces else block // 256


def grad_warps(block: int, reduces: bool = True) -> int:
    """As few as registers allow. (An H200 takes 175 us for 128x258x1152 with 4 warps, 207 with 8, 206 with 16.)"""
    return max(min(4, block // 128), block // 512) if reduces else min(16, block // 128)


class Split(NamedTuple):
    """How the rows of a sample are divided in the backward pass: a function of their number alone."""

    rows: int
    """Of a program."""
    chunks: int
    """Programs of a sample."""


def grad_split(length: int) -> Split:
    """As few programs as GRAD_ROWS allows, all of (nearly) the same size."""
    rows = triton.cdiv(length, triton.cdiv(length, GRAD_ROWS))
    return Split(rows, triton.cdiv(length, rows))


@triton.jit
def load_gain(weight_ptr, scale_ptr, scale_start, d, inside, BLOCK: tl.constexpr):
    """weight * (1 + scale): what the normalised row is multiplied by."""
    gain = tl.full([BLOCK], 1.0, tl.float32)
    if weight_ptr is not None:
        gain = load_float(weight_ptr + d, inside)
    if scale_ptr is not None:
        gain *= 1.0 + load_float(scale_ptr + scale_start + d, inside)
    return gain


@triton.jit
def load_offset(bias_ptr, scale_ptr, scale_start, shift_ptr, shift_start, d, inside, BLOCK: tl.constexpr):
    """bias * (1 + scale) + shift: what is added to the row afterwards."""
    offset = tl.zeros([BLOCK], tl.float32)
    if bias_ptr is not None:
        offset = load_float(bias_ptr + d, inside)
        if scale_ptr is not None:
            offset *= 1.0 + load_float(scale_ptr + scale_start + d, inside)
    if shift_ptr is not None:
        offset += load_float(shift_ptr + shift_start + d, inside)
    return offset


@triton.jit
def modulated_norm_kernel(
    residual_ptr,
    y_ptr,
    stats_ptr,
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    length,
    width,
    total_rows,
    chunks,
    x_batch_stride,
    x_row_stride,
    branch_batch_stride,
    branch_row_stride,
    gate_stride,
    shift_stride,
    scale_stride,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS rows of one sample. Pointers that a variant does not use are None."""
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    row = (pid % chunks) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    inside = d < width
    mask = (row < length)[:, None] & inside[None, :]
    own = row[:, None] * width + d[None, :]  # in the contiguous tensors, from the first row of the sample
    start = b * length * width
    r = load_float(x_ptr + b * x_batch_stride + (row[:, None] * x_row_stride + d[None, :]), mask)
    if branch_ptr is not None:
        branch_rows = row[:, None] * branch_row_stride + d[None, :]
        branch = load_float(branch_ptr + b * branch_batch_stride + branch_rows, mask)
        if gate_ptr is not None:
            branch *= load_float(gate_ptr + b * gate_stride + d, inside)[None, :]
        rounded = (r + branch).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + start + own, rounded, mask=mask)
        r = rounded.to(tl.float32)  # the backward pass will read these
    if NORM != 0:
        stats = stats_ptr + b * length + row
        if NORM == 2:
            mean = tl.sum(r, axis=1) / width
            tl.store(stats + total_rows, mean, mask=row < length)
            r = tl.where(mask, r - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(r * r, axis=1) / width + eps)
        tl.store(stats, rstd, mask=row < length)
        gain = load_gain(weight_ptr, scale_ptr, b * scale_stride, d, inside, BLOCK)
        offset = load_offset(bias_ptr, scale_ptr, b * scale_stride, shift_ptr, b * shift_stride, d, inside, BLOCK)
        y = r * rstd[:, None] * gain[None, :] + offset[None, :]
        tl.store(y_ptr + start + own, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def modulated_norm_grad_kernel(
    grad_x_ptr,
    grad_branch_ptr,
    partials_ptr,
    grad_residual_ptr,
    grad_y_ptr,
    r_ptr,
    stats_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    length,
    width,
    total_rows,
    chunks,
    r_batch_stride,
    r_row_stride,
    branch_batch_stride,
    branch_row_stride,
    gate_stride,
    scale_stride,
    NORM: tl.constexpr,
    NORM_SUMS: tl.constexpr,
    GATE_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: ROWS rows of one sample, one after the other. Pointers that a variant does not use are None."""
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    first = (pid % chunks) * ROWS
    d = tl.arange(0, BLOCK)
    inside = d < width
    start = b * length * width
    if NORM != 0:
        gain = load_gain(weight_ptr, scale_ptr, b * scale_stride, d, inside, BLOCK)
    if gate_ptr is not None:
        gate = load_float(gate_ptr + b * gate_stride + d, inside)
    sum_dy = tl.zeros([BLOCK], tl.float32)
    sum_dy_h = tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        row = first + i
        mask = inside & (row < length)
        own = row * width + d
        if grad_residual_ptr is not None:
            dx = load_float(grad_residual_ptr + start + own, mask)
        else:
            dx = tl.zeros([BLOCK], tl.float32)
        if NORM != 0:
            dy = load_float(grad_y_ptr + start + own, mask)
            h = load_float(r_ptr + b * r_batch_stride + (row * r_row_stride + d), mask)
            stats = stats_ptr + b * length + row
            rstd = tl.load(stats, mask=row < length, other=0.0)
            if NORM == 2:
                h -= tl.load(stats + total_rows, mask=row < length, other=0.0)  # where h was masked, dy is 0
            h *= rstd
            g = dy * gain
            correction = h * (tl.sum(g * h, axis=0) / width)
            if NORM == 2:
                correction += tl.sum(g, axis=0) / width
            dx += rstd * (g - correction)
            if NORM_SUMS:
                sum_dy += dy
                sum_dy_h += dy * h
        if grad_x_ptr is not None:
            tl.store(grad_x_ptr + start + own, dx.to(grad_x_ptr.dtype.element_ty), mask=mask)
        if GATE_SUM:
            branch = load_float(branch_ptr + b * branch_batch_stride + (row * branch_row_stride + d), mask)
            sum_gate += dx * branch
        if grad_branch_ptr is not None:
            if gate_ptr is not None:
                dx *= gate
            tl.store(grad_branch_ptr + start + own, dx.to(grad_branch_ptr.dtype.element_ty), mask=mask)
    if partials_ptr is not None:
        partials = partials_ptr + pid.to(tl.int64) * width * (2 * NORM_SUMS + GATE_SUM) + d
        if NORM_SUMS:
            tl.store(partials, sum_dy, mask=inside)
            tl.store(partials + width, sum_dy_h, mask=inside)
        if GATE_SUM:
            tl.store(partials + width * 2 * NORM_SUMS, sum_gate, mask=inside)


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    """Of samples and of rows."""
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


def modulated_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(r, y, stats); None for what does not exist.

    All tensors are of float32, bfloat16 or float16, each of its own, and on one device; the caller has checked them.

    Args:
        x: (B, L, D), D at most MAX_WIDTH; samples and rows of any stride, channels of stride 1.
        branch: the same, or None: then there is no r.
        gate, shift, scale: (B, D), rows of any stride, channels of stride 1; or None.
        weight, bias: (D,) contiguous, or None.
        norm: a key of NORMS. With "none" there is no y, and shift, scale, weight and bias are None.
        eps: added to the mean square.
        dtype: of y.

    Returns:
        r: (B, L, D) contiguous, of x's dtype.
        y: (B, L, D) contiguous.
        stats: (2, B, L) float32, rstd and mean; (1, B, L), rstd, for RMSNorm.
    """
    B, L, D = x.shape
    r = None if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = stats = None
    if norm != "none":
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        stats = torch.empty((NORMS[norm], B, L), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return r, y, stats
    block, chunks = row_block(D), triton.cdiv(L, ROWS)
    with torch.cuda.device_of(x):
        modulated_norm_kernel[(B * chunks,)](
            r,
            y,
            stats,
            x,
            branch,
            gate,
            shift,
            scale,
            weight,
            bias,
            eps,
            L,
            D,
            B * L,
            chunks,
            *_strides(x),
            *_strides(branch),
            row_stride(gate),
            row_stride(shift),
            row_stride(scale),
            NORM=NORMS[norm],
            ROWS=ROWS,
            BLOCK=block,
            num_warps=forward_warps(block, norm != "none"),
        )
    return r, y, stats


def modulated_norm_grad(
    grad_residual: Tensor | None,
    grad_y: Tensor | None,
    r: Tensor | None,
    stats: Tensor | None,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    branch_dtype: torch.dtype | None,
    want: Wanted,
) -> tuple[Tensor | None, ...]:
    """(grad_x, grad_branch, grad_gate, grad_shift, grad_scale, grad_weight, grad_bias); None for what is not wanted.

    Args:
        grad_residual: (B, L, D) contiguous, the gradient of r from elsewhere; None for zero, if there is a norm.
        grad_y: (B, L, D) contiguous; None without norm.
        r: what was normalised, (B, L, D), channels of stride 1. None without norm.
        stats: as `modulated_norm` returned them.
        branch: needed for the gradient of the gate alone.
        gate, shift, scale, weight, bias: those of `modulated_norm`.
        norm: a key of NORMS.
        branch_dtype: of grad_branch; None if there is no branch, or if its gradient is that of x.
        want: the other gradients.

    Returns:
        Gradients contiguous and of their tensor's dtype. Without norm grad_x is None: it is grad_residual.
    """
    grad = grad_residual if grad_y is None else grad_y
    assert grad is not None
    B, L, D = shape = grad.shape
    device = grad.device
    norm_sums = want.shift or want.scale or want.weight or want.bias
    sums = 2 * norm_sums + want.gate

    def like(tensor: Tensor | None, wanted: bool) -> Tensor | None:
        """Where a sum over rows goes; 0 where there are no rows."""
        if not wanted:
            return None
        make = torch.empty if L and B else torch.zeros
        return make(tensor.shape, dtype=tensor.dtype, device=device)

    grad_x = None if r is None else torch.empty(shape, dtype=r.dtype, device=device)
    grad_branch = None if branch_dtype is None else torch.empty(shape, dtype=branch_dtype, device=device)
    tensors = (gate, shift, scale, weight, bias)
    per_channel = [like(tensor, wanted) for tensor, wanted in zip(tensors, want, strict=True)]
    if B == 0 or L == 0:
        return grad_x, grad_branch, *per_channel
    block, split = row_block(D), grad_split(L)
    partials = None
    if sums:
        partials = torch.empty((B * split.chunks, sums, D), dtype=torch.float32, device=device)
    with torch.cuda.device_of(grad):
        modulated_norm_grad_kernel[(B * split.chunks,)](
            grad_x,
            grad_branch,
            partials,
            grad_residual,
            grad_y,
            r,
            stats,
            branch,
            gate,
            scale,
            weight,
            L,
            D,
            B * L,
            split.chunks,
            *_strides(r),
            *_strides(branch),
            row_stride(gate),
            row_stride(scale),
            NORM=NORMS[norm],
            NORM_SUMS=norm_sums,
            GATE_SUM=want.gate,
            ROWS=split.rows,
            STAGES=GRAD_STAGES,
            BLOCK=block,
            num_warps=grad_warps(block, norm != "none"),
        )
        if partials is not None:
            add_sums(partials, per_channel, scale, weight, bias, split.chunks, norm_sums, want)
    return grad_x, grad_branch, *per_channel
