"""Inception score: how sure a classifier is of each picture, and how many classes all of them show.

    IS = exp( mean_i sum_c p_ic (log p_ic - log pbar_c) ),  pbar = mean_i p_i

(Salimans et al. 2016.) As ADM reports it: the mean over groups of 5,000 pictures in their order, each with its own
pbar, of probabilities from logits without the bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from erdfast.group import Group

SPLIT_SIZE = 5000
"""Pictures per group; the last group may be smaller."""


class InceptionScore:
    """Sums from which the score follows, for probabilities that come in pieces and in any order.

    Args:
        total: pictures that will come.
        num_classes: C.
        split_size: pictures per group.
        device: where the sums are kept (float64).
    """

    def __init__(
        self,
        total: int,
        num_classes: int,
        split_size: int = SPLIT_SIZE,
        device: torch.device | str = "cpu",
    ) -> None:
        if min(total, num_classes, split_size) < 1:
            raise ValueError(
                f"total, num_classes and split_size must be at least 1, got {total}, {num_classes}, {split_size}"
            )
        self._split_size = split_size
        groups = math.ceil(total / split_size)
        self._sums = torch.zeros(groups, num_classes + 2, dtype=torch.float64, device=device)
        """Per group: sum of p, then of sum_c p log p, then pictures."""

    def update(self, probabilities: Tensor, indices: Tensor) -> None:
        """Adds pictures.

        Args:
            probabilities: (B, C), rows that sum to 1.
            indices: (B,) int64, their places among all pictures, which decide their groups.

        Raises:
            ValueError: another number of classes, or rows that are no probabilities.
        """
        p = probabilities.to(self._sums)
        if p.ndim != 2 or p.shape[1] != self._sums.shape[1] - 2:
            raise ValueError(f"probabilities must be (N, {self._sums.shape[1] - 2}), got {tuple(p.shape)}")
        if not bool(((p.sum(1) - 1.0).abs() < 1e-3).all() and (p >= 0.0).all()):
            raise ValueError("probabilities must be at least 0 and their rows sum to 1")
        negative_entropy = torch.special.xlogy(p, p).sum(1, keepdim=True)  # 0 log 0 = 0
        rows = torch.cat([p, negative_entropy, torch.ones_like(negative_entropy)], dim=1)
        self._sums.index_add_(0, indices.to(self._sums.device) // self._split_size, rows)

    def join_processes(self, group: Group) -> None:
        """Adds what the other processes have seen, in each of them; all must call it."""
        if group.size > 1:
            group.all_reduce(self._sums)

    def value(self) -> float:
        """The score, from 1 to C.

        Raises:
            ValueError: no pictures have come.
        """
        sums = self._sums[self._sums[:, -1] > 0]
        if not len(sums):
            raise ValueError("an Inception score needs pictures")
        means = sums / sums[:, -1:]
        mean_p = means[:, :-2]
        divergence = means[:, -2] - torch.special.xlogy(mean_p, mean_p).sum(1)
        return float(divergence.exp().mean())


def inception_score(probabilities: Tensor, split_size: int = SPLIT_SIZE) -> float:
    """The score of (N, C) probabilities, in the order of the pictures.

    Raises:
        ValueError: see `InceptionScore`.
    """
    if probabilities.ndim != 2 or not len(probabilities):
        raise ValueError(f"probabilities must be (N, C), got {tuple(probabilities.shape)}")
    score = InceptionScore(len(probabilities), probabilities.shape[1], split_size, probabilities.device)
    score.update(probabilities, torch.arange(len(probabilities)))
    return score.value()
