"""Noise levels: the table belongs to the training schedule, and the sets have their published definition."""

import math

import numpy as np
import pytest
import torch

from erdfast.process import Process
from erdfast.sampling.levels import LARGEST_LEVEL, LEVEL_SETS, VARIABLES, make_levels, noise_table, table_levels

DISCRETE = ["cosine", "ddpm_linear", "sd_linear", "logsnr_linear"]
CONTINUOUS = ["flow", "vp", "gvp", "logsnr_uniform"]


def analytic_cosine_table(size: int) -> np.ndarray:
    """The recursion of EDM's iDDPM preconditioning, by label."""

    def abar(j: int) -> float:
        return math.sin(math.pi / 2 * j / size / 1.008) ** 2

    u = np.zeros(size + 1)
    for j in range(size, 0, -1):
        u[j - 1] = math.sqrt((u[j] ** 2 + 1) / max(abar(j - 1) / abar(j), 0.001) - 1)
    return u[:size][::-1]


@pytest.mark.parametrize("size", [1000, 250])
def test_cosine_table_is_the_analytic_one(size: int) -> None:
    table = noise_table(Process(schedule="cosine", num_timesteps=size))
    np.testing.assert_allclose(table, analytic_cosine_table(size), rtol=1e-9)


@pytest.mark.parametrize("schedule", DISCRETE)
def test_table_is_that_of_training(schedule: str) -> None:
    """A label means the same noise to the sampler as it did in training."""
    process = Process(schedule=schedule)
    coef = process.coefficients(torch.arange(1000), dtype=torch.float64)
    np.testing.assert_allclose(noise_table(process), coef.sigma / coef.alpha, rtol=1e-12)


def test_linear_table_is_not_the_cosine_one() -> None:
    """A sampler that builds its table from another schedule is off by 9.5% at the clean end."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)
    table = noise_table(Process(schedule="ddpm_linear"))
    np.testing.assert_allclose(table, np.sqrt((1 - abar) / abar), rtol=1e-9)
    assert table[0] == pytest.approx(math.sqrt(1e-4 / (1 - 1e-4)), rel=1e-9)
    levels = make_levels(Process(schedule="ddpm_linear"), 50)
    assert levels.positions[-2] == table[0]


@pytest.mark.parametrize("schedule", DISCRETE)
@pytest.mark.parametrize("level_set", sorted(LEVEL_SETS))
@pytest.mark.parametrize("steps", [1, 2, 18, 50])
def test_every_level_is_in_the_table(schedule: str, level_set: str, steps: int) -> None:
    process = Process(schedule=schedule)
    table = noise_table(process)
    levels = make_levels(process, steps, level_set)
    sigmas = np.array(levels.positions)
    assert len(levels.times) == steps
    assert len(sigmas) == steps + 1
    assert sigmas[-1] == 0.0
    assert levels.scale == sigmas[0]
    assert [table[int(label)] for label in levels.times] == list(sigmas[:-1])
    assert np.all(np.diff(sigmas) <= 0.0)
    assert all(isinstance(label, int) for label in levels.times)
    if steps > 1:
        ends = {"edm": (0.002, 80.0), "iddpm": (0.002, 81.0), "vp": (0.01048, 152.17), "logsnr": (0.002, 80.0)}
        low, high = ends.get(level_set, (0.0, math.inf))
        assert sigmas[0] == pytest.approx(min(high, table[-1]), rel=0.15)
        assert sigmas[-2] == pytest.approx(max(low, table[0]), rel=0.15)


def test_edm_levels_by_hand() -> None:
    table = np.geomspace(0.001, 200.0, 100_000)  # fine enough to see the rule through the rounding
    sigmas = table_levels(table, 5, "edm").positions
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    expected = [(high + i / 4 * (low - high)) ** 7 for i in range(5)] + [0.0]
    np.testing.assert_allclose(sigmas, expected, rtol=1e-4)


def test_vp_levels_by_hand() -> None:
    """Where the table reaches far enough the refit gives the SDE back: beta from 0.1 to 20."""
    table = np.geomspace(0.001, 1000.0, 100_000)
    sigmas = table_levels(table, 3, "vp").positions
    times = np.array([1.0, 0.5005, 0.001])
    expected = np.sqrt(np.exp(0.5 * 19.9 * times**2 + 0.1 * times) - 1)
    np.testing.assert_allclose(sigmas[:3], expected, rtol=2e-4)


def test_iddpm_levels_by_hand() -> None:
    table = np.concatenate([[0.001], np.linspace(0.01, 80.0, 9), [100.0]])
    assert table_levels(table, 3, "iddpm").times == (9, 5, 1)


@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_uniform_levels(schedule: str) -> None:
    levels = make_levels(Process(schedule=schedule, target="u", weighting="constant"), 4)
    assert levels.positions == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert levels.times == levels.positions[:-1]
    assert levels.scale == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("schedule", "target"), [("flow", "eps"), ("gvp", "eps"), ("flow", "score")])
def test_start_where_the_target_is_singular(schedule: str, target: str) -> None:
    levels = make_levels(Process(schedule=schedule, target=target, weighting="constant"), 10)
    alpha, sigma = Process(schedule=schedule).schedule.alpha_sigma(torch.tensor(levels.positions[0]))
    assert float(sigma / alpha) == pytest.approx(LARGEST_LEVEL, rel=1e-4)
    assert levels.scale == pytest.approx(float(sigma))
    assert levels.positions[-1] == 0.0


def test_uniform_and_logsnr_by_hand() -> None:
    table = np.geomspace(0.001, 1000.0, 13)
    assert table_levels(table, 4, "uniform").times == (12, 8, 4, 0)
    fine = np.geomspace(0.001, 1000.0, 100_000)
    np.testing.assert_allclose(
        table_levels(fine, 3, "logsnr").positions[:3], [80.0, math.sqrt(80.0 * 0.002), 0.002], rtol=1e-4
    )


@pytest.mark.parametrize("schedule", CONTINUOUS)
@pytest.mark.parametrize("level_set", ["edm", "vp", "logsnr"])
@pytest.mark.parametrize("variable", VARIABLES)
def test_level_sets_of_a_continuous_process(schedule: str, level_set: str, variable: str) -> None:
    """Exact levels, not rounded to anything, within what the process reaches."""
    process = Process(schedule=schedule, target="v", weighting="constant")
    levels = make_levels(process, 9, level_set, variable)
    ratios = np.array([sigma / alpha for alpha, sigma in levels.amplitudes])
    reach = (math.exp(-5.0), math.exp(5.0)) if schedule == "logsnr_uniform" else (0.0, math.inf)
    low, high = {"edm": (0.002, 80.0), "vp": (0.01048, 152.17), "logsnr": (0.002, 80.0)}[level_set]
    highest = 152.17 if schedule == "vp" else min(high, reach[1])  # its own end, exp(5.03)
    assert ratios[0] == pytest.approx(min(high, highest), rel=1e-3)
    assert ratios[-2] == pytest.approx(max(low, reach[0]), rel=1e-3)
    assert np.all(np.diff(ratios) < 0.0)
    if level_set == "logsnr":
        np.testing.assert_allclose(np.diff(np.log(ratios[:-1])), np.log(ratios[1] / ratios[0]), rtol=1e-6)
    expected = ratios if variable == "ratio" else [*levels.times, 0.0]
    np.testing.assert_allclose(levels.positions, expected, rtol=1e-12)
    assert levels.scale == pytest.approx(ratios[0] if variable == "ratio" else levels.amplitudes[0][1])


@pytest.mark.parametrize("schedule", [*DISCRETE, *CONTINUOUS])
@pytest.mark.parametrize("variable", VARIABLES)
def test_amplitudes_are_those_of_the_times(schedule: str, variable: str) -> None:
    process = Process(schedule=schedule, target="v", weighting="constant", noise_scale=2.0)
    levels = make_levels(process, 7, variable=variable)
    t = torch.tensor(levels.times, dtype=torch.int64 if process.discrete else torch.float64)
    alpha, sigma = process.schedule.alpha_sigma(t)
    assert levels.amplitudes == (*zip(alpha.tolist(), sigma.tolist(), strict=True), (1.0, 0.0))
    assert levels.positions[-1] == 0.0
    if process.discrete and variable == "time":
        np.testing.assert_allclose(np.tan(levels.positions[:-1]), sigma / (2.0 * alpha), rtol=1e-6)


def test_no_run_over_the_ratio_begins_at_infinity() -> None:
    """alpha = 0 at t = 1 of `flow`: over x_t/alpha a run begins as EDM's does, over x_t at pure noise."""
    process = Process(schedule="flow", target="u", weighting="constant")
    assert make_levels(process, 4, "uniform", "ratio").positions[0] == pytest.approx(LARGEST_LEVEL)
    assert make_levels(process, 4, "uniform", "time").amplitudes[0] == (0.0, 1.0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"'karras' is not one of \['edm', 'iddpm', 'logsnr', 'uniform', 'vp'\]"):
        make_levels(Process(schedule="cosine"), 10, "karras")
    with pytest.raises(ValueError, match=r"'karras' is not one of \['edm', 'logsnr', 'uniform', 'vp'\] for a cont"):
        make_levels(Process(schedule="flow"), 10, "karras")
    with pytest.raises(ValueError, match=r"'iddpm' is not one of .*counts the labels of a discrete one"):
        make_levels(Process(schedule="flow"), 10, "iddpm")
    with pytest.raises(ValueError, match="variable 'angle' is not one of"):
        make_levels(Process(schedule="flow"), 10, variable="angle")
    with pytest.raises(ValueError, match="continuous process has no table"):
        noise_table(Process(schedule="flow"))
    with pytest.raises(ValueError, match="no noise level"):
        table_levels(np.array([90.0, 100.0]), 2, "iddpm")
    for schedule in ("cosine", "flow"):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            make_levels(Process(schedule=schedule), 0)


@pytest.mark.parametrize("size", range(2, 40))
@pytest.mark.parametrize("level_set", sorted(LEVEL_SETS))
def test_levels_of_a_short_table_descend_or_are_refused(size: int, level_set: str) -> None:
    process = Process(schedule="cosine", num_timesteps=size)
    try:
        levels = make_levels(process, 8, level_set)
    except ValueError as error:
        assert level_set == "vp"
        assert f"num_timesteps={size}" in str(error)  # noqa: PT017
    else:
        assert np.all(np.diff(levels.positions) <= 0.0)


def test_vp_levels_need_a_table_that_is_long_enough() -> None:
    with pytest.raises(ValueError, match=r"'vp' does not descend from 45 to .* num_timesteps=2"):
        make_levels(Process(schedule="cosine", num_timesteps=2), 8, "vp")
