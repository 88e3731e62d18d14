"""The metrics by name: what each needs of the samples, and its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from erdfast.group import ALONE, Group
from erdfast.monitoring import PICTURE_METRICS

from .features import Summary, Wanted
from .precision_recall import precision_recall
from .reference import Reference


class Metric(NamedTuple):
    """How a metric is shown."""

    title: str
    decimals: int
    better: str
    """"lower" or "higher"."""


METRICS: dict[str, Metric] = {
    "fid": Metric("FID", 4, "lower"),
    "sfid": Metric("sFID", 4, "lower"),
    "is": Metric("IS", 4, "higher"),
    "precision": Metric("precision", 4, "higher"),
    "recall": Metric("recall", 4, "higher"),
    "fd": Metric("FD", 4, "lower"),
    "accuracy": Metric("accuracy", 4, "higher"),
}
"""fid to recall as ADM defines them (Dhariwal and Nichol 2021), of pictures; fd of features of any network, with
precision and recall of the same features; accuracy of the labels that a classifier of digits gives."""
KINDS: dict[str, tuple[str, ...]] = {
    "pictures": PICTURE_METRICS,
    "features": ("fd", "precision", "recall"),
    "digits": ("fd", "precision", "recall", "accuracy"),
}
"""What can be measured of what."""


def check_metrics(metrics: Sequence[str], kind: str = "pictures") -> None:
    """Raise ValueError for an unknown, repeated or missing metric, or one that is not of this kind (of KINDS)."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"unknown metric '{name}'; choose from {', '.join(METRICS)}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics are {list(metrics)}; name each once, out of {', '.join(KINDS[kind])}")
    for name in metrics:
        if name not in KINDS[kind]:
            sets = "; ".join(f"of {key} {', '.join(names)}" for key, names in KINDS.items())
            raise ValueError(f"metric {name} is not of {kind}: there are {sets}. Measure them apart")


def wanted_of_samples(metrics: Sequence[str]) -> Wanted:
    """What to take from pictures for some metrics."""
    return Wanted(
        pool="fid" in metrics,
        spatial="sfid" in metrics,
        score="is" in metrics,
        features="precision" in metrics or "recall" in metrics,
    )


def measure(
    summary: Summary,
    reference: Reference,
    metrics: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    group: Group = ALONE,
) -> dict[str, float]:
    """Values by metric, in the order asked for.

    Args:
        summary: of the samples, with what `wanted_of_samples` says.
        reference: with the same kinds.
        metrics: of PICTURE_METRICS.
        device: where distances between features are computed; all else is float64 on the CPU.
        group: processes that share those; all must call it.

    Raises:
        ValueError: too few samples, or a reference whose covariance is none.
    """
    values: dict[str, float] = {}
    sides = {"fid": (summary.pool, reference.pool), "sfid": (summary.spatial, reference.spatial)}
    for name, (ours, theirs) in sides.items():
        if name in metrics:
            assert ours is not None
            assert theirs is not None
            values[name] = _of_first(group, partial(ours.distance, theirs))
    if "is" in metrics:
        assert summary.score is not None
        values["is"] = summary.score
    if "precision" in metrics or "recall" in metrics:
        assert summary.features is not None
        assert reference.features is not None
        shares = precision_recall(summary.features.to(device), reference.features.to(device), group=group)
        values |= shares._asdict()
    return {name: values[name] for name in metrics}


def _of_first(group: Group, compute: Callable[[], float]) -> float:
    """What the first process computes, in all of them: decompositions on the same cores would only take turns."""
    value, failed = 0.0, None
    if group.rank == 0:
        try:
            value = compute()
        except ValueError as error:  # the others wait for this one
            failed = error
    found = group.all_reduce(torch.tensor([value, float(failed is not None)], dtype=torch.float64))
    if found[1]:
        raise ValueError(str(failed) if failed else "the first process could not compute a distance") from failed
    return float(found[0])


def warnings_of(summary: Summary) -> list[str]:
    """What to tell people about distances from too few samples."""
    sides = (("FID", summary.pool), ("sFID", summary.spatial))
    return [f"{name}: {side.warning}" for name, side in sides if side is not None and side.warning]
