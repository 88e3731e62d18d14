"""Intrinsic dimension of a set of points, from distances to nearest neighbours and from the covariance's spectrum.

Near a point of a d-dimensional set the number of neighbours within r grows as r^d, so that log(T_k/T_j), of distances
T_j to the j-th neighbour, is a sum of independent exponential variables:

    two-NN (Facco et al., 2017)         mu = T_2/T_1, P(mu > m) = m^-d: by a line through the origin over log mu, or
                                        by maximum likelihood; the largest ratios are left out of both
    Levina & Bickel (2004), averaged    1/d = mean over points and j < k of log(T_k/T_j), then the mean of d over a
    as MacKay & Ghahramani (2005) say   range of k

All say too little where d is large: the nearest of M points are then too far away to be near. They say too much where
the set bends, or has noise across it, at the scale of those distances. Distances must not be 0: rows that occur more
than once are to be counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PARTS = 8
"""Disjoint parts of the points, whose spread gives the standard error."""
ESTIMATORS = ("two-NN fit", "two-NN MLE", "Levina-Bickel")


class Estimate(NamedTuple):
    """A number and its standard error."""

    value: float
    error: float


def least_points(largest: int) -> int:
    """Points that estimates with neighbours up to the `largest`-th need: two parts, each with twice as many."""
    return 4 * (largest + 1)


def neighbour_distances(x: Tensor, neighbours: int) -> Tensor:
    """Distances to the nearest other points: (M, D) => (M, neighbours) float64, rising along a row.

    Raises:
        ValueError: fewer points than that, or points that coincide.
        ImportError: scikit-learn is missing.
    """
    from sklearn.neighbors import NearestNeighbors

    if not 1 <= neighbours < x.shape[0]:
        raise ValueError(f"{x.shape[0]:,} points have no {neighbours} nearest neighbours")
    found = NearestNeighbors(n_neighbors=neighbours).fit(x.numpy()).kneighbors()[0]
    distances = torch.from_numpy(found).double()
    if not float(distances[:, 0].min()) > 0:
        raise ValueError("some points coincide: count identical rows once")
    return distances


def two_nn_fit(distances: Tensor, discard: float = 0.1) -> float:
    """The slope of -log(1 - F) over log mu, through the origin, without the largest ratios.

    Args:
        distances: (M, 2 or more).
        discard: share of ratios left out, in [0, 1).
    """
    ratios, kept = _two_nn_ratios(distances, discard)
    # F of the i-th of M is i/M in the paper; its last value, 1, has no logarithm and is left out by any discard.
    rank = torch.arange(1, kept + 1, dtype=torch.float64).clamp(max=ratios.shape[0] - 0.5)
    heights = -torch.log1p(-rank / ratios.shape[0])
    ratios = ratios[:kept]
    return float((ratios * heights).sum() / ratios.square().sum())


def two_nn_mle(distances: Tensor, discard: float = 0.1) -> float:
    """(m-1) / (sum of the m smallest log mu + (M-m) times their largest): without bias for exponential variables of
    which those beyond the m-th are known to be larger. Arguments as for `two_nn_fit`."""
    ratios, kept = _two_nn_ratios(distances, discard)
    total = ratios[:kept].sum() + (ratios.shape[0] - kept) * ratios[kept - 1]
    return float((kept - 1) / total)


def _two_nn_ratios(distances: Tensor, discard: float) -> tuple[Tensor, int]:
    """Sorted log mu, and how many are kept."""
    if not 0.0 <= discard < 1.0:
        raise ValueError(f"discard={discard} must be at least 0 and below 1")
    ratios = (distances[:, 1] / distances[:, 0]).log().sort().values
    kept = max(round((1.0 - discard) * ratios.shape[0]), 2)
    if not float(ratios[:kept].sum()) > 0:
        raise ValueError("the first and second neighbours of nearly all points are equally far: two-NN has no answer")
    return ratios, kept


def levina_bickel(distances: Tensor) -> Tensor:
    """d by number of neighbours, MacKay and Ghahramani's average: (M, K) => (K,) float64, NaN for the first alone."""
    logs = distances.log()
    counts = torch.arange(distances.shape[1], dtype=torch.float64)
    before = logs.cumsum(1) - logs  # of all nearer ones
    inverse = ((counts * logs - before) / counts).mean(0)
    return 1.0 / inverse


def estimate_once(x: Tensor, neighbours: tuple[int, int], discard: float = 0.1) -> dict[str, float]:
    """Each of ESTIMATORS on the same points: (M, D), no two the same.

    Args:
        neighbours: the range of k of Levina-Bickel, both ends included, from 2.
        discard: see `two_nn_fit`.

    Raises:
        ValueError: too few points, or points that coincide.
    """
    distances = neighbour_distances(x, max(neighbours[1], 2))
    by_count = levina_bickel(distances)[neighbours[0] - 1 : neighbours[1]]
    values = (two_nn_fit(distances, discard), two_nn_mle(distances, discard), float(by_count.mean()))
    return dict(zip(ESTIMATORS, values, strict=True))


def estimates_by_size(
    x: Tensor, neighbours: tuple[int, int], *, discard: float = 0.1, seed: int = 0
) -> dict[int, dict[str, Estimate]]:
    """The estimators on all points and on halves, quarters ... of them, down to PARTS parts.

    A standard error is the standard deviation over the PARTS disjoint parts, brought to the number of points by its
    square root. Unlike a bootstrap's, it knows that neighbours are shared, and never sees a point twice. Of sizes below
    the whole, the value is the mean over the parts.

    Args:
        x: (M, D), no two rows the same; with fewer than `least_points` of a part's, there are fewer parts.
        seed: of the parts.

    Returns:
        By number of points, the largest last.

    Raises:
        ValueError: too few points, or points that coincide.
    """
    needed = least_points(neighbours[1])
    if x.shape[0] < needed:
        raise ValueError(
            f"{x.shape[0]:,} distinct samples are too few for neighbours up to {neighbours[1]}: "
            f"{needed:,} or more are needed"
        )
    mixed = x[torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))]
    most = PARTS
    while x.shape[0] // most < needed // 2:
        most //= 2
    found: dict[int, dict[str, Estimate]] = {}
    spread: dict[str, float] = {}
    parts = most
    while parts:
        size = x.shape[0] // parts
        each = [estimate_once(mixed[i * size : (i + 1) * size], neighbours, discard) for i in range(parts)]
        if parts == most:
            spread = {name: _deviation([one[name] for one in each]) * size**0.5 for name in ESTIMATORS}
        found[size] = {
            name: Estimate(sum(one[name] for one in each) / parts, spread[name] / (parts * size) ** 0.5)
            for name in ESTIMATORS
        }
        parts //= 2
    return found


def _deviation(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).std())


def spectrum(x: Tensor) -> Tensor:
    """Eigenvalues of the covariance, the largest first: (M, D) => (min(M-1, D),) float64, at least 0."""
    centred = x.double() - x.double().mean(0)
    rows, columns = centred.shape
    gram = centred.T @ centred if columns < rows else centred @ centred.T
    values = torch.linalg.eigvalsh(gram / (rows - 1)).flip(0)
    return values[: min(rows - 1, columns)].clamp(min=0.0)


def participation_ratio(variances: Tensor) -> float:
    """(sum v)^2 / sum v^2: how many directions share the variance, if it were equal among them."""
    return float(variances.sum().square() / variances.square().sum())


def components_for(variances: Tensor, share: float) -> int:
    """The least number of principal components with this share of the variance, in (0, 1)."""
    reached = variances.cumsum(0) >= share * variances.sum()
    return int(reached.double().argmax()) + 1
