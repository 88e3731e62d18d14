"""Pictures by name, whether they lie in a folder, a zip or a tar; data sets choose theirs among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from .pictures import SUFFIXES
from .sample_files import Files, FolderFiles, ZipFiles, list_files, list_members
from .source import guarded
from .tar_files import TarFiles, list_tar


class Container(NamedTuple):
    """What a folder, zip or tar holds."""

    path: Path
    names: list[str]
    """Of its pictures, with slashes, sorted."""
    choose: Callable[[Sequence[int]], Files]
    """Some of them by their places in `names`, in that order."""


def open_container(path: Path) -> Container:
    """Find the pictures at a path.

    Raises:
        ValueError: it is missing, damaged, of another kind, or holds no pictures; names it.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    kind = "folder" if path.is_dir() else path.suffix
    if kind not in _KINDS:
        raise ValueError(f"{path}: unknown file type '{path.suffix}', expected a folder, {' or '.join(_SUFFIXES)}")
    container = guarded(path, lambda: _KINDS[kind](path))
    if not container.names:
        raise ValueError(f"{path}: holds no pictures ({', '.join(SUFFIXES)})")
    return container


def _of_folder(path: Path) -> Container:
    names = list_files(path, SUFFIXES)
    return Container(path, names, lambda places: FolderFiles(path, [names[place] for place in places]))


def _of_zip(path: Path) -> Container:
    members = list_members(path, SUFFIXES)
    names = [member.filename for member in members]
    return Container(path, names, lambda places: ZipFiles(path, [members[place] for place in places]))


def _of_tar(path: Path) -> Container:
    members = list_tar(path)
    names = [member.name for member in members]
    return Container(path, names, lambda places: TarFiles(path, [members[place] for place in places]))


_SUFFIXES = (".zip", ".tar")
_KINDS: dict[str, Callable[[Path], Container]] = {"folder": _of_folder, ".zip": _of_zip, ".tar": _of_tar}
