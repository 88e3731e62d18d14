"""What goes with the images: labels in a fixed order, and the npz file that ADM's evaluation reads."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erdfast.atomic import atomic_write


def default_labels(num: int, num_classes: int, classes: Sequence[int] | None = None, first: int = 0) -> Tensor:
    """The classes in turn, so that each comes equally often (within one): (num,) int64.

    Args:
        num: number of labels, at least 0.
        num_classes: classes that the model knows.
        classes: the classes to take, in this order; None means all.
        first: how many labels come before these.

    Raises:
        ValueError: no class to choose from, a class that is no integer, or one outside 0..num_classes-1.
    """
    try:
        chosen = list(range(num_classes)) if classes is None else [operator.index(c) for c in classes]
    except TypeError as error:
        raise ValueError(f"classes must be integers, got {classes}") from error
    if num < 0:
        raise ValueError(f"num must be at least 0, got {num}")
    if not chosen:
        raise ValueError("no classes to draw from: the model is unconditional or the list is empty")
    outside = sorted({c for c in chosen if not 0 <= c < num_classes})
    if outside:
        raise ValueError(f"classes {outside} are not within 0..{num_classes - 1}")
    return torch.tensor(chosen, dtype=torch.int64)[(torch.arange(num) + first % len(chosen)) % len(chosen)]


def save_npz(path: str | os.PathLike[str], images: np.ndarray, labels: np.ndarray | Tensor | None = None) -> Path:
    """Writes `arr_0` (images) and `arr_1` (labels) as ADM's evaluation reads them; complete or not at all.

    Args:
        path: the file, which replaces one of that name; its folder is made if need be.
        images: NHWC, uint8, 1 or 3 channels; grey ones are repeated to RGB.
        labels: (N,) integers, or None for a file without `arr_1`.

    Returns:
        The path written.

    Raises:
        ValueError: another shape or dtype, or as many labels as there are not images.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(f"images must be uint8 NHWC with 1 or 3 channels, got {images.dtype} {images.shape}")
    arrays: dict[str, Any] = {"arr_0": np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images}
    if labels is not None:
        given = np.asarray(labels)
        if given.dtype.kind not in "iu":
            raise ValueError(f"labels must be integers, got {given.dtype}")
        arrays["arr_1"] = given.astype(np.int64)
        if arrays["arr_1"].shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images but labels of shape {arrays['arr_1'].shape}")
    with atomic_write(path) as stream:
        np.savez(stream, **arrays)  # numbers alone; NumPy 1.26 would store allow_pickle=False as an array
    return Path(path)
