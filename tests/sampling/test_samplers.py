"""Samplers: number and place of the calls, precision of the state, order, closed-form end points."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.sampler_order import RESULT, ROWS, STEPS, Row, measure
from erdfast.process import SCHEDULES, TARGETS, Process
from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import Levels, make_levels
from erdfast.sampling.sample import sample
from erdfast.sampling.samplers import ASKS, SAMPLERS, STOCHASTIC, TWO_STAGE, call_times, dpmpp_2m, edm_heun, heun
from tests.sampling.gaussian import GaussianNetwork

SHAPE = (2, 3, 3)
LATENTS = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def some_levels(steps: int) -> Levels:
    """Amplitudes from pure noise to clean data, and positions and times that are none of a process."""
    amplitudes = tuple((i / steps, 1.0 - i / steps) for i in range(steps + 1))
    return Levels(tuple(float(steps - i) for i in range(steps + 1)), tuple(range(100, 100 + steps)), 2.0, amplitudes)


def some_noise(i: int) -> Tensor:
    return torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(100 + i), dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_calls(name: str, steps: int) -> None:
    """2N - 1 calls or N, at the listed times in order, and none at the clean end, where the slope is 0/0."""
    levels = some_levels(steps)
    seen: list[float] = []

    def network(x: Tensor, time: float) -> Tensor:
        seen.append(time)
        return 0.1 * x

    ends: list[int] = []
    drawn: list[int] = []

    def noise(i: int) -> Tensor:
        drawn.append(i)
        return some_noise(i)

    SAMPLERS[name](network, LATENTS, levels, noise=noise, callback=lambda i, x: ends.append(i))
    expected = list(levels.times)
    if name.endswith("heun"):  # each level but the first twice: a step's end, then the next one's start
        expected = [levels.times[0], *(time for time in levels.times[1:] for _ in range(2))]
    assert seen == expected == call_times(name, levels)
    assert len(seen) == (2 * steps - 1 if name in TWO_STAGE else steps)
    assert drawn == (list(range(steps - 1)) if name in STOCHASTIC else [])  # none that is not used
    assert ends == list(range(steps))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_keeps_its_precision(name: str, dtype: torch.dtype) -> None:
    """A network in bf16 does not pull the state down to bf16, nor a float64 start a float32 state up."""
    levels = some_levels(2)
    states: list[torch.dtype] = []

    def network(x: Tensor, time: float) -> Tensor:
        states.append(x.dtype)
        return (0.1 * x).to(torch.bfloat16)

    result = SAMPLERS[name](network, LATENTS, levels, noise=some_noise, state_dtype=dtype)
    assert result.dtype == dtype
    assert set(states) == {dtype}


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_low_precision_states_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"bfloat16 is not one of \(torch.float32, torch.float64\)"):
        SAMPLERS[name](lambda x, time: x, LATENTS, some_levels(1), noise=some_noise, state_dtype=torch.bfloat16)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_samplers_need_noise(name: str) -> None:
    with pytest.raises(ValueError, match="needs noise"):
        SAMPLERS[name](lambda x, time: x, LATENTS, some_levels(1))


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "sde_euler", "sde_heun"])
def test_levels_without_amplitudes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="2 levels have 0 amplitudes"):
        SAMPLERS[name](lambda x, time: x, LATENTS, Levels((2.0, 1.0, 0.0), (2, 1), 1.0), noise=some_noise)


def test_one_step_of_edm_is_the_denoiser() -> None:
    result = edm_heun(lambda x, label: torch.full_like(x, 0.3), LATENTS, Levels((80.0, 0.0), (900,), 80.0))
    torch.testing.assert_close(result, torch.full_like(result, 0.3), rtol=0.0, atol=2e-5)


def distance(process: Process, network: GaussianNetwork, name: str, steps: int, level_set: str | None = None) -> float:
    """Largest distance of the end points from the exact flow's, class 1."""
    levels = make_levels(process, steps, level_set, "ratio" if ASKS[name] == "denoise" else "time")
    guided = Guided(network, process, torch.ones(len(LATENTS), dtype=torch.int64))
    with torch.no_grad():
        ours = SAMPLERS[name](getattr(guided, ASKS[name]), LATENTS, levels, state_dtype=torch.float64)
        amplitudes = (1.0, levels.scale) if ASKS[name] == "denoise" else levels.amplitudes[0]
        exact = network.endpoint(LATENTS * levels.scale, network.means[1], *amplitudes)
    return float((ours - exact).abs().max())


@pytest.mark.parametrize("schedule", ["cosine", "ddpm_linear", "sd_linear", "logsnr_linear"])
@pytest.mark.parametrize("target", ["x0", "eps", "v", "u", "score", "k", "k2", "k(t)"])
def test_discrete_processes_reach_the_data(schedule: str, target: str) -> None:
    process = Process(schedule=schedule, target=target, weighting="constant")
    assert distance(process, GaussianNetwork(process, SHAPE), "edm_heun", 50) < 2e-2


@pytest.mark.parametrize("schedule", ["flow", "vp", "gvp", "logsnr_uniform"])
@pytest.mark.parametrize("target", ["x0", "eps", "v", "u", "score", "k", "k2", "k(t)"])
def test_continuous_processes_reach_the_data(schedule: str, target: str) -> None:
    process = Process(schedule=schedule, target=target, weighting="constant")
    assert distance(process, GaussianNetwork(process, SHAPE), "heun", 100) < 2e-2


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - STOCHASTIC))
def test_every_sampler_reaches_the_data_under_every_process(schedule: str, name: str) -> None:
    process = Process(schedule=schedule, target="v", weighting="constant")
    first_order = name in ("edm_euler", "euler", "ddim")
    error = distance(process, GaussianNetwork(process, SHAPE), name, 300 if first_order else 100)
    assert error < (6e-2 if first_order else 2e-2)


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - STOCHASTIC - {"edm_heun"}))
@pytest.mark.parametrize("target", ["x0", "eps", "u", "score", "k", "k2", "k(t)"])
def test_every_sampler_takes_every_target(schedule: str, name: str, target: str) -> None:
    """Perfect networks of all targets lead to the same image: `v`, tested above, stands for the exact one."""
    ends = []
    for each in ("v", target):
        process = Process(schedule=schedule, target=each, weighting="constant")
        network = GaussianNetwork(process, SHAPE)
        ends.append(sample(network, process, num=3, steps=6, sampler=name, level_set="edm", state_dtype=torch.float64))
    torch.testing.assert_close(ends[1], ends[0], rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "flow", "gvp"])
def test_ddim_is_euler_in_the_variables_of_edm(schedule: str) -> None:
    process = Process(schedule=schedule, target="eps", weighting="constant")
    network = GaussianNetwork(process, SHAPE)
    draw: dict[str, Any] = {"num": 3, "steps": 7, "level_set": "edm", "state_dtype": torch.float64}
    ddim, euler = (sample(network, process, sampler=name, **draw) for name in ("ddim", "edm_euler"))
    torch.testing.assert_close(ddim, euler, rtol=0.0, atol=1e-5)


def test_dpmpp_by_hand() -> None:
    """Two steps of the published update, in log-SNR as the paper writes it, and the last one to clean data."""
    amplitudes = ((0.2, 0.9), (0.6, 0.7), (0.9, 0.3), (1.0, 0.0))
    levels = Levels((3.0, 2.0, 1.0, 0.0), (3, 2, 1), 0.9, amplitudes)
    cleans: list[Tensor] = []

    def network(x: Tensor, time: float) -> Tensor:
        cleans.append(torch.tanh(x) + time)
        return cleans[-1]

    states: list[Tensor] = []
    options: dict[str, Any] = {"state_dtype": torch.float64, "callback": lambda i, x: states.append(x)}
    dpmpp_2m(network, LATENTS, levels, **options)
    logs = [math.log(a / s) for a, s in amplitudes[:3]]
    h1, h2 = logs[1] - logs[0], logs[2] - logs[1]
    x1 = 0.7 / 0.9 * (0.9 * LATENTS) - 0.6 * math.expm1(-h1) * cleans[0]
    r = h1 / h2
    extrapolated = (1 + 1 / (2 * r)) * cleans[1] - 1 / (2 * r) * cleans[0]
    x2 = 0.3 / 0.7 * x1 - 0.9 * math.expm1(-h2) * extrapolated
    torch.testing.assert_close(states[0], x1)
    torch.testing.assert_close(states[1], x2)
    torch.testing.assert_close(states[2], cleans[2])


def test_repeated_levels_do_no_harm() -> None:
    """More steps than labels: steps of no length are divided by nothing."""
    process = Process(schedule="cosine", target="v", weighting="constant", num_timesteps=30)
    network = GaussianNetwork(process, SHAPE)
    for name in sorted(SAMPLERS):
        images = sample(network, process, num=2, steps=70, sampler=name, level_set="uniform")
        assert bool(torch.isfinite(images).all()), name


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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.sampler}-{row.measure}-{row.schedule}-{row.level_set}")
def test_order_on_the_mixture(row: Row) -> None:
    """In float64, from coarse steps to as many as the slope takes to settle.

    `dpmpp_2m` in equal steps of `flow` has steps of log(alpha/sigma) at both ends that do not shrink: h^2 log(1/h).
    """
    slow_to_settle = row.sampler == "dpmpp_2m" and (row.schedule, row.level_set) == ("flow", "uniform")
    result = measure(row, (64, 128, 256))
    low, high = (1.6, 2.1) if slow_to_settle else (row.order - 0.2, row.order + 0.25)
    assert low <= result.slope <= high, result


def test_committed_orders_are_those_of_the_code() -> None:
    """bench/results/sampler_order.json, at its smaller numbers of steps."""
    committed = json.loads(RESULT.read_text())["rows"]
    assert [(row["sampler"], row["measure"], row["schedule"], row["level_set"]) for row in committed] == [
        (row.sampler, row.measure, row.schedule, row.level_set) for row in ROWS
    ]
    for row, saved in zip(ROWS, committed, strict=True):
        if row.measure != "strong":  # whose reference takes seconds
            assert measure(row, STEPS[:2]).errors == pytest.approx(saved["errors"][:2], rel=1e-4), row


def test_heun_is_exact_for_a_linear_velocity() -> None:
    """dx/dt = t: the trapezoid has no error; the Euler step at the end contributes h^2/2 alone."""
    grid = tuple(1.0 - i / 10 for i in range(11))
    levels = Levels(grid, grid[:-1], 1.0)
    result = heun(lambda x, t: torch.full_like(x, t), LATENTS, levels, state_dtype=torch.float64)
    torch.testing.assert_close(result - LATENTS, torch.full_like(LATENTS, -0.5 - 0.5 * 0.1**2))
