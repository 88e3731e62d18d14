"""The launchers of gelu and its gradient against float64."""

import pytest
import torch
import torch.nn.functional as F

from erdfast.kernels import gelu as kernels
from tests.kernels.inputs import DTYPES, GUARD, ROUNDING, assert_guard_intact, assert_within

SHAPES = [(1,), (7, 5), (2, 3, 341), (4099,)]


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


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, shape, approximate, device, poisoned):
    rng = torch.Generator().manual_seed(sum(shape))
    x = (3 * torch.randn(shape, generator=rng)).to(DTYPES[dtype])
    grad = torch.randn(shape, generator=rng).to(DTYPES[dtype])
    y = kernels.gelu(x.to(device), approximate)
    grad_x = kernels.gelu_grad(grad.to(device), x.to(device), approximate)
    poisoned(2)
    leaf = x.double().requires_grad_()
    y64 = F.gelu(leaf, approximate=approximate)
    (grad64,) = torch.autograd.grad(y64, leaf, grad.double())
    for actual, expected in ((y, y64.detach()), (grad_x, grad64)):
        assert actual.shape == shape
        assert actual.dtype == x.dtype
        assert_within(actual, expected, ROUNDING[x.dtype] * expected.abs() + 4e-6)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.filterwarnings("ignore:overflow")
def test_far_from_zero(approximate, device):
    """The identity on the right, zero on the left, a slope of 1 and 0; NaN stays NaN."""
    x = torch.tensor([30.0, 1e4, 1e15, -30.0, -1e4, float("nan")], device=device)
    y, slope = kernels.gelu(x, approximate), kernels.gelu_grad(torch.ones_like(x), x, approximate)
    assert torch.equal(y[:3], x[:3])
    assert y[3:5].abs().max() == 0
    assert slope[:5].tolist() == [1, 1, 1, 0, 0]
    assert y[5].isnan()
    assert slope[5].isnan()


def test_empty(device):
    x = torch.zeros(0, 5, device=device)
    assert kernels.gelu(x, "none").shape == kernels.gelu_grad(x, x, "none").shape == (0, 5)
