"""Improved precision and recall (Kynkaanniemi et al. 2019) with k = 3, in tiles, as ADM reports them.

A set of features covers a point that lies within the distance of some member to its k-th nearest other member.
Precision is the share of samples that the reference covers, recall the share of the reference that the samples
cover. No more than a tile of distances exists at a time: 50,000 samples against 10,000 take 250 MB beside the
features, where all distances would take 2 GB, and those among the samples 10 GB.

ADM computes distances in float16 where they stay finite. Here they keep the type of the features, float32 at least,
which moves single samples across a border.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.group import ALONE, Group

from .inception import full_precision

NEIGHBOURS = 3
ROWS, COLUMNS = 2048, 8192
"""Of a tile: 64 MB of float32 distances, at which products of 2,048 features run at full speed."""


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


@torch.inference_mode()
def precision_recall(
    samples: Tensor,
    reference: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    tile: tuple[int, int] = (ROWS, COLUMNS),
    group: Group = ALONE,
) -> PrecisionRecall:
    """Precision and recall of samples against a reference.

    Args:
        samples: (N, D) float features.
        reference: (M, D), on the same device.
        neighbours: k.
        tile: rows and columns of the distances that exist at a time.
        group: processes that share the work; each needs all features.

    Raises:
        ValueError: shapes that do not agree, no more than k features on a side, or values that are not finite.
    """
    samples, reference = _checked(samples, reference, neighbours)
    with full_precision():
        sample_radii = neighbour_radii(samples, neighbours, tile=tile, group=group)
        reference_radii = neighbour_radii(reference, neighbours, tile=tile, group=group)
        covered_samples = torch.zeros(len(samples), dtype=torch.int32, device=samples.device)
        covered_reference = torch.zeros(len(reference), dtype=torch.int32, device=samples.device)
        for rows in _own_rows(len(samples), tile[0], group):
            for columns in _spans(len(reference), tile[1]):
                distance = squared_distances(samples[rows], reference[columns])
                covered_samples[rows] |= (distance <= reference_radii[columns]).any(1).int()
                covered_reference[columns] |= (distance <= sample_radii[rows, None]).any(0).int()
        precise, recalled = (group.all_reduce(flags) > 0 for flags in (covered_samples, covered_reference))
    return PrecisionRecall(float(precise.double().mean()), float(recalled.double().mean()))


@torch.inference_mode()
def neighbour_radii(
    features: Tensor,
    neighbours: int = NEIGHBOURS,
    *,
    tile: tuple[int, int] = (ROWS, COLUMNS),
    group: Group = ALONE,
) -> Tensor:
    """SQUARED distance of each feature to its k-th nearest other one: (N, D) => (N,) of the same type.

    Args:
        features: (N, D) with N > k; repeated features count as neighbours at distance 0.
        neighbours, tile, group: see `precision_recall`.
    """
    radii = torch.zeros(len(features), dtype=features.dtype, device=features.device)
    for rows in _own_rows(len(features), tile[0], group):
        nearest = features.new_empty(rows.stop - rows.start, 0)
        for columns in _spans(len(features), tile[1]):
            distance = squared_distances(features[rows], features[columns])
            _forget_itself(distance, rows, columns)
            near = distance.topk(min(neighbours, distance.shape[1]), dim=1, largest=False, sorted=False).values
            nearest = torch.cat([nearest, near], dim=1)
            nearest = nearest.topk(min(neighbours, nearest.shape[1]), dim=1, largest=False, sorted=False).values
        radii[rows] = nearest.amax(1)
    return group.all_reduce(radii)


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, D) and (C, D) => (R, C), at least 0.

    Around the mean of the columns: |u|^2 + |v|^2 - 2 u.v loses the digits that the norms have in common.
    """
    centre = columns.mean(0)
    u, v = rows - centre, columns - centre
    distance = torch.addmm(v.square().sum(1), u, v.T, alpha=-2.0)
    return distance.add_(u.square().sum(1, keepdim=True)).clamp_min_(0.0)


def _forget_itself(distance: Tensor, rows: slice, columns: slice) -> None:
    """A feature is no neighbour of its own: infinity on the diagonal of the whole matrix."""
    start, stop = max(rows.start, columns.start), min(rows.stop, columns.stop)
    if start < stop:
        place = torch.arange(start, stop, device=distance.device)
        distance[place - rows.start, place - columns.start] = torch.inf


def _checked(samples: Tensor, reference: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, got {neighbours}")
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(f"need features (N, D) and (M, D), got {tuple(samples.shape)} and {tuple(reference.shape)}")
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbours:
            raise ValueError(f"precision and recall need more than {neighbours} {name}, got {len(features)}")
        if not all(bool(torch.isfinite(part).all()) for part in features.split(ROWS)):  # of all it would take a copy
            raise ValueError(f"features must be finite; those of the {name} are not")
    dtype = torch.promote_types(torch.promote_types(samples.dtype, reference.dtype), torch.float32)
    return samples.to(dtype), reference.to(dtype)


def _own_rows(total: int, step: int, group: Group) -> Iterator[slice]:
    """Spans of this process: every size-th one."""
    return (span for number, span in enumerate(_spans(total, step)) if number % group.size == group.rank)


def _spans(total: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, total)) for start in range(0, total, step))
