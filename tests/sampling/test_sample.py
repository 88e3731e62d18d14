"""`sample`: the same image whatever the batch, arguments checked, the model restored."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from erdfast.presets import build_model
from erdfast.process import Process
from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import make_levels
from erdfast.sampling.sample import SAMPLER_KINDS, initial_latents, sample, sample_batches, step_noise
from erdfast.sampling.samplers import ASKS, SAMPLERS
from tests.sampling.gaussian import GaussianNetwork

SHAPE = (1, 4, 4)


class ConvNetwork(nn.Module):
    """A small network with random weights and dropout."""

    input_shape = SHAPE
    null_class: int | None

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.label = nn.Embedding(num_classes + 1, 1)
        self.modes: list[bool] = []

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        self.modes.append(self.drop.training or torch.is_grad_enabled())
        shift = 0.0 if y is None else self.label(y)[:, :, None, None]
        return self.drop(torch.tanh(self.conv(x))) + shift + 0.0 * time[:, None, None, None]


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_images_do_not_depend_on_the_batch(schedule: str, cfg_scale: float) -> None:
    model, process = ConvNetwork(), Process(schedule=schedule, target="v")
    whole = sample(model, process, num=7, steps=6, cfg_scale=cfg_scale, seed=3)
    assert whole.shape == (7, *SHAPE)
    assert whole.dtype == torch.float32
    assert whole.device.type == "cpu"
    assert not whole.requires_grad
    assert not whole.is_inference()
    for batch_size in (1, 3):
        parts = sample(model, process, num=7, steps=6, cfg_scale=cfg_scale, seed=3, batch_size=batch_size)
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    tail = sample(model, process, num=3, steps=6, cfg_scale=cfg_scale, seed=3, first_id=4)
    torch.testing.assert_close(tail, whole[4:], rtol=1e-4, atol=1e-4)
    assert not torch.equal(sample(model, process, num=7, steps=6, cfg_scale=cfg_scale, seed=4), whole)


class Float64Network(nn.Module):
    """A function of each pixel, time and label alone, without products of matrices: no sum is reordered."""

    input_shape, num_classes = SHAPE, 3

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return torch.tanh(x * (1.0 + y[:, None, None, None])) + 1e-3 * time[:, None, None, None]


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_1_and_64_give_the_same_bits(schedule: str, sampler: str, dtype: torch.dtype) -> None:
    """Everything of ours is elementwise, noise included: whatever differs comes from the network's sums."""
    process = Process(schedule=schedule, target="v", weighting="constant")
    draw: dict[str, Any] = {"steps": 4, "sampler": sampler, "seed": 3, "cfg_scale": 1.7, "interval": (0.0, 0.8)}
    draw["state_dtype"] = dtype
    together = sample(Float64Network(), process, num=64, batch_size=64, **draw)
    alone = sample(Float64Network(), process, num=3, batch_size=1, first_id=61, **draw, labels=[1, 2, 0])
    assert torch.equal(together[61:], alone)
    draw["seed"] = 4
    other = sample(Float64Network(), process, num=1, **draw)
    assert not torch.equal(other, together[:1])


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_a_real_network_differs_by_rounding(schedule: str, sampler: str) -> None:
    """Matrix products of 1 and of 64 rows sum in another order: float32 rounding of the network, and no more."""
    torch.manual_seed(0)
    model = build_model("uvit_tiny")
    process = Process(schedule=schedule, target="v", weighting="constant")
    together = sample(model, process, num=64, batch_size=64, steps=3, sampler=sampler)
    alone = sample(model, process, num=2, batch_size=1, first_id=62, steps=3, sampler=sampler, labels=[2, 3])
    torch.testing.assert_close(alone, together[62:], rtol=1e-4, atol=1e-4)


def test_noise_of_a_step_belongs_to_image_and_step() -> None:
    noise = step_noise(7, torch.arange(300), (4, 8, 8))
    assert float(noise(3).mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise(3).var()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(step_noise(7, torch.tensor([123]), (4, 8, 8))(3)[0], noise(3)[123])
    latents = initial_latents(7, torch.arange(300), (4, 8, 8))
    pairs = [(noise(3), noise(4)), (noise(3), step_noise(8, torch.arange(300), (4, 8, 8))(3)), (noise(0), latents)]
    for one, other in pairs:
        assert abs(float((one * other).mean())) < 0.01


@pytest.mark.parametrize("schedule", ["cosine", "ddpm_linear", "flow", "vp"])
@pytest.mark.parametrize("sampler", ["sde_euler", "sde_heun"])
def test_stochastic_samples_follow_the_data(schedule: str, sampler: str) -> None:
    process = Process(schedule=schedule, target="v", weighting="constant")
    network = GaussianNetwork(process, SHAPE, std=0.5)
    draw: dict[str, Any] = {"num": 600, "steps": 60, "sampler": sampler, "classes": [2], "level_set": "uniform"}
    images = sample(network, process, **draw)
    torch.testing.assert_close(images.mean(0).double(), network.means[2].detach(), rtol=0.0, atol=0.1)
    assert float(images.std(0).mean()) == pytest.approx(0.5, rel=0.08)


class NothingReadNothingCopied(TorchDispatchMode):
    """Refuses what waits for a GPU or copies to it: values read by the host, tensors made of its numbers."""

    FORBIDDEN = ("_local_scalar_dense", "lift_fresh", "nonzero", "equal.default", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_no_step_waits_for_the_device(schedule: str, sampler: str) -> None:
    process = Process(schedule=schedule, target="v", weighting="constant")
    levels = make_levels(process, 5, variable="ratio" if ASKS[sampler] == "denoise" else "time")
    guided = Guided(ConvNetwork(), process, torch.tensor([0, 1]), 2.1, (0.0, 0.8), null_class=3)
    guided.prepare(levels.times, torch.device("cpu"))
    ids = torch.arange(2)
    latents, noise = initial_latents(0, ids, SHAPE), step_noise(0, ids, SHAPE)
    with torch.no_grad(), NothingReadNothingCopied():
        SAMPLERS[sampler](getattr(guided, ASKS[sampler]), latents, levels, noise=noise)


def test_batches_need_no_memory_for_all_images() -> None:
    process = Process(schedule="flow", target="v", weighting="constant")
    model = ConvNetwork()
    model.train()
    draw: dict[str, Any] = {"num": 7, "steps": 2, "batch_size": 3}
    batches = sample_batches(model, process, **draw)
    seen = []
    for start, images in batches:
        assert model.training
        assert not torch.is_inference_mode_enabled()
        assert not images.is_inference()
        seen.append((start, len(images)))
        images.zero_()  # they are the caller's
    assert seen == [(0, 3), (3, 3), (6, 1)]
    whole = sample(model, process, **draw)
    parts = torch.cat([images for _, images in sample_batches(model, process, **draw)])
    assert torch.equal(whole, parts)


def test_compiled_network_is_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch is filled up; its images are those of a run without."""
    sizes: list[int] = []

    def fake_compile(model: nn.Module, dynamic: bool) -> Any:
        assert dynamic is False

        def call(x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
            sizes.append(len(x))
            return model(x, time, y)

        return call

    monkeypatch.setattr(torch, "compile", fake_compile)
    process = Process(schedule="cosine", target="v", weighting="constant")
    draw: dict[str, Any] = {"num": 7, "steps": 3, "batch_size": 3, "cfg_scale": 2.0, "interval": (0.0, 0.5)}
    compiled = sample(ConvNetwork(), process, compile=True, **draw)
    assert set(sizes) == {3, 6}
    assert compiled.shape == (7, *SHAPE)
    torch.testing.assert_close(compiled, sample(ConvNetwork(), process, **draw), rtol=1e-5, atol=1e-5)


def test_latents_are_standard_normal_and_belong_to_the_image() -> None:
    latents = initial_latents(7, torch.arange(500), (4, 8, 8))
    assert latents.dtype == torch.float64
    assert float(latents.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(latents.var()) == pytest.approx(1.0, abs=0.02)
    assert torch.equal(initial_latents(7, torch.tensor([123]), (4, 8, 8))[0], latents[123])
    assert not torch.equal(initial_latents(8, torch.tensor([123]), (4, 8, 8))[0], latents[123])


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_float64_state_agrees_with_float32(schedule: str) -> None:
    process = Process(schedule=schedule)
    network = GaussianNetwork(process, SHAPE)
    single, double = (
        sample(network, process, num=4, steps=30, state_dtype=dtype) for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-3)
    assert not torch.equal(single, double)


def test_samples_follow_the_data() -> None:
    process = Process(schedule="flow", target="u")
    network = GaussianNetwork(process, SHAPE, std=0.5)
    images = sample(network, process, num=600, steps=20, classes=[2])
    torch.testing.assert_close(images.mean(0).double(), network.means[2].detach(), rtol=0.0, atol=0.1)
    assert float(images.std(0).mean()) == pytest.approx(0.5, rel=0.05)


def test_labels_and_classes() -> None:
    process = Process(schedule="flow", target="u")
    network = GaussianNetwork(process, SHAPE, std=0.01)

    def nearest(images: Tensor) -> list[int]:
        return (images[:, None] - network.means).square().sum((2, 3, 4)).argmin(1).tolist()

    draw: dict[str, Any] = {"steps": 3, "batch_size": 4}
    assert nearest(sample(network, process, num=7, **draw)) == [0, 1, 2, 0, 1, 2, 0]
    assert nearest(sample(network, process, num=5, classes=[2, 0], **draw)) == [2, 0, 2, 0, 2]
    assert nearest(sample(network, process, num=3, labels=[1, 3, 0], **draw)) == [1, 3, 0]


def test_unconditional_model() -> None:
    images = sample(ConvNetwork(num_classes=0), Process(schedule="cosine"), num=2, steps=3)
    assert bool(torch.isfinite(images).all())
    with pytest.raises(ValueError, match="unconditional"):
        sample(ConvNetwork(num_classes=0), Process(schedule="cosine"), num=2, labels=[0, 1])
    with pytest.raises(ValueError, match="needs labels"):
        sample(ConvNetwork(num_classes=0), Process(schedule="cosine"), num=2, cfg_scale=2.0)


def test_model_without_a_null_class() -> None:
    model = ConvNetwork()
    model.null_class = None
    sample(model, Process(schedule="cosine"), num=2, steps=2)
    with pytest.raises(ValueError, match="null class"):
        sample(model, Process(schedule="cosine"), num=2, steps=2, cfg_scale=2.0)


def test_model_is_in_evaluation_mode_then_as_before() -> None:
    model, process = ConvNetwork(), Process(schedule="cosine")
    model.train()
    model.conv.eval()  # a frozen part stays frozen
    sample(model, process, num=2, steps=3)
    assert not any(model.modes)
    assert model.training
    assert model.drop.training
    assert not model.conv.training
    model.eval()
    sample(model, process, num=2, steps=3)
    assert not model.training
    assert not model.drop.training
    model.train()

    def fail(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, process, num=2, steps=3, progress=fail)
    assert model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_backbone(schedule: str) -> None:
    """A transformer with freshly drawn weights: shapes, labels and the null class fit together."""
    torch.manual_seed(0)
    model = build_model("uvit_tiny")
    process = Process(schedule=schedule, target="v")
    images = sample(model, process, num=5, steps=3, cfg_scale=1.5)
    assert images.shape == (5, *model.input_shape)
    assert bool(torch.isfinite(images).all())
    parts = sample(model, process, num=5, steps=3, cfg_scale=1.5, batch_size=2)
    torch.testing.assert_close(parts, images, rtol=1e-3, atol=1e-3)


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    sample(
        ConvNetwork(),
        Process(schedule="cosine"),
        num=5,
        steps=2,
        batch_size=2,
        progress=lambda *a: seen.append(a),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_autocast() -> None:
    model, process = ConvNetwork(), Process(schedule="cosine", target="v")
    exact = sample(model, process, num=4, steps=8)
    rounded = sample(model, process, num=4, steps=8, autocast_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_trained_target_can_be_sampled() -> None:
    """A learnable target holds parameters that require gradients; sampling needs none."""
    process = Process(schedule="flow", target="k", weighting="constant")
    images = sample(ConvNetwork(), process, num=2, steps=3)
    assert not images.requires_grad
    assert bool(torch.isfinite(images).all())


def test_every_sampler_suits_both_kinds() -> None:
    assert all(sorted(names) == sorted(SAMPLERS) for names in SAMPLER_KINDS.values())
    assert ASKS.keys() == SAMPLERS.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"num": 1.0}, r"num must be an integer, got 1\.0"),
        ({"steps": 2.5}, r"steps must be an integer, got 2\.5"),
        ({"seed": 2**70}, r"seed is .*below 2\^64"),
        ({"seed": -1}, r"seed is -1"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"labels": [1.7, 0.0]}, "labels must be integers"),
        ({"classes": [1.7]}, "classes must be integers"),
        ({"first_id": 2**63 - 1}, "first_id"),
        ({"first_id": -1}, "first_id must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"sampler": "plms"}, r"'plms' is not one of \['edm_heun', 'edm_euler', 'heun', .* for a discrete process"),
        ({"level_set": "karras"}, "'karras' is not one of"),
        ({"cuda_graph": True}, "cuda_graph needs a GPU, and the model is on cpu"),
        ({"labels": [0]}, r"shape \(2,\), got \(1,\)"),
        ({"labels": [0, 4]}, r"labels \[4\] are not within 0..2"),
        ({"labels": [-1, 1]}, r"labels \[-1\]"),
        ({"classes": [3]}, r"classes \[3\] are not within 0..2"),
        ({"classes": []}, "no classes"),
        ({"labels": [0, 1], "classes": [0]}, "not both"),
        ({"interval": (0.9, 0.1)}, "interval"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"state_dtype": torch.bfloat16}, "state_dtype"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"num": 2, "steps": 2, **arguments}
    with pytest.raises(ValueError, match=message):
        sample(ConvNetwork(), Process(schedule="cosine"), **options)


def test_a_late_first_id_costs_nothing() -> None:
    model, process = ConvNetwork(), Process(schedule="flow", target="u")
    late = sample(model, process, num=2, steps=1, first_id=2**40 + 1)
    again = sample(model, process, num=2, steps=1, first_id=2**40 + 1, labels=[(2**40 + 1) % 3, (2**40 + 2) % 3])
    assert torch.equal(late, again)
    largest = sample(model, process, num=1, steps=1, seed=2**64 - 1)
    assert not torch.equal(largest, sample(model, process, num=1, steps=1, seed=2**63 - 1))
