"""Frechet distance between two sets of features, each summed up by its mean and covariance, in float64.

    d^2 = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)

(Dowson and Landau 1982; Heusel et al. 2017 for Inception features.) With C = F F^T the last trace is the sum
of the singular values of F1^T F2. That form needs no matrix square root, is defined for covariances of any
rank (few samples, pixels that never change), and keeps all digits of small values: eigenvalues of C1 C2 lose
half of them to rounding.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """Squared Frechet distance between two Gaussians (the quantity reported as FID); at least 0.

    Args:
        mu1, mu2: (D,) means.
        cov1, cov2: (D, D) covariances, symmetric and positive semidefinite up to rounding.

    Raises:
        ValueError: shapes that do not agree, or values that are not finite.
    """
    mean1, mean2 = (torch.as_tensor(mu).to(torch.float64) for mu in (mu1, mu2))
    matrix1, matrix2 = (torch.as_tensor(cov).to(torch.float64) for cov in (cov1, cov2))
    shapes = [tuple(array.shape) for array in (mean1, matrix1, mean2, matrix2)]
    size = mean1.numel()
    if shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"need shapes (D,), (D, D), (D,), (D, D), got {shapes}")
    if not all(bool(torch.isfinite(array).all()) for array in (mean1, matrix1, mean2, matrix2)):
        raise ValueError("means and covariances must be finite")
    overlap = torch.linalg.svdvals(_factor(matrix1).T @ _factor(matrix2)).sum()
    distance = (mean1 - mean2).square().sum() + matrix1.trace() + matrix2.trace() - 2.0 * overlap
    return max(float(distance), 0.0)


def _factor(covariance: Tensor) -> Tensor:
    """F with F F^T = covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.T))
    return vectors * values.clamp_min(0.0).sqrt()


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

    def distance(self, other: FeatureStatistics) -> float:
        """`frechet_distance` to other statistics."""
        return frechet_distance(self.mean.cpu(), self.covariance.cpu(), other.mean.cpu(), other.covariance.cpu())
