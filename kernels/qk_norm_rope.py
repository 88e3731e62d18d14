"""RMSNorm over a head and rotary embedding of q and k, from the output of one Linear, in one pass over memory.

    r = 1 / sqrt(mean_i x_i^2 + eps)            y_i = r * w_i * x_i        for each token and head of q and of k
    (z_2i, z_2i+1) = (y_2i cos - y_2i+1 sin, y_2i+1 cos + y_2i sin)        the angle depends on token and pair

Either half may be absent. Backward, with g the incoming gradient turned back by the same angle:

    dw_i = sum_{tokens, heads} g_i r x_i        dx = r * (w*g - r x * mean_i(w_i g_i r x_i))

B batch, L tokens, H heads, K head width. qkv is (B, L, 3, H, K), results are (B, L, H, K). v is no business of the
forward kernel; the backward kernel copies its gradient so that all three end up in one dqkv.

Per element of one of q, k and v, s being the bytes of one number:

    forward     read 2 s        written 2 s     flops 2*4 for the norm + 2*3 for the rotation
    backward    read 5 s        written 3 s     flops 2*12 + 2*3       (read 3 s without the norm)

and 8 bytes of cos and sin for each pair of a token and program (from the cache), 8 K bytes of partial sums for each
program. Weight gradients are sums over a program's tokens and heads, then over programs in the order of PyTorch's
sum: no atomics, the same bits every time.

A program takes a few tokens and goes through `heads` heads of q, then of k, with angles, weights and sums in
registers. Its tile is (tokens, K rounded up to a power of two): for K = 72, 44% of the lanes idle, but not the memory.
An H200 has issue slots for 25 instructions per number forward and 50 backward in the time of the traffic above; with
the idle lanes the loops take 19 and 34 (10 and 19 for K = 64 and 128; counted in sm_90 code, bf16). Tiles of 64 + 8
columns idle none, but the compiler then moves one of them through shared memory to the other's layout in each step,
and the backward kernel takes 147 to 240 registers instead of 56.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_WARPS = 4
TILE = 2048
"""Numbers of a forward tile: 16 to a thread, two 16-byte loads of bf16; 56 registers for bf16 at K = 64, 72 and 128."""
BACKWARD_TILE = 1024
"""Two tiles and the sums for the weights live at a time: 8 numbers to a thread of each, 64 registers."""

MIN_PROGRAMS = 1024
"""Heads are divided among programs until there are so many: 8 for each SM of an H200, as many as fit there."""

SIZES = ["length", "num_heads", "heads", "blocks", "groups"]
STRIDES = [f"d{name}_stride_{axis}" for name in "qkv" for axis in "bhl"]


class Partition(NamedTuple):
    """Who does what; a function of the shape alone."""

    padded: int
    """K rounded up to a power of two: columns of a tile."""
    rows: int
    """Tokens of a program."""
    blocks: int
    """Programs along the tokens of a sample."""
    heads: int
    """Heads of a program."""
    groups: int
    """Programs along the heads."""


def partition(batch: int, length: int, num_heads: int, head_width: int, tile: int) -> Partition:
    """Divides (B, L, H, K) among programs; no size is 0."""
    padded = max(2, triton.next_power_of_2(head_width))
    rows = max(1, tile // padded)
    blocks = triton.cdiv(length, rows)
    groups = min(num_heads, triton.cdiv(MIN_PROGRAMS, batch * blocks))
    heads = triton.cdiv(num_heads, groups)
    return Partition(padded, rows, blocks, heads, groups=triton.cdiv(num_heads, heads))


@triton.jit
def head_offsets(rows, mask, K: tl.constexpr, PADDED: tl.constexpr):
    """(offsets, mask) of a tile (ROWS, PADDED): a head of some tokens."""
    columns = tl.arange(0, PADDED)[None, :]
    offsets, mask = rows[:, None] + columns, mask[:, None]
    if PADDED > K:
        mask = mask & (columns < K)
    return offsets, mask


@triton.jit
def load_head(pointer, rows, mask, K: tl.constexpr, PADDED: tl.constexpr):
    """The even and the odd columns of a head as float32, (ROWS, PADDED/2) each; 0 where there are none."""
    offsets, mask = head_offsets(rows, mask, K, PADDED)
    tile = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(tile, (rows.shape[0], PADDED // 2, 2)))


@triton.jit
def store_head(pointer, rows, mask, even, odd, K: tl.constexpr, PADDED: tl.constexpr):
    offsets, mask = head_offsets(rows, mask, K, PADDED)
    tile = tl.reshape(tl.join(even, odd), (rows.shape[0], PADDED))
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_weight(pointer, K: tl.constexpr, PADDED: tl.constexpr):
    """The even and the odd weights, (1, PADDED/2) each; 1 where there are none."""
    if pointer is None:
        even = tl.full([1, 1], 1.0, tl.float32)
        odd = even
    else:
        column = 2 * tl.arange(0, PADDED // 2)[None, :]
        even = tl.load(pointer + column, mask=column < K, other=0.0).to(tl.float32)
        odd = tl.load(pointer + column + 1, mask=column + 1 < K, other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def load_angles(cos_ptr, sin_ptr, tokens, mask, K: tl.constexpr, PADDED: tl.constexpr):
    """cos and sin of a program's tokens, (ROWS, PADDED/2) each; no rotation where there are no tables."""
    if cos_ptr is None:
        cos = tl.full([1, 1], 1.0, tl.float32)
        sin = tl.full([1, 1], 0.0, tl.float32)
    else:
        offsets, mask = head_offsets(tokens * (K // 2), mask, K // 2, PADDED // 2)
        cos = tl.load(cos_ptr + offsets, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + offsets, mask=mask, other=0.0)
    return cos, sin


@triton.jit
def turn(even, odd, cos, sin, ROPE: tl.constexpr):
    """Rotates pairs by the angle; with -sin, back."""
    if ROPE:
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    return even, odd


@triton.jit(do_not_specialize=SIZES)
def qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    length,
    num_heads,
    heads,
    blocks,
    groups,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program: ROWS tokens of one sample, `heads` heads of q, then of k. Absent weights and tables are None."""
    NORM: tl.constexpr = q_weight_ptr is not None
    ROPE: tl.constexpr = cos_ptr is not None
    pid = tl.program_id(0)
    first_head, pid = (pid % groups) * heads, pid // groups
    last_head = tl.minimum(first_head + heads, num_heads)
    first = (pid % blocks) * ROWS
    start = tl.cast(pid // blocks, tl.int64) * length + first
    token = tl.arange(0, ROWS)
    mask = first + token < length
    width = num_heads * K
    cos, sin = load_angles(cos_ptr, sin_ptr, first + token, mask, K, PADDED)
    for part in tl.static_range(2):
        w_even, w_odd = load_weight(k_weight_ptr if part else q_weight_ptr, K, PADDED)
        for h in range(first_head, last_head):
            x_ptr = qkv_ptr + start * (3 * width) + (part * num_heads + h) * K
            out_ptr = (k_ptr if part else q_ptr) + start * width + h * K
            even, odd = load_head(x_ptr, token * (3 * width), mask, K, PADDED)
            if NORM:
                r = tl.rsqrt(tl.sum(even * even + odd * odd, axis=1)[:, None] / K + eps)
                even, odd = even * r * w_even, odd * r * w_odd
            even, odd = turn(even, odd, cos, sin, ROPE)
            store_head(out_ptr, token * width, mask, even, odd, K, PADDED)


@triton.jit(do_not_specialize=[*STRIDES, *SIZES])
def qk_norm_rope_backward_kernel(
    dqkv_ptr,
    partials_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dq_stride_b,
    dq_stride_h,
    dq_stride_l,
    dk_stride_b,
    dk_stride_h,
    dk_stride_l,
    dv_stride_b,
    dv_stride_h,
    dv_stride_l,
    eps,
    length,
    num_heads,
    heads,
    blocks,
    groups,
    K: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The same programs; each also copies dv and leaves its (2, K) sums for the weights. Strides count UNITs."""
    NORM: tl.constexpr = q_weight_ptr is not None
    ROPE: tl.constexpr = cos_ptr is not None
    program = tl.program_id(0)
    first_head, pid = (program % groups) * heads, program // groups
    last_head = tl.minimum(first_head + heads, num_heads)
    first = (pid % blocks) * ROWS
    b = tl.cast(pid // blocks, tl.int64)
    token = tl.arange(0, ROWS)
    mask = first + token < length
    width = num_heads * K
    rows = token * (3 * width)
    cos, sin = load_angles(cos_ptr, sin_ptr, first + token, mask, K, PADDED)
    for part in tl.static_range(3):
        if part == 0:
            grad_ptr, stride_b, stride_h, stride_l = dq_ptr, dq_stride_b, dq_stride_h, dq_stride_l
        elif part == 1:
            grad_ptr, stride_b, stride_h, stride_l = dk_ptr, dk_stride_b, dk_stride_h, dk_stride_l
        else:
            grad_ptr, stride_b, stride_h, stride_l = dv_ptr, dv_stride_b, dv_stride_h, dv_stride_l
        grad_ptr += (b * stride_b + tl.cast(first, tl.int64) * stride_l) * UNIT
        grad_rows = token.to(tl.int64) * (stride_l * UNIT)
        if part < 2:
            w_even, w_odd = load_weight(k_weight_ptr if part else q_weight_ptr, K, PADDED)
            dw_even = tl.zeros([ROWS, PADDED // 2], tl.float32)
            dw_odd = tl.zeros([ROWS, PADDED // 2], tl.float32)
        for h in range(first_head, last_head):
            even, odd = load_head(grad_ptr + tl.cast(h, tl.int64) * stride_h * UNIT, grad_rows, mask, K, PADDED)
            head = (b * length + first) * (3 * width) + (part * num_heads + h) * K
            if part < 2:
                even, odd = turn(even, odd, cos, -sin, ROPE)
                if NORM:
                    x_even, x_odd = load_head(qkv_ptr + head, rows, mask, K, PADDED)
                    r = tl.rsqrt(tl.sum(x_even * x_even + x_odd * x_odd, axis=1)[:, None] / K + eps)
                    r = tl.where(mask[:, None], r, 0.0)  # infinite beyond the last token where eps is 0
                    x_even, x_odd = x_even * r, x_odd * r
                    dw_even += even * x_even
                    dw_odd += odd * x_odd
                    even, odd = even * w_even, odd * w_odd
                    mean = tl.sum(even * x_even + odd * x_odd, axis=1)[:, None] / K
                    even, odd = r * (even - x_even * mean), r * (odd - x_odd * mean)
            store_head(dqkv_ptr + head, rows, mask, even, odd, K, PADDED)
        if NORM and part < 2:
            sums_ptr = partials_ptr + (tl.cast(program, tl.int64) * 2 + part) * K
            column = 2 * tl.arange(0, PADDED // 2)
            tl.store(sums_ptr + column, tl.sum(dw_even, axis=0), mask=column < K)
            tl.store(sums_ptr + column + 1, tl.sum(dw_odd, axis=0), mask=column + 1 < K)


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(q, k), each (B, L, H, K) contiguous in qkv's dtype.

    All tensors are contiguous and on one device; the caller has checked them.

    Args:
        qkv: (B, L, 3*H*K), float32, bfloat16 or float16.
        q_weight, k_weight: (K,) of any of the three dtypes, or both None for no norm.
        cos, sin: (L, K/2) float32, or both None for no rotation; K is even with them.
        eps: added to the mean square.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head_width = width // num_heads
    q, k = (qkv.new_empty((batch, length, num_heads, head_width)) for _ in range(2))
    if q.numel() == 0:
        return q, k
    part = partition(batch, length, num_heads, head_width, TILE)
    with torch.cuda.device_of(qkv):
        qk_norm_rope_kernel[(batch * part.blocks * part.groups,)](
            q,
            k,
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            eps,
            length,
            num_heads,
            part.heads,
            part.blocks,
            part.groups,
            K=head_width,
            PADDED=part.padded,
            ROWS=part.rows,
            num_warps=NUM_WARPS,
        )
    return q, k


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """(dqkv, dw): the gradient of qkv, contiguous, and (2, K) float32, those of both weights; None without the norm.

    Args:
        dq, dk, dv: (B, H, L, K); any strides, but the last is 1.
        qkv and all others: as in the forward pass; of qkv only the shape and dtype count without the norm.
    """
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    head_width = width // num_heads
    dqkv = qkv.new_empty(qkv.shape)
    if dqkv.numel() == 0:
        return dqkv, None if q_weight is None else qkv.new_zeros((2, head_width), dtype=torch.float32)
    part = partition(batch, length, num_heads, head_width, BACKWARD_TILE)
    programs = batch * part.blocks * part.groups
    partials = None if q_weight is None else qkv.new_empty((programs, 2, head_width), dtype=torch.float32)
    strides = [stride for grad in (dq, dk, dv) for stride in grad.stride()[:3]]
    unit = math.gcd(16, *strides)  # Triton looks for 16 itself, but a head of 72 is 9 times 8
    with torch.cuda.device_of(qkv):
        qk_norm_rope_backward_kernel[(programs,)](
            dqkv,
            partials,
            dq,
            dk,
            dv,
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            *[stride // unit for stride in strides],
            eps,
            length,
            num_heads,
            part.heads,
            part.blocks,
            part.groups,
            K=head_width,
            PADDED=part.padded,
            ROWS=part.rows,
            UNIT=unit,
            num_warps=NUM_WARPS,
        )
    return dqkv, None if partials is None else partials.sum(0)
