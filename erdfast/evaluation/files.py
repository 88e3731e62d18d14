"""Pictures, features and statistics on disk, mapped or read without unpickling; every error names the file.

| file | holds |
|---|---|
| .npz: `arr_0` | uint8 (N, H, W, 3) pictures: ADM's samples (`arr_1`, labels, is not needed) |
| folder with `erdfast.json` | the same, as `erdfast.prepare` writes them |
| .npz: `mu`, `sigma`, `mu_s`, `sigma_s`, `arr_0` | ADM's references: statistics of features, pictures |
| .npz: `mu`, `sigma`, `pool` ... | ours (reference.py): the same, with pooled features in place of pictures |
| .npy, .npz, .safetensors, folder of one kind | (N, ...) features: `features` or `arr_0`, shards in order of name |
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from erdfast.data.rows import Loaders, Rows, ShardedRows, read_npy, read_npz, read_safetensors
from erdfast.data.source import guarded
from erdfast.data.store import MANIFEST, open_store

FEATURE_SUFFIXES = (".npy", ".npz", ".safetensors")
FEATURE_NAMES = ("features", "arr_0")


def open_arrays(path: Path) -> Loaders:
    """The arrays of a .npz file, by name; a folder of pictures in our own format has `arr_0`.

    Raises:
        ValueError: it is missing, of another kind, or damaged; names it.
    """
    if path.is_dir():
        return guarded(path, lambda: _open_folder(path))
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix != ".npz":
        raise ValueError(f"{path}: unknown file type '{path.suffix}', expected .npz (as ADM writes samples)")
    return guarded(path, lambda: read_npz(path))


def _open_folder(path: Path) -> Loaders:
    if not (path / MANIFEST).exists():
        raise ValueError(f"the folder holds no {MANIFEST}: expected .npz, or a folder that erdfast.prepare wrote")
    source = open_store(path)
    if source.kind != "pixels":
        raise ValueError(f"it holds {source.kind}, not pictures")
    return {"arr_0": lambda: source.rows}


def open_images(path: Path) -> Rows:
    """The pictures of a .npz file or of a folder in our own format, each (H, W, 3) uint8.

    Raises:
        ValueError: it cannot be read, or holds none; names it.
    """
    arrays = open_arrays(path)
    if "arr_0" not in arrays:
        raise ValueError(f"{path}: expected an array 'arr_0' of pictures, found {', '.join(sorted(arrays)) or 'none'}")
    rows = guarded(path, arrays["arr_0"])
    if rows.dtype != torch.uint8 or len(rows.shape) != 3 or rows.shape[2] != 3:
        raise ValueError(
            f"{path}: 'arr_0' must be uint8 (N, H, W, 3) pictures, it is "
            f"{str(rows.dtype).removeprefix('torch.')} {(len(rows), *rows.shape)}"
        )
    return rows


def open_features(path: Path) -> Rows:
    """Features of any network, one row per sample.

    Raises:
        ValueError: a missing or damaged file, no features in it, or shards that do not agree; names it.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if not path.is_dir():
        return _open_feature_file(path)
    shards = sorted(shard for shard in path.iterdir() if shard.suffix in FEATURE_SUFFIXES)
    if not shards:
        raise ValueError(f"{path}: holds no features: expected files of type {', '.join(FEATURE_SUFFIXES)}")
    rows = [_open_feature_file(shard) for shard in shards]
    for shard, part in zip(shards, rows, strict=True):
        if (part.shape, part.dtype) != (rows[0].shape, rows[0].dtype):
            raise ValueError(
                f"{shard}: its features are {part.dtype} {part.shape}, those of {shards[0].name} "
                f"{rows[0].dtype} {rows[0].shape}"
            )
    return ShardedRows(rows)


def _open_feature_file(path: Path) -> Rows:
    if path.suffix not in FEATURE_SUFFIXES:
        raise ValueError(f"{path}: unknown file type '{path.suffix}', expected one of {', '.join(FEATURE_SUFFIXES)}")
    if path.suffix == ".npy":
        rows = guarded(path, lambda: read_npy(path))
    else:
        reader = read_npz if path.suffix == ".npz" else read_safetensors
        arrays = guarded(path, lambda: reader(path))
        names = [name for name in FEATURE_NAMES if name in arrays]
        if not names:
            raise ValueError(
                f"{path}: expected an array {' or '.join(map(repr, FEATURE_NAMES))}, "
                f"found {', '.join(sorted(arrays)) or 'none'}"
            )
        rows = guarded(path, arrays[names[0]])
    if not rows.dtype.is_floating_point or not rows.shape:
        raise ValueError(
            f"{path}: features must be floating-point (N, D), they are {rows.dtype} {(len(rows), *rows.shape)}"
        )
    return rows


def read_array(path: Path, arrays: Loaders, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """A whole array of an open .npz.

    Args:
        path: for messages.
        arrays: from `open_arrays`.
        name: which.
        shape: its sides, None where any will do.

    Raises:
        ValueError: it is damaged, of another shape, or not finite; names file and array.
    """
    rows = guarded(path, arrays[name])
    found = (len(rows), *rows.shape)
    if len(found) != len(shape) or any(want not in (None, side) for want, side in zip(shape, found, strict=True)):
        wanted = "x".join("N" if side is None else str(side) for side in shape)
        raise ValueError(f"{path}: '{name}' must be {wanted}, it is {'x'.join(map(str, found))}")
    array = rows.take(torch.arange(len(rows)))
    if array.is_floating_point() and not bool(torch.isfinite(array).all()):
        raise ValueError(f"{path}: '{name}' holds values that are not finite")
    return array
