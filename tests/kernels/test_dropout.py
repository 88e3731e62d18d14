"""The launcher of dropout against the definition in PyTorch, bit for bit in what is dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erdfast import philox
from erdfast.kernels import dropout as kernels
from tests.kernels.inputs import DTYPES, GUARD, ROUNDING, SEED, STREAM, assert_guard_intact, assert_within

IDS = torch.tensor([7, 2**40 + 3, -2])
PLACE, DROPPED = 255, 26214
SHAPES = [(3, 1), (3, 7), (2, 65), (1, 1030), (2, 3, 1366)]
"""In order. The last one takes two programs a sample: 513 lanes of which a program has 512."""
LAST_SHAPES = [(3, 8, 2, 1), (2, 24, 3, 5), (1, 96, 6, 7), (2, 264, 1, 18)]
"""Channels-last: 1, 3, 12 and 33 channels of an eighth (the last one takes four programs a sample), images of several
sizes."""


def kept(shape: torch.Size) -> Tensor:
    """The mask by its definition: bool of this shape."""
    batch, n = shape[0], shape[1:].numel()
    eighth = -(-n // 8)
    q = torch.arange(eighth) + PLACE * 2**24
    words = philox.philox_words(philox.domain_seed(SEED, "dropout"), (q[None, :], IDS[:batch, None], STREAM))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return (torch.cat(halves, dim=1)[:, :n] >= DROPPED).view(shape)


@pytest.fixture
def poisoned(monkeypatch):
    """What the launcher allocates is NaN and lies between guard zones, which the returned function looks at."""
    whole = []

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty_like(self, like):
            size = like.numel() + 2 * GUARD
            whole.append(torch.full((size,), float("nan"), dtype=like.dtype, device=like.device))
            return whole[-1].as_strided(like.shape, like.stride(), GUARD)

    monkeypatch.setattr(kernels, "torch", Torch())

    def check():
        (tensor,) = whole
        assert_guard_intact(tensor)

    return check


def run(x: Tensor, device: torch.device, *, dropped: int = DROPPED, last: bool = False) -> Tensor:
    seed, stream, place = torch.tensor([SEED, STREAM, PLACE], device=device).unbind()
    return kernels.dropout(x.to(device), seed, stream, IDS[: x.shape[0]].to(device), place, dropped, last)


@pytest.mark.parametrize(("shape", "last"), [*[(s, False) for s in SHAPES], *[(s, True) for s in LAST_SHAPES]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_definition(dtype, shape, last, device, poisoned):
    rng = torch.Generator().manual_seed(sum(shape))
    x = (1 + torch.rand(shape, generator=rng)).to(DTYPES[dtype])
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = run(x, device, last=last)
    poisoned()
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()
    keep = kept(x.shape)
    assert torch.equal(y.cpu() != 0, keep)
    exact = keep * x.double() * (2**16 / (2**16 - DROPPED))
    assert_within(y, exact, ROUNDING[x.dtype] * exact.abs())


@pytest.mark.parametrize("dropped", [1, 2**16 - 1])
def test_extreme_rates(dropped, device):
    y = run(torch.ones(3, 4000), device, dropped=dropped)
    assert set(y.unique().tolist()) <= {0.0, float(torch.tensor(2**16 / (2**16 - dropped)))}
    assert int((y == 0).sum()) in (range(4) if dropped == 1 else range(12_000 - 4, 12_001))


def test_what_is_dropped_is_zero_whatever_it_was(device):
    y = run(torch.full((2, 100), float("inf")), device).cpu()
    assert torch.equal(y == 0, ~kept(y.shape))
    assert not y.isnan().any()


def test_empty(device):
    assert run(torch.zeros(0, 6), device).shape == (0, 6)
    assert run(torch.zeros(2, 0), device).shape == (2, 0)
