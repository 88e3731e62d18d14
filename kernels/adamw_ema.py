"""AdamW, averages of the weights, loss scale, clipping and a copy in half precision, in one pass over all tensors.

    g = factor * grad                                factor = min(1, max_norm / (norm + 1e-6)) / grad_scale
    m = lerp(m, g, 1 - beta1)                        v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema = lerp(ema, p, 1 - decay)                    copy = p, rounded

as torch.optim.AdamW has it (Loshchilov and Hutter, algorithm 2), and norm = sqrt(sum of grad^2) over all tensors.

A launch finds its tensors in a table of addresses, as apex's multi-tensor kernels do. Per element:

    update    read 12 + 4 E + s_g, written 12 + 4 E + s_c bytes: 36 with one average and float32 gradients;
              15 + 5 E flops, a division and a square root
    norm      read s_g, 2 flops

E averages, s_g and s_c bytes of a number of the gradient and of the copy. A program owns one block of one tensor,
which it learns from 4 bytes of the list `owner`.

The norm adds blocks in an order that depends on the sizes of the tensors alone: it repeats bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMEL, GROUP, FIRST, PARAM, EXP_AVG, EXP_AVG_SQ, STEP, EMA = (tl.constexpr(row) for row in range(8))
"""Rows of the table: sizes, settings, first block, addresses; averages follow from EMA on, then the copy."""

BLOCK = 2048
"""8 elements to each of 256 threads: twice 16 bytes of each of five arrays are on their way per thread, and at most 64
registers let an SM hold 4 programs."""

PIECE = tl.constexpr(256)
"""Elements that the last block of a tensor, or one that is not aligned, moves at a time."""

NORM_PROGRAMS = 1024
"""At most so many partial sums: one block of the second stage; 7 programs to each SM of an H100."""

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SCALARS = ["grad_scale_ptr", "found_inf_ptr", "norm_ptr"]


@triton.jit
def power(base, exponent):
    """base^exponent for exponents below 2^25 (a float32 counts no further), in base's precision."""
    result = base * 0.0 + 1.0
    for _ in tl.static_range(25):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit(do_not_specialize_on_alignment=_SCALARS, do_not_specialize=["tensors"])
def prepare_kernel(
    scalars_ptr,
    table_ptr,
    grads_ptr,
    settings_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    norm_ptr,
    max_norm,
    tensors,
    BLOCK: tl.constexpr,
):
    """One lane per tensor: counts its step and computes in float64 what its elements share; 100 bytes per tensor."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < tensors
    group = settings_ptr + 5 * tl.load(table_ptr + GROUP * tensors + t, mask=mask, other=0)
    lr = tl.load(group)
    beta1 = tl.load(group + 1)
    beta2 = tl.load(group + 2)
    factor = tl.full([BLOCK], 1.0, tl.float32)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr)
        clip = max_norm / (norm + 1e-6)
        factor *= tl.where(clip < 1.0, clip, tl.where(norm == norm, 1.0, norm))  # NaN stays NaN
    if grad_scale_ptr is not None:
        factor /= tl.load(grad_scale_ptr)
    active = mask & (tl.load(grads_ptr + t, mask=mask, other=0) != 0)
    if found_inf_ptr is not None:
        active = active & (tl.zeros([BLOCK], tl.float32) == tl.load(found_inf_ptr))
    steps = tl.load(table_ptr + STEP * tensors + t, mask=active, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=active, other=0.0) + 1.0
    tl.store(steps, step, mask=active)
    count = step.to(tl.int32)
    scalars = scalars_ptr + 8 * t
    tl.store(scalars, factor, mask=mask)
    tl.store(scalars + 1, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(scalars + 2, beta2.to(tl.float32), mask=mask)
    tl.store(scalars + 3, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(scalars + 4, (1.0 / tl.sqrt(1.0 - power(beta2, count))).to(tl.float32), mask=mask)
    tl.store(scalars + 5, tl.load(group + 3).to(tl.float32), mask=mask)
    tl.store(scalars + 6, (lr / (1.0 - power(beta1, count))).to(tl.float32), mask=mask)
    tl.store(scalars + 7, (1.0 - lr * tl.load(group + 4)).to(tl.float32), mask=mask)


@triton.jit
def lerp(a, b, weight):
    """a + weight (b - a), from the nearer end."""
    return tl.where(weight < 0.5, a + weight * (b - a), b - (1.0 - weight) * (b - a))


@triton.jit
def at(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of element `start`, known to be a multiple of 16 bytes or not."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def update_block(
    column,
    grad,
    scalars,
    ema_weights,
    tensors,
    start,
    i,
    mask,
    active,
    GRAD: tl.constexpr,
    EMAS: tl.constexpr,
    COPY: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Elements start + i of one tensor: averages and copy where `mask`, the update where `active`; None: everywhere."""
    params = at(tl.load(column + PARAM * tensors), start, tl.float32, ALIGNED) + i
    firsts = at(tl.load(column + EXP_AVG * tensors), start, tl.float32, ALIGNED) + i
    seconds = at(tl.load(column + EXP_AVG_SQ * tensors), start, tl.float32, ALIGNED) + i
    p = tl.load(params, mask=mask)
    g = tl.load(at(grad, start, GRAD, ALIGNED) + i, mask=active).to(tl.float32) * tl.load(scalars)
    m = lerp(tl.load(firsts, mask=active), g, tl.load(scalars + 1))
    v = tl.load(scalars + 2) * tl.load(seconds, mask=active) + tl.load(scalars + 3) * (g * g)
    denominator = tl.sqrt_rn(v) * tl.load(scalars + 4) + tl.load(scalars + 5)
    updated = p * tl.load(scalars + 7) - tl.load(scalars + 6) * (m / denominator)
    tl.store(firsts, m, mask=active)
    tl.store(seconds, v, mask=active)
    tl.store(params, updated, mask=active)
    p = updated if active is None else tl.where(active, updated, p)
    for k in tl.static_range(EMAS):
        averages = at(tl.load(column + (EMA + k) * tensors), start, tl.float32, ALIGNED) + i
        weight = tl.load(ema_weights + k).to(tl.float32)
        tl.store(averages, lerp(tl.load(averages, mask=mask), p, weight), mask=mask)
    if COPY is not None:
        copies = at(tl.load(column + (EMA + EMAS) * tensors), start, COPY, ALIGNED) + i
        tl.store(copies, p.to(COPY), mask=mask)


@triton.jit(do_not_specialize_on_alignment=_SCALARS, do_not_specialize=["tensors", "groups"])
def adamw_ema_kernel(
    table_ptr,
    owner_ptr,
    grads_ptr,
    scalars_ptr,
    settings_ptr,
    found_inf_ptr,
    tensors,
    groups,
    GRAD: tl.constexpr,
    EMAS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one block of one tensor. Whole blocks of aligned tensors move in pieces of 16 bytes."""
    t = tl.load(owner_ptr + tl.program_id(0))
    column = table_ptr + t
    numel = tl.load(column + NUMEL * tensors)
    start = (tl.program_id(0) - tl.load(column + FIRST * tensors)) * BLOCK
    grad = tl.load(grads_ptr + t)
    active = grad != 0
    if found_inf_ptr is not None:
        active = active & (tl.load(found_inf_ptr) == 0.0)
    addresses = tl.load(column + PARAM * tensors) | grad
    addresses |= tl.load(column + EXP_AVG * tensors) | tl.load(column + EXP_AVG_SQ * tensors)
    for k in tl.static_range(EMAS + (COPY is not None)):
        addresses |= tl.load(column + (EMA + k) * tensors)
    scalars = scalars_ptr + 8 * t
    weights = settings_ptr + 5 * groups
    if active & (start + BLOCK <= numel) & (addresses % 16 == 0):
        i = tl.arange(0, BLOCK)
        update_block(column, grad, scalars, weights, tensors, start, i, None, None, GRAD, EMAS, COPY, True)
    else:
        count = tl.minimum(numel - start, BLOCK).to(tl.int32)
        updated = tl.where(active, count, 0)
        for first in range(
            0, BLOCK, PIECE
        ):  # one element to a thread: few registers, so that whole blocks set the need
            i = first + tl.arange(0, PIECE)
            update_block(
                column, grad, scalars, weights, tensors, start, i, i < count, i < updated, GRAD, EMAS, COPY, False
            )


@triton.jit(do_not_specialize=["tensors", "blocks"])
def sum_squares_kernel(
    partials_ptr,
    table_ptr,
    owner_ptr,
    grads_ptr,
    tensors,
    blocks,
    GRAD: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program k adds blocks k, k + programs, ..., of gradients of any alignment."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        block = tl.program_id(0) + step * tl.num_programs(0)
        inside = block < blocks
        t = tl.load(owner_ptr + block, mask=inside, other=0)
        grad = tl.load(grads_ptr + t, mask=inside, other=0)
        start = (block - tl.load(table_ptr + FIRST * tensors + t)) * BLOCK
        left = tl.where(grad != 0, tl.load(table_ptr + NUMEL * tensors + t) - start, 0)
        if (left >= BLOCK) & (grad % 16 == 0):
            g = tl.load(at(grad, start, GRAD, True) + i).to(tl.float32)
        else:
            g = tl.load(at(grad, start, GRAD, False) + i, mask=i < left, other=0.0).to(tl.float32)
        total += g * g
    tl.store(partials_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["programs"])
def norm_kernel(norm_ptr, partials_ptr, programs, BLOCK: tl.constexpr):
    """Second stage: the square root of the sum of all partials; 4 bytes read per partial."""
    i = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + i, mask=i < programs, other=0.0)
    tl.store(norm_ptr, tl.sqrt_rn(tl.sum(partials, axis=0)))


def block_owners(numels: Sequence[int]) -> tuple[list[int], Tensor]:
    """(the first block of each tensor, the tensor of each block as int32 on the CPU); a function of the sizes."""
    counts = torch.tensor([triton.cdiv(numel, BLOCK) for numel in numels], dtype=torch.int64, device="cpu")
    first = (counts.cumsum(0) - counts).tolist()
    return first, torch.repeat_interleave(torch.arange(len(numels), dtype=torch.int32, device="cpu"), counts)


def adamw_ema(
    table: Tensor,
    owner: Tensor,
    grads: Tensor,
    settings: Tensor,
    grad_dtype: torch.dtype,
    emas: int,
    copy_dtype: torch.dtype | None,
    groups: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float,
) -> None:
    """One step over all tensors of the table, in place: two launches.

    All tensors are contiguous and on one device, that of the tensors in the table; the caller has checked those:
    parameters, moments, steps and averages are float32.

    Args:
        table: (7 + E [+ 1], T) int64: rows NUMEL, GROUP (of settings), FIRST, then the addresses of parameter,
            moments, step, averages and copy.
        owner: (blocks,) int32, of `block_owners`.
        grads: (T,) int64, addresses of the gradients; 0 leaves a tensor as it is, but for its averages and copy.
        settings: (5 G + E,) float64: lr, beta1, beta2, eps, weight_decay of each group; 1 - decay of each average.
        grad_dtype: of all gradients.
        emas, groups: E and G.
        copy_dtype: None without copies.
        grad_scale: 0-d float32 that gradients are divided by, or None for 1.
        found_inf: 0-d float32; unless 0, parameters, moments and steps stay as they are. None for 0.
        norm: 0-d float32, norm of the divided gradients, or None not to clip.
        max_norm: the norm to clip to.
    """
    tensors = table.shape[1]
    if owner.numel() == 0:
        return
    scalars = table.new_empty((tensors, 8), dtype=torch.float32)
    with torch.cuda.device_of(table):
        prepare_kernel[(triton.cdiv(tensors, 128),)](
            scalars, table, grads, settings, grad_scale, found_inf, norm, max_norm, tensors, BLOCK=128, num_warps=4
        )
        adamw_ema_kernel[(owner.numel(),)](
            table,
            owner,
            grads,
            scalars,
            settings,
            found_inf,
            tensors,
            groups,
            GRAD=_DTYPES[grad_dtype],
            EMAS=emas,
            COPY=None if copy_dtype is None else _DTYPES[copy_dtype],
            BLOCK=BLOCK,
            num_warps=8,
        )


def grad_norm(table: Tensor, owner: Tensor, grads: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """The norm of all gradients together, 0-d float32; `table` needs no rows after FIRST, an address 0 counts as 0."""
    norm = table.new_zeros((), dtype=torch.float32)
    blocks = owner.numel()
    if blocks == 0:
        return norm
    programs = min(blocks, NORM_PROGRAMS)
    steps = triton.next_power_of_2(triton.cdiv(blocks, programs))
    partials = table.new_empty((programs,), dtype=torch.float32)
    with torch.cuda.device_of(table):
        sum_squares_kernel[(programs,)](
            partials,
            table,
            owner,
            grads,
            table.shape[1],
            blocks,
            GRAD=_DTYPES[grad_dtype],
            STEPS=steps,
            BLOCK=BLOCK,
            num_warps=8,
        )
        norm_kernel[(1,)](norm, partials, programs, BLOCK=NORM_PROGRAMS, num_warps=4)
    return norm
