"""From pictures to what the metrics need of them, batch by batch, in one process or several.

Nothing is kept of a batch but sums, unless precision and recall ask for the features themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erdfast.data.rows import Rows

from .frechet import FeatureStatistics, Gaussian
from .group import ALONE, Group
from .inception import InceptionNetwork, full_precision
from .inception_score import InceptionScore

Progress = Callable[[int], object]
"""Is told how many samples more are done, of all processes together."""
_FEATURE_BATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to take from a set of pictures."""

    pool: bool = False
    """Mean and covariance of the pooled features (FID)."""
    spatial: bool = False
    """The same of the spatial ones (sFID)."""
    score: bool = False
    """Inception score."""
    features: bool = False
    """The pooled features themselves (precision and recall): 8 KB a picture."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was taken; None where it was not wanted."""

    count: int
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    score: float | None = None
    features: Tensor | None = None
    """(N, 2048) float32 on the CPU, in the order of the pictures."""


@torch.inference_mode()
def summarise_images(
    images: Rows,
    network: InceptionNetwork,
    wanted: Wanted,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    progress: Progress | None = None,
) -> Summary:
    """Run the network over pictures and sum up its features.

    Args:
        images: rows of (H, W, 3) uint8.
        network: on `device`, from `load_inception`.
        wanted: what to take.
        batch_size: pictures at a time in this process.
        group: processes that share the batches; all get the whole result.
        progress: told after every batch.

    Raises:
        ValueError: features that are not finite (damaged weights), or a single picture where a covariance is wanted.
    """
    total = len(images)
    pool = FeatureStatistics(network.pool_features, device) if wanted.pool else None
    spatial = FeatureStatistics(network.spatial_features, device) if wanted.spatial else None
    score = InceptionScore(total, network.num_logits, device=device) if wanted.score else None
    kept = torch.zeros(total, network.pool_features) if wanted.features else None
    for indices in own_batches(total, batch_size, group):
        pictures = images.take(indices).to(device, non_blocking=True).permute(0, 3, 1, 2)
        with full_precision():
            features = network(pictures)
            logits = network.logits_unbiased(features.pool)
        if not bool(torch.isfinite(features.pool).all()):
            raise ValueError(
                f"features of pictures {int(indices[0])} to {int(indices[-1])} are not finite: "
                "the weights of the Inception network are damaged"
            )
        if pool is not None:
            pool.update(features.pool)
        if spatial is not None:
            spatial.update(features.spatial)
        if score is not None:
            score.update(logits.double().softmax(1), indices)
        if kept is not None:
            kept[indices] = features.pool.float().cpu()
        if progress is not None:
            progress(min(len(indices) * group.size, total))
    return _joined(total, pool, spatial, score, kept, group)


def _joined(
    total: int,
    pool: FeatureStatistics | None,
    spatial: FeatureStatistics | None,
    score: InceptionScore | None,
    kept: Tensor | None,
    group: Group,
) -> Summary:
    """The same result in all processes."""
    if group.size > 1:
        for statistics in (pool, spatial):
            if statistics is not None:
                statistics.join_processes(group.all_reduce)
        if score is not None:
            score.join_processes(group)
        if kept is not None:
            group.all_reduce(kept)  # each row is zero in all processes but one
    return Summary(
        count=total,
        pool=None if pool is None else pool.gaussian(),
        spatial=None if spatial is None else spatial.gaussian(),
        score=None if score is None else score.value(),
        features=kept,
    )


@torch.inference_mode()
def summarise_features(
    rows: Rows,
    *,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
    progress: Progress | None = None,
) -> Gaussian:
    """Mean and covariance of features that exist already, each sample flattened.

    Raises:
        ValueError: fewer than two, or values that are not finite.
    """
    statistics = FeatureStatistics(max(1, torch.Size(rows.shape).numel()), device)
    for indices in own_batches(len(rows), _FEATURE_BATCH, group):
        statistics.update(rows.take(indices).flatten(1))
        if progress is not None:
            progress(min(len(indices) * group.size, len(rows)))
    if group.size > 1:
        statistics.join_processes(group.all_reduce)
    return statistics.gaussian()


def own_batches(total: int, batch_size: int, group: Group = ALONE) -> Iterator[Tensor]:
    """Indices (B,) int64 of the batches that are this process's: every size-th one.

    Raises:
        ValueError: batch_size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for start in range(group.rank * batch_size, total, group.size * batch_size):
        yield torch.arange(start, min(start + batch_size, total))
