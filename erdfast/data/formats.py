"""Readers of the files that users already have, found by looking at them.

| file or folder | holds | becomes |
|---|---|---|
| folder with `erdfast.json` | what `erdfast.encode` and `erdfast.prepare` write (store.py) | as it says |
| .npz: `arr_0`, `arr_1` | uint8 NHWC pictures, labels; as ADM's samples | pixels in [-1, 1] |
| .npz: `latents`, `labels` | float (N, C, H, W) | as stored |
| .npy, folder with `latents.npy` | float (N, C, H, W); labels in `labels.npy` beside it | as stored |
| .h5, .hdf5: `train_latents`, `train_labels` | float (N, 2C, H, W) [mean, STD]; ERD's | moments, x 0.18215 |
| .safetensors, folder of them | `latents`, `labels`, `latents_flip`; as LightningDiT's | see below |
| folder or .zip of `img-mean-std-*.npy` | (2C, H, W) [mean, STD], `dataset.json`; EDM2's, REPA's | moments, see below |
| folder of `NAME_features`, `NAME_labels` | a (1, C, H, W) npy per sample; fast-DiT's | as stored |
| folder or .zip of pictures | labels in `dataset.json`, or a folder per class (ImageFolder) | pixels in [-1, 1] |
| folder of `0.npy`, `1.npy`, ... | pickled pairs; U-ViT's | after `erdfast.encode --convert` |

Labels may be missing everywhere. With a `latents_stats.pt` beside the shards, latents become (x - mean) / std per
channel, otherwise they stay as stored. EDM2 and REPA write the same files with other values: told apart by their mean.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .dataset import Shape, format_shape
from .folders import open_sample_folder, open_zip
from .rows import Rows, ShardedRows, read_hdf5, read_npy, read_npz, read_safetensors
from .sample_files import is_hidden
from .source import DAMAGE, Affine, Source, VaeUnits, guarded
from .store import JOB, MANIFEST, open_store


def open_source(path: Path, shape: Shape | None = None, *, pickled: bool = False) -> Source:
    """What a path holds.

    Args:
        path: a file or folder of the table above.
        shape: (C, H, W) wanted; pictures are cropped to it.
        pickled: read U-ViT's pickled pairs too, by a reader that runs nothing (pickled_pairs.py).

    Raises:
        ValueError: naming the file and what is wrong with it.
        ImportError: an HDF5 file without h5py, pictures without Pillow.
    """
    try:
        exists = path.exists()
    except OSError as error:  # too long a name, a loop of links
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if not exists:
        raise ValueError(f"{path}: no such file or folder")
    if path.is_dir():
        return guarded(path, partial(_open_folder, path, shape, pickled))
    if path.suffix == ".zip":
        return guarded(path, partial(open_zip, path, shape))
    if path.suffix not in READERS:
        raise ValueError(
            f"{path}: unknown file type '{path.suffix}', expected one of {', '.join(READERS)}, .zip or a folder"
        )
    return guarded(path, partial(READERS[path.suffix], path))


def _open_folder(path: Path, shape: Shape | None, pickled: bool) -> Source:
    if (path / MANIFEST).exists():
        return open_store(path)
    if (path / JOB).exists():
        raise ValueError(
            "it is unfinished: run the same command again (erdfast.encode or prepare), which goes on where it was"
        )
    shards = sorted(shard for shard in path.glob("*.safetensors") if not is_hidden(shard.name))
    if shards:
        return join([guarded(shard, partial(_open_safetensors, shard)) for shard in shards], shards, _read_stats(path))
    if (path / "latents.npy").exists():
        return _open_npy(path / "latents.npy")
    return open_sample_folder(path, shape, pickled)


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
    rows, labels = tensors["latents"](), _read_all(tensors.get("labels"))
    flipped = tensors["latents_flip"]() if "latents_flip" in tensors else None
    if flipped is not None and (len(flipped), flipped.shape, flipped.dtype) != (len(rows), rows.shape, rows.dtype):
        raise ValueError("'latents_flip' has another shape or type than 'latents'")
    return Source(rows, labels, "latents", "as stored", flipped=flipped)


def _open_hdf5(path: Path) -> Source:
    arrays = read_hdf5(path)
    if "train_latents" not in arrays:
        raise ValueError(f"expected a data set 'train_latents', found {sorted(arrays) or 'none'}")
    return Source(arrays["train_latents"](), _read_all(arrays.get("train_labels")), "moments", "", scale="sd")


def join(sources: list[Source], paths: list[Path], affine: Affine | None = None) -> Source:
    """Shards end to end.

    Raises:
        ValueError: they do not suit one another; names the first that does not.
    """
    first = sources[0]
    for source, path in zip(sources, paths, strict=True):
        if (source.rows.shape, source.rows.dtype) != (first.rows.shape, first.rows.dtype):
            raise ValueError(
                f"{path.name} holds {source.rows.dtype} {format_shape(source.rows.shape)}, "
                f"but {paths[0].name} {first.rows.dtype} {format_shape(first.rows.shape)}"
            )
        for what in ("labels", "flipped"):
            if (getattr(source, what) is None) != (getattr(first, what) is None):
                name = {"labels": "labels", "flipped": "mirror images"}[what]
                raise ValueError(f"either all shards have {name} or none; {path.name} and {paths[0].name} differ")
        if source.labels is not None and len(source.labels) != len(source.rows):
            raise ValueError(f"{path.name} has {len(source.rows)} latents, but {len(source.labels)} labels")
    if affine is not None and affine.scale.shape[0] != first.rows.shape[0]:
        raise ValueError(
            f"latents_stats.pt is for {affine.scale.shape[0]} channels, the latents have {first.rows.shape[0]}"
        )
    labels = [source.labels for source in sources if source.labels is not None]
    flipped = [source.flipped for source in sources if source.flipped is not None]
    return first._replace(
        rows=ShardedRows([source.rows for source in sources]),
        flipped=ShardedRows(flipped) if flipped else None,
        labels=torch.cat(labels) if labels else None,
        note="as stored" if affine is None else "normalised by latents_stats.pt",
        affine=affine,
        units=None if affine is None else VaeUnits(affine),
    )


def _read_stats(folder: Path) -> Affine | None:
    """LightningDiT's {mean, std}, each (1, C, 1, 1) or (C,). Loaded by PyTorch's restricted reader: tensors alone."""
    path = folder / "latents_stats.pt"
    if not path.exists():
        return None
    try:
        stats = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (stats[key].float().reshape(-1, 1, 1) for key in ("mean", "std"))
    except DAMAGE as error:  # PyTorch's own words advise to unpickle it
        raise ValueError(f"{path}: cannot be read as tensors 'mean' and 'std' ({type(error).__name__})") from error
    finite = bool(torch.isfinite(mean).all() and torch.isfinite(std).all())
    if mean.shape != std.shape or not finite or not bool((std > 0).all()):
        raise ValueError("latents_stats.pt must hold 'mean' and positive 'std' of one value per channel each")
    return Affine(1.0 / std, -mean / std)


def _read_all(load: Callable[[], Rows] | None) -> Tensor | None:
    rows = None if load is None else load()
    return None if rows is None else rows.take(torch.arange(len(rows)))


READERS: dict[str, Callable[[Path], Source]] = {
    ".npz": _open_npz,
    ".npy": _open_npy,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".safetensors": _open_safetensors,
}
