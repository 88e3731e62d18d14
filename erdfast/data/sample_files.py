"""Data of one file per sample, in a folder or in a zip: what other projects write before anybody has time to wait.

A table of names or of places in the zip says where sample i lies; nothing is opened before it is asked for, and several
threads read a batch. A converted copy (`python -m erdfast.encode --convert`) is hundreds of times faster to read.
"""

from __future__ import annotations

import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

THREADS = 8
"""That read and decode a batch: reading waits for the disk, and zlib, Pillow and NumPy let other threads run."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    zlib.error,
    struct.error,
    SyntaxError,
    tokenize.TokenError,
    OverflowError,
    MemoryError,
)
"""What reading and decoding one broken file raises (Pillow: SyntaxError; headers of NumPy: TokenError)."""

LARGEST_FILE = 1 << 28
"""Bytes of one sample, unpacked; a larger one is no sample, and would fill the memory."""

Decode = Callable[[bytes], np.ndarray]
"""A file's content => the sample, an array whose shape and type are the same for all samples."""


class Files(Protocol):
    """Many small files by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """For people, and for labels: the path within the folder or zip, with slashes."""
        ...

    def read(self, index: int) -> bytes:
        """The whole content; safe to call from several threads."""
        ...


class FolderFiles:
    """Files below a folder. Their names are kept end to end: a million Python strings would take a hundred megabytes.

    Args:
        folder: where they lie.
        names: paths below it, with slashes.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """See `Files.name`."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._text[start : int(self._ends[index])])

    def read(self, index: int) -> bytes:
        """See `Files.read`."""
        # Without waiting: a pipe among the files would never be opened.
        descriptor = os.open(self.folder / self.name(index), os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is no regular file")
            if status.st_size > LARGEST_FILE:
                raise ValueError(f"it has {status.st_size:,} bytes, more than the {LARGEST_FILE:,} of any sample")
            return stream.read()


class ArchiveFiles:
    """What `Files` in one file have in common: their names, and the file, open for reading by place.

    Args:
        path: the archive.
        names: of the members wanted, in order.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path = path
        self._names = FolderFiles(path, names)
        self._descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """See `Files.name`."""
        return self._names.name(index)


class ZipFiles(ArchiveFiles):
    """Files in a zip, read by their places in it: Python's own reader allows one thread at a time.

    Args:
        path: the zip.
        members: those wanted, in order.

    Raises:
        zipfile.BadZipFile: it is damaged. ValueError: a member is stored in a way that is not known here.
    """

    def __init__(self, path: Path, members: Sequence[zipfile.ZipInfo]) -> None:
        for info in members:
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise ValueError(f"'{info.filename}' is encrypted or compressed in a way that is not known here")
            if not 0 < info.file_size <= LARGEST_FILE:
                raise ValueError(f"'{info.filename}' has {info.file_size:,} bytes, expected 1 to {LARGEST_FILE:,}")
        columns = [(m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in members]
        self._table = np.array(columns, dtype=np.int64).reshape(-1, 5)
        super().__init__(path, [info.filename for info in members])

    def read(self, index: int) -> bytes:
        """See `Files.read`; the checksum of the zip is compared."""
        offset, packed, size, crc, compression = self._table[index].tolist()
        head = os.pread(self._descriptor, _LOCAL_HEADER.size, offset)
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
        if magic != b"PK\3\4":
            raise ValueError("it does not lie where the zip's directory says")
        data = os.pread(self._descriptor, packed, offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)
        if compression == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("it is damaged: the zip's checksum differs")
        return data


class SampleRows:
    """`Rows` (rows.py) of one file per sample.

    Args:
        files: where the samples are.
        decode: from a file's content to the sample.
        origin: folder or zip, for messages.
        threads: that read and decode.

    Raises:
        ValueError: there is none, or the first cannot be read.
    """

    def __init__(self, files: Files, decode: Decode, origin: Path, threads: int = THREADS) -> None:
        if not len(files):
            raise ValueError("it holds no samples")
        self._files, self._decode, self._origin, self._threads = files, decode, origin, threads
        first = self._sample(0)
        self.dtype, self.shape = torch.from_numpy(np.empty(0, first.dtype)).dtype, tuple(first.shape)
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._files)

    def take(self, indices: Tensor) -> Tensor:
        """See `Rows.take`.

        Raises:
            ValueError: a file is damaged, or of another shape than the first; names it and its index.
        """
        out = torch.empty((indices.numel(), *self.shape), dtype=self.dtype)
        numbers, target = indices.tolist(), out.numpy()
        if len(numbers) < 2:
            for place, index in enumerate(numbers):
                target[place] = self._sample(index)
            return out
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "erdfast-samples")
        for place, sample in enumerate(self._pool.map(self._sample, numbers)):
            target[place] = sample
        return out

    def _sample(self, index: int) -> np.ndarray:
        try:
            sample = self._decode(self._files.read(index))
            if hasattr(self, "shape") and (tuple(sample.shape), sample.dtype) != (self.shape, self._numpy_dtype):
                raise ValueError(
                    f"it is {sample.dtype} {sample.shape}, the first sample {self._numpy_dtype} {self.shape}"
                )
        except _DAMAGE as error:
            name = self._files.name(index)
            raise ValueError(f"{self._origin}: sample {index} ({name}) cannot be read: {error}") from error
        return sample

    @property
    def _numpy_dtype(self) -> np.dtype:
        return torch.empty(0, dtype=self.dtype).numpy().dtype


def decode_npy(data: bytes) -> np.ndarray:
    """One plain array; what would have to be unpickled is refused.

    Raises:
        ValueError: it is damaged, or holds Python objects.
    """
    import io

    array = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    if array.dtype.kind not in "fiu" or not array.dtype.isnative or array.size == 0:
        raise ValueError(f"it is {array.dtype.str} of shape {array.shape}, which is no sample")
    return array


def list_files(folder: Path, suffixes: Sequence[str]) -> list[str]:
    """Paths below a folder of files that end so, links followed, sorted: the order that every reader of them uses.

    Hidden files and folders are left out.

    Raises:
        ValueError: a link leads to a folder that it lies in. OSError: a folder cannot be read.
    """
    found: list[str] = []

    def walk(where: Path, below: str, above: frozenset[tuple[int, int]]) -> None:
        status = where.stat()
        own = (status.st_dev, status.st_ino)
        if own in above:
            raise ValueError(f"{below.rstrip('/')} is a link to a folder that it lies in")
        with os.scandir(where) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    walk(Path(entry.path), f"{below}{entry.name}/", above | {own})
                elif os.path.splitext(entry.name)[1].lower() in suffixes:
                    found.append(below + entry.name)

    walk(folder, "", frozenset())
    return sorted(found)


def list_members(path: Path, suffixes: Sequence[str]) -> list[zipfile.ZipInfo]:
    """The same of a zip."""
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if not info.is_dir()]
    wanted = [
        info
        for info in members
        if os.path.splitext(info.filename)[1].lower() in suffixes and not any(map(is_hidden, info.filename.split("/")))
    ]
    return sorted(wanted, key=lambda info: info.filename)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is its system's rather than its user's."""
    return name.startswith(".") or name == "__MACOSX"
