"""Folders and zips of one file per sample: EDM2's, REPA's, fast-DiT's, U-ViT's, and pictures."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import Shape, format_shape
from .pickled_pairs import decode_moments, decode_pair, is_pickled
from .pictures import SUFFIXES, decode_picture, picture_decoder
from .sample_files import Files, FolderFiles, SampleRows, ZipFiles, decode_npy, list_files, list_members
from .source import Source

_LABELS = "dataset.json"
_NUMBERED = re.compile(r"\d{5}/img\d+\.\w+")
"""How EDM2's tools name pictures: these folders are no classes."""
_AT_ONCE = 65_536
CONVERT = "python -m erdfast.encode --convert --data {path} --out NEW_FOLDER"


def open_sample_folder(path: Path, shape: Shape | None, pickled: bool) -> Source:
    """A folder whose samples are files.

    Raises:
        ValueError: it is none, or needs to be converted; says how.
    """
    if pair := _fast_dit_folders(path):
        return _open_fast_dit(*pair)
    if (path / "0.npy").exists() and is_pickled(_head(path / "0.npy")):
        return _open_pickled(path, pickled)
    folder = path / "vae-sd" if (path / "vae-sd").is_dir() else path  # REPA's, beside its pictures
    if moments := [name for name in list_files(folder, (".npy",)) if _is_moments(name)]:
        labels = _labels_of(moments, _read_json(folder / _LABELS), by_folder=False)[0]
        return _moments(FolderFiles(folder, moments), labels, path)
    if pictures := list_files(path, SUFFIXES):
        labels, classes = _labels_of(pictures, _read_json(path / _LABELS), by_folder=True)
        return _pictures(FolderFiles(path, pictures), labels, classes, shape, path)
    raise ValueError(
        "the folder holds neither erdfast.json, *.safetensors, latents.npy, img-mean-std-*.npy, NAME_features and "
        f"NAME_labels, nor pictures ({', '.join(SUFFIXES)})"
    )


def open_zip(path: Path, shape: Shape | None) -> Source:
    """A zip of EDM2's tools: moments or pictures, with `dataset.json`."""
    with zipfile.ZipFile(path) as archive:
        described = next((info for info in archive.infolist() if info.filename == _LABELS), None)
        table = None if described is None else json.loads(archive.read(described))
    moments = [info for info in list_members(path, (".npy",)) if _is_moments(info.filename)]
    members = moments or list_members(path, SUFFIXES)
    if not members:
        raise ValueError(f"the zip holds neither img-mean-std-*.npy nor pictures ({', '.join(SUFFIXES)})")
    labels, classes = _labels_of([info.filename for info in members], table, by_folder=not moments)
    files = ZipFiles(path, members)
    return _moments(files, labels, path) if moments else _pictures(files, labels, classes, shape, path)


# ---------------------------------------------------------------------------- kinds


def _moments(files: Files, labels: Tensor | None, path: Path) -> Source:
    return Source(SampleRows(files, decode_npy, path), labels, "moments", "", scale="auto")


def _pictures(files: Files, labels: Tensor | None, classes: tuple[str, ...], shape: Shape | None, path: Path) -> Source:
    if shape is not None and (shape[0] not in (1, 3) or shape[1] != shape[2]):
        raise ValueError(
            f"pictures are cropped to squares of 1 or 3 channels, but {format_shape(shape)} is wanted; encode them: "
            f"python -m erdfast.encode --data {path} --vae FOLDER --out NEW_FOLDER"
        )
    decode = decode_picture if shape is None else picture_decoder(shape[1], shape[0])
    rows = SampleRows(files, decode, path)
    return Source(rows, labels, "pixels", "scaled to [-1, 1]", class_names=classes)


def _fast_dit_folders(path: Path) -> tuple[Path, Path] | None:
    """Features and labels: both below `path`, or `path` and its neighbour."""
    candidates = [path] if path.name.endswith("_features") else sorted(path.glob("*_features"))
    for features in candidates:
        labels = features.with_name(features.name.removesuffix("_features") + "_labels")
        if features.is_dir() and labels.is_dir():
            return features, labels
    return None


def _open_fast_dit(features: Path, labels: Path) -> Source:
    names = list_files(features, (".npy",))
    missing = set(names) ^ set(list_files(labels, (".npy",)))
    if missing:
        raise ValueError(f"{len(missing)} files are in only one of {features.name} and {labels.name}: {min(missing)}")
    rows = SampleRows(FolderFiles(features, names), _without_batch, features)
    found = _read(SampleRows(FolderFiles(labels, names), decode_npy, labels))
    return Source(rows, found.reshape(-1), "latents", "as stored")


def _without_batch(data: bytes) -> np.ndarray:
    """(1, C, H, W) => (C, H, W)."""
    array = decode_npy(data)
    if array.ndim != 4 or array.shape[0] != 1:
        raise ValueError(f"its shape is {array.shape}, expected (1, C, H, W)")
    return array[0]


def _open_pickled(path: Path, allowed: bool) -> Source:
    if not allowed:
        raise ValueError(
            f"these are U-ViT's features, pickled, which is not read while training: {CONVERT.format(path=path)}"
        )
    count = sum(1 for name in path.iterdir() if re.fullmatch(r"\d+\.npy", name.name))
    files = FolderFiles(path, [f"{number}.npy" for number in range(count)])  # 0, 1, 2: not in the order of letters
    labels = _read(SampleRows(files, _pair_label, path))
    return Source(SampleRows(files, decode_moments, path), labels.reshape(-1), "moments", "", scale="sd")


def _pair_label(data: bytes) -> np.ndarray:
    return np.array([decode_pair(data).label], dtype=np.int64)


# ---------------------------------------------------------------------------- labels


def _labels_of(names: Sequence[str], table: object, *, by_folder: bool) -> tuple[Tensor | None, tuple[str, ...]]:
    """Labels, and the classes' names where they are folders.

    Raises:
        ValueError: dataset.json is not of the form {"labels": [[name, label], ...]}, or lacks a name.
    """
    if table is not None:
        return _from_table(names, table), ()
    if not by_folder or any("/" not in name for name in names) or all(_NUMBERED.fullmatch(name) for name in names):
        return None, ()
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    number = {name: index for index, name in enumerate(classes)}
    return torch.tensor([number[folder] for folder in folders], dtype=torch.int64), tuple(classes)


def _from_table(names: Sequence[str], table: object) -> Tensor | None:
    pairs = table.get("labels", ...) if isinstance(table, dict) else ...
    if pairs is None:
        return None
    try:
        known: dict[Any, Any] = dict(pairs)  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_LABELS} does not hold labels as [name, label] pairs") from error
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ValueError(f"{_LABELS} has no label for {missing}")
    labels = [known[name] for name in names]
    wrong = next((name for name, label in zip(names, labels, strict=True) if type(label) is not int), None)
    if wrong is not None:
        raise ValueError(f"{_LABELS}: the label of {wrong} is {known[wrong]!r}, expected a whole number")
    return torch.tensor(labels, dtype=torch.int64)


def _read_json(path: Path) -> object:
    return json.loads(path.read_text()) if path.exists() else None


def _read(rows: SampleRows) -> Tensor:
    starts = range(0, len(rows), _AT_ONCE)
    return torch.cat([rows.take(torch.arange(start, min(start + _AT_ONCE, len(rows)))) for start in starts])


def _is_moments(name: str) -> bool:
    return name.rpartition("/")[2].startswith("img-mean-std")


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(4096)
