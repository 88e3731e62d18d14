"""Data from files and folders, memory-mapped where they allow it: what formats.py finds, checked."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dataset import (
    Batch,
    Dataset,
    Shape,
    check_images,
    check_indices,
    format_classes,
    format_shape,
    spread,
    unit_to_uint8,
)
from .formats import open_source
from .rows import Rows
from .source import DAMAGE, Source, rescaled

MOST_CLASSES = 10_000_000
"""A larger label is a mistake: networks hold one embedding per class."""
_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


class FileDataset(Dataset):
    """A data set whose rows stay on disk; the operating system keeps in RAM what is used.

    Args:
        path: a file or folder that formats.py knows.
        shape: (C, H, W) that the data must have; None accepts any. Pictures are cropped to it.
        num_classes: number of labels, which all labels must be below; None takes the largest label plus 1; 0
            ignores labels.
        latent_scale: of `source.SCALES`; auto does what the code that the format comes from does.
        pickled: read U-ViT's pickled features, for conversion.
        source: what was opened at `path` already; None looks there.

    Raises:
        ValueError: naming the file and what is wrong with it.
        ImportError: an HDF5 file without h5py, pictures without Pillow.
    """

    def __init__(
        self,
        path: Path,
        *,
        shape: Shape | None = None,
        num_classes: int | None = None,
        latent_scale: str = "auto",
        pickled: bool = False,
        source: Source | None = None,
    ) -> None:
        self.path = path
        source = open_source(path, shape, pickled=pickled) if source is None else source
        self._kind = KINDS[source.kind]
        try:
            source = rescaled(source, latent_scale)
            self.shape = self._kind.shape(source.rows)
            _check_shape(self.shape, shape)
            wanted = source.num_classes if num_classes is None else num_classes
            self._labels, self.num_classes = _check_labels(source.labels, len(source.rows), wanted)
            self._source = source
            self._check_values()
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from error
        except DAMAGE as error:  # reading rows for the first time: data elsewhere that are missing, say
            raise ValueError(f"{path}: cannot be read: {error or type(error).__name__}") from error
        self.has_flips = source.kind == "pixels" or source.flipped is not None
        self.vae_units = source.units

    def __len__(self) -> int:
        return len(self._source.rows)

    @property
    def kind(self) -> str:
        """pixels, latents or moments."""
        return self._source.kind

    @property
    def note(self) -> str:
        """How the values are scaled."""
        return self._source.note

    @property
    def class_names(self) -> list[str]:
        """See `Dataset.class_names`; the folders' names, where classes are folders."""
        names = self._source.class_names
        return list(names) if len(names) == self.num_classes else super().class_names

    def gather(self, indices: Tensor, flips: Tensor | None = None) -> Batch:
        """See `Dataset.gather`.

        Raises:
            ValueError: `flips` where there are no mirror images; a file of its own that cannot be read, by name.
        """
        check_indices(indices, len(self))
        x, source = self.take(indices, flips), self._source
        if source.affine is not None:
            x = source.affine.apply(x, moments=source.kind == "moments")
        else:
            x = self._kind.decode(x)
        return Batch(x, self._labels[indices], source.moments_scale)

    def labels(self, indices: Tensor) -> Tensor:
        """(B,) int64, as `gather` gives them."""
        return self._labels[indices]

    def fingerprint(self) -> int:
        """A number that is most likely another for other data: CRC-32 of some samples and of all labels."""
        some = spread(len(self))
        value = zlib.crc32(self.take(some).contiguous().view(torch.uint8).numpy().tobytes())
        return zlib.crc32(self._labels.contiguous().numpy().tobytes(), value)

    def take(self, indices: Tensor, flips: Tensor | None = None) -> Tensor:
        """Rows as they are stored: (B, C, H, W), moments (B, 2C, H, W), pixels (B, H, W, C) uint8."""
        x = self._source.rows.take(indices)
        if flips is None or not bool(flips.any()):
            return x
        if not self.has_flips:
            raise ValueError(f"{self.path}: there are no mirror images")
        if self._source.flipped is not None:
            x[flips] = self._source.flipped.take(indices[flips])
        else:
            x[flips] = x[flips].flip(2)  # pixels: (B, H, W, C)
        return x

    def describe(self) -> str:
        """See `Dataset.describe`: "1,281,167 latents 4x32x32, moments, bf16, 1000 classes, posterior draws ..."."""
        source, classes = self._source, format_classes(self.num_classes)
        parts = [f"{len(self):,} {self._kind.noun} {format_shape(self.shape)}"]
        if source.kind != "pixels":
            stored = _DTYPE_NAMES.get(source.rows.dtype, str(source.rows.dtype))
            parts += [f"moments, {stored}"] if source.kind == "moments" else [stored]
        parts += [classes, source.note] + (["with mirror images"] if source.flipped is not None else [])
        return f"{', '.join(parts)} ({self.path})"

    def to_images(self, x: Tensor) -> np.ndarray:
        """Pixels: (B, C, H, W) in [-1, 1] => (B, H, W, C) uint8; latents as in `Dataset.to_images`."""
        if self.kind != "pixels":
            return super().to_images(x)
        return unit_to_uint8((check_images(x, self.shape) + 1.0) / 2.0)

    def _check_values(self) -> None:
        """A look at a few rows spread over the file: a wrong file is noticed now and not as a loss that is NaN."""
        rows = spread(len(self))
        x = self._kind.decode(self._source.rows.take(rows))
        if not bool(torch.isfinite(x).all()):
            row = int(rows[(~torch.isfinite(x)).flatten(1).any(1).nonzero()[0, 0]])
            raise ValueError(f"sample {row} holds values that are not finite")
        if self.kind == "moments" and float(x[:, self.shape[0] :].min()) < 0:
            raise ValueError(
                "the second half of the channels must be standard deviations, but some are negative "
                f"({float(x[:, self.shape[0] :].min()):.3g}): are they log-variances?"
            )


class _Kind(NamedTuple):
    noun: str
    shape: Callable[[Rows], Shape]
    decode: Callable[[Tensor], Tensor]


def _pixel_shape(rows: Rows) -> Shape:
    if rows.dtype != torch.uint8 or len(rows.shape) != 3 or rows.shape[2] not in (1, 3):
        raise ValueError(
            f"arr_0 must be uint8 (N, H, W, 1 or 3), got {rows.dtype} (N, {format_shape(rows.shape, ', ')})"
        )
    height, width, channels = rows.shape
    return channels, height, width


def _latent_shape(rows: Rows) -> Shape:
    if not rows.dtype.is_floating_point or len(rows.shape) != 3:
        raise ValueError(f"latents must be float (N, C, H, W), got {rows.dtype} (N, {format_shape(rows.shape, ', ')})")
    channels, height, width = rows.shape
    return channels, height, width


def _moments_shape(rows: Rows) -> Shape:
    channels, height, width = _latent_shape(rows)
    if channels % 2:
        raise ValueError(f"moments [mean, std] need an even number of channels, got {channels}")
    return channels // 2, height, width


def _pixels_to_float(raw: Tensor) -> Tensor:
    return (raw.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0).contiguous()


def _as_stored(raw: Tensor) -> Tensor:
    """What the ops take stays as it is: half the bytes to copy to a GPU."""
    return raw if raw.dtype in (torch.float32, torch.bfloat16, torch.float16) else raw.float()


KINDS: dict[str, _Kind] = {
    "pixels": _Kind("images", _pixel_shape, _pixels_to_float),
    "latents": _Kind("latents", _latent_shape, _as_stored),
    "moments": _Kind("latents", _moments_shape, _as_stored),
}


def _check_shape(found: Shape, wanted: Shape | None) -> None:
    if wanted is not None and tuple(wanted) != found:
        raise ValueError(f"the data are {format_shape(found)}, but {format_shape(wanted)} is wanted")


def _check_labels(labels: Tensor | None, size: int, num_classes: int | None) -> tuple[Tensor, int]:
    """(N,) int64 labels and their number; zeros and 0 where there are none or none are wanted."""
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must be 0 or more, got {num_classes}")
    if labels is None and num_classes:
        raise ValueError(f"{num_classes} classes are wanted, but the data have no labels")
    if labels is None or num_classes == 0:
        return torch.zeros(1, dtype=torch.int64).expand(size), 0
    if labels.dtype.is_floating_point or labels.numel() != size:
        raise ValueError(f"labels must be {size} integers, got {labels.dtype} of shape {tuple(labels.shape)}")
    labels = labels.reshape(-1).to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    limit = high + 1 if num_classes is None else num_classes
    if limit > MOST_CLASSES:
        raise ValueError(f"{limit:,} classes (the largest label is {high}) are more than {MOST_CLASSES:,}")
    if low < 0 or high >= limit:
        sample = int(labels.argmin() if low < 0 else labels.argmax())
        raise ValueError(f"labels must be in 0..{limit - 1}, found {low if low < 0 else high} at sample {sample}")
    return labels, limit
