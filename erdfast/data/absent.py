"""The shape and the classes of data that are not here: what a published checkpoint was trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .dataset import Batch, Dataset, Shape, check_images, check_indices, format_classes, format_shape, unit_to_uint8

_SHOWN = (-3.0, 3.0)
"""Range of latents in false colours; published latents have about unit variance."""


class AbsentData(Dataset):
    """No samples: for drawing pictures from a network whose data nobody gave.

    Args:
        shape: (C, H, W); of 1 or 3 channels they are pixels in [-1, 1], else latents.
        num_classes: 0 for none.
    """

    def __init__(self, shape: Shape, num_classes: int) -> None:
        self.shape, self.num_classes = shape, num_classes
        self.kind = "pixels" if shape[0] in (1, 3) else "latents"

    def __len__(self) -> int:
        return 0

    def gather(self, indices: Tensor, flips: Tensor | None = None) -> Batch:
        check_indices(indices, 0)
        return Batch(torch.zeros(0, *self.shape), torch.zeros(0, dtype=torch.int64))

    def describe(self) -> str:
        return f"{self.kind} {format_shape(self.shape)}, {format_classes(self.num_classes)}, not here"

    def to_images(self, x: Tensor) -> np.ndarray:
        """Pixels: [-1, 1] => uint8; latents: their first three channels as red, green and blue."""
        x = check_images(x, self.shape)
        low, high = (-1.0, 1.0) if self.kind == "pixels" else _SHOWN
        return unit_to_uint8((x[:, : 3 if self.shape[0] >= 3 else 1] - low) / (high - low))
