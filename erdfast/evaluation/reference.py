"""What samples are compared with: statistics as ADM publishes them, or pictures, or statistics that we saved.

A reference that was saved holds the CRC-32 of the Inception weights: statistics of two networks are never compared.
ADM's hold none; they are of the network whose converted weights people use.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from torch import Tensor

from erdfast.atomic import atomic_write
from erdfast.data.rows import Loaders

from .features import Summary, Wanted
from .files import open_arrays, read_array
from .frechet import Gaussian
from .inception import POOL_FEATURES, SPATIAL_FEATURES

STATISTICS = {"fid": ("mu", "sigma", POOL_FEATURES), "sfid": ("mu_s", "sigma_s", SPATIAL_FEATURES)}
"""Arrays of mean and covariance, and their size, by metric."""
_COUNT, _CRC, _POOL = "count", "inception_crc32", "pool"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One side of the comparison; None where the metrics do not need it."""

    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    features: Tensor | None = None
    """(M, 2048) float32 pooled features."""

    def check(self) -> None:
        """Raise ValueError for a matrix that is no covariance, before the samples are read."""
        for gaussian in (self.pool, self.spatial):
            if gaussian is not None:
                _ = gaussian.factor


def read_reference(path: Path, metrics: tuple[str, ...], inception_crc32: int) -> tuple[Reference, Wanted]:
    """What a file holds of what some metrics need, and what its pictures must still be asked for.

    Args:
        path: of `files`' table, but no features.
        metrics: of `METRICS`.
        inception_crc32: of the weights in use.

    Raises:
        ValueError: damaged, of another network, or without something that a metric needs; names the file.
    """
    arrays = open_arrays(path)
    count = _check_origin(path, arrays, inception_crc32)
    found: dict[str, Gaussian] = {}
    for metric, (mean, covariance, size) in STATISTICS.items():
        if metric in metrics and mean in arrays and covariance in arrays:
            mu, sigma = read_array(path, arrays, mean, (size,)), read_array(path, arrays, covariance, (size, size))
            found[metric] = Gaussian(mu.double(), sigma.double(), count)
    by_neighbours = "precision" in metrics or "recall" in metrics
    features = None
    if by_neighbours and _POOL in arrays:
        features = read_array(path, arrays, _POOL, (None, POOL_FEATURES)).float()
    has_statistics = "mu" in arrays
    missing = [name for name in STATISTICS if name in metrics and name not in found]
    if missing and (has_statistics or "arr_0" not in arrays):
        # Statistics of one kind from the file and of the other from its pictures would be of different sets.
        _refuse(path, arrays, missing[0], " and ".join(map(repr, STATISTICS[missing[0]][:2])))
    if by_neighbours and features is None and "arr_0" not in arrays:
        _refuse(path, arrays, "precision and recall", "pictures 'arr_0' or features 'pool'")
    wanted = Wanted(pool="fid" in missing, spatial="sfid" in missing, features=by_neighbours and features is None)
    return Reference(pool=found.get("fid"), spatial=found.get("sfid"), features=features), wanted


def complete(reference: Reference, summary: Summary) -> Reference:
    """A reference with what its pictures gave."""
    return Reference(
        pool=reference.pool or summary.pool,
        spatial=reference.spatial or summary.spatial,
        features=summary.features if reference.features is None else reference.features,
    )


def save_reference(path: Path, reference: Reference, inception_crc32: int) -> None:
    """Write an .npz that `read_reference` reads, and ADM's evaluator too where it holds both statistics.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {_CRC: np.array([inception_crc32], dtype=np.int64)}
    for metric, gaussian in (("fid", reference.pool), ("sfid", reference.spatial)):
        if gaussian is not None:
            mean, covariance, _ = STATISTICS[metric]
            arrays[mean], arrays[covariance] = gaussian.mean.numpy(), gaussian.covariance.numpy()
            if gaussian.count is not None:
                arrays[_COUNT] = np.array([gaussian.count], dtype=np.int64)
    if reference.features is not None:
        arrays[_POOL] = reference.features.numpy()
    with atomic_write(path) as stream:
        np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]


def _check_origin(path: Path, arrays: Loaders, inception_crc32: int) -> int | None:
    """Samples behind the statistics, where the file says so."""
    if _CRC in arrays:
        saved = int(read_array(path, arrays, _CRC, (1,)))
        if saved != inception_crc32:
            raise ValueError(
                f"{path}: was computed with other Inception weights (CRC-32 {saved:08x}) than those in use "
                f"({inception_crc32:08x}): compute it again from the pictures with --save-reference"
            )
    return int(read_array(path, arrays, _COUNT, (1,))) if _COUNT in arrays else None


def _refuse(path: Path, arrays: Loaders, metric: str, needed: str) -> NoReturn:
    raise ValueError(f"{path}: {metric} needs {needed}, but it holds only {', '.join(sorted(arrays)) or 'nothing'}")
