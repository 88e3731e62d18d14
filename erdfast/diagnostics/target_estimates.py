"""The same three numbers of a data set: from draws of x_t, and from what is known of E Var(x0 | x_t).

Where the posterior is known (a Gaussian mixture), it is used. For any other data, the least error m of a prediction of
x0 lies between

    in_set <= m <= left_out, linear, one_factor        (each in expectation)

    in_set      the least error if the samples were all there is: the posterior is a softmax over them, among them the
                one that x_t was made from. The least error is a concave functional of the data's distribution (Wu &
                Verdu, 2012), so that of a sample is too small on average, and 0 where noise does not mix its points up.
    left_out    the same prediction from all samples but the one that x_t was made from and its copies. It was not made
                for that sample, so its error is no less than the least; it stays above the distance between points.
    linear      the best linear prediction, from the mean and covariance (shrunk as Ledoit & Wolf say) of one half of
                the samples, on the other half, its mean over the noise taken in closed form.
    one_factor  the best prediction a*x_t with one number a for all elements, about the mean: s^2 / (1 + s^2 SNR) of
                data with mean variance s^2, whatever their distribution. Predictions that need no x_t are among those
                that it is the best of: 0 for eps leaves 1, the mean for x0 leaves s^2, and no target keeps more than
                its own variance, however badly the other two generalise. With the samples' s^2 it is too small on
                average, at most by about a quarter of the squared relative error of s^2.

The least of the upper bounds is taken. Bounds on the conditional variance follow for every target, and those on the
conditional mean by subtraction. Standard errors take the samples as independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.data import GaussianMixture
from erdfast.process.coefficients import Pair

from .data_sample import Sample, row_groups
from .target_statistics import Place

LEAST_SAMPLES = 16
MOST_SAMPLES = 10_000
"""Every pair of samples is compared."""
UPPER, LOWER = ("left_out", "linear", "one_factor"), "in_set"


class Estimate(NamedTuple):
    """Numbers and their standard errors, each (L,) float64."""

    value: Tensor
    error: Tensor


class Draws(NamedTuple):
    """What correlations and variances need of each sample and its noise; (M,) float64, means over the elements."""

    data: Tensor
    """Square of x0 less the samples' mean, free of the bias of that mean."""
    cross: Tensor
    """x0 less the mean, times eps."""
    noise: Tensor
    """eps^2."""


class DataEstimates(NamedTuple):
    """Of one target at L noise levels."""

    correlation: Estimate
    mean_square: dict[str, Estimate]
    """Of E[y | x_t] about E y, by what is known: exact, or lower and upper."""
    variance: dict[str, Estimate]


def draw_noise(x: Tensor, seed: int) -> Tensor:
    """Noise like (M, D), float64: one draw per sample, the same at all noise levels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, dtype=torch.float64, generator=generator)


def summarise_draws(x: Tensor, eps: Tensor) -> Draws:
    """Of samples and noise, both (M, D) float64."""
    away = x - x.mean(0)
    return Draws(_squares(x), (away * eps).mean(1), eps.square().mean(1))


def _squares(x: Tensor) -> Tensor:
    """(M, D) => (M,): distance from the mean, squared, per element; the mean over M is the variance without bias."""
    return (x - x.mean(0)).square().mean(1) * (x.shape[0] / (x.shape[0] - 1))


def x0_errors(sample: Sample, eps: Tensor, logsnr: Tensor, seed: int) -> dict[str, Tensor]:
    """Squared error per element of predictions of x0, by sample: each (L, M) float64.

    Args:
        eps: (M, D) float64.
        logsnr: (L,) float64.
        seed: of the halves.

    Returns:
        in_set, left_out, linear, one_factor; and exact where the posterior is known.
    """
    x = sample.x.double()
    found = set_errors(x, eps, logsnr)
    found |= {"linear": linear_errors(x, logsnr, seed), "one_factor": one_factor_errors(x, logsnr)}
    if isinstance(sample.dataset, GaussianMixture):
        found["exact"] = mixture_errors(sample.dataset, x, eps, logsnr)
    return found


def set_errors(x: Tensor, eps: Tensor, logsnr: Tensor) -> dict[str, Tensor]:
    """in_set and left_out. Of the former the squared error stands in for the posterior's variance, which is the same on
    average and would hide that another set has another variance."""
    x = x - x.mean(0)  # no digits are lost to what all have in common
    products = eps @ x.T
    norms = x.square().sum(1)
    distances = (norms[:, None] + norms[None, :] - 2.0 * x @ x.T).clamp(min=0.0)
    shifts = products.diagonal()[:, None] - products  # eps_i . (x_i - x_j)
    groups = row_groups(x)
    own = groups[:, None] == groups[None, :]
    distances = distances.masked_fill(own, 0.0)
    # Rotated into no more dimensions than there are samples.
    z = x if x.shape[1] <= x.shape[0] else torch.linalg.qr(x.T).R.T

    def errors(logits: Tensor) -> Tensor:
        """|x_i - sum_j r_j x_j|^2 / D, (M,)."""
        return (torch.softmax(logits, dim=1) @ z - z).square().sum(1) / x.shape[1]

    within, without = [], []
    for snr in logsnr.exp().tolist():
        # -|x_t - alpha x_j|^2 / (2 sigma^2), without what is the same for all j.
        logits = -0.5 * snr * distances - snr**0.5 * shifts
        within.append(errors(logits))
        without.append(errors(logits.masked_fill(own, -torch.inf)))
    return {"in_set": torch.stack(within), "left_out": torch.stack(without)}


def linear_errors(x: Tensor, logsnr: Tensor, seed: int) -> Tensor:
    """(L, M): each half by the other's mean and covariance."""
    halves = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed)).tensor_split(2)
    errors = torch.empty(logsnr.shape[0], x.shape[0], dtype=torch.float64)
    for own, other in (halves, halves[::-1]):
        errors[:, own] = _linear_errors(x[other], x[own], logsnr)
    return errors


def _linear_errors(fitted: Tensor, x: Tensor, logsnr: Tensor) -> Tensor:
    """Along each principal axis with variance v, x0 is predicted by a*x_t, a = alpha v/(alpha^2 v + sigma^2)."""
    mean, width = fitted.mean(0), x.shape[1]
    _, roots, axes = torch.linalg.svd(fitted - mean, full_matrices=False)
    found = roots.square() / fitted.shape[0]
    shrinkage = ledoit_wolf_shrinkage(found, (fitted - mean).square().sum(1), width)
    floor = shrinkage * found.sum() / width
    variances = torch.cat([(1.0 - shrinkage) * found + floor, floor[None]])  # the last: across all axes
    along = ((x - mean) @ axes.T).square()
    across = ((x - mean).square().sum(1) - along.sum(1)).clamp(min=0.0)
    powers = torch.cat([along, across[:, None]], dim=1)
    counts = torch.ones_like(variances)
    counts[-1] = width - found.shape[0]
    alpha2, sigma2 = torch.sigmoid(logsnr)[:, None], torch.sigmoid(-logsnr)[:, None]
    passed = alpha2 * variances / (alpha2 * variances + sigma2)  # alpha*a
    noise = (sigma2 / alpha2 * passed.square() * counts).sum(1, keepdim=True)
    return ((1.0 - passed).square() @ powers.T + noise) / width


def one_factor_errors(x: Tensor, logsnr: Tensor) -> Tensor:
    """(L, M), the mean over the noise: of x0 the share p = s^2 SNR / (1 + s^2 SNR) is passed on, and noise with it."""
    squares, snr = _squares(x), logsnr.exp()[:, None]
    passed = torch.sigmoid(logsnr + squares.mean().log())[:, None]
    return (1.0 - passed).square() * squares + passed.square() / snr


def ledoit_wolf_shrinkage(variances: Tensor, norms: Tensor, width: int) -> float:
    """How far Ledoit and Wolf (2004) bring a covariance S to a multiple of the identity, in [0, 1].

    scikit-learn's is the same and takes a time that grows with the square of the elements: hours for large pictures.

    Args:
        variances: (min(M, D),) eigenvalues of S, a mean over M samples.
        norms: (M,) squared norms of the samples less their mean.
        width: D.
    """
    power = variances.square().sum()
    apart = float(power - variances.sum().square() / width)  # |S - mu|^2, mu = tr S / D
    sampling = float(norms.square().mean() - power) / norms.shape[0]
    shared = min(sampling, apart)
    return shared / apart if shared > 0.0 else 0.0


def mixture_errors(mixture: GaussianMixture, x: Tensor, eps: Tensor, logsnr: Tensor) -> Tensor:
    """The closed-form posterior's variance: (L, M)."""
    errors = []
    for alpha, sigma in zip(torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt(), strict=True):
        x_t = (alpha * x + sigma * eps).view(-1, *mixture.shape)
        errors.append(mixture.posterior(x_t, alpha, sigma).variance)
    return torch.stack(errors)


def known_errors(errors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is known of the least error: exact, or lower and upper, the best of the upper bounds at each level."""
    if "exact" in errors:
        return {"exact": errors["exact"]}
    bounds = torch.stack([errors[name] for name in UPPER])
    best = bounds.mean(2).argmin(0)
    return {"lower": errors[LOWER], "upper": bounds[best, torch.arange(bounds.shape[1])]}


def estimate(values: Tensor) -> Estimate:
    """Mean over the samples: (L, M) => (L,)."""
    return Estimate(values.mean(1), values.std(1) / values.shape[1] ** 0.5)


def root(square: Estimate) -> Estimate:
    """The square root of a mean square, which sampling errors may bring below 0; then 0."""
    high, low = ((square.value + sign * square.error).clamp(min=0.0).sqrt() for sign in (1, -1))
    return Estimate(square.value.clamp(min=0.0).sqrt(), 0.5 * (high - low))


def estimate_target(draws: Draws, known: Mapping[str, Tensor], place: Place, c: Pair) -> DataEstimates:
    """Of the target c at L places, from samples and from what is known of the error of x0 there, (L, M) each.

    A larger error of x0 is a larger conditional variance and a smaller conditional mean: the bounds change places. The
    upper bound of the variance is no more than Var y, since one_factor is among the bounds of x0.
    """
    gain = ((c[0] * place.sigma - c[1] * place.alpha) / place.sigma).square()[:, None]
    total = c[0].square()[:, None] * draws.data + c[1].square()[:, None]  # Var y, its mean over the noise
    swapped = {"exact": "exact", "lower": "upper", "upper": "lower"}
    return DataEstimates(
        correlation(draws, place, c),
        {swapped[name]: estimate(total - gain * errors) for name, errors in known.items()},
        {name: estimate(gain * errors) for name, errors in known.items()},
    )


def correlation(draws: Draws, place: Place, c: Pair) -> Estimate:
    """Cov(y, x_t) / sqrt(Var y Var x_t), sums over elements in each, by Monte Carlo; its error by linearisation."""
    alpha, sigma, c_x, c_eps = (value[:, None] for value in (place.alpha, place.sigma, *c))

    def product(a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """(a x0 + b eps)(p x0 + q eps), (L, M)."""
        return a * p * draws.data + (a * q + b * p) * draws.cross + b * q * draws.noise

    both, own, noisy = product(c_x, c_eps, alpha, sigma), product(c_x, c_eps, c_x, c_eps), product(*[alpha, sigma] * 2)
    scale = (own.mean(1) * noisy.mean(1)).sqrt()
    value = both.mean(1) / scale
    influence = both / scale[:, None] - 0.5 * value[:, None] * (
        own / own.mean(1, keepdim=True) + noisy / noisy.mean(1, keepdim=True)
    )
    return Estimate(value, influence.std(1) / influence.shape[1] ** 0.5)
