"""Dropout whose mask is computed in registers: of a key, a place and an element (erdfast/ops/dropout.py defines it).

    y = x * scale where h >= dropped, else 0        h: 16 bits of Philox4x32-10, scale = 2^16 / (2^16 - dropped)

The gradient of x is the same function of the gradient of y: no mask is written, and nothing is kept for the backward
pass but the key. A lane is one counter (q + 2^24 place, sample id, stream); the halves of its four words serve elements
q, q+Q, ... q+7Q of a sample of n, Q = ceil(n/8): in each eighth neighbouring lanes touch neighbouring elements. Of a
channels-last image whose channels are a multiple of 8, lane q belongs to a pixel and a channel of the first C/8, and
its eight elements are channels of that pixel: a program takes some channels of some pixels.

Per element, s_x being the bytes of one number; forward and backward are alike:

    read   s_x      written   s_x      flops   1, and 10 integer operations (an eighth of Philox's, its half and a test)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import load_float
from .philox import philox_words

DOMAIN = tl.constexpr(0x1C69B3F74AC4AE35)
"""XORed into the seed (`DOMAINS["dropout"]` of erdfast/philox.py)."""
PLACE_BITS = tl.constexpr(24)
"""A place has 2^24 counters (`LANES` of erdfast/ops/dropout.py)."""

MAX_BLOCK, MIN_BLOCK = 512, 128
"""Lanes of a program, four to a thread: 8-byte pieces of bf16, 16-byte ones of float32, up to 40 registers and at least
75% of an SM's warps (bench/results/aot.json). With eight to a thread bf16 too comes in 16 bytes, by 56 to 64 registers:
half of the warps."""

CHANNEL_BLOCK = 32
"""Channels of a channels-last program at most, of each eighth of them: 64 bytes of bf16 in a row, two sectors."""


@triton.jit
def dropout_words(seed_ptr, stream_ptr, ids_ptr, place_ptr, b, q):
    """Philox's words for lanes `q` (int32, not negative, below 2^24) of sample `b`: four uint32 blocks."""
    seed = tl.load(seed_ptr) ^ DOMAIN
    counter = (tl.load(place_ptr) << PLACE_BITS).to(tl.uint32) | q.to(tl.uint32)
    return philox_words(seed, counter, tl.load(ids_ptr + b), tl.load(stream_ptr))


@triton.jit
def drop(out_ptr, x_ptr, offset, mask, word, high: tl.constexpr, scale, dropped):
    """Elements at `offset`, by the lower or the higher half of a word."""
    half = (word >> 16) if high else (word & 0xFFFF)
    y = tl.where(half >= dropped.to(tl.uint32), load_float(x_ptr + offset, mask) * scale, 0.0)
    tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["dropped"],
    do_not_specialize_on_alignment=["seed_ptr", "stream_ptr", "ids_ptr", "place_ptr"],
)
def dropout_kernel(
    out_ptr, x_ptr, seed_ptr, stream_ptr, ids_ptr, place_ptr, scale, dropped, n, eighth, chunks, BLOCK: tl.constexpr
):
    """One program: BLOCK lanes of one sample, whose elements lie in order."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    q = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    words = dropout_words(seed_ptr, stream_ptr, ids_ptr, place_ptr, b, q)
    for j in tl.static_range(8):
        mask = (q < eighth) & (q < n - j * eighth)
        drop(out_ptr + b * n + j * eighth, x_ptr + b * n + j * eighth, q, mask, words[j // 2], j % 2, scale, dropped)


@triton.jit(
    do_not_specialize=["dropped"],
    do_not_specialize_on_alignment=["seed_ptr", "stream_ptr", "ids_ptr", "place_ptr"],
)
def dropout_channels_last_kernel(
    out_ptr,
    x_ptr,
    seed_ptr,
    stream_ptr,
    ids_ptr,
    place_ptr,
    scale,
    dropped,
    pixels,
    chunks,
    EIGHTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """One program: CHANNELS of the EIGHTH channels' lanes of PIXELS pixels of one sample of 8 * EIGHTH channels."""
    blocks: tl.constexpr = (EIGHTH + CHANNELS - 1) // CHANNELS
    b = (tl.program_id(0) // (chunks * blocks)).to(tl.int64)
    c = (tl.program_id(0) % blocks) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    p = (tl.program_id(0) // blocks % chunks) * PIXELS + tl.arange(0, PIXELS)[:, None]
    words = dropout_words(seed_ptr, stream_ptr, ids_ptr, place_ptr, b, c * pixels + p)
    mask = (c < EIGHTH) & (p < pixels)
    start = b * pixels * (8 * EIGHTH)
    for j in tl.static_range(8):
        offset = start + j * EIGHTH
        drop(out_ptr + offset, x_ptr + offset, p * (8 * EIGHTH) + c, mask, words[j // 2], j % 2, scale, dropped)


def lane_block(eighth: int) -> int:
    """Lanes of a program of `dropout_kernel`, for samples of `eighth` lanes."""
    return min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(eighth)))


def channel_block(eighth: int) -> int:
    """Lanes' channels of a program of `dropout_channels_last_kernel`; it has MAX_BLOCK lanes in all."""
    return min(CHANNEL_BLOCK, triton.next_power_of_2(eighth))


def dropout(
    x: Tensor, seed: Tensor, stream: Tensor, sample_ids: Tensor, place: Tensor, dropped: int, channels_last: bool
) -> Tensor:
    """x with a share of its numbers set to zero and the others scaled up; computed in float32 and rounded once.

    All tensors are on one device; the caller has checked them. The result has x's shape, dtype and strides.

    Args:
        x: (B, ...) float32, bfloat16 or float16 of less than 2^27 elements a sample: contiguous, or channels-last
            without gaps and with a multiple of 8 channels.
        seed, stream, place: one int64 each, read on the device.
        sample_ids: (B,) int64, contiguous.
        dropped: numbers of 2^16 that are dropped, 0 < dropped < 2^16.
        channels_last: how x lies.
    """
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, n = x.shape[0], x.shape[1:].numel()
    inputs = (out, x, seed, stream, sample_ids, place, 65536 / (65536 - dropped), dropped)
    with torch.cuda.device_of(x):
        if channels_last:
            pixels, eighth = x.shape[2:].numel(), x.shape[1] // 8
            channels = channel_block(eighth)
            chunks = triton.cdiv(pixels, MAX_BLOCK // channels)
            grid = (batch * chunks * triton.cdiv(eighth, channels),)
            sizes = {"EIGHTH": eighth, "CHANNELS": channels, "PIXELS": MAX_BLOCK // channels}
            dropout_channels_last_kernel[grid](*inputs, pixels, chunks, **sizes, num_warps=MAX_BLOCK // 128)
        else:
            eighth = triton.cdiv(n, 8)
            block = lane_block(eighth)
            chunks = triton.cdiv(eighth, block)
            dropout_kernel[(batch * chunks,)](*inputs, n, eighth, chunks, BLOCK=block, num_warps=block // 128)
    return out
