"""Data sets from files that users already have, without conversion.

| file | holds | becomes |
|---|---|---|
| .npz: `arr_0`, `arr_1` | uint8 NHWC pictures, labels; as ADM's samples | pixels in [-1, 1] |
| .npz: `latents`, `labels` | float (N, C, H, W) | as stored |
| .npy | float (N, C, H, W); labels in `labels.npy` beside it | as stored |
| .h5, .hdf5: `train_latents`, `train_labels` | float (N, 2C, H, W) [mean, STD]; ERD's | moments, x 0.18215 |
| .safetensors: `latents`, `labels` | float (N, C, H, W) | as stored |
| folder of .safetensors | shards in the order of their names; as LightningDiT's | see below |
| folder with `latents.npy` | as .npy | as stored |

Labels may be missing everywhere. With a `latents_stats.pt` beside the shards, latents become (x - mean) / std
per channel, otherwise they stay as stored; the mirrored copies `latents_flip` are not used.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
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
    unit_to_uint8,
)
from .rows import Rows, ShardedRows, read_hdf5, read_npy, read_npz, read_safetensors

SD_VAE_SCALE = 0.18215
"""Brings the Stable Diffusion VAE's latents to about unit variance (Rombach et al., 2022)."""

_PROBE_ROWS = 64

MOST_CLASSES = 10_000_000
"""A larger label is a mistake: networks hold one embedding per class."""


class Source(NamedTuple):
    """What a file holds, before it is checked."""

    rows: Rows
    labels: Tensor | None
    kind: str
    """A key of `KINDS`."""

    note: str
    """How the values are scaled, for `describe`."""

    normalize: tuple[Tensor, Tensor] | None = None
    """Mean and standard deviation per channel, (C, 1, 1) float32 each."""


class FileDataset(Dataset):
    """A data set whose rows stay on disk, memory-mapped; the operating system keeps in RAM what is used.

    Args:
        path: a file or folder of the table above.
        shape: (C, H, W) that the data must have; None accepts any.
        num_classes: number of labels, which all labels must be below; None takes the largest label plus 1; 0
            ignores labels.

    Raises:
        ValueError: naming the file and what is wrong with it.
        ImportError: an HDF5 file without h5py.
    """

    def __init__(self, path: Path, *, shape: Shape | None = None, num_classes: int | None = None) -> None:
        self.path = path
        source = _open(path)
        self._rows, self._kind, self._normalize = source.rows, KINDS[source.kind], source.normalize
        self._moments_scale = SD_VAE_SCALE if source.kind == "moments" else None
        self._note = source.note
        try:
            self.shape = self._kind.shape(source.rows)
            _check_shape(self.shape, shape)
            self._labels, self.num_classes = _check_labels(source.labels, len(source.rows), num_classes)
            self._check_values()
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        except _DAMAGE as error:  # reading rows for the first time: data elsewhere that are missing, say
            raise ValueError(f"{path}: cannot be read: {error or type(error).__name__}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, indices: Tensor) -> Batch:
        """See `Dataset.gather`."""
        x = self._kind.to_float(self._rows.take(check_indices(indices, len(self))))
        if self._normalize is not None:
            mean, std = self._normalize
            x = (x - mean) / std
        return Batch(x, self._labels[indices], self._moments_scale)

    def describe(self) -> str:
        """See `Dataset.describe`."""
        size, classes = format_shape(self.shape), format_classes(self.num_classes)
        return f"{len(self):,} {self._kind.noun} {size}, {classes}, {self._note} ({self.path})"

    def to_images(self, x: Tensor) -> np.ndarray:
        """Pixels: (B, C, H, W) in [-1, 1] => (B, H, W, C) uint8; latents as in `Dataset.to_images`."""
        if self._kind is not KINDS["pixels"]:
            return super().to_images(x)
        return unit_to_uint8((check_images(x, self.shape) + 1.0) / 2.0)

    def _check_values(self) -> None:
        """A look at a few rows spread over the file: a wrong file is noticed now and not as a loss that is
        NaN."""
        rows = torch.linspace(0, len(self) - 1, min(len(self), _PROBE_ROWS)).long()
        x = self.gather(rows).x
        if not bool(torch.isfinite(x).all()):
            row = int(rows[(~torch.isfinite(x)).flatten(1).any(1).nonzero()[0, 0]])
            raise ValueError(f"sample {row} holds values that are not finite")
        if self._moments_scale is not None and float(x[:, self.shape[0] :].min()) < 0:
            raise ValueError(
                "the second half of the channels must be standard deviations, but some are negative "
                f"({float(x[:, self.shape[0] :].min()):.3g}): are they log-variances?"
            )


class _Kind(NamedTuple):
    noun: str
    shape: Callable[[Rows], Shape]
    to_float: Callable[[Tensor], Tensor]


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


KINDS: dict[str, _Kind] = {
    "pixels": _Kind("images", _pixel_shape, _pixels_to_float),
    "latents": _Kind("latents", _latent_shape, Tensor.float),
    "moments": _Kind("latents", _moments_shape, Tensor.float),
}


_DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,  # PyTorch's restricted reader refuses a file with it
)
"""What the readers raise when a header, a directory of parts or a number in it makes no sense."""


def _open(path: Path) -> Source:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        return _guarded(path, _open_folder)
    if path.suffix not in READERS:
        raise ValueError(f"{path}: unknown file type '{path.suffix}', expected one of {', '.join(READERS)} or a folder")
    return _guarded(path, READERS[path.suffix])


def _guarded(path: Path, reader: Callable[[Path], Source]) -> Source:
    """The reader's result; whatever a damaged file makes it raise becomes a ValueError that names the
    file."""
    try:
        return reader(path)
    except _DAMAGE as error:
        raise ValueError(f"{path}: cannot be read: {error or type(error).__name__}") from error


def _open_npz(path: Path) -> Source:
    arrays = read_npz(path)
    if "arr_0" in arrays:
        return Source(arrays["arr_0"](), _read_all(arrays.get("arr_1")), "pixels", "scaled to [-1, 1]")
    if "latents" in arrays:
        return Source(arrays["latents"](), _read_all(arrays.get("labels")), "latents", "as stored")
    raise ValueError(f"expected an array 'arr_0' (pictures) or 'latents', found {sorted(arrays) or 'none'}")


def _open_npy(path: Path) -> Source:
    beside = path.with_name("labels.npy")
    labels = _read_all(partial(read_npy, beside)) if beside.exists() and beside != path else None
    return Source(read_npy(path), labels, "latents", "as stored")


def _open_safetensors(path: Path) -> Source:
    tensors = read_safetensors(path)
    if "latents" not in tensors:
        raise ValueError(f"expected a tensor 'latents', found {sorted(tensors) or 'none'}")
    return Source(tensors["latents"](), _read_all(tensors.get("labels")), "latents", "as stored")


def _open_hdf5(path: Path) -> Source:
    arrays = read_hdf5(path)
    if "train_latents" not in arrays:
        raise ValueError(f"expected a data set 'train_latents', found {sorted(arrays) or 'none'}")
    note = f"posterior draws times {SD_VAE_SCALE}"
    return Source(arrays["train_latents"](), _read_all(arrays.get("train_labels")), "moments", note)


def _open_folder(path: Path) -> Source:
    shards = sorted(path.glob("*.safetensors"))
    if shards:
        return _join([_guarded(shard, _open_safetensors) for shard in shards], shards, _read_stats(path))
    if (path / "latents.npy").exists():
        return _open_npy(path / "latents.npy")
    raise ValueError("the folder holds neither *.safetensors shards nor latents.npy")


def _join(sources: list[Source], paths: list[Path], normalize: tuple[Tensor, Tensor] | None) -> Source:
    first = sources[0]
    labels = [source.labels for source in sources if source.labels is not None]
    for source, path in zip(sources, paths, strict=True):
        if (source.rows.shape, source.rows.dtype) != (first.rows.shape, first.rows.dtype):
            raise ValueError(
                f"{path.name} holds {source.rows.dtype} {format_shape(source.rows.shape)}, "
                f"but {paths[0].name} {first.rows.dtype} {format_shape(first.rows.shape)}"
            )
        if (source.labels is None) != (first.labels is None):
            raise ValueError(f"either all shards have labels or none; {path.name} and {paths[0].name} differ")
        if source.labels is not None and len(source.labels) != len(source.rows):
            raise ValueError(f"{path.name} has {len(source.rows)} latents, but {len(source.labels)} labels")
    rows = ShardedRows([source.rows for source in sources])
    if normalize is not None and normalize[0].shape[0] != first.rows.shape[0]:
        raise ValueError(f"latents_stats.pt is for {normalize[0].shape[0]} channels, the latents have {rows.shape[0]}")
    note = "as stored" if normalize is None else "normalised by latents_stats.pt"
    return Source(rows, torch.cat(labels) if labels else None, "latents", note, normalize)


def _read_stats(folder: Path) -> tuple[Tensor, Tensor] | None:
    """LightningDiT's {mean, std}, each (1, C, 1, 1) or (C,). Loaded by PyTorch's restricted reader: tensors
    alone."""
    path = folder / "latents_stats.pt"
    if not path.exists():
        return None
    stats = torch.load(path, map_location="cpu", weights_only=True)
    mean, std = (stats[key].float().reshape(-1, 1, 1) for key in ("mean", "std"))
    if mean.shape != std.shape or not bool((std > 0).all()):
        raise ValueError("latents_stats.pt must hold 'mean' and positive 'std' of one value per channel each")
    return mean, std


READERS: dict[str, Callable[[Path], Source]] = {
    ".npz": _open_npz,
    ".npy": _open_npy,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".safetensors": _open_safetensors,
}


def _read_all(load: Callable[[], Rows] | None) -> Tensor | None:
    rows = None if load is None else load()
    return None if rows is None else rows.take(torch.arange(len(rows)))


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
        raise ValueError(f"labels must be in 0..{limit - 1}, found {low if low < 0 else high}")
    return labels, limit
