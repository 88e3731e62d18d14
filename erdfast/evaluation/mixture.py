"""Samples against a Gaussian mixture whose mean and covariance are known: nothing has to be estimated but theirs.

The modes' means mu_j lie in few directions, the columns of Q (orthonormal, d x k); around its mean every mode is normal
with standard deviation s in all directions. Two features tell all that a Frechet distance can of such samples:

    f(x) = [Q^T x, |x - Q Q^T x|]

Under the mixture the first k have mean and covariance of Q^T mu_j plus s^2 on the diagonal, and the last is s times a
chi variable of m = d - k degrees of freedom, independent of them:

    E = s sqrt(2) Gamma((m + 1)/2) / Gamma(m/2),   Var = s^2 m - E^2

The distance of f is that of x where what is left of x is isotropic, without its bias and cost: from all d numbers,
5,000 perfect samples of 4x32x32 (total variance 4,096) are 159 away from their own distribution, which takes two cores
five minutes to find out; in these features they are 2.3 to 3.3 away (four draws), after a tenth of a second.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from erdfast.data import GaussianMixture

from .frechet import Gaussian

_TOLERANCE = 1e-9
"""Of what the means have outside of Q, relative to them: float64's rounding over a few thousand terms."""


class KnownMixture:
    """A mixture as something that samples are compared with.

    Args:
        mixture: the data set.
    """

    def __init__(self, mixture: GaussianMixture) -> None:
        self._std, self._mode_class, self._num_classes = mixture.std, mixture.mode_class, mixture.num_classes
        self.num_modes = len(mixture.mode_class)
        self._basis = _span(mixture.means)
        self._means = mixture.means @ self._basis
        self._left = mixture.means.shape[1] - self._basis.shape[1]
        """Directions in which all modes are alike; without any there is no last feature."""
        self.gaussian: Gaussian = self._closed_form()
        """Mean and covariance of the features under the mixture."""

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W), on any device => (B, k + 1) float64 on the CPU."""
        flat = x.detach().to("cpu", torch.float64).flatten(1)
        place = flat @ self._basis
        if not self._left:
            return place
        rest = flat - place @ self._basis.T
        return torch.cat([place, rest.norm(dim=1, keepdim=True)], dim=1)

    def num_recognised(self, x: Tensor, labels: Tensor) -> int:
        """How many samples are, by the closed-form posterior, most likely of their label.

        Args:
            x: (B, C, H, W), on any device.
            labels: (B,) int64 on the CPU.
        """
        modes = torch.softmax(self._distances(x).square() / (-2.0 * self._std**2), dim=1)
        classes = modes.new_zeros(len(x), self._num_classes).index_add_(1, self._mode_class, modes)
        return int((classes.argmax(1) == labels).sum())

    def nearest_modes(self, x: Tensor) -> Tensor:
        """(B, C, H, W), on any device => (B,) int64 on the CPU: the mode from which each is most likely."""
        return self._distances(x).argmin(1)

    def _distances(self, x: Tensor) -> Tensor:
        """(B, J) from each mode's mean, within the directions in which the modes differ."""
        return torch.cdist(self.features(x)[:, : self._means.shape[1]], self._means)

    def _closed_form(self) -> Gaussian:
        mean = self._means.mean(0)
        centred = self._means - mean
        covariance = centred.T @ centred / len(centred) + self._std**2 * torch.eye(len(mean), dtype=torch.float64)
        if not self._left:
            return Gaussian(mean, covariance)
        length = math.sqrt(2.0) * math.exp(math.lgamma((self._left + 1) / 2) - math.lgamma(self._left / 2))
        variance = self._std**2 * (self._left - length**2)
        last = torch.tensor([self._std * length], dtype=torch.float64)
        return Gaussian(torch.cat([mean, last]), torch.block_diag(covariance, torch.full((1, 1), variance).double()))


def _span(means: Tensor) -> Tensor:
    """(J, d) float64 => (d, k) orthonormal columns that span its rows, k as small as it can be.

    From random sums of the rows, twice as many until they span all: a decomposition of 4,000 means of 4,096 numbers,
    which lie in 64 directions, would take half a minute.
    """
    generator = torch.Generator().manual_seed(0)  # the global one belongs to others
    most = min(means.shape)
    size = min(32, most)
    while True:
        mix = torch.randn(len(means), size, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(means.T @ mix).Q
        outside = (means - means @ basis @ basis.T).norm() / means.norm()
        if size == most or float(outside) < _TOLERANCE:
            break
        size = min(2 * size, most)
    left, values, _ = torch.linalg.svd(basis.T @ means.T, full_matrices=False)
    return basis @ left[:, values > values[0] * _TOLERANCE]
