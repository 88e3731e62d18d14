"""Closed forms of targets' statistics against Monte Carlo, quadrature and the formulas of the article."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from erdfast.diagnostics.target_statistics import (
    TARGETS,
    build_schedule,
    factors,
    gaussian_statistics,
    places_at,
    places_in_time,
    preserves_variance,
    reached,
)
from erdfast.process import Process
from erdfast.process.schedule import SCHEDULES, ContinuousSchedule
from tests.runs import single_thread

LEVELS = torch.tensor([-4.0, -0.5, 3.0], dtype=torch.float64)
K = 0.3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.mark.parametrize("variance", [1.0, 0.3])
@pytest.mark.parametrize("schedule", ["cosine", "flow", "vp"])
def test_closed_forms_against_monte_carlo(schedule, variance):
    """A regression of y on x_t, which for Gaussian data is the conditional mean: to four standard errors."""
    num, generator = 400_000, torch.Generator().manual_seed(0)
    x0 = variance**0.5 * torch.randn(num, generator=generator, dtype=torch.float64)
    eps = torch.randn(num, generator=generator, dtype=torch.float64)
    place = places_at(build_schedule(schedule), LEVELS)
    for target in TARGETS:
        c = factors(target, place, K)
        known = gaussian_statistics(place, c, variance)
        for i in range(LEVELS.numel()):
            x_t, y = place.alpha[i] * x0 + place.sigma[i] * eps, c[0][i] * x0 + c[1][i] * eps
            slope = (x_t * y).mean() / x_t.square().mean()
            found = torch.corrcoef(torch.stack([x_t, y]))[0, 1]
            assert abs(found - known.correlation[i]) < 4 * (1 - found**2) / num**0.5 + 1e-12
            left = (y - slope * x_t).square()
            assert abs(left.mean() - known.variance[i]) < 4 * left.std() / num**0.5
            # The slope's own error is that of the residuals.
            error = left.mean().sqrt() / num**0.5
            size = (slope * x_t).square().mean().sqrt()
            assert abs(size - known.mean[i]) < 4 * (error + known.mean[i] / (2 * num) ** 0.5)


@pytest.mark.parametrize("schedule", ["gvp", "flow"])
@pytest.mark.parametrize("target", TARGETS)
def test_conditional_moments_against_quadrature(schedule, target):
    """Bayes' rule on a grid of x0 for each x_t of a grid, without Gaussian algebra: exact to rounding."""
    place = places_at(build_schedule(schedule), LEVELS)
    c = factors(target, place, K)
    known = gaussian_statistics(place, c)
    x0 = np.linspace(-9.0, 9.0, 1801)
    prior = np.exp(-0.5 * x0**2)
    for i in range(LEVELS.numel()):
        alpha, sigma, c_x, c_eps = (float(value[i]) for value in (place.alpha, place.sigma, *c))
        x_t = np.linspace(-9.0, 9.0, 401)[:, None] * math.hypot(alpha, sigma)
        joint = prior * np.exp(-0.5 * ((x_t - alpha * x0) / sigma) ** 2)
        marginal = joint.sum(1)
        y = c_x * x0 + c_eps * (x_t - alpha * x0) / sigma
        mean = (joint * y).sum(1) / marginal
        variance = (joint * y**2).sum(1) / marginal - mean**2
        weights = marginal / marginal.sum()
        assert np.sqrt((weights * mean**2).sum()) == pytest.approx(float(known.mean[i]), abs=1e-7)
        assert (weights * variance).sum() == pytest.approx(float(known.variance[i]), rel=1e-7)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "flow"])
def test_the_articles_formulas(schedule):
    """Section 3, for unit variance and alpha^2 + sigma^2 = 1."""
    place = places_in_time(build_schedule(schedule), 50)
    snr, one = place.logsnr.exp(), torch.ones(50, dtype=torch.float64)
    inside = place.logsnr.abs() < 19.9  # beyond, the log-SNR is held and alpha, sigma are not

    def check(target: str, correlation: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> None:
        found = gaussian_statistics(place, factors(target, place, K))
        for got, wanted in zip(found, (correlation, mean, variance), strict=True):
            torch.testing.assert_close(got[inside], wanted[inside], rtol=1e-6, atol=1e-9)

    low, high = (1 + snr).rsqrt(), (snr / (1 + snr)).sqrt()
    check("eps", low, low, snr / (1 + snr))
    check("x0", high, high, 1 / (1 + snr))
    check("v", 0 * one, 0 * one, one)
    check("score", -low, one, snr)


def test_on_flow_the_variance_of_v_is_not_constant():
    """alpha^2 + sigma^2, between 1/2 and 1; and u, k in closed form."""
    place = places_in_time(build_schedule("flow"), 101)
    t = place.time
    total = t.square() + (1 - t).square()
    found = gaussian_statistics(place, factors("v", place, K))
    torch.testing.assert_close(found.variance, total)
    assert float(found.variance.min()) == pytest.approx(0.5)
    found = gaussian_statistics(place, factors("u", place, K))
    torch.testing.assert_close(found.variance, 1 / total)
    torch.testing.assert_close(found.correlation, (2 * t - 1) / (2 * total).sqrt())
    found = gaussian_statistics(place, factors("k", place, K))
    torch.testing.assert_close(found.variance, (K * t + (1 - K) * (1 - t)).square() / total)
    torch.testing.assert_close(found.mean, (K * (1 - t) - (1 - K) * t).abs() / total.sqrt())


def test_variance_is_what_the_mean_leaves():
    """The law of total variance, for any schedule, target and variance of the data."""
    for name in SCHEDULES:
        place = places_in_time(build_schedule(name), 20)
        for target in TARGETS:
            c = factors(target, place, K)
            found = gaussian_statistics(place, c, 0.7)
            torch.testing.assert_close(found.mean**2 + found.variance, c[0] ** 2 * 0.7 + c[1] ** 2)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "k"])
@pytest.mark.parametrize("schedule", ["sd_linear", "flow"])
def test_factors_are_those_of_training(schedule, target):
    process = Process(schedule, target, "constant")
    place = places_in_time(process.schedule, 7)
    t = place.time if schedule == "flow" else (place.time * 1000).round().long() - 1
    trained = process.coefficients(t, dtype=torch.float64)
    for got, wanted in zip(factors(target, place, K), (trained.c_x, trained.c_eps), strict=True):
        torch.testing.assert_close(got, wanted)
    process = Process(schedule, "k", "constant", k_init=K)
    trained = process.coefficients(t, dtype=torch.float64)
    torch.testing.assert_close(factors("k", place, K)[0], trained.c_x, rtol=1e-6, atol=0)
    torch.testing.assert_close(factors("k", place, K)[1], trained.c_eps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_place_is_found_again_by_its_logsnr(name):
    schedule = build_schedule(name)
    there = places_in_time(schedule, 40)
    inside = there.logsnr.abs() < 19
    back = places_at(schedule, there.logsnr[inside])
    for got, wanted in zip(back, there, strict=True):
        torch.testing.assert_close(got, wanted[inside], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cosine", "ddpm_linear"])
def test_between_steps(name):
    """Half-way in log-SNR is between the two steps, and the log-SNR asked for is met."""
    schedule = build_schedule(name)
    steps = torch.tensor([300, 301])
    ends = schedule.logsnr(steps)
    place = places_at(schedule, ends.mean()[None])
    assert float(place.time) == pytest.approx(0.3015)
    assert float(2 * (place.alpha / place.sigma).log()) == pytest.approx(float(ends.mean()))
    slopes = schedule.d_alpha(steps)
    assert float(slopes.min()) < float(place.d_alpha) < float(slopes.max())


@pytest.mark.parametrize("name", [name for name, kind in SCHEDULES.items() if not kind.discrete])
def test_u_is_the_slope_of_the_path(name):
    schedule = build_schedule(name)
    assert isinstance(schedule, ContinuousSchedule)
    place, step = places_at(schedule, LEVELS), 1e-6
    before, after = (schedule.alpha_sigma(place.time + sign * step) for sign in (-1, 1))
    for got, low, high in zip(factors("u", place, K), before, after, strict=True):
        torch.testing.assert_close(got, (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


def test_what_a_schedule_reaches():
    """Stable Diffusion's ends at a log-SNR of -5.4 and begins at 7.1."""
    levels = torch.tensor([-6.0, -5.0, 0.0, 7.0, 8.0], dtype=torch.float64)
    assert reached(build_schedule("sd_linear"), levels).tolist() == [False, True, True, True, False]
    assert reached(build_schedule("flow"), levels).all()


def test_flow_alone_does_not_preserve_the_variance():
    assert [name for name in SCHEDULES if not preserves_variance(build_schedule(name))] == ["flow"]
