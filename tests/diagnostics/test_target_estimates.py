"""Estimates of targets' statistics: brackets of the least error against brute force and where it is known."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from erdfast.data import GaussianMixture
from erdfast.diagnostics import target_estimates
from erdfast.diagnostics.data_sample import Sample, draw_sample
from erdfast.diagnostics.target_estimates import (
    Estimate,
    correlation,
    draw_noise,
    estimate,
    estimate_target,
    known_errors,
    linear_errors,
    mixture_errors,
    one_factor_errors,
    root,
    set_errors,
    summarise_draws,
    x0_errors,
)
from erdfast.diagnostics.target_statistics import TARGETS, build_schedule, factors, gaussian_statistics, places_at
from tests.runs import single_thread

LOGSNR = torch.tensor([-5.0, -1.0, 0.5, 2.0, 6.0], dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def amplitudes() -> list[tuple[float, float]]:
    return list(zip(torch.sigmoid(LOGSNR).sqrt().tolist(), torch.sigmoid(-LOGSNR).sqrt().tolist(), strict=True))


@pytest.mark.parametrize("width", [3, 20])
def test_errors_within_and_without_a_set_against_brute_force(width):
    """Point by point, with x_t written out; two of the points are the same."""
    x, eps = normal(7, width), normal(7, width, seed=1)
    x[5] = x[2]
    found = set_errors(x, eps, LOGSNR)
    for level, (alpha, sigma) in enumerate(amplitudes()):
        for i in range(7):
            x_t = alpha * x[i] + sigma * eps[i]
            exponents = -(x_t - alpha * x).square().sum(1) / (2 * sigma**2)
            others = [j for j in range(7) if j != i and {i, j} != {2, 5}]
            for name, among in (("in_set", list(range(7))), ("left_out", others)):
                density = torch.exp(exponents[among] - exponents[among].max())
                wanted = (density @ x[among] / density.sum() - x[i]).square().mean()
                assert float(found[name][level, i]) == pytest.approx(float(wanted), rel=1e-9, abs=1e-12)


def test_the_error_within_a_set_is_the_posteriors_variance_on_average():
    x, alpha, sigma = normal(6, 2), 0.8, 0.6
    logsnr = torch.tensor([2 * torch.log(torch.tensor(alpha / sigma))], dtype=torch.float64)
    found, wanted = [], []
    for seed in range(2000):
        eps = normal(6, 2, seed=seed)
        found.append(set_errors(x, eps, logsnr)["in_set"].mean())
        r = torch.softmax(-torch.cdist(alpha * x + sigma * eps, alpha * x).square() / (2 * sigma**2), dim=1)
        wanted.append((r @ x.square() - (r @ x).square()).mean())
    apart = torch.stack(found) - torch.stack(wanted)
    assert abs(float(apart.mean())) < 4 * float(apart.std()) / 2000**0.5


def test_linear_errors_are_the_mean_over_noise():
    """The prediction's matrix from the other half, applied to drawn noise."""
    from sklearn.covariance import LedoitWolf

    x = normal(60, 4) @ normal(4, 4, seed=5) + 1.5
    found = linear_errors(x, LOGSNR, seed=3)
    first, second = torch.randperm(60, generator=torch.Generator().manual_seed(3)).tensor_split(2)
    fit = LedoitWolf().fit(x[first].numpy())
    mean, covariance = torch.from_numpy(fit.location_), torch.from_numpy(fit.covariance_)
    one, i = torch.eye(4, dtype=torch.float64), int(second[0])
    for level, (alpha, sigma) in enumerate(amplitudes()):
        layer = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * one)
        x_t = alpha * x[i] + sigma * normal(100_000, 4, seed=8)
        errors = (mean + (x_t - alpha * mean) @ layer.T - x[i]).square().mean(1)
        assert abs(float(found[level, i]) - float(errors.mean())) < 4 * float(errors.std()) / 100_000**0.5


@pytest.mark.parametrize("shape", [(30, 1), (30, 4), (12, 12), (9, 40)])
def test_shrinkage_is_scikit_learns(shape):
    from sklearn.covariance import ledoit_wolf_shrinkage as wanted

    x = normal(*shape) * torch.linspace(0.2, 2.0, shape[1], dtype=torch.float64)
    x = x - x.mean(0)
    found = target_estimates.ledoit_wolf_shrinkage(
        torch.linalg.svdvals(x).square() / shape[0], x.square().sum(1), shape[1]
    )
    assert shape[1] == 1 or found == pytest.approx(float(wanted(x.numpy(), assume_centered=True)), rel=1e-9)
    assert 0.0 <= found <= 1.0


def test_large_pictures_are_quick():
    """200,000 elements: whatever grows with their square would take hours."""
    x, eps = normal(16, 200_000), normal(16, 200_000, seed=1)
    found = set_errors(x, eps, LOGSNR) | {"linear": linear_errors(x, LOGSNR, seed=0)}
    assert all(bool(values.isfinite().all()) for values in found.values())


def test_a_common_part_of_all_samples_is_of_no_account():
    x, eps = normal(30, 5), normal(30, 5, seed=1)
    for name, values in set_errors(x + 1e6, eps, LOGSNR).items():
        torch.testing.assert_close(values, set_errors(x, eps, LOGSNR)[name], rtol=1e-6, atol=1e-12)


def test_linear_errors_with_more_elements_than_samples():
    """What the half does not span is predicted too: the error goes to 0 with the noise."""
    errors = linear_errors(normal(20, 50), torch.tensor([0.0, 25.0]).double(), seed=0).mean(1)
    assert 0.3 < float(errors[0]) < 0.7
    assert float(errors[1]) < 1e-9


def test_of_gaussian_data_the_linear_prediction_is_the_best():
    errors = linear_errors(0.5 * normal(4000, 3), LOGSNR, seed=0)
    found, wanted = estimate(errors), 0.25 / (1 + 0.25 * LOGSNR.exp())
    assert ((found.value - wanted).abs() < 4 * found.error + 0.002 * wanted).all()


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 4, 4)])
def test_a_mixtures_error_lies_between_the_bounds(shape):
    """Where the posterior is known; and the bounds meet where noise is large."""
    mixture = GaussianMixture(shape, num_classes=3, modes_per_class=2)
    sample = Sample(mixture.gather(torch.arange(800)).x.flatten(1), mixture, "")
    found = x0_errors(sample, draw_noise(sample.x.double(), 0), LOGSNR, 0)
    exact = estimate(found["exact"])
    for name, sign in (("in_set", -1), ("left_out", 1), ("linear", 1), ("one_factor", 1)):
        # Errors of the same points and noise: what they differ by is better known than either.
        apart = estimate(sign * (found[name] - found["exact"]))
        assert (apart.value > -4 * apart.error).all(), name
    lower, upper = estimate(found["in_set"]).value, estimate(found["left_out"]).value
    assert float((upper - lower)[0] / exact.value[0]) < 0.02
    assert float(lower[-1] / exact.value[-1]) < 0.9
    assert set(known_errors(found)) == {"exact"}


def test_a_larger_set_has_a_larger_error():
    """The least error is concave in the distribution: that of a sample is too small on average."""
    x, eps = normal(1600, 2), normal(1600, 2, seed=1)
    whole = set_errors(x, eps, LOGSNR)["in_set"]
    parts = [set_errors(x[i : i + 50], eps[i : i + 50], LOGSNR)["in_set"] for i in range(0, 1600, 50)]
    apart = estimate(whole - torch.cat(parts, dim=1))
    assert (apart.value > 2 * apart.error)[1:].all()
    known = 1 / (1 + LOGSNR.exp())
    assert (estimate(whole).value < known + 4 * estimate(whole).error).all()
    assert float(estimate(whole).value[-1]) < 0.9 * float(known[-1])


def test_the_exact_error_is_the_bayes_floor():
    mixture = GaussianMixture((1, 2, 2), num_classes=2, modes_per_class=2)
    x = mixture.gather(torch.arange(4000)).x.flatten(1).double()
    found = estimate(mixture_errors(mixture, x, normal(4000, 4), LOGSNR))
    alpha, sigma = torch.sigmoid(LOGSNR).sqrt(), torch.sigmoid(-LOGSNR).sqrt()
    one = torch.ones_like(alpha)
    floor = mixture.bayes_floor(alpha, sigma, one, 0 * one, num_samples=20_000)
    assert ((found.value - floor).abs() < 4 * found.error).all()


def test_one_factor_is_the_best_of_its_kind():
    """Whatever the data's distribution: s^2 / (1 + s^2 SNR), with noise that is drawn; other factors leave more."""
    x, eps = 3.0 + 0.7 * normal(40_000, 3).abs(), normal(40_000, 3, seed=1)
    found, away = estimate(one_factor_errors(x, LOGSNR)), x - x.mean(0)
    variance = float(x.var(0).mean())
    torch.testing.assert_close(found.value, variance / (1.0 + variance * LOGSNR.exp()), rtol=1e-4, atol=0.0)
    for level, (alpha, sigma) in enumerate(amplitudes()):
        x_t, a = alpha * away + sigma * eps, alpha * variance / (alpha**2 * variance + sigma**2)
        left = [estimate((f * a * x_t - away).square().mean(1)[None]) for f in (1.0, 0.8, 1.25)]
        assert abs(float(left[0].value - found.value[level])) < 4 * float(left[0].error)
        assert float(left[0].value) < min(float(other.value) for other in left[1:])


def test_the_best_upper_bound_is_taken():
    first, second = (
        torch.tensor([[1.0, 1.0], [4.0, 4.0], [9.0, 9.0]]),
        torch.tensor([[2.0, 2.0], [3.0, 3.0], [8.0, 8.0]]),
    )
    third = torch.tensor([[5.0, 5.0], [5.0, 5.0], [7.0, 6.0]])
    found = known_errors({"in_set": 0 * first, "left_out": first, "linear": second, "one_factor": third})
    assert found["upper"].tolist() == [[1.0, 1.0], [3.0, 3.0], [7.0, 6.0]]
    assert found["lower"].tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_bounds_of_targets_hold_the_gaussians_closed_forms(schedule):
    """Every target, by the errors of x0 alone; within the sampling error."""
    x = 0.8 * normal(1000, 2)
    sample = Sample(x.float(), cast("GaussianMixture", None), "")
    eps = draw_noise(x, 1)
    known = known_errors(x0_errors(sample, eps, LOGSNR, 0))
    place, draws = places_at(build_schedule(schedule), LOGSNR), summarise_draws(x, eps)
    for target in TARGETS:
        c = factors(target, place, 0.3)
        found, wanted = estimate_target(draws, known, place, c), gaussian_statistics(place, c, 0.64)
        for got, value in ((found.variance, wanted.variance), (found.mean_square, wanted.mean.square())):
            slack = 1e-12 + 4 * torch.maximum(got["lower"].error, got["upper"].error)
            assert (got["lower"].value <= value + slack).all()
            assert (got["upper"].value >= value - slack).all()


def test_mean_and_variance_add_up():
    """To the variance of y, whatever is known of the error."""
    x = normal(50, 3)
    draws, place = summarise_draws(x, normal(50, 3, seed=1)), places_at(build_schedule("flow"), LOGSNR)
    c = factors("u", place, 0.5)
    found = estimate_target(draws, {"exact": torch.rand(5, 50, dtype=torch.float64)}, place, c)
    total = c[0].square() * x.var(0).mean() + c[1].square()
    torch.testing.assert_close(found.mean_square["exact"].value + found.variance["exact"].value, total)


def test_correlations_depend_on_the_variance_of_the_data_alone():
    """Data of two values, as far from Gaussian as any: v has correlation 0 if their variance is 1, and else not."""
    place = places_at(build_schedule("vp"), LOGSNR)
    for size in (1.0, 0.5):
        x = size * normal(40_000, 2).sign()
        draws = summarise_draws(x, normal(40_000, 2, seed=1))
        for target in TARGETS:
            c = factors(target, place, 0.3)
            found, wanted = correlation(draws, place, c), gaussian_statistics(place, c, size**2).correlation
            assert ((found.value - wanted).abs() < 4 * found.error + 1e-9).all()
        assert (float(correlation(draws, place, factors("v", place, 0.3)).value.abs().max()) > 0.3) == (size == 0.5)


def test_a_correlation_is_that_of_numpy_and_its_error_that_of_repetition():
    place, c = (
        places_at(build_schedule("flow"), LOGSNR),
        (torch.full((5,), 0.5).double(), torch.full((5,), 0.7).double()),
    )
    values, errors = [], []
    for seed in range(60):
        x, eps = normal(200, 1, seed=2 * seed), normal(200, 1, seed=2 * seed + 1)
        found = correlation(summarise_draws(x, eps), place, c)
        values.append(found.value)
        errors.append(found.error)
    x_t, y = place.alpha[2] * x + place.sigma[2] * eps, c[0][2] * x + c[1][2] * eps
    assert float(values[-1][2]) == pytest.approx(float(torch.corrcoef(torch.cat([x_t, y], 1).T)[0, 1]), abs=0.02)
    ratio = torch.stack(errors).mean(0) / torch.stack(values).std(0)
    assert ((ratio > 0.75) & (ratio < 1.33)).all()


def test_root():
    found = root(Estimate(torch.tensor([4.0, 0.0, -1.0]), torch.tensor([0.4, 0.25, 0.5])))
    assert found.value.tolist() == [2.0, 0.0, 0.0]
    assert found.error.tolist() == pytest.approx([0.1, 0.25, 0.0], abs=1e-3)


def test_noise_is_the_seeds():
    x = torch.zeros(4, 3)
    assert torch.equal(draw_noise(x, 1), draw_noise(x, 1))
    assert not torch.equal(draw_noise(x, 1), draw_noise(x, 2))


def test_the_digits_are_bracketed():
    """Real data: the bounds are in order at every level, up to a thousandth."""
    sample = draw_sample("digits", 400, seed=0)
    found = x0_errors(sample, draw_noise(sample.x, 0), LOGSNR, 0)
    known = {name: estimate(values).value for name, values in known_errors(found).items()}
    assert (known["lower"] <= known["upper"] * 1.001).all()
