"""Frechet distance between two sets of features, each summed up by its mean and covariance, in float64.

    d^2 = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

(Dowson and Landau 1982; Heusel et al. 2017 for Inception features.) With C = F F^T the last trace is the sum
of the singular values of F1^T F2. That form needs no square root of a product, is defined for covariances of any
rank (few samples, pixels that never change), and keeps all digits of small values: eigenvalues of C1 C2 lose
half of them to rounding. F comes from the eigenvalues of C, and F F^T is compared with C.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor

ROOT_TOLERANCE = 1e-3
"""Of |F F^T - C| / |C|. Exact covariances give 1e-14, those stored in float32 1e-7; beyond this it is none."""


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """Squared Frechet distance between two Gaussians (the quantity reported as FID); at least 0.

    Args:
        mu1, mu2: (D,) means.
        cov1, cov2: (D, D) covariances, symmetric and positive semidefinite up to rounding.

    Raises:
        ValueError: shapes that do not agree, values that are not finite, or matrices that are no covariances.
    """
    shapes = [tuple(np.shape(array)) for array in (mu1, cov1, mu2, cov2)]
    size = math.prod(shapes[0])
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"need shapes (D,), (D, D), (D,), (D, D), got {shapes}")
    return Gaussian(_float64(mu1), _float64(cov1)).distance(Gaussian(_float64(mu2), _float64(cov2)))


@dataclass(frozen=True)
class Gaussian:
    """What a Frechet distance needs of a set of features.

    Raises:
        ValueError: shapes that do not agree, or values that are not finite.
    """

    mean: Tensor
    """(D,) float64."""
    covariance: Tensor
    """(D, D) float64."""
    count: int | None = None
    """Samples behind it, where that is known."""

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(
                f"a mean (D,) and a covariance (D, D) are needed, got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}"
            )
        if not bool(torch.isfinite(self.mean).all() and torch.isfinite(self.covariance).all()):
            raise ValueError("means and covariances must be finite")

    @cached_property
    def factor(self) -> Tensor:
        """`covariance_factor`, computed once: a reference serves many samples."""
        return covariance_factor(self.covariance)

    def distance(self, other: Gaussian) -> float:
        """`frechet_distance` to another one.

        Raises:
            ValueError: other features, or a matrix that is no covariance.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"{self.mean.numel()} features cannot be compared with {other.mean.numel()}")
        with _converging():
            overlap = torch.linalg.svdvals(self.factor.T @ other.factor).sum()
        traces = self.covariance.trace() + other.covariance.trace()
        return max(float((self.mean - other.mean).square().sum() + traces - 2.0 * overlap), 0.0)

    @property
    def warning(self) -> str | None:
        """What to tell people about too few samples; None if there are enough, or their number is unknown."""
        size = self.mean.numel()
        if self.count is None or self.count > size:
            return None
        return (
            f"{self.count:,} samples for {size:,} features: the covariance is singular and the Frechet distance "
            f"too large; compare only with the same number of samples"
        )


def covariance_factor(covariance: Tensor) -> Tensor:
    """F with F F^T = covariance, by eigenvalues in float64; those within rounding of 0 are left out.

    Args:
        covariance: (D, D).

    Returns:
        (D, rank): few samples give few columns, and a distance in a fraction of the time.

    Raises:
        ValueError: F F^T differs from it: it is not symmetric, or has negative eigenvalues beyond rounding.
    """
    matrix = covariance.to(torch.float64)
    with _converging():
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.T))
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].clamp_min(0.0)
    factor = vectors[:, kept] * values[kept].sqrt()
    size = matrix.norm()
    error = float((factor @ factor.T - matrix).norm() / size) if size > 0 else 0.0
    if not error <= ROOT_TOLERANCE:
        raise ValueError(
            f"a matrix is no covariance: its square root is wrong by {error:.1e} of its norm (at most "
            f"{ROOT_TOLERANCE:g}), its eigenvalues are {float(values[0]):.3g} to {float(values[-1]):.3g}"
        )
    return factor


@contextlib.contextmanager
def _converging() -> Iterator[None]:
    """A decomposition that fails is a ValueError, as other matrices that make no sense are."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]  # documented as public
        raise ValueError(f"a matrix cannot be decomposed: {error}") from error


def _float64(array: Array) -> Tensor:
    return torch.as_tensor(array).to(torch.float64)


class FeatureStatistics:
    """Mean and covariance of features that arrive in pieces, without keeping the features.

    Each piece is summed around its own mean and joined to the rest by the pairwise rule of Chan, Golub and
    LeVeque (1983), so that a mean far from 0 costs no digits. Statistics of several processes join by
    `merge`.

    Args:
        size: D, the number of features of a sample.
        device: where the sums are kept (float64).
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        """(D,) float64, zeros as long as there are no samples."""
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)
        """(D, D) float64, sum of (x - mean)(x - mean)^T."""

    @classmethod
    def of(cls, features: Array, chunk: int = 4096) -> FeatureStatistics:
        """Statistics of an (N, ...) array, each sample flattened, `chunk` samples at a time."""
        samples = torch.as_tensor(features)
        if samples.ndim < 2:
            raise ValueError(f"features must be (N, ...) with two dimensions or more, got {tuple(samples.shape)}")
        statistics = cls(math.prod(samples.shape[1:]), samples.device)
        for part in samples.flatten(1).split(chunk):
            statistics.update(part)
        return statistics

    def update(self, features: Array) -> None:
        """Adds (N, D) samples, in float64 from here on.

        Raises:
            ValueError: another width, or values that are not finite: one NaN would spoil all before it.
        """
        samples = torch.as_tensor(features).to(self.mean.device, torch.float64)
        if samples.ndim != 2 or samples.shape[1] != self.mean.numel():
            raise ValueError(f"features must be (N, {self.mean.numel()}), got {tuple(samples.shape)}")
        if len(samples) == 0:
            return
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("features must be finite")
        mean = samples.mean(dim=0)
        centred = samples - mean
        self._join(len(samples), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Adds the samples that `other` has seen.

        Raises:
            ValueError: `other` is of another width.
        """
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"cannot merge statistics of {other.mean.numel()} and {self.mean.numel()} features")
        if other.count:
            self._join(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))

    def join_processes(self, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Adds what the other processes have seen, in each of them; all must call it.

        Args:
            all_reduce: the sum over all processes, in place.
        """
        count = int(all_reduce(torch.tensor(self.count, device=self.mean.device)))
        if count == 0:
            return
        mean = all_reduce(self.mean * self.count) / count
        shift = self.mean - mean
        self.scatter = all_reduce(self.scatter + torch.outer(shift, shift) * self.count)
        self.mean, self.count = mean, count

    def _join(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased (divided by N - 1, as in all implementations of FID).

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def gaussian(self) -> Gaussian:
        """Mean and covariance, on the CPU.

        Raises:
            ValueError: fewer than two samples.
        """
        return Gaussian(self.mean.cpu(), self.covariance.cpu(), self.count)

    def distance(self, other: FeatureStatistics) -> float:
        """`frechet_distance` to other statistics."""
        return self.gaussian().distance(other.gaussian())
