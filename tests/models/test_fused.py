"""The backbones on their kernels: the same outputs and gradients as on the references, in every way they are run."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from erdfast.ops import backend
from erdfast.presets import build_model
from tests.models.test_backbones import inputs_for, randomised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ["dit_tiny", "uvit_tiny", "lightningdit_tiny", "jit_tiny"]
WATCHED = [*NAMES, "adm_unet_tiny"]
"""Of these the last has no kernels, but calls some of its convolutions as products."""
_UNET = {"model_channels": 96, "channel_mult": (1,), "attention_resolutions": (1,), "num_head_channels": 48}
SMALL: dict[str, dict[str, Any]] = {"adm_unet_tiny": _UNET}
"""What makes a network small whose sizes have other names."""
COMPILED = ["dit_tiny", "uvit_tiny", "jit_tiny"]
"""LightningDiT's blocks are JiT's."""
NORMS = (nn.LayerNorm, nn.RMSNorm)


def small(name):
    """A network whose widths are no powers of two, and a batch for it."""
    sizes = SMALL.get(name, {"depth": 3, "width": 24, "num_heads": 2})
    model = randomised(build_model(name, input_shape=(1, 4, 4), **sizes))
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
        monkeypatch.setattr(backend, "_default", kind)

    return switch


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_agree_with_references(name, autocast, on_kernels) -> None:
    model, batch = small(name)
    on_kernels("reference")
    expected = run(model, batch, autocast)
    on_kernels("triton")
    assert_close(run(model, batch, autocast), expected, 0.1 if autocast else 1e-3 if DEVICE == "cuda" else 2e-5)


@pytest.mark.parametrize("name", COMPILED)
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


@pytest.mark.parametrize("name", WATCHED)
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


def spelled(norm: Any) -> type[nn.Module]:
    """Norms of another kind."""

    class SpelledNorm(norm):
        calls = 0

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            SpelledNorm.calls += 1
            return 2 * super().forward(input)

    return SpelledNorm


def probed(model) -> list[str]:
    """The leaf modules of a network that hold parameters."""
    return [name for name, m in model.named_modules() if not list(m.children()) and list(m.parameters(recurse=False))]


@pytest.mark.filterwarnings("ignore:Full backward hook")  # the network's input needs no gradient
@pytest.mark.parametrize("way", ["hook", "pre-hook", "backward hook", "own forward"])
@pytest.mark.parametrize("name", WATCHED)
def test_whatever_watches_a_module_is_called(name, way) -> None:
    """Every Linear, norm and convolution that an op stands in for."""
    model, batch = small(name)
    expected = run(model, batch)
    names, fired = probed(model), []
    for key in names:
        module = model.get_submodule(key)
        if way == "hook":
            module.register_forward_hook(lambda *_, key=key: fired.append(key))
        elif way == "pre-hook":
            module.register_forward_pre_hook(lambda *_, key=key: fired.append(key))
        elif way == "backward hook":
            module.register_full_backward_hook(lambda *_, key=key: fired.append(key))
        else:
            module.forward = lambda *inputs, key=key, forward=module.forward: fired.append(key) or forward(*inputs)
    assert_close(run(model, batch), expected, 1e-3 if DEVICE == "cuda" else 2e-5)
    assert sorted(fired) == sorted(names)


@pytest.mark.parametrize("name", ["uvit_tiny", "lightningdit_tiny", "jit_tiny"])
@torch.no_grad()
def test_norms_of_another_kind_are_respected(name) -> None:
    model, batch = small(name)
    before = model(*batch)
    norms = [m for m in model.modules() if type(m) in NORMS]
    usual = type(norms[0])
    other: Any = spelled(usual)
    for norm in norms:
        norm.__class__ = other
    after = model(*batch)
    assert other.calls == len(norms)
    for norm in norms:  # twice a norm is a norm with twice the weight and bias
        norm.__class__ = usual
        for parameter in norm.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(after, model(*batch), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(after, before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", WATCHED)
def test_pruned_networks_train(name) -> None:
    model, batch = small(name)
    ends = (".mlp.fc1", ".mlp.w12", ".skip_linear", ".norm2", ".q_norm", "embed.proj", "embedder.proj")
    ends += ("embedder.proj1", "embedder.proj2", ".1.qkv", ".proj_out", ".in_layers.0", ".in_layers.2")
    pruned: list[Any] = [module for key, module in model.named_modules() if key.endswith(ends)]
    for module in pruned:
        prune.random_unstructured(module, "weight", 0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [module.weight_orig.detach().clone() for module in pruned]
    for _ in range(2):  # the second backward fails if the pruned weight is that of the first step
        optimizer.zero_grad()
        model(*batch).square().mean().backward()
        optimizer.step()
    for module, old in zip(pruned, before, strict=True):
        kept = module.weight_mask.bool()
        assert bool((module.weight_orig[~kept] == old[~kept]).all())
        assert bool((module.weight_orig[kept] != old[kept]).any())


@pytest.mark.parametrize("name", COMPILED)
def test_watched_modules_compile_whole(name) -> None:
    model, batch = small(name)
    expected = run(model, batch)
    fc1 = next(module for key, module in model.named_modules() if key.endswith((".mlp.fc1", ".mlp.w12")))
    fc1.register_forward_hook(lambda module, args, output: 2 * output)
    watched = run(model, batch)
    assert not torch.allclose(watched[0], expected[0], rtol=1e-3)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(run(compiled, batch), watched, 1e-3 if DEVICE == "cuda" else 2e-5)
