"""Pictures in a tar, or in the tars within one as ImageNet's: found once, then read by their places, never unpacked."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .pictures import SUFFIXES
from .sample_files import LARGEST_FILE, ArchiveFiles, is_hidden


class TarMember(NamedTuple):
    """A file in a tar."""

    name: str
    """With slashes; of a file within a.tar in the tar, a/NAME."""
    offset: int
    """Of its content in the outer tar, in bytes."""
    size: int


class TarFiles(ArchiveFiles):
    """`Files` (sample_files.py) of a tar, which several threads read.

    Args:
        path: the tar, not compressed.
        members: those wanted, in order.
    """

    def __init__(self, path: Path, members: Sequence[TarMember]) -> None:
        super().__init__(path, [member.name for member in members])
        self._places = np.array([member[1:] for member in members], dtype=np.int64).reshape(-1, 2)

    def read(self, index: int) -> bytes:
        """See `Files.read`."""
        offset, size = self._places[index].tolist()
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise ValueError("the tar ends within it")
        return data


def list_tar(path: Path) -> list[TarMember]:
    """Pictures of a tar and of the tars directly within it, sorted by name; hidden ones are left out.

    Reads the headers alone: a minute or so for the 1.28 million of ImageNet.

    Raises:
        ValueError: it is compressed, damaged or cut off, or holds a picture that is no ordinary file.
    """
    try:
        with tarfile.open(path, "r:") as outer:
            return sorted(_pictures(outer))
    except tarfile.TarError as error:
        raise ValueError(f"it is no tar that can be read in place: {error} (is it compressed?)") from error


def _pictures(outer: tarfile.TarFile) -> Iterator[TarMember]:
    for member in outer:
        name = member.name.removeprefix("./")
        if not name.endswith(".tar"):
            yield from _picture(member, name, 0)
            continue
        inside = outer.extractfile(member) if member.isreg() and not member.issparse() else None
        if inside is None:
            raise ValueError(f"{name} is no ordinary file")
        folder, count = name.removesuffix(".tar"), 0
        try:
            with tarfile.open(fileobj=inside, mode="r:") as inner:
                for one in inner:
                    for picture in _picture(one, f"{folder}/{one.name.removeprefix('./')}", member.offset_data):
                        count += 1
                        yield picture
        except tarfile.TarError as error:
            raise tarfile.ReadError(f"{name} in it: {error}") from error
        if not count:
            raise ValueError(f"{name} holds no picture")


def _picture(member: tarfile.TarInfo, name: str, start: int) -> Iterator[TarMember]:
    """The member, if it is a picture; `start` is where its tar begins."""
    if os.path.splitext(name)[1].lower() not in SUFFIXES or any(map(is_hidden, name.split("/"))):
        return
    if not member.isreg() or member.issparse() or not 0 < member.size <= LARGEST_FILE:
        raise ValueError(f"{name} is no ordinary file of 1 to {LARGEST_FILE:,} bytes")
    yield TarMember(name, start + member.offset_data, member.size)
