"""x_t = alpha * x0 + sigma * eps, the noise computed in registers.

With a key, eps is Philox4x32-10 under (seed, sample id, stream): no tensor of noise is read or written. Where
x0 comes as the moments (mean, std) of a VAE's posterior, x0 = scale * (mean + std * eta) with eta from a
second Philox domain.

Per element, s_x and s_out being the bytes of one number of x0 and of the result:

    read      s_x  (2 s_x with moments)   + that of the noise, if given
    written   s_out
    flops     3    (6 with moments)       + 15 float and 20 integer operations per normal

An estimate, not a measurement: 43 instructions an element (sm_90, key, no moments) take an H100's 132 SMs
about 1.5 ps at full issue, the 8 bytes of float32 take its memory 2.4 ps, the 4 bytes of bfloat16 1.2 ps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import element, load_float, partition, pixels_of, quarter_mask, quarter_start
from .philox import POSTERIOR_DOMAIN, normal4


@triton.jit(do_not_specialize_on_alignment=["alpha_ptr", "sigma_ptr", "seed_ptr", "stream_ptr", "ids_ptr"])
def add_noise_kernel(
    out_ptr,
    x0_ptr,
    noise_ptr,
    alpha_ptr,
    sigma_ptr,
    seed_ptr,
    stream_ptr,
    ids_ptr,
    moments_scale,
    n,
    quarter,
    chunks,
    pixels,
    x0_stride,
    x0_pixel,
    noise_stride,
    noise_pixel,
    out_pixel,
    KEYED: tl.constexpr,
    MOMENTS: tl.constexpr,
    X0_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    OUT_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK lanes of one sample. Pointers that a variant does not need are None."""
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    q = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    alpha = tl.load(alpha_ptr + b)
    sigma = tl.load(sigma_ptr + b)
    if KEYED or MOMENTS:
        seed = tl.load(seed_ptr)
        stream = tl.load(stream_ptr)
        sample_id = tl.load(ids_ptr + b)
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
            eps = eps4[j]
        else:
            eps = load_float(element(noise_ptr + b * noise_stride, start, q, pixels, noise_pixel, NOISE_LAST), mask)
        x_t = alpha * x0 + sigma * eps
        out = element(out_ptr + b * n, start, q, pixels, out_pixel, OUT_LAST)
        tl.store(out, x_t.to(out_ptr.dtype.element_ty), mask=mask)


def add_noise(
    out: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    layouts: Sequence[tuple[int, int]],
) -> None:
    """Writes alpha * x0 + sigma * eps to `out`.

    All tensors are on one device; the caller has checked them. A sample has n elements, numbered channels first
    however they lie in memory.

    Args:
        out: (B, C, ...), float32, bfloat16 or float16; computed in float32 and rounded once.
        x0: (B, C, ...), or (B, 2C, ...) with `moments_scale`: n means, then n standard deviations. Any of the
            three dtypes.
        noise: (B, C, ...) of any of the three dtypes, or None to draw it from the key.
        alpha, sigma: (B,) float32.
        seed, stream: 0-d int64, read on the device; may be None if nothing is drawn. Of `stream` the low 32
            bits count.
        sample_ids: (B,) int64; may be None if nothing is drawn.
        moments_scale: None if x0 is data, else the factor of the posterior sample.
        layouts: (stride, pixel) of x0, noise and out (`Layout` in erdfast/ops/source.py); out has no gaps.
    """
    if out.numel() == 0:
        return
    batch, n = out.shape[0], out.shape[1:].numel()
    part = partition(n)
    chunks = triton.cdiv(part.quarter, part.block)
    with torch.cuda.device_of(out):
        add_noise_kernel[(batch * chunks,)](
            out,
            x0,
            noise,
            alpha,
            sigma,
            seed,
            stream,
            sample_ids,
            1.0 if moments_scale is None else moments_scale,
            n,
            part.quarter,
            chunks,
            pixels_of(out),
            *(*layouts[0], *layouts[1], layouts[2][1]),
            KEYED=noise is None,
            MOMENTS=moments_scale is not None,
            X0_LAST=layouts[0][1] > 0,
            NOISE_LAST=layouts[1][1] > 0,
            OUT_LAST=layouts[2][1] > 0,
            BLOCK=part.block,
            num_warps=part.num_warps,
        )
