"""Loss, distance to the best possible prediction, and effective ranks of a network at single noise levels.

At every level the same images with noise of its own, a function of (seed, level, image): equal for all networks. The
network sees x_t in the precision that it computes in, as in training; the posterior sees it in float32.

Where the data are a Gaussian mixture, E[y | x_t] is known (given the label too, if the network knows it). The excess

    E |f(x_t) - E[y | x_t]|^2 = E |f(x_t) - y|^2 - Bayes floor

is measured by its left side, in which the noise of y does not occur.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.data import GaussianMixture
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.process import Coefficients
from erdfast.process.coefficients import determinant

from .effective_rank import effective_rank_of_features
from .features import FeatureProbe, feature_rows
from .subject import NOISE_STREAM, Images, Levels, Subject


class LevelMeasures(NamedTuple):
    """(L,) float64 each, on the CPU. Errors are mean squares per element; `_error` is a standard error."""

    loss: Tensor
    """In the network's own target, not weighed."""
    loss_error: Tensor
    excess: Tensor
    """Above the floor; NaN where the posterior is not known."""
    excess_error: Tensor
    floor: Tensor
    """The mean posterior variance on the same x_t; NaN where it is not known."""
    to_v: Tensor
    """What errors are multiplied with to become those of v; see `v_factor`."""
    rank_pooled: Tensor
    """Effective rank of the features, one row per image."""
    rank_tokens: Tensor
    """Of the features, one row per token."""
    rank_outputs: Tensor
    """Of the predictions, one row per image."""
    rank_best: Tensor
    """Of the best possible predictions for the same x_t; NaN where they are not known."""


class _Batch(NamedTuple):
    """Of some images, on the CPU."""

    error: Tensor
    excess: Tensor | None
    floor: Tensor | None
    pooled: Tensor
    tokens: Tensor
    outputs: Tensor
    best: Tensor | None


@torch.no_grad()
def measure_levels(
    subject: Subject, levels: Levels, images: Images, *, seed: int, batch_size: int, advance: Callable[[], object]
) -> LevelMeasures:
    """All of `LevelMeasures`, level by level.

    Args:
        subject: the network.
        levels: of its process.
        images: two or more.
        seed: of the noise.
        batch_size: images per network call.
        advance: called after each level.

    Raises:
        ArithmeticError: a prediction is not finite.
    """
    rows = []
    for number in range(len(levels.logsnr)):
        parts = []
        with FeatureProbe(subject.model) as probe:
            for first in range(0, len(images.y), batch_size):
                key = NoiseKey(seed, NOISE_STREAM + number)
                parts.append(_measure(subject, levels.time[number], images, first, batch_size, key, probe))
        if not all(bool(part.error.isfinite().all()) for part in parts):
            level = float(levels.logsnr[number])
            raise ArithmeticError(f"{subject.name}: predictions at log-SNR {level:.2f} are not finite")
        rows.append(_summary(parts))
        advance()
    columns = dict(zip(rows[0], torch.tensor([list(row.values()) for row in rows], dtype=torch.float64).T, strict=True))
    return LevelMeasures(**columns, to_v=v_factor(levels.coef))


def v_factor(coef: Coefficients) -> Tensor:
    """The factor of a squared error that makes it one of v = alpha*eps - sigma*x0 on a variance-preserving process.

    For two networks at the same log-SNR that process is the same, whatever their targets, schedules and noise scales
    are: x_t is divided by s = sqrt(alpha^2 + sigma^2), hence kappa = -s/D (k-Diff, appendix A), D = c_x sigma - c_eps
    alpha.
    """
    d = determinant(coef.alpha, coef.sigma, (coef.c_x, coef.c_eps))
    return (coef.alpha.square() + coef.sigma.square()) / d.square()


def _measure(
    subject: Subject, time: Tensor, images: Images, first: int, batch_size: int, key: NoiseKey, probe: FeatureProbe
) -> _Batch:
    source, y = images.part(first, first + batch_size, subject.device)
    coef = subject.process.coefficients(time.expand(len(y)))
    key = key._replace(sample_ids=torch.arange(first, first + len(y), device=y.device))
    labels = subject.labels(y)
    pred = subject.predict(add_noise(source, coef, key, dtype=subject.precision.dtype), coef, labels)
    _, error = diffusion_loss(pred, source, coef, key, per_sample=True)
    rows = feature_rows(probe.features, first)
    outputs = pred.float().flatten(1).cpu()
    best, floor = _best(subject, add_noise(source, coef, key, dtype=torch.float32), time, labels)
    excess = None if best is None else (outputs.double() - best).square().mean(1)
    return _Batch(error.double().cpu(), excess, floor, rows.pooled, rows.tokens, outputs, best)


def _best(
    subject: Subject, x_t: Tensor, time: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """E[y | x_t], (B, d), and the posterior variance of y per element, (B,), where they are known."""
    if not isinstance(subject.dataset, GaussianMixture):
        return None, None
    exact = subject.process.coefficients(time.reshape(1), dtype=torch.float64)
    c = Coefficients(*(value.cpu() for value in exact))
    posterior = subject.dataset.posterior(x_t.cpu(), c.alpha, c.sigma, None if labels is None else labels.cpu())
    best = c.c_x * posterior.x0 + c.c_eps * posterior.eps
    floor = (c.c_x - c.c_eps * c.alpha / c.sigma).square() * posterior.variance
    return best.flatten(1), floor


def _summary(parts: list[_Batch]) -> dict[str, float]:
    """The numbers of a level, by their names in `LevelMeasures`."""
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    error, excess, floor, pooled, tokens, outputs, best = joined
    loss, loss_error = _mean(error)
    above, above_error = _mean(excess)
    ranks = {"pooled": pooled, "tokens": tokens, "outputs": outputs, "best": best}
    return {
        "loss": loss,
        "loss_error": loss_error,
        "excess": above,
        "excess_error": above_error,
        "floor": _mean(floor)[0],
        **{f"rank_{n}": torch.nan if f is None else float(effective_rank_of_features(f)) for n, f in ranks.items()},
    }


def _mean(values: Tensor | None) -> tuple[float, float]:
    """With its standard error."""
    if values is None:
        return torch.nan, torch.nan
    return float(values.mean()), float(values.std() / len(values) ** 0.5)
