"""From pictures to what the metrics need of them, batch by batch, in one process or several.

Nothing is kept of a batch but sums, unless precision and recall ask for the features themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from erdfast.data.rows import Rows
from erdfast.group import ALONE, Group

from .frechet import FeatureStatistics, Gaussian
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


class ImageSums:
    """What is taken from pictures that come batch by batch, in any order, in one process or several.

    Args:
        total: pictures that will come, of all processes together.
        network: from `load_inception`.
        wanted: what to take.
        device: where the network is.
    """

    def __init__(
        self, total: int, network: InceptionNetwork, wanted: Wanted, device: torch.device | str = "cpu"
    ) -> None:
        self._total, self._network, self._device = total, network, device
        self._pool = FeatureStatistics(network.pool_features, device) if wanted.pool else None
        self._spatial = FeatureStatistics(network.spatial_features, device) if wanted.spatial else None
        self._score = InceptionScore(total, network.num_logits, device=device) if wanted.score else None
        self._kept = torch.zeros(total, network.pool_features) if wanted.features else None

    @torch.inference_mode()
    def add(self, pictures: Tensor, indices: Tensor) -> None:
        """Run the network over some pictures.

        Args:
            pictures: (B, H, W, 3) uint8.
            indices: (B,) int64 on the CPU, their places among all pictures.

        Raises:
            ValueError: features that are not finite (damaged weights).
        """
        images = pictures.to(self._device, non_blocking=True).permute(0, 3, 1, 2)
        with full_precision():
            features = self._network(images)
            logits = self._network.logits_unbiased(features.pool)
        if not bool(torch.isfinite(features.pool).all()):
            raise ValueError(
                f"features of pictures {int(indices[0])} to {int(indices[-1])} are not finite: "
                "the weights of the Inception network are damaged"
            )
        if self._pool is not None:
            self._pool.update(features.pool)
        if self._spatial is not None:
            self._spatial.update(features.spatial)
        if self._score is not None:
            self._score.update(logits.double().softmax(1), indices)
        if self._kept is not None:
            self._kept[indices] = features.pool.float().cpu()

    def joined(self, group: Group = ALONE) -> Summary:
        """The summary of all processes' pictures, the same in each of them; all must call it.

        Raises:
            ValueError: a single picture where a covariance is wanted.
        """
        if group.size > 1:
            for statistics in (self._pool, self._spatial):
                if statistics is not None:
                    statistics.join_processes(group.all_reduce)
            if self._score is not None:
                self._score.join_processes(group)
            if self._kept is not None:
                group.all_reduce(self._kept)  # each row is zero in all processes but one
        return Summary(
            count=self._total,
            pool=None if self._pool is None else self._pool.gaussian(),
            spatial=None if self._spatial is None else self._spatial.gaussian(),
            score=None if self._score is None else self._score.value(),
            features=self._kept,
        )


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
    sums = ImageSums(len(images), network, wanted, device)
    for indices in own_batches(len(images), batch_size, group):
        sums.add(images.take(indices), indices)
        if progress is not None:
            progress(min(len(indices) * group.size, len(images)))
    return sums.joined(group)


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
