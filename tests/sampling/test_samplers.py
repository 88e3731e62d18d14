"""Samplers: number and place of the calls, precision of the state, order, closed-form end points."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from erdfast.process import TARGETS, Process
from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import Levels, make_levels
from erdfast.sampling.sample import sample
from erdfast.sampling.samplers import SAMPLERS, edm_heun, heun
from tests.sampling.gaussian import GaussianNetwork

SHAPE = (2, 3, 3)
LATENTS = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls(name: str, steps: int) -> None:
    """2N - 1 calls or N, at the listed times in order, and none at the clean end, where the slope is 0/0."""
    levels = Levels(tuple(float(steps - i) for i in range(steps + 1)), tuple(range(100, 100 + steps)), 2.0)
    seen: list[float] = []

    def network(x: Tensor, time: float) -> Tensor:
        seen.append(time)
        return 0.1 * x

    ends: list[int] = []
    SAMPLERS[name](network, LATENTS, levels, callback=lambda i, x: ends.append(i))
    expected = list(levels.times)
    if name.endswith("heun"):  # each level but the first twice: a step's end, then the next one's start
        expected = [levels.times[0], *(time for time in levels.times[1:] for _ in range(2))]
    assert seen == expected
    assert ends == list(range(steps))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_its_precision(name: str, dtype: torch.dtype) -> None:
    """A network in bf16 does not pull the state down to bf16, nor a float64 start a float32 state up."""
    levels = Levels((2.0, 1.0, 0.0), (2, 1), 2.0)
    states: list[torch.dtype] = []

    def network(x: Tensor, time: float) -> Tensor:
        states.append(x.dtype)
        return (0.1 * x).to(torch.bfloat16)

    result = SAMPLERS[name](network, LATENTS, levels, state_dtype=dtype)
    assert result.dtype == dtype
    assert set(states) == {dtype}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_low_precision_states_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"bfloat16 is not one of \(torch.float32, torch.float64\)"):
        SAMPLERS[name](lambda x, time: x, LATENTS, Levels((1.0, 0.0), (0,), 1.0), state_dtype=torch.bfloat16)


def test_one_step_of_edm_is_the_denoiser() -> None:
    result = edm_heun(lambda x, label: torch.full_like(x, 0.3), LATENTS, Levels((80.0, 0.0), (900,), 80.0))
    torch.testing.assert_close(result, torch.full_like(result, 0.3), rtol=0.0, atol=2e-5)


def distance(process: Process, network: GaussianNetwork, name: str, steps: int) -> float:
    """Largest distance of the end points from the exact flow's, class 1."""
    levels = make_levels(process, steps)
    guided = Guided(network, process, torch.ones(len(LATENTS), dtype=torch.int64))
    ask = guided.denoise if process.schedule.discrete else guided.velocity
    with torch.no_grad():
        ours = SAMPLERS[name](ask, LATENTS, levels, state_dtype=torch.float64)
        start = LATENTS * levels.scale
        if process.schedule.discrete:
            exact = network.endpoint(start, network.means[1], 1.0, levels.scale)
        else:
            time = torch.tensor([levels.times[0]], dtype=torch.float64)
            coef = process.coefficients(time, dtype=torch.float64)
            exact = network.endpoint(start, network.means[1], float(coef.alpha), float(coef.sigma))
    return float((ours - exact).abs().max())


@pytest.mark.parametrize("schedule", ["cosine", "ddpm_linear", "logsnr_linear"])
@pytest.mark.parametrize("target", ["x0", "eps", "v", "u", "score", "k", "k2", "k(t)"])
def test_discrete_processes_reach_the_data(schedule: str, target: str) -> None:
    process = Process(schedule=schedule, target=target, weighting="constant")
    assert distance(process, GaussianNetwork(process, SHAPE), "edm_heun", 50) < 2e-2


@pytest.mark.parametrize("schedule", ["flow", "vp", "gvp", "logsnr_uniform"])
@pytest.mark.parametrize("target", ["x0", "eps", "v", "u", "score", "k", "k2", "k(t)"])
def test_continuous_processes_reach_the_data(schedule: str, target: str) -> None:
    process = Process(schedule=schedule, target=target, weighting="constant")
    assert distance(process, GaussianNetwork(process, SHAPE), "heun", 100) < 2e-2


@pytest.mark.parametrize("schedule", ["cosine", "vp"])
def test_the_target_does_not_matter(schedule: str) -> None:
    """Perfect networks of different targets lead to the same image: conversions are exact inverses."""
    images = []
    for target in TARGETS:
        process = Process(schedule=schedule, target=target, weighting="constant")
        network = GaussianNetwork(process, SHAPE)
        images.append(sample(network, process, num=3, steps=12, state_dtype=torch.float64))
    for image in images[1:]:
        torch.testing.assert_close(image, images[0], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_noise_scale(schedule: str) -> None:
    """Scaled noise reaches the data as well: the level, not sqrt(1 - alpha^2), is what counts."""
    process = Process(schedule=schedule, target="v", weighting="constant", noise_scale=3.0)
    name = "edm_heun" if process.schedule.discrete else "heun"
    assert distance(process, GaussianNetwork(process, SHAPE), name, 100) < 2e-2


def test_every_number_of_timesteps() -> None:
    """The network's time runs to 1000 whatever T is."""
    process = Process(schedule="cosine", num_timesteps=400)
    network = GaussianNetwork(process, SHAPE)
    assert distance(process, network, "edm_heun", 40) < 2e-2
    times = [time for _, time, _ in network.calls]
    assert max(times) > 900.0
    assert all((time * 0.4) % 1.0 == pytest.approx(0.0, abs=1e-3) for time in times)


@pytest.mark.parametrize(("name", "order"), [("heun", 2.0), ("euler", 1.0)])
@pytest.mark.parametrize("schedule", ["flow", "gvp"])
def test_order(schedule: str, name: str, order: float) -> None:
    """Halving the step divides the error by 2^order, up to 80 steps.

    The last step is Euler's in both, and leaves second order intact: one such step errs by h^2.
    """
    process = Process(schedule=schedule, target="u", weighting="constant")
    network = GaussianNetwork(process, SHAPE)
    errors = [distance(process, network, name, steps) for steps in (10, 20, 40, 80)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(order, abs=0.25), (errors, slopes)


def test_order_of_edm_heun() -> None:
    """On levels that are exact rather than rounded to a table."""

    def error(steps: int) -> float:
        grid = torch.linspace(80.0 ** (1 / 7), 0.002 ** (1 / 7), steps, dtype=torch.float64) ** 7
        sigmas = tuple(grid.tolist())

        def denoise(x: Tensor, sigma: float) -> Tensor:
            return 0.25 * x / (0.25 + sigma**2)

        ours = edm_heun(denoise, LATENTS, Levels((*sigmas, 0.0), sigmas, 80.0), state_dtype=torch.float64)
        exact = LATENTS * 80.0 * 0.5 / math.hypot(0.5, 80.0)
        return float((ours - exact).abs().max())

    assert math.log2(error(40) / error(80)) == pytest.approx(2.0, abs=0.25)


def test_heun_is_exact_for_a_linear_velocity() -> None:
    """dx/dt = t: the trapezoid has no error; the Euler step at the end contributes h^2/2 alone."""
    grid = tuple(1.0 - i / 10 for i in range(11))
    levels = Levels(grid, grid[:-1], 1.0)
    result = heun(lambda x, t: torch.full_like(x, t), LATENTS, levels, state_dtype=torch.float64)
    torch.testing.assert_close(result - LATENTS, torch.full_like(LATENTS, -0.5 - 0.5 * 0.1**2))
