"""A class-conditional Gaussian mixture of any shape, whose best possible denoiser is known in closed form.

Symbols: J modes with means mu_j (equally likely, several per class), standard deviation s within a mode, d
elements, x_t = alpha*x0 + sigma*eps. Given mode j, x_t is normal with mean alpha*mu_j and variance v =
(alpha*s)^2 + sigma^2 per element, so with the responsibilities r_j proportional to exp(-|x_t - alpha*mu_j|^2
/ (2v)) and M = sum_j r_j*mu_j:

    E[x0 | x_t]        = (sigma^2 M + alpha s^2 x_t) / v
    E[eps | x_t]       = sigma (x_t - alpha M) / v
    tr Cov(x0 | x_t)/d = s^2 sigma^2/v + (sigma^2/v)^2 * sum_j r_j |mu_j - M|^2 / d

The error that no network can beat (the Bayes floor; ERD, secs. 2-3) is q^2 tr Cov(x0|x_t)/d with q = c_x -
c_eps*alpha/sigma.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.philox import normal, uniform

from .dataset import Batch, Dataset, Shape, check_indices, format_classes, format_shape

# Streams of the "data" domain of the seed. The ids are sample numbers for the first two, modes and draws for
# the others.
_VALUES, _MODE, _CLASS_MEANS, _MODE_MEANS, _FLOOR = range(5)

_FREQUENCIES = 4
"""Cosines per axis in a mean: at most 1.5 periods across the picture, legible from 4x4 up."""

_CLASS_SHARE = 0.7
"""Share of a mean's energy that all modes of its class have in common: the modes look like variants of one
pattern."""


class Posterior(NamedTuple):
    """What x_t tells about the clean sample and the noise; float64."""

    x0: Tensor
    """E[x0 | x_t], shaped like x_t."""

    eps: Tensor
    """E[eps | x_t], shaped like x_t; finite for sigma = 0 too."""

    variance: Tensor
    """(B,) tr Cov(x0 | x_t) / d."""


class GaussianMixture(Dataset):
    """Samples mu_j + s*z, made on the fly: sample i is a function of (seed, i) alone.

    The means are smooth patterns (a few low-frequency cosines per channel with Philox amplitudes), so classes
    can be told apart by eye and by a small network. The average variance per element, over everything, is
    exactly 1.

    Args:
        shape: (C, H, W).
        num_classes: number of labels.
        modes_per_class: modes that share a label.
        std: s, in (0, 1).
        size: number of samples.
        seed: decides the means and the samples.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        shape: Shape = (4, 32, 32),
        *,
        num_classes: int = 10,
        modes_per_class: int = 4,
        std: float = 0.4,
        size: int = 50_000,
        seed: int = 0,
    ) -> None:
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape must be three positive numbers (C, H, W), got {shape}")
        if min(num_classes, modes_per_class, size) < 1 or num_classes * modes_per_class < 2:
            raise ValueError(
                "a mixture needs two modes or more and a sample, got "
                f"num_classes={num_classes}, modes_per_class={modes_per_class}, size={size}"
            )
        if not 0.0 < std < 1.0:
            raise ValueError(f"std must lie between 0 and 1 (the total variance is 1), got {std}")
        shape = (shape[0], shape[1], shape[2])
        means = _smooth_means(shape, num_classes, modes_per_class, seed) * math.sqrt(1.0 - std**2)
        self._fill(shape, means, modes_per_class, std, size, seed)

    @classmethod
    def of_means(cls, means: Tensor, *, std: float, size: int = 50_000, seed: int = 0) -> GaussianMixture:
        """A mixture of given modes, each with a label of its own; its variance is what these make it.

        Args:
            means: (J, C, H, W) floating, two modes or more.
            std: s, above 0.
            size, seed: as above; the seed decides the samples alone.

        Raises:
            ValueError: a value out of range.
        """
        if means.ndim != 4 or means.shape[0] < 2 or means.numel() == 0 or not bool(torch.isfinite(means).all()):
            raise ValueError(f"means must be finite and (J, C, H, W) with two modes or more, got {tuple(means.shape)}")
        if not 0.0 < std < math.inf or size < 1:
            raise ValueError(f"std must be above 0 and size at least 1, got std={std}, size={size}")
        mixture = cls.__new__(cls)
        mixture._fill((means.shape[1], means.shape[2], means.shape[3]), means.double().flatten(1), 1, std, size, seed)
        return mixture

    def _fill(self, shape: Shape, means: Tensor, modes_per_class: int, std: float, size: int, seed: int) -> None:
        self.shape, self.means, self.std, self.seed = shape, means, float(std), seed
        self.num_classes, self.modes_per_class = means.shape[0] // modes_per_class, modes_per_class
        self.mode_class = torch.arange(self.num_classes).repeat_interleave(modes_per_class)
        self._size = size

    def __len__(self) -> int:
        return self._size

    def gather(self, indices: Tensor) -> Batch:
        """See `Dataset.gather`."""
        indices = check_indices(indices, self._size)
        mode = self.modes(indices)
        noise = normal(self.seed, _VALUES, indices, self.means.shape[1], domain="data")
        x = (self.means[mode] + self.std * noise).float()
        return Batch(x.view(-1, *self.shape), self.mode_class[mode])

    def modes(self, indices: Tensor) -> Tensor:
        """Which mode each sample comes from: (B,) int64 in 0..J-1; mode j has label `mode_class[j]`."""
        draw = uniform(self.seed, _MODE, indices, domain="data")
        return (draw * self.means.shape[0]).long()

    def describe(self) -> str:
        """See `Dataset.describe`."""
        variance = float(self.means.var(dim=0, correction=0).mean()) + self.std**2
        return (
            f"{self._size:,} samples {format_shape(self.shape)}, {format_classes(self.num_classes)}, "
            f"variance {variance:.3g} (Gaussian mixture of {self.means.shape[0]} modes, known Bayes floor)"
        )

    def posterior(
        self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, y: Tensor | None = None
    ) -> Posterior:
        """Closed-form posterior of the clean sample.

        Args:
            x_t: (B, C, H, W), any float type, on the CPU.
            alpha, sigma: (B,) or one number for all; not both 0.
            y: (B,) int64 labels that the observer knows too; None, or the null label `num_classes`, for one
                that does not.
        """
        if tuple(x_t.shape[1:]) != self.shape:
            raise ValueError(f"x_t must be (B, {format_shape(self.shape, ', ')}), got {tuple(x_t.shape)}")
        flat = x_t.double().flatten(1)
        alpha, sigma = _column(alpha, flat.shape[0]), _column(sigma, flat.shape[0])
        variance = _total_variance(alpha, sigma, self.std)
        r = self._responsibilities(flat @ self.means.T, alpha, variance, self._allowed(y, flat.shape[0]))
        mean = r @ self.means
        x0 = (sigma**2 * mean + alpha * self.std**2 * flat) / variance
        eps = sigma * (flat - alpha * mean) / variance
        trace = sigma**2 * self._variance_over_sigma2(r, sigma, variance)
        return Posterior(x0.view(x_t.shape), eps.view(x_t.shape), trace.squeeze(1))

    def posterior_mean(
        self, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float, y: Tensor | None = None
    ) -> Tensor:
        """E[x0 | x_t] (given y too): (B, C, H, W) float64. Arguments as for `posterior`."""
        return self.posterior(x_t, alpha, sigma, y).x0

    def target_mean(
        self,
        x_t: Tensor,
        alpha: Tensor | float,
        sigma: Tensor | float,
        c_x: Tensor | float,
        c_eps: Tensor | float,
        y: Tensor | None = None,
    ) -> Tensor:
        """The best prediction of c_x*x0 + c_eps*eps: (B, C, H, W) float64.

        Equal to q*E[x0|x_t] + (c_eps/sigma)*x_t (ERD, sec. 2), written so that sigma = 0 needs no limit.
        """
        best = self.posterior(x_t, alpha, sigma, y)
        c_x, c_eps = (_column(c, x_t.shape[0])[..., None, None] for c in (c_x, c_eps))
        return c_x * best.x0 + c_eps * best.eps

    def bayes_floor(
        self,
        alpha: Tensor,
        sigma: Tensor,
        c_x: Tensor,
        c_eps: Tensor,
        *,
        conditional: bool = False,
        num_samples: int = 4000,
    ) -> Tensor:
        """The lowest possible mean squared error per element at each of T noise levels (ERD, secs. 2-3).

        A Monte Carlo average over x_t of the closed-form posterior variance. Only the inner products of x_t
        with the
        means matter, and those are drawn directly, exactly in law: the cost does not grow with the sample's
            size.

        Args:
            alpha, sigma, c_x, c_eps: (T,), any float type.
            conditional: the observer knows the label.
            num_samples: draws of x_t per level, rounded up to a multiple of the number of modes (each equally
                often).

        Returns:
            (T,) float64.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        values = [torch.as_tensor(c, dtype=torch.float64, device="cpu").reshape(-1) for c in (alpha, sigma, c_x, c_eps)]
        levels = torch.stack(torch.broadcast_tensors(*values), dim=1)
        modes = self.means.shape[0]
        mode = torch.arange(modes).repeat(math.ceil(num_samples / modes))
        y = self.mode_class[mode] if conditional else None
        allowed = self._allowed(y, mode.numel())
        noise = normal(self.seed, _FLOOR, torch.arange(mode.numel()), modes, domain="data") @ self._gram_root
        floors = []
        for a, s, cx, ce in levels.unbind(0):
            variance = _total_variance(a, s, self.std)
            products = a * self._gram[mode] + variance.sqrt() * noise
            r = self._responsibilities(products, a, variance, allowed)
            ratio = self._variance_over_sigma2(r, s, variance).mean()
            floors.append((cx * s - ce * a) ** 2 * ratio)  # (q*sigma)^2 * (trace/d)/sigma^2: no division by sigma
        return torch.stack(floors)

    def _allowed(self, y: Tensor | None, batch: int) -> Tensor | None:
        """(B, J) bool: the modes that the label leaves open."""
        if y is None:
            return None
        if y.dtype.is_floating_point or y.dtype == torch.bool or y.numel() == 0:
            raise ValueError(f"y must hold {batch} integer labels, got {y.dtype} of shape {tuple(y.shape)}")
        if y.shape != (batch,) or int(y.min()) < 0 or int(y.max()) > self.num_classes:
            raise ValueError(
                f"y must hold {batch} labels in 0..{self.num_classes} (the last is null), got {y.tolist()}"
            )
        y = y[:, None]
        return (y == self.mode_class) | (y == self.num_classes)

    def _responsibilities(self, products: Tensor, alpha: Tensor, variance: Tensor, allowed: Tensor | None) -> Tensor:
        """(B, J) posterior probability of each mode, from <x_t, mu_j>. |x_t|^2 is the same for all modes and
        drops out."""
        logits = (alpha * products - 0.5 * alpha**2 * self._gram.diagonal()) / variance
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return torch.softmax(logits, dim=-1)

    def _variance_over_sigma2(self, r: Tensor, sigma: Tensor, variance: Tensor) -> Tensor:
        """(B, 1) tr Cov(x0|x_t)/(d sigma^2); the spread over modes is 1/2 sum_ij r_i r_j |mu_i - mu_j|^2
        (never negative)."""
        spread = 0.5 * ((r @ self._distances) * r).sum(dim=-1, keepdim=True)
        return self.std**2 / variance + sigma**2 / variance**2 * spread / self.means.shape[1]

    @cached_property
    def _gram(self) -> Tensor:
        return self.means @ self.means.T

    @cached_property
    def _gram_root(self) -> Tensor:
        """Symmetric square root: z @ root has the law of <noise, mu_j>, also for linearly dependent means."""
        values, vectors = torch.linalg.eigh(self._gram)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    @cached_property
    def _distances(self) -> Tensor:
        """(J, J) squared distances of the means."""
        norms = self._gram.diagonal()
        return (norms[:, None] + norms[None, :] - 2 * self._gram).clamp(min=0)


def _smooth_means(shape: Shape, num_classes: int, modes_per_class: int, seed: int) -> Tensor:
    """(J, d) float64: zero mean over the modes, mean square 1 over modes and elements."""
    channels, height, width = shape
    rows, columns = _cosines(height), _cosines(width)
    numel = channels * len(rows) * len(columns)
    class_part = normal(seed, _CLASS_MEANS, torch.arange(num_classes), numel, domain="data")
    mode_part = normal(seed, _MODE_MEANS, torch.arange(num_classes * modes_per_class), numel, domain="data")
    amplitudes = (
        math.sqrt(_CLASS_SHARE) * class_part.repeat_interleave(modes_per_class, dim=0)
        + math.sqrt(1.0 - _CLASS_SHARE) * mode_part
    ).view(-1, channels, len(rows), len(columns))
    i, j = torch.arange(len(rows))[:, None], torch.arange(len(columns))[None, :]
    amplitudes = amplitudes / (1.0 + i**2 + j**2).sqrt()  # the spectrum falls off as in pictures
    means = torch.einsum("mcij,ih,jw->mchw", amplitudes, rows, columns).flatten(1)
    means = means - means.mean(dim=0)
    return means / means.square().mean().sqrt()


def _cosines(size: int) -> Tensor:
    """(F, size) float64 cosine basis, F = min(4, size)."""
    frequency = torch.arange(min(_FREQUENCIES, size), dtype=torch.float64)[:, None]
    position = (torch.arange(size, dtype=torch.float64) + 0.5)[None, :] / size
    return torch.cos(math.pi * frequency * position)


def _column(value: Tensor | float, batch: int) -> Tensor:
    """(B, 1) float64 on the CPU."""
    value = torch.as_tensor(value, dtype=torch.float64, device="cpu")
    return value.reshape(-1, 1).expand(batch, 1)


def _total_variance(alpha: Tensor, sigma: Tensor, std: float) -> Tensor:
    variance = (alpha * std) ** 2 + sigma**2
    if not bool((variance > 0).all()):
        raise ValueError("alpha and sigma must not both be 0")
    return variance
