"""Quality of generated digits (1x8x8) against the 1,797 real ones of scikit-learn, in seconds on a CPU.

The Frechet distance is taken on the 64 pixels themselves, scaled to [-1, 1] as in training. On that scale two
random halves of the real digits are 0.28 apart (0.283 with a standard deviation of 0.035 over 8 splits): a
floor for what so few images can show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erdfast.evaluation.frechet import FeatureStatistics, Gaussian

SampleDigits = Callable[[Tensor, float], Tensor]
"""(labels (N,) int64, cfg_scale) -> images (N, 1, 8, 8), pixels in [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class DigitsReport:
    """What `digits_report` measured."""

    frechet_distance: float
    """Generated against real digits, pixels in [-1, 1], without guidance."""

    frechet_distance_real_halves: float
    """The same between two halves of the real digits: about what perfect samples would get."""

    label_accuracy: float
    """Share in [0, 1] of guided samples that the classifier takes for the class asked for."""

    num_unguided: int
    """Samples behind the distance."""

    num_guided: int
    """Samples behind the accuracy."""

    cfg_scale: float
    """Guidance of the latter."""


def load_real_digits() -> tuple[Tensor, Tensor]:
    """The real digits: (1797, 1, 8, 8) float32 in [-1, 1] and (1797,) int64.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(np.asarray(pixels, dtype=np.float32) / 8.0 - 1.0)
    return images.reshape(-1, 1, 8, 8), torch.from_numpy(np.asarray(labels, dtype=np.int64))


def real_halves_distance(images: Tensor, splits: int = 8) -> float:
    """Mean distance between two random halves of the images, over fixed splits."""
    generator = torch.Generator().manual_seed(0)
    half = len(images) // 2
    distances = []
    for _ in range(splits):
        order = torch.randperm(len(images), generator=generator)
        first, second = FeatureStatistics.of(images[order[:half]]), FeatureStatistics.of(images[order[half:]])
        distances.append(first.distance(second))
    return sum(distances) / splits


def recognised_share(images: Tensor, labels: Tensor) -> float:
    """Share of images that a support vector classifier, trained on the real digits, takes for their label."""
    return float(np.mean(_classifier().predict(images.flatten(1).numpy()) == labels.numpy()))


@cache
def _classifier() -> Any:
    from sklearn.svm import SVC

    real, real_labels = load_real_digits()
    return SVC().fit(real.flatten(1).numpy(), real_labels.numpy())


class KnownDigits:
    """The real digits as something that samples are compared with batch by batch, as `digits_report` does at once.

    Raises:
        ImportError: scikit-learn is missing.
    """

    def __init__(self) -> None:
        self.gaussian: Gaussian = FeatureStatistics.of(load_real_digits()[0]).gaussian()
        """Mean and covariance of the features of real digits."""

    def features(self, images: Tensor) -> Tensor:
        """(B, 1, 8, 8) => (B, 64): the pixels, clipped to [-1, 1]."""
        return images.clamp(-1.0, 1.0).flatten(1)

    def num_recognised(self, images: Tensor, labels: Tensor) -> int:
        """How many of (B, 1, 8, 8) images look like their (B,) labels; see `recognised_share`."""
        return round(recognised_share(images.clamp(-1.0, 1.0), labels) * len(labels))


def digits_report(
    sample_digits: SampleDigits, *, num_unguided: int = 1797, num_guided: int = 500, cfg_scale: float = 2.0
) -> DigitsReport:
    """Draws digits and measures them: distance to the real ones unguided, label accuracy guided.

    Labels go in turn through the ten classes. Pixels are clipped to [-1, 1] first, as for display.

    Args:
        sample_digits: see SampleDigits; called twice, with scale 1 and `cfg_scale`. Deterministic if it is.
        num_unguided: images for the distance, at least 2; 1,797 is the number of real ones.
        num_guided: images for the accuracy, at least 1.
        cfg_scale: guidance of the latter.

    Raises:
        ValueError: too few images asked for, or images of another shape, or pixels that are not finite.
        ImportError: scikit-learn is missing.
    """
    if num_unguided < 2 or num_guided < 1:
        raise ValueError(f"need at least 2 unguided and 1 guided images, got {num_unguided} and {num_guided}")
    real, _ = load_real_digits()
    unguided = _draw(sample_digits, torch.arange(num_unguided) % 10, 1.0)
    labels = torch.arange(num_guided) % 10
    guided = _draw(sample_digits, labels, cfg_scale)
    return DigitsReport(
        frechet_distance=FeatureStatistics.of(unguided).distance(FeatureStatistics.of(real)),
        frechet_distance_real_halves=real_halves_distance(real),
        label_accuracy=recognised_share(guided, labels),
        num_unguided=num_unguided,
        num_guided=num_guided,
        cfg_scale=cfg_scale,
    )


def _draw(sample_digits: SampleDigits, labels: Tensor, cfg_scale: float) -> Tensor:
    images = sample_digits(labels, cfg_scale).detach().cpu().to(torch.float32)
    if images.shape != (len(labels), 1, 8, 8):
        raise ValueError(f"digits must be ({len(labels)}, 1, 8, 8), got {tuple(images.shape)}")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("the samples hold values that are not finite: the model has diverged")
    return images.clamp(-1.0, 1.0)
