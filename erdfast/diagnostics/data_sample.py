"""Some samples of a data set as rows of numbers: what estimates are made from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.data import Dataset, open_dataset

MOST_ELEMENTS = 2**27
"""Numbers held at most (512 MiB): fewer samples are taken of large pictures."""


class Sample(NamedTuple):
    """Rows drawn without replacement, and where they are from."""

    x: Tensor
    """(M, D) float32; of latents that are stored as moments, one draw of the posterior each."""

    dataset: Dataset

    described: str
    """How many of what: "10,000 of 50,000 latents 4x32x32, ..."."""


def draw_sample(spec: str, num: int, *, seed: int, latent_scale: str = "auto", at_least: int = 2) -> Sample:
    """Open data as `erdfast.train` does with --data, and draw rows.

    Args:
        spec: see `erdfast.data.open_dataset`.
        num: rows wanted; all there are, and fewer of large pictures, where there are not so many.
        seed: which rows, and the noise of posteriors.
        latent_scale: see `erdfast.data.open_dataset`.
        at_least: rows without which estimates mean nothing.

    Raises:
        ValueError: unknown or unreadable data, too few samples, or samples that are all equal or not finite.
        ImportError: a package that the data need is missing.
    """
    dataset = open_dataset(spec, seed=seed, latent_scale=latent_scale)
    width = torch.Size(dataset.shape).numel()
    num = min(num, len(dataset), max(MOST_ELEMENTS // width, at_least))
    if num < at_least:
        raise ValueError(f"data {spec}: {num:,} samples are too few, estimates need {at_least:,} or more")
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(dataset), generator=generator)[:num].sort().values
    batch = dataset.gather(indices)
    x = batch.x.float()
    if batch.moments_scale is not None:
        mean, std = x.chunk(2, dim=1)
        x = batch.moments_scale * (mean + std * torch.randn(mean.shape, generator=generator))
    x = x.flatten(1)
    if not bool(x.isfinite().all()):
        raise ValueError(f"data {spec}: holds numbers that are not finite")
    if bool((x == x[:1]).all()):
        raise ValueError(f"data {spec}: all {num:,} samples are equal, there is nothing to estimate")
    return Sample(x, dataset, f"{num:,} of {dataset.describe()}")


def row_groups(x: Tensor) -> Tensor:
    """(M,) int64: the same number for identical rows of (M, D), counted from 0 by first appearance."""
    known: dict[bytes, int] = {}
    # Adding 0 makes -0.0 equal to 0.0 in bytes too.
    return torch.tensor([known.setdefault(row.tobytes(), len(known)) for row in (x + 0.0).numpy()])


def distinct_rows(x: Tensor) -> Tensor:
    """The first of each set of identical rows, in order."""
    groups = row_groups(x)
    first = torch.ones_like(groups, dtype=torch.bool)
    first[1:] = groups[1:] > groups.cummax(0).values[:-1]
    return x[first]
