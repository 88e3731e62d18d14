"""How the elements of a sample are divided among programs and lanes: shared by add_noise and diffusion_loss.

Lane q of a sample of n elements owns elements q, q+Q, q+2Q and q+3Q, Q = ceil(n/4): the sample is four quarters,
in each of which neighbouring lanes touch neighbouring elements: every quarter is read and written in 16-byte
pieces (8-byte ones of bf16 and fp16) whenever Q is a multiple of 16, that is for n a multiple of 64.
Normals then reach the threads that own their elements through 4 KiB of shared memory: to compute them there at
once, as four interleaved calls of normal4, saves 3% of the instructions for such n and costs 14% for all others.

One program works on `block` lanes of one sample at a time. Programs lie on grid axis 0 alone: its limit is
2^31-1, that of the other axes 65,535.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
"""Lanes of a program: a latent of 4x32x32 is one program, so that its sums need no second stage."""

MIN_BLOCK = 128
"""One warp. Fewer lanes would save nothing, more variants would only be compiled."""

LANES_PER_THREAD = 4
"""16 bytes of float32, and four independent chains of Philox to hide the latency of its multiplications.

The rule: no spill, and in the plain case 3 programs of 256 threads to an SM, which has 65,536 registers. Of a variant
counts the worse of sm_80 and sm_90 (`python -m bench.aot`, bench/results/aot.json). Registers and programs an SM:

                                     add_noise    diffusion_loss
    fp32 key                           48   5          75   3
    bf16 key                           44   5          64   4
    bf16 key, moments                  64   4          95   2
    bf16 key, channels-last            64   4          78   3
    bf16 key, moments, channels-last  172   1         153   1

Moments in channels-last, and sums with moments in several steps (176 registers, samples of more than 8 million
elements), leave an SM 1 program: they are correct, and slower than they might be."""

MAX_CHUNKS = 2048
"""Programs per sample at most: their partial sums are one block of the reduction's second stage."""


class Partition(NamedTuple):
    """A function of n alone: sums are bitwise the same whatever the batch size."""

    quarter: int
    """Q = ceil(n/4), the number of lanes."""
    block: int
    """Lanes of one step of a program, a power of 2."""
    steps: int
    """Steps of a program in the reduction, a power of 2."""
    chunks: int
    """Programs per sample in the reduction, at most MAX_CHUNKS."""
    num_warps: int


def partition(n: int) -> Partition:
    """Divides a sample of n >= 1 elements."""
    quarter = triton.cdiv(n, 4)
    block = min(MAX_BLOCK, max(MIN_BLOCK, triton.next_power_of_2(quarter)))
    steps = triton.next_power_of_2(triton.cdiv(quarter, block * MAX_CHUNKS))
    chunks = triton.cdiv(quarter, block * steps)
    return Partition(quarter, block, steps, chunks, num_warps=block // (32 * LANES_PER_THREAD))


@triton.jit
def quarter_start(quarter, j: tl.constexpr):
    """The first element of quarter j as an int64 scalar: q + 3Q may exceed int32."""
    return tl.cast(quarter, tl.int64) * j


@triton.jit
def quarter_mask(q, quarter, n, j: tl.constexpr):
    """Which lanes q own an element of quarter j: min(Q, n - jQ) of them, possibly none."""
    return q < tl.minimum(tl.cast(quarter, tl.int64), n - quarter_start(quarter, j)).to(tl.int32)


@triton.jit
def load_float(pointers, mask):
    """Elements as float32, 0 where masked."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def element(pointer, start, q, pixels, pixel, CHANNELS_LAST: tl.constexpr):
    """Pointers to elements start + q of a sample, which begins at `pointer`.

    Element c*pixels + p lies there as it is numbered, or at p*pixel + c. With as many channels as quarters (the 4 of
    a latent) a thread's four elements are then neighbours.
    """
    if CHANNELS_LAST:
        p = (start % pixels).to(tl.int32) + q
        pointers = pointer + (start // pixels + (p // pixels) + (p % pixels).to(tl.int64) * pixel)
    else:
        pointers = (pointer + start) + q
    return pointers


def pixels_of(like: Tensor) -> int:
    """Pixels of a (B, C, ...) tensor: 1 if it has no image.

    Raises:
        ValueError: more than 32-bit offsets allow.
    """
    pixels = like.shape[2:].numel()
    if pixels >= 2**30:
        raise ValueError(f"shape {tuple(like.shape)} has more than 2^30 pixels")
    return pixels
