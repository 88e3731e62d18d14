from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from erdfast import philox
from erdfast.kernels.layout import MAX_CHUNKS, partition
from erdfast.kernels.philox import cos_sin_turn, minus_two_log, normal4, philox_words, unit_interval
from tests.kernels.inputs import NORMAL_ERROR

LANES: Any = 1 << 14
WORDS: Any = 512
EDGES: Any = 1024
"""Compile-time constants of the kernels below, which annotate them as such."""
KEYS = [
    (0, 0, 0),
    (1, 7, 2**32 - 1),
    (-1, -1, -1),
    (0x5851F42D4C957F2D, 2**40 + 3, 400_000),
    (-(2**63), 2**63 - 1, 2**31),
]


@triton.jit
def words_kernel(out_ptr, seed_ptr, id_ptr, stream_ptr, first, BLOCK: tl.constexpr):
    q = first + tl.arange(0, BLOCK)
    words = philox_words(tl.load(seed_ptr), q, tl.load(id_ptr), tl.load(stream_ptr))
    for j in tl.static_range(4):
        tl.store(out_ptr + j * BLOCK + tl.arange(0, BLOCK), words[j].to(tl.int64))


@triton.jit
def normals_kernel(out_ptr, seed_ptr, id_ptr, stream_ptr, BLOCK: tl.constexpr):
    q = tl.arange(0, BLOCK)
    eps = normal4(tl.load(seed_ptr), q, tl.load(id_ptr), tl.load(stream_ptr))
    for j in tl.static_range(4):
        tl.store(out_ptr + j * BLOCK + q, eps[j])


@triton.jit
def functions_kernel(word_ptr, u_ptr, log_ptr, cos_ptr, sin_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    word = tl.load(word_ptr + i).to(tl.uint32)
    u = unit_interval(word)
    cos, sin = cos_sin_turn(word)
    tl.store(u_ptr + i, u)
    tl.store(log_ptr + i, minus_two_log(u))
    tl.store(cos_ptr + i, cos)
    tl.store(sin_ptr + i, sin)


def make_scalars(device: torch.device, seed: int, sample_id: int, stream: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.tensor(seed, device=device),
        torch.tensor(sample_id, device=device),
        torch.tensor(stream, device=device),
    )


@pytest.mark.parametrize(("seed", "sample_id", "stream"), KEYS)
@pytest.mark.parametrize("first", [0, 2**29 - 256])
def test_words_are_bit_exact(seed, sample_id, stream, first, device):
    out = torch.empty(4, WORDS, dtype=torch.int64, device=device)
    s, i, t = make_scalars(device, seed, sample_id, stream)
    words_kernel[(1,)](out, s, i, t, first, BLOCK=WORDS)
    q = torch.arange(first, first + WORDS)
    expected = philox.philox_words(seed, (q, torch.tensor(sample_id), stream))
    assert torch.equal(out.cpu(), torch.stack(expected))


def test_words_match_the_published_vector(device):
    """Random123's known answer for philox4x32-10 with counter and key all zero."""
    out = torch.empty(4, WORDS, dtype=torch.int64, device=device)
    zero, _, _ = make_scalars(device, 0, 0, 0)
    words_kernel[(1,)](out, zero, zero, zero, 0, BLOCK=WORDS)
    assert out[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize(("seed", "sample_id", "stream"), KEYS)
def test_normals_agree_with_float64(seed, sample_id, stream, device):
    out = torch.empty(4 * LANES, dtype=torch.float32, device=device)
    s, i, t = make_scalars(device, seed, sample_id, stream)
    normals_kernel[(1,)](out, s, i, t, BLOCK=LANES)
    expected = philox.normal(seed, stream, torch.tensor([sample_id]), 4 * LANES)[0]
    error = (out.cpu().double() - expected).abs()
    assert error.max() <= NORMAL_ERROR
    assert error.square().mean().sqrt() <= 1e-7


def test_functions_at_the_edges(device):
    """Words around every power of two and every eighth of a turn, where exponents, quadrants and signs
    change."""
    edges = torch.tensor([1 << k for k in range(32)] + [k << 29 for k in range(8)] + [0xB504F333, 0xFFFFFFFF])
    near = (edges[:, None] + torch.arange(-8, 9)).flatten() % 2**32
    word = torch.cat([near, torch.zeros(EDGES - near.numel(), dtype=torch.int64)])
    u, log, cos, sin = (torch.empty(EDGES, dtype=torch.float32, device=device) for _ in range(4))
    functions_kernel[(1,)](word.to(device), u, log, cos, sin, BLOCK=EDGES)
    u64 = philox.unit_interval(word)
    assert torch.equal(u.cpu().double(), u64)
    expected = -2.0 * torch.log(u64)
    assert ((log.cpu().double() - expected).abs() <= 2.5e-7 * expected).all()
    phase = word.double() * (2.0 * torch.pi / 2.0**32)
    assert (cos.cpu().double() - torch.cos(phase)).abs().max() <= 1.5e-7
    assert (sin.cpu().double() - torch.sin(phase)).abs().max() <= 1.5e-7


def test_partition_covers_every_lane_within_the_limits():
    sizes = [1, 3, 4, 5, 511, 512, 513, 4096, 4097, 196_608, 2**23 + 5, 2**31 - 1, 2**31]
    for n in sizes:
        part = partition(n)
        assert part.quarter == -(-n // 4)
        assert part.chunks <= MAX_CHUNKS
        assert (part.chunks - 1) * part.block * part.steps < part.quarter <= part.chunks * part.block * part.steps
        assert part.block == 128 * part.num_warps
    assert partition(4096).chunks == 1
    assert partition(4097).chunks == 2
