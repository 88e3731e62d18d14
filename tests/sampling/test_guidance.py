"""Guidance: what is computed when, on which channels, and what it does to a known distribution."""

import pytest
import torch
from torch import Tensor, nn

from erdfast.process import Process
from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import make_levels
from erdfast.sampling.sample import sample
from erdfast.sampling.samplers import ASKS, SAMPLERS, TWO_STAGE
from tests.sampling.gaussian import GaussianNetwork

SHAPE = (2, 3, 3)
KINDS = [("cosine", "eps", "edm_heun"), ("flow", "u", "heun")]
ALL_KINDS = [(schedule, name) for schedule in ("cosine", "flow") for name in sorted(SAMPLERS)]


def setup(schedule: str, target: str, batch: int = 4) -> tuple[Process, GaussianNetwork, Tensor]:
    process = Process(schedule=schedule, target=target, weighting="constant")
    return process, GaussianNetwork(process, SHAPE), torch.arange(batch) % 3


@pytest.mark.parametrize(("schedule", "target", "sampler"), KINDS)
def test_scale_one_never_computes_the_unconditional_half(schedule: str, target: str, sampler: str) -> None:
    process, network, _ = setup(schedule, target)
    sample(network, process, num=4, steps=5, sampler=sampler)
    assert [size for size, _, _ in network.calls] == [4] * 9


@pytest.mark.parametrize(("schedule", "target", "sampler"), KINDS)
def test_one_call_of_both_halves(schedule: str, target: str, sampler: str) -> None:
    process, network, _ = setup(schedule, target)
    sample(network, process, num=4, steps=5, sampler=sampler, cfg_scale=2.0)
    assert [size for size, _, _ in network.calls] == [8] * 9


@pytest.mark.parametrize(("schedule", "target", "sampler"), KINDS)
@pytest.mark.parametrize("interval", [(0.0, 0.8), (0.3, 0.6), (0.5, 1.0)])
def test_interval_at_each_evaluation(schedule: str, target: str, sampler: str, interval: tuple[float, float]) -> None:
    """Every evaluation, a corrector's included, is guided or not by its own time."""
    process, network, _ = setup(schedule, target)
    sample(network, process, num=4, steps=11, sampler=sampler, cfg_scale=2.0, interval=interval)
    largest = 999.0 if process.schedule.discrete else 1.0
    inside = [interval[0] <= time / largest <= interval[1] for _, time, _ in network.calls]
    assert [size for size, _, _ in network.calls] == [8 if guided else 4 for guided in inside]
    assert any(inside)
    assert not all(inside)
    # The two evaluations at one level (corrector of a step, start of the next) agree.
    assert inside[1:][0::2] == inside[1:][1::2]


@pytest.mark.parametrize(("schedule", "sampler"), ALL_KINDS)
@pytest.mark.parametrize("steps", [1, 7, 18])
def test_images_that_the_network_sees(schedule: str, sampler: str, steps: int) -> None:
    """As many as theory says: one per image and call, two where the call's own time is in the interval."""
    process, network, _ = setup(schedule, "v")
    interval = (0.0, 0.8)
    sample(network, process, num=4, steps=steps, sampler=sampler, cfg_scale=2.1, interval=interval)
    levels = make_levels(process, steps, variable="ratio" if ASKS[sampler] == "denoise" else "time")
    largest = 999.0 if process.schedule.discrete else 1.0
    places = [time / largest for time in levels.times]
    first, rest = (1 + (place <= 0.8) for place in places[:1]), [1 + (place <= 0.8) for place in places[1:]]
    theory = sum(first) + (2 if sampler in TWO_STAGE else 1) * sum(rest)
    assert sum(size for size, _, _ in network.calls) == 4 * theory
    assert len(network.calls) == (2 * steps - 1 if sampler in TWO_STAGE else steps)


def test_second_stage_is_guided_by_its_own_time() -> None:
    """One step that ends where guidance begins: the first stage is outside the interval, the second inside."""
    process, network, _ = setup("flow", "u", 1)
    sample(network, process, num=1, steps=2, cfg_scale=2.1, interval=(0.0, 0.5))
    assert [(size, time) for size, time, _ in network.calls] == [(1, 1.0), (2, 0.5), (2, 0.5)]
    network.calls.clear()
    sample(network, process, num=1, steps=2, cfg_scale=2.1, interval=(0.6, 1.0))
    assert [(size, time) for size, time, _ in network.calls] == [(2, 1.0), (1, 0.5), (1, 0.5)]


@pytest.mark.parametrize(("schedule", "target"), [("cosine", "x0"), ("flow", "u"), ("gvp", "k")])
def test_all_questions_have_the_same_answer(schedule: str, target: str) -> None:
    """`denoise`, `clean` and `velocity` are one prediction in other words."""
    process, network, y = setup(schedule, target)
    guided = Guided(network, process, y, 1.5, null_class=3)
    time = 600 if process.schedule.discrete else 0.6
    t = torch.tensor([time], dtype=torch.int64 if process.schedule.discrete else torch.float64)
    x_t = torch.randn(4, *SHAPE, dtype=torch.float64)
    alpha, sigma = process.schedule.alpha_sigma(t)
    with torch.no_grad():
        clean = guided.clean(x_t, time)
        torch.testing.assert_close(guided.denoise(x_t / alpha, time), clean, rtol=1e-5, atol=1e-5)
        noise = (x_t - alpha * clean) / sigma
        d_alpha, d_sigma = (-sigma, alpha) if process.schedule.discrete else process.schedule.d_alpha_sigma(t)
        torch.testing.assert_close(guided.velocity(x_t, time), d_alpha * clean + d_sigma * noise, rtol=1e-5, atol=1e-5)


def test_with_labels_keeps_what_is_prepared() -> None:
    process, network, y = setup("cosine", "eps")
    guided = Guided(network, process, y, 2.0, null_class=3)
    guided.prepare((500,), torch.device("cpu"))
    other = guided.with_labels(y[:1])
    assert other._rows is guided._rows
    fresh = Guided(network, process, y[:1], 2.0, null_class=3)
    x = torch.randn(1, *SHAPE)
    torch.testing.assert_close(other.clean(x, 500), fresh.clean(x, 500), rtol=0.0, atol=0.0)


def test_interval_ends() -> None:
    process, network, y = setup("flow", "u")
    guided = Guided(network, process, y, 2.0, (0.25, 0.75), null_class=3)
    assert [guided.guided_at(t) for t in (0.0, 0.2499, 0.25, 0.5, 0.75, 0.7501, 1.0)] == [0, 0, 1, 1, 1, 0, 0]
    assert guided.guided_at(0.75 + 1e-15)
    process, network, y = setup("cosine", "eps")
    whole = Guided(network, process, y, 2.0, null_class=3)
    assert whole.guided_at(0)
    assert whole.guided_at(999)
    low = Guided(network, process, y, 2.0, (0.0, 0.8), null_class=3)
    assert low.guided_at(0)
    assert low.guided_at(799)
    assert not low.guided_at(800)


@pytest.mark.parametrize(("schedule", "target", "sampler"), KINDS)
def test_guided_distribution(schedule: str, target: str, sampler: str) -> None:
    """For Gaussians of equal width guidance extrapolates the mean: m = m_none + s (m_class - m_none)."""
    process, network, y = setup(schedule, target)
    levels = make_levels(process, 100)
    guided = Guided(network, process, y, 1.7, null_class=3)
    ask = guided.denoise if process.schedule.discrete else guided.velocity
    latents = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ours = SAMPLERS[sampler](ask, latents, levels, state_dtype=torch.float64)
        mean = network.means[3] + 1.7 * (network.means[y] - network.means[3])
        start = latents * levels.scale
        alpha, sigma = (1.0, levels.scale) if process.schedule.discrete else (0.0, 1.0)
        exact = network.endpoint(start, mean, alpha, sigma)
    torch.testing.assert_close(ours, exact, rtol=0.0, atol=2e-2)


@pytest.mark.parametrize(("schedule", "target"), [("cosine", "v"), ("flow", "x0"), ("vp", "k"), ("flow", "u")])
def test_guiding_output_or_velocity_is_the_same(schedule: str, target: str) -> None:
    process, network, y = setup(schedule, target)
    x = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    time = 600 if process.schedule.discrete else 0.6

    def ask(labels: Tensor, cfg_scale: float) -> Tensor:
        guided = Guided(network, process, labels, cfg_scale, null_class=3)
        return guided.denoise(x, time) if process.schedule.discrete else guided.velocity(x, time)

    with torch.no_grad():
        cond, none = ask(y, 1.0), ask(torch.full_like(y, 3), 1.0)
        torch.testing.assert_close(ask(y, 2.5), none + 2.5 * (cond - none), rtol=1e-5, atol=1e-5)


class Labelled(nn.Module):
    """Answers with the label in every channel, so that guidance can be read off."""

    input_shape = (32, 2, 2)
    num_classes = 4

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return y.to(x.dtype)[:, None, None, None].expand_as(x)


def test_every_channel_is_guided() -> None:
    process = Process(schedule="cosine")
    guided = Guided(Labelled(), process, torch.tensor([0, 1, 2]), 3.0, null_class=4)
    pred = guided.predict(torch.zeros(3, 32, 2, 2), 10)
    expected = torch.tensor([-8.0, -5.0, -2.0])[:, None, None, None].expand(3, 32, 2, 2)
    torch.testing.assert_close(pred, expected)


def test_learned_variance_channels_are_dropped() -> None:
    process = Process(schedule="cosine")
    plain, learned = GaussianNetwork(process, SHAPE), GaussianNetwork(process, SHAPE, extra=2)
    a, b = (sample(net, process, num=3, steps=4, cfg_scale=1.5) for net in (plain, learned))
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("schedule", "target"), [("cosine", "eps"), ("flow", "v")])
def test_batch_as_wide_as_the_image(schedule: str, target: str) -> None:
    """Coefficients of samples must not spread over columns when there are as many of one as of the other."""
    process, network, _ = setup(schedule, target)
    y = torch.tensor([0, 1, 2])
    x = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    time = 700 if process.schedule.discrete else 0.7
    ask = "denoise" if process.schedule.discrete else "velocity"
    with torch.no_grad():
        together = getattr(Guided(network, process, y, 2.0, null_class=3), ask)(x, time)
        for i in range(3):
            single = Guided(network, process, y[i : i + 1], 2.0, null_class=3)
            alone = getattr(single, ask)(x[i : i + 1], time)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)


def test_network_always_receives_float32() -> None:
    process, network, _ = setup("cosine", "eps")
    sample(network, process, num=2, steps=3, state_dtype=torch.float64)
    assert {dtype for _, _, dtype in network.calls} == {torch.float32}


def test_bad_input() -> None:
    process, network, y = setup("cosine", "eps")
    with pytest.raises(ValueError, match="needs a null class"):
        Guided(network, process, y, 2.0)
    with pytest.raises(ValueError, match="needs labels"):
        Guided(network, process, None, 2.0, null_class=3)
    for scale in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number of at least 0"):
            Guided(network, process, y, scale, null_class=3)
    for interval in ((0.5, 0.2), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="0 <= low <= high <= 1"):
            Guided(network, process, y, 2.0, interval, null_class=3)
