"""The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn: real data without a download."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .dataset import Batch, Dataset, Shape, check_images, check_indices, unit_to_uint8


class Digits(Dataset):
    """scikit-learn's `load_digits`: grey values 0..16 mapped to [-1, 1], labels 0..9.

    Raises:
        ImportError: scikit-learn is not installed.
    """

    shape: Shape = (1, 8, 8)
    num_classes: int = 10

    def __init__(self) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError(
                "the embedded digits come with scikit-learn: run `pip install scikit-learn`, or choose other data"
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        values = np.asarray(pixels, dtype=np.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
        self._x = torch.from_numpy(values)
        self._y = torch.from_numpy(np.asarray(labels, dtype=np.int64))

    def __len__(self) -> int:
        return self._x.shape[0]

    def gather(self, indices: Tensor) -> Batch:
        """See `Dataset.gather`; x in [-1, 1]."""
        indices = check_indices(indices, len(self))
        return Batch(self._x[indices], self._y[indices])

    def describe(self) -> str:
        """See `Dataset.describe`."""
        return f"{len(self):,} images 1x8x8, 10 classes, scaled to [-1, 1] (embedded digits)"

    def to_images(self, x: Tensor) -> np.ndarray:
        """(B, 1, 8, 8) in [-1, 1] => (B, 8, 8, 1) uint8."""
        return unit_to_uint8((check_images(x, self.shape) + 1.0) / 2.0)
