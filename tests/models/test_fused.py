"""The backbones on their kernels: the same outputs and gradients as on the references, in every way they are run."""

import pytest
import torch
from torch import nn

from erdfast.ops import backend
from erdfast.presets import build_model
from tests.models.test_backbones import inputs_for, randomised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["dit_tiny", "uvit_tiny"]


def small(name):
    """A network whose widths are no powers of two, and a batch for it."""
    model = randomised(build_model(name, depth=3, width=24, num_heads=2, input_shape=(1, 4, 4)))
    batch = inputs_for(model, batch=2)
    return model.to(DEVICE), tuple(tensor.to(DEVICE) for tensor in batch)


def run(model, batch, autocast=False):
    """The output and the gradients of all parameters."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = model(*batch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), torch.autograd.grad(out.float().square().mean(), parameters)


def assert_close(actual, expected, tolerance) -> None:
    for a, b in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.fixture
def on_kernels(monkeypatch):
    """A function: from then on, whatever has Triton kernels runs on them, also on a CPU (interpreted)."""

    def switch(kind):
        monkeypatch.setitem(backend._FASTEST, DEVICE, kind)

    return switch


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_references(name, autocast, on_kernels) -> None:
    model, batch = small(name)
    on_kernels("reference")
    expected = run(model, batch, autocast)
    on_kernels("triton")
    assert_close(run(model, batch, autocast), expected, 0.1 if autocast else 1e-3 if DEVICE == "cuda" else 2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_whole(name, on_kernels) -> None:
    model, batch = small(name)
    on_kernels("triton")
    expected = run(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, batch), expected, 1e-3 if DEVICE == "cuda" else 2e-5)


class Spelled(nn.Linear):
    """A Linear of another kind: only its forward knows how it computes."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        Spelled.calls += 1
        return super().forward(input)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_linears_of_another_kind_are_called(name) -> None:
    model, batch = small(name)
    expected = model(*batch)
    linears = [m for m in model.modules() if type(m) is nn.Linear]
    for linear in linears:
        linear.__class__ = Spelled
    Spelled.calls = 0
    torch.testing.assert_close(model(*batch), expected, rtol=1e-3, atol=1e-4)
    assert Spelled.calls == len(linears)
