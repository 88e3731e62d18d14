"""What every data set offers, and how its samples become pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .source import VaeUnits

Shape = tuple[int, int, int]
"""(C, H, W) of what the network denoises."""

_PROBE_ROWS = 64


class Batch(NamedTuple):
    """Some samples of a data set, on the CPU."""

    x: Tensor
    """(B, C, H, W) clean data, or (B, 2C, H, W) = [mean, standard deviation] where `moments_scale` is given; float32,
    or bfloat16 or float16 where they are stored so: the ops compute in float32."""

    y: Tensor
    """(B,) int64 labels in 0..num_classes-1; all zero where the data has no labels."""

    moments_scale: float | None = None
    """Where x holds VAE moments: the factor that brings a draw of the posterior to the network's scale."""


class Dataset(ABC):
    """N samples addressed by index; sample i never changes."""

    shape: Shape
    """(C, H, W)."""

    num_classes: int
    """Number of labels; 0 for data without labels."""

    has_flips: bool = False
    """Whether samples can be had mirrored: pixels, and latents that are stored with their mirror images."""

    vae_units: VaeUnits | None = None
    """Of latents: how they come from a VAE's own, where the data say it."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def gather(self, indices: Tensor, flips: Tensor | None = None) -> Batch:
        """The samples at `indices` ((B,) int64 on the CPU, 0..N-1, repeats allowed), in that order.

        `flips`, (B,) bool, says which are mirrored from left to right, where `has_flips`.

        Raises:
            ValueError: indices of another type, or not on the CPU.
            IndexError: an index outside 0..N-1.
        """

    @abstractmethod
    def describe(self) -> str:
        """One line for people: how many, what shape, how many classes, which scale."""

    @property
    def class_names(self) -> list[str]:
        """One short name per label; empty for data without labels."""
        return [str(label) for label in range(self.num_classes)]

    def to_images(self, x: Tensor) -> np.ndarray:
        """Pictures of x, (B, C, H, W) float: (B, H, W, 1 or 3) uint8.

        Pixel data overrides this with its exact scale. Here, for latents: the first three channels become
        red, green and blue (with fewer channels, a grey picture of the first), each mapped from the range
        that holds the central 98% of the data set's own values. The range is fixed, so that pictures of
        different steps can be compared.
        """
        x = check_images(x, self.shape)
        low, high = self._display_range
        channels = low.numel()
        scaled = (x[:, :channels] - low.view(1, -1, 1, 1)) / (high - low).view(1, -1, 1, 1)
        return unit_to_uint8(scaled)

    @cached_property
    def _display_range(self) -> tuple[Tensor, Tensor]:
        channels = 3 if self.shape[0] >= 3 else 1
        batch = self.gather(spread(len(self)))
        values = batch.x[:, :channels].float() * (1.0 if batch.moments_scale is None else batch.moments_scale)
        flat = values.transpose(0, 1).reshape(channels, -1).numpy()
        low, high = np.quantile(flat, [0.01, 0.99], axis=1)
        high = np.maximum(high, low + 1e-6)  # a constant channel must not divide by zero
        return torch.from_numpy(low).float(), torch.from_numpy(high).float()


def spread(size: int) -> Tensor:
    """Some indices from 0 to size-1, evenly spread: what is looked at in place of everything. (B,) int64."""
    return torch.linspace(0, size - 1, min(size, _PROBE_ROWS)).long()


def unit_to_uint8(x: Tensor) -> np.ndarray:
    """(B, C, H, W) float, [0, 1] (outside is clipped, NaN becomes 0) => (B, H, W, C) uint8, rounded to
    nearest."""
    bytes_ = (x.float() * 255.0).round().clamp(0, 255).nan_to_num(0.0).to(torch.uint8)
    return bytes_.permute(0, 2, 3, 1).contiguous().numpy()


def check_images(x: Tensor, shape: Shape) -> Tensor:
    """x as float32 on the CPU; ValueError unless it is (B, *shape)."""
    if x.ndim != 4 or tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"expected samples of shape (B, {format_shape(shape, ', ')}), got {tuple(x.shape)}")
    return x.detach().to("cpu", torch.float32)


def check_indices(indices: Tensor, size: int) -> Tensor:
    """`indices` itself, once it is known to be (B,) int64 on the CPU within 0..size-1."""
    if indices.dtype != torch.int64 or indices.device.type != "cpu" or indices.ndim != 1:
        raise ValueError(
            "indices must be a one-dimensional int64 tensor on the CPU, "
            f"got {indices.dtype} of shape {tuple(indices.shape)} on {indices.device}"
        )
    if indices.numel() and not (int(indices.min()) >= 0 and int(indices.max()) < size):
        raise IndexError(f"indices must be in 0..{size - 1}, got {int(indices.min())}..{int(indices.max())}")
    return indices


def format_shape(shape: tuple[int, ...], separator: str = "x") -> str:
    """(4, 32, 32) => "4x32x32"."""
    return separator.join(str(side) for side in shape)


def format_classes(num_classes: int) -> str:
    """10 => "10 classes", 0 => "no labels"."""
    return {0: "no labels", 1: "1 class"}.get(num_classes, f"{num_classes:,} classes")
