"""Folders and zips of one file per sample: EDM2's, REPA's, fast-DiT's, U-ViT's, and pictures."""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .dataset import Shape, format_shape
from .pickled_pairs import decode_moments, decode_pair, is_pickled
from .pictures import SUFFIXES, decode_picture, picture_decoder
from .sample_files import (
    LARGEST_FILE,
    Files,
    FolderFiles,
    SampleRows,
    ZipFiles,
    decode_npy,
    is_hidden,
    list_files,
    list_members,
)
from .source import SD_VAE_SCALE, Source, factor_units

_LABELS = "dataset.json"
_NUMBERED = re.compile(r"\d{5}/img\d+\.\w+")
"""How EDM2's tools name pictures: these folders are no classes."""
_AT_ONCE = 65_536
_ABSENT = object()
"""In place of dataset.json, which may hold null."""
CONVERT = "python -m erdfast.encode --convert --data {path} --out NEW_FOLDER"


def open_sample_folder(path: Path, shape: Shape | None, pickled: bool) -> Source:
    """A folder whose samples are files.

    Raises:
        ValueError: it is none, or needs to be converted; says how.
    """
    if pair := _fast_dit_folders(path):
        return _open_fast_dit(*pair)
    arrays = sorted(entry for entry in path.glob("*.npy") if not is_hidden(entry.name) and entry.is_file())
    if arrays and arrays[0].stem.isdigit() and is_pickled(_head(arrays[0])):
        return _open_pickled(path, pickled)
    folder = path / "vae-sd" if (path / "vae-sd").is_dir() else path  # REPA's, beside its pictures
    if moments := [name for name in list_files(folder, (".npy",)) if _is_moments(name)]:
        labels, _ = _labels_of(moments, _read_json(folder / _LABELS), by_folder=False)
        return _moments(FolderFiles(folder, moments), labels, path)
    if pictures := list_files(path, SUFFIXES):
        labels, classes = _labels_of(pictures, _read_json(path / _LABELS), by_folder=True)
        check_classes(path, classes)
        return _pictures(FolderFiles(path, pictures), labels, classes, shape, path)
    raise ValueError(
        "the folder holds neither erdfast.json, *.safetensors, latents.npy, img-mean-std-*.npy, NAME_features and "
        f"NAME_labels, nor pictures ({', '.join(SUFFIXES)})"
    )


def open_zip(path: Path, shape: Shape | None) -> Source:
    """A zip of EDM2's tools: moments or pictures, with `dataset.json`."""
    with zipfile.ZipFile(path) as archive:
        described = next((info for info in archive.infolist() if info.filename == _LABELS), None)
        if described is not None and described.file_size > LARGEST_FILE:
            raise ValueError(f"{_LABELS} has {described.file_size:,} bytes, more than {LARGEST_FILE:,}")
        table = _ABSENT if described is None else json.loads(archive.read(described))
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
    named = [(one, one.with_name(one.name.removesuffix("_features") + "_labels")) for one in candidates]
    pairs = [(features, labels) for features, labels in named if features.is_dir() and labels.is_dir()]
    if len(pairs) > 1:
        raise ValueError(f"it holds {' and '.join(features.name for features, _ in pairs)}: name one of them")
    return pairs[0] if pairs else None


def _open_fast_dit(features: Path, labels: Path) -> Source:
    names = list_files(features, (".npy",))
    missing = set(names) ^ set(list_files(labels, (".npy",)))
    if missing:
        raise ValueError(f"{len(missing)} files are in only one of {features.name} and {labels.name}: {min(missing)}")
    rows = SampleRows(FolderFiles(features, names), _without_batch, features)
    found = _read(SampleRows(FolderFiles(labels, names), decode_npy, labels))
    units = factor_units(SD_VAE_SCALE, rows.shape[0]) if len(rows.shape) == 3 else None  # done before they are stored
    return Source(rows, found.reshape(-1), "latents", "as stored", units=units)


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
    if table is not _ABSENT:
        return _from_table(names, table), ()
    top = [name for name in names if "/" not in name]
    if not by_folder or len(top) == len(names) or all(_NUMBERED.fullmatch(name) for name in names):
        return None, ()
    if top:
        raise ValueError(f"{top[0]} lies beside folders of classes: remove it, or put it into one")
    folders = [name.partition("/")[0] for name in names]
    classes = sorted(set(folders))
    number = {name: index for index, name in enumerate(classes)}
    return torch.tensor([number[folder] for folder in folders], dtype=torch.int64), tuple(classes)


def _from_table(names: Sequence[str], table: object) -> Tensor | None:
    pairs = table.get("labels", ...) if isinstance(table, dict) else ...
    if pairs is None:
        return None
    names_given = [pair[0] for pair in pairs] if isinstance(pairs, list) and all(map(_is_pair, pairs)) else []
    twice, times = Counter(names_given).most_common(1)[0] if names_given else ("", 0)
    if times > 1:
        raise ValueError(f"{_LABELS} has two labels for {twice}")
    try:
        known: dict[Any, Any] = dict(pairs)  # type: ignore[call-overload]  # what does not fit raises, below
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_LABELS} does not hold labels as [name, label] pairs") from error
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ValueError(f"{_LABELS} has no label for {missing}")
    labels = [known[name] for name in names]
    wrong = next((name for name, label in zip(names, labels, strict=True) if not _is_label(label)), None)
    if wrong is not None:
        raise ValueError(f"{_LABELS}: the label of {wrong} is {known[wrong]!r:.100}, expected a whole number from 0 on")
    return torch.tensor(labels, dtype=torch.int64)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)


def _is_label(label: object) -> bool:
    return type(label) is int and 0 <= label < 2**31


def check_classes(path: Path, classes: tuple[str, ...]) -> None:
    """Raise ValueError if a folder beside those of classes holds no picture: labels would not be what is expected."""
    if not classes:
        return
    folders = {entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name)}
    if empty := sorted(folders - set(classes)):
        raise ValueError(f"the folder {empty[0]} holds no picture ({', '.join(SUFFIXES)}): remove it, or fill it")


def _read_json(path: Path) -> object:
    return json.loads(path.read_text()) if path.exists() else _ABSENT


def _read(rows: SampleRows) -> Tensor:
    starts = range(0, len(rows), _AT_ONCE)
    return torch.cat([rows.take(torch.arange(start, min(start + _AT_ONCE, len(rows)))) for start in starts])


def _is_moments(name: str) -> bool:
    return name.rpartition("/")[2].startswith("img-mean-std")


def _head(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(4096)
