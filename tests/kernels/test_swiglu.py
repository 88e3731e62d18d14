"""The launchers of swiglu and its gradient against float64."""

import pytest
import torch
import torch.nn.functional as F

from erdfast.kernels import swiglu as kernels
from tests.kernels.inputs import DTYPES, GUARD, ROUNDING, assert_guard_intact, assert_within

SHAPES = [(1, 2), (5, 6), (2, 3, 514), (3, 2730)]
"""The last one takes two programs for a row."""


@pytest.fixture
def poisoned(monkeypatch):
    """What the launchers allocate is NaN and lies between guard zones, which the returned function looks at."""
    whole = []

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, shape, *, dtype, device):
            numel = torch.Size(shape).numel()
            whole.append(torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=device))
            return whole[-1][GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(kernels, "torch", Torch())

    def check(count):
        assert len(whole) == count
        for tensor in whole:
            assert_guard_intact(tensor)

    return check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, shape, device, poisoned):
    rng = torch.Generator().manual_seed(sum(shape))
    x = (2 * torch.randn(shape, generator=rng)).to(DTYPES[dtype])
    grad = torch.randn((*shape[:-1], shape[-1] // 2), generator=rng).to(DTYPES[dtype])
    y = kernels.swiglu(x.to(device))
    grad_x = kernels.swiglu_grad(grad.to(device), x.to(device))
    poisoned(2)
    leaf = x.double().requires_grad_()
    a, b = leaf.chunk(2, dim=-1)
    y64 = F.silu(a) * b
    (grad64,) = torch.autograd.grad(y64, leaf, grad.double())
    for actual, expected in ((y, y64.detach()), (grad_x, grad64)):
        assert actual.shape == expected.shape
        assert actual.dtype == x.dtype
        assert_within(actual, expected, ROUNDING[x.dtype] * expected.abs() + 4e-6)


@pytest.mark.filterwarnings("ignore:overflow")
def test_gates_that_are_closed_or_wide_open(device):
    x = torch.tensor([[-200.0, 200.0, 3.0, 5.0]], device=device)
    assert kernels.swiglu(x).tolist() == [[0.0, 1000.0]]
    assert kernels.swiglu_grad(torch.ones(1, 2, device=device), x).tolist() == [[0.0, 5.0, 0.0, 200.0]]


def test_empty(device):
    x = torch.zeros(0, 6, device=device)
    assert kernels.swiglu(x).shape == (0, 3)
    assert kernels.swiglu_grad(torch.zeros(0, 3, device=device), x).shape == (0, 6)
    assert kernels.swiglu(torch.zeros(4, 0, device=device)).shape == (4, 0)
