"""Data whose intrinsic dimension is known, as are its posterior mean and the distance of a point from it.

Both kinds are rank-r data x = P z in D dimensions with P'P = 1 and E[z] = 0, E[z z'] = 1, as in k-Diff, sec. 3.1:
    subspace    z ~ N(0, 1), r = d: the theory's own setting
    torus       z = sqrt 2 (cos a, sin a, cos 2a, sin 2a) for each of d independent uniform angles, r = 4d: curved, with
                fewer intrinsic dimensions than its linear span has
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

ANGLES = 256
"""Points of the quadrature over an angle; z has no frequency above 2."""


class Manifold(ABC):
    """Rank-r data in D dimensions.

    Args:
        ambient: D.
        dim: d, the intrinsic dimension.
        seed: of the embedding P alone.

    Raises:
        ValueError: a rank above D.
    """

    per_dim: ClassVar[int]
    """Rank by intrinsic dimension."""

    def __init__(self, ambient: int, dim: int, seed: int) -> None:
        self.ambient, self.dim, self.rank = ambient, dim, self.per_dim * dim
        if not dim >= 1 or self.rank > ambient:
            raise ValueError(f"{type(self).__name__} of dimension {dim} has rank {self.rank}, more than {ambient}")
        gaussian = torch.randn(ambient, ambient, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.basis = torch.linalg.qr(gaussian).Q[:, : self.rank].contiguous()
        """(D, r) float64, P."""

    @abstractmethod
    def coordinates(self, num: int, generator: torch.Generator) -> Tensor:
        """(num, r) float64 draws of z."""

    @abstractmethod
    def posterior_coordinates(self, y: Tensor, noise: Tensor) -> Tensor:
        """E[z | y] for y = z + noise*eps, float64: (B, r) and (B,) => (B, r)."""

    @abstractmethod
    def off_coordinates(self, z: Tensor) -> Tensor:
        """Squared distance of (B, r) coordinates from those that occur; (B,)."""

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """(num, D) float32 samples."""
        return (self.coordinates(num, generator) @ self.basis.T).float()

    def posterior_mean(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_t], the best possible prediction of x0: (B, D), (B,) and (B,) => (B, D) float64."""
        y = (x_t.double() @ self.basis) / alpha.double()[:, None]
        return self.posterior_coordinates(y, sigma.double() / alpha.double()) @ self.basis.T

    def squared_distance(self, x: Tensor) -> Tensor:
        """Of each point from the nearest one of the manifold: (B, D) => (B,) float64."""
        z = x.double() @ self.basis
        across = x.double().square().sum(1) - z.square().sum(1)
        return across.clamp(min=0.0) + self.off_coordinates(z)


class Subspace(Manifold):
    """Standard normal coordinates."""

    per_dim = 1

    def coordinates(self, num: int, generator: torch.Generator) -> Tensor:
        return torch.randn(num, self.rank, dtype=torch.float64, generator=generator)

    def posterior_coordinates(self, y: Tensor, noise: Tensor) -> Tensor:
        return y / (1.0 + noise.square())[:, None]

    def off_coordinates(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[0])


class Torus(Manifold):
    """A product of closed curves, each of them in four dimensions."""

    per_dim = 4

    @staticmethod
    def curve(angles: Tensor) -> Tensor:
        """(...,) => (..., 4) with unit second moments."""
        waves = [angles.cos(), angles.sin(), (2 * angles).cos(), (2 * angles).sin()]
        return math.sqrt(2.0) * torch.stack(waves, dim=-1)

    def grid(self) -> Tensor:
        """(ANGLES, 4): the curve at equally spaced angles."""
        return self.curve(torch.arange(ANGLES, dtype=torch.float64) * (2 * math.pi / ANGLES))

    def coordinates(self, num: int, generator: torch.Generator) -> Tensor:
        angles = 2 * math.pi * torch.rand(num, self.dim, dtype=torch.float64, generator=generator)
        return self.curve(angles).flatten(1)

    def posterior_coordinates(self, y: Tensor, noise: Tensor) -> Tensor:
        """By quadrature over each angle; the angles are independent given y, as P'P = 1."""
        points = self.grid()
        gaps = self._gaps(y, points) / (-2.0 * noise.square().clamp(min=1e-9)[:, None, None])
        return (torch.softmax(gaps, dim=-1) @ points).flatten(1)

    def off_coordinates(self, z: Tensor) -> Tensor:
        """To the nearest point of the grid, which is at most 2e-3 per angle too far."""
        return self._gaps(z, self.grid()).amin(dim=-1).sum(dim=1)

    def _gaps(self, z: Tensor, points: Tensor) -> Tensor:
        """(B, r) => (B, d, ANGLES) squared distances."""
        curves = z.unflatten(1, (self.dim, self.per_dim))
        return curves.square().sum(-1, keepdim=True) - 2.0 * curves @ points.T + points.square().sum(-1)


MANIFOLDS: dict[str, Callable[[int, int, int], Manifold]] = {"subspace": Subspace, "torus": Torus}
"""Each by name, made of (ambient, dim, seed)."""
