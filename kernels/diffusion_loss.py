"""Per-sample sums of the squared error and its gradient, in one pass over memory (ERD, sec. 3.4).

    r = pred - (c_x * x0 + c_eps * eps)
    sums_b = (sum_i r^2, sum_i r*x0, sum_i r*eps)        loss = mean_b[ w_b * sums_b0 / n ]
    d loss / d pred = 2 w_b / (B n) * r

The sums also give the gradients of learnable targets: sums_b0 / (B n) for w_b, -2 w_b / (B n) * sums_b1 for
c_x and -2 w_b / (B n) * sums_b2 for c_eps. Noise and posterior draws are those of add_noise.py, computed again.

Per element, s_p and s_x being the bytes of one number of pred and of x0:

    read      s_p + s_x  (s_p + 2 s_x with moments)   + that of the noise, if given
    written   s_p        (nothing without the gradient), and 12 bytes for each program's sums
    flops     11         (14 with moments)            + 15 float and 20 integer operations per normal

The partition of a sample depends on its size alone and partial sums are added in a fixed order (blocks as
trees, programs in a second stage where a sample needs several): results repeat bit for bit and do not depend
on the batch size. (Tensors that start at no multiple of 16 bytes, which only views do, are compiled for apart
and may differ in the last bit.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import element, load_float, partition, pixels_of, quarter_mask, quarter_start
from .philox import POSTERIOR_DOMAIN, normal4

_SCALARS = ["c_x_ptr", "c_eps_ptr", "w_ptr", "seed_ptr", "stream_ptr", "ids_ptr", "grad_scale_ptr"]


@triton.jit(do_not_specialize_on_alignment=_SCALARS)
def diffusion_loss_kernel(
    sums_ptr,
    grad_ptr,
    pred_ptr,
    x0_ptr,
    noise_ptr,
    c_x_ptr,
    c_eps_ptr,
    w_ptr,
    seed_ptr,
    stream_ptr,
    ids_ptr,
    grad_scale_ptr,
    moments_scale,
    grad_unit,
    n,
    quarter,
    chunks,
    pixels,
    x0_stride,
    x0_pixel,
    noise_stride,
    noise_pixel,
    pred_stride,
    pred_pixel,
    grad_pixel,
    KEYED: tl.constexpr,
    MOMENTS: tl.constexpr,
    X0_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    PRED_LAST: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: STEPS blocks of lanes of one sample. Pointers that a variant does not use are None."""
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    first = (pid % chunks) * (BLOCK * STEPS)
    c_x = tl.load(c_x_ptr + b)
    c_eps = tl.load(c_eps_ptr + b)
    if KEYED or MOMENTS:
        seed = tl.load(seed_ptr)
        stream = tl.load(stream_ptr)
        sample_id = tl.load(ids_ptr + b)
    if grad_ptr is not None:
        factor = tl.load(w_ptr + b) * grad_unit
        if grad_scale_ptr is not None:
            factor *= tl.load(grad_scale_ptr)
    sum_rr = tl.zeros([BLOCK], tl.float32)
    sum_rx = tl.zeros([BLOCK], tl.float32)
    sum_re = tl.zeros([BLOCK], tl.float32)
    for step in range(STEPS):
        q = first + step * BLOCK + tl.arange(0, BLOCK)
        if KEYED:
            eps4 = normal4(seed, q, sample_id, stream)
        if MOMENTS:
            eta4 = normal4(seed ^ POSTERIOR_DOMAIN, q, sample_id, stream)
        for j in tl.static_range(4):
            mask = quarter_mask(q, quarter, n, j)
            start = quarter_start(quarter, j)
            if MOMENTS:
                mean = load_float(element(x0_ptr + b * x0_stride, start, q, pixels, x0_pixel, X0_LAST), mask)
                std = load_float(element(x0_ptr + b * x0_stride, n + start, q, pixels, x0_pixel, X0_LAST), mask)
                x0 = moments_scale * (mean + std * eta4[j])
            else:
                x0 = load_float(element(x0_ptr + b * x0_stride, start, q, pixels, x0_pixel, X0_LAST), mask)
            if KEYED:
                eps = tl.where(mask, eps4[j], 0.0)  # lanes beyond the sample must not enter the sums
            else:
                eps = load_float(element(noise_ptr + b * noise_stride, start, q, pixels, noise_pixel, NOISE_LAST), mask)
            pred = load_float(element(pred_ptr + b * pred_stride, start, q, pixels, pred_pixel, PRED_LAST), mask)
            r = pred - (c_x * x0 + c_eps * eps)
            if grad_ptr is not None:
                grad = element(grad_ptr + b * n, start, q, pixels, grad_pixel, PRED_LAST)
                tl.store(grad, (factor * r).to(grad_ptr.dtype.element_ty), mask=mask)
            sum_rr += r * r
            sum_rx += r * x0
            sum_re += r * eps
    if sums_ptr is not None:
        sums = sums_ptr + pid.to(tl.int64) * 3
        tl.store(sums, tl.sum(sum_rr, axis=0))
        tl.store(sums + 1, tl.sum(sum_rx, axis=0))
        tl.store(sums + 2, tl.sum(sum_re, axis=0))


@triton.jit
def add_partials_kernel(sums_ptr, partials_ptr, chunks, BLOCK: tl.constexpr):
    """Second stage: (B, chunks, 3) -> (B, 3), one program and one tree per sample; 12 bytes read per chunk."""
    b = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    for k in tl.static_range(3):
        partials = tl.load(partials_ptr + b * chunks * 3 + chunk * 3 + k, mask=chunk < chunks, other=0.0)
        tl.store(sums_ptr + b * 3 + k, tl.sum(partials, axis=0))


LOSS_BLOCK = 1024


@triton.jit
def weighted_mean_kernel(loss_ptr, sums_ptr, w_ptr, batch, n, BLOCK: tl.constexpr):
    """Last stage: loss = mean_b[w_b * sums_b0 / n] by one program, 8 bytes read per sample.

    Means first: a sum times its weight may overflow.
    """
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        mask = b < batch
        squares = tl.load(sums_ptr + 3 * b.to(tl.int64), mask=mask, other=0.0)
        total += tl.load(w_ptr + b, mask=mask, other=0.0) * (squares / n)
    tl.store(loss_ptr, tl.sum(total, axis=0) / batch)


SCALE_BLOCK = 2048
"""8 elements to each of a program's 256 threads: 16 bytes of bf16 and fp16, twice 16 of float32."""


@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def scale_kernel(values_ptr, scale_ptr, numel, BLOCK: tl.constexpr):
    """values *= scale in float32, rounded once: 1 flop per element, each read and written once unless scale is 1."""
    scale = tl.load(scale_ptr)
    if scale != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        i = tl.arange(0, BLOCK)
        mask = i < tl.minimum(numel - start, BLOCK).to(tl.int32)
        values = load_float(values_ptr + start + i, mask) * scale
        tl.store(values_ptr + start + i, values.to(values_ptr.dtype.element_ty), mask=mask)


def diffusion_loss(
    pred: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    c_x: Tensor,
    c_eps: Tensor,
    w: Tensor,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    grad_scale: Tensor | None,
    grad: Tensor | None,
    want_sums: bool,
    layouts: Sequence[tuple[int, int]],
) -> tuple[Tensor | None, Tensor | None]:
    """(loss, sums), or (None, None) where they are not wanted; the gradient is written to `grad`.

    All tensors are on one device; the caller has checked them. A sample has n elements, numbered channels first
    however they lie in memory. Two launches, three where a sample takes several programs.

    Args:
        pred: (B, C, ...), float32, bfloat16 or float16. NaN and infinities in it show in the sums.
        x0: (B, C, ...), or (B, 2C, ...) with `moments_scale`: n means, then n standard deviations. Any of the
            three dtypes.
        noise: (B, C, ...) of any of the three dtypes, or None to draw it from the key.
        c_x, c_eps, w: (B,) float32.
        seed, stream: 0-d int64, read on the device; may be None if nothing is drawn. Of `stream` the low 32
            bits count.
        sample_ids: (B,) int64; may be None if nothing is drawn.
        moments_scale: None if x0 is data, else the factor of the posterior sample.
        grad_scale: 0-d float32 that multiplies the gradient before it is rounded (the loss scale of fp16), or
            None for 1.
        grad: of pred's shape and dtype, without gaps: grad_scale * 2 w_b / (B n) * r, computed in float32 and
            rounded once; or None.
        want_sums: whether to compute sums and loss.
        layouts: (stride, pixel) of x0, noise, pred and grad (`Layout` in erdfast/ops/source.py).

    Returns:
        loss: 0-d float32.
        sums: (B, 3) float32, the sums of r^2, r*x0 and r*eps over each sample.
    """
    batch, n = pred.shape[0], pred.shape[1:].numel()
    if not want_sums and grad is None:
        return None, None
    part = partition(n)
    partials = pred.new_empty((batch, part.chunks, 3), dtype=torch.float32) if want_sums else None
    with torch.cuda.device_of(pred):
        diffusion_loss_kernel[(batch * part.chunks,)](
            partials,
            grad,
            pred,
            x0,
            noise,
            c_x,
            c_eps,
            w,
            seed,
            stream,
            sample_ids,
            grad_scale,
            1.0 if moments_scale is None else moments_scale,
            2.0 / (batch * n),
            n,
            part.quarter,
            part.chunks,
            pixels_of(pred),
            *(*layouts[0], *layouts[1], *layouts[2], layouts[3][1]),
            KEYED=noise is None,
            MOMENTS=moments_scale is not None,
            X0_LAST=layouts[0][1] > 0,
            NOISE_LAST=layouts[1][1] > 0,
            PRED_LAST=layouts[2][1] > 0,
            STEPS=part.steps,
            BLOCK=part.block,
            num_warps=part.num_warps,
        )
        if partials is None:
            return None, None
        sums = partials.view(batch, 3) if part.chunks == 1 else pred.new_empty((batch, 3), dtype=torch.float32)
        if part.chunks > 1:
            block = triton.next_power_of_2(part.chunks)
            add_partials_kernel[(batch,)](sums, partials, part.chunks, BLOCK=block, num_warps=4)
        loss = pred.new_empty((), dtype=torch.float32)
        weighted_mean_kernel[(1,)](loss, sums, w, batch, n, BLOCK=LOSS_BLOCK, num_warps=4)
    return loss, sums


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """Multiplies a contiguous fp32, bf16 or fp16 tensor in place by a 0-d float32 on its device; a scale of 1
    writes nothing.

    The backward of the fused loss: the scale is read on the device, so that nothing waits for it. Returns
    `values`.
    """
    if values.numel() == 0:
        return values
    programs = triton.cdiv(values.numel(), SCALE_BLOCK)
    with torch.cuda.device_of(values):
        scale_kernel[(programs,)](values, scale, values.numel(), BLOCK=SCALE_BLOCK, num_warps=8)
    return values
