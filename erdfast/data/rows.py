"""Arrays on disk as memory-mapped rows of bytes: npy, npz, safetensors and HDF5, without ever unpickling.

Rows stay bytes until they are gathered. An array inside an npz may start at any byte, and bfloat16 is unknown
to NumPy: copying a few rows and viewing the copy as numbers is right in every case, and the only copy there
is.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

_TORCH_DTYPES: dict[str, torch.dtype] = {
    "u1": torch.uint8,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
}

_SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself: a larger number means that the file is something else."""


class Rows(Protocol):
    """N equal arrays."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        ...

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Tensor:
        """(B,) int64 => (B, *shape) of `dtype`, a fresh contiguous tensor."""
        ...


@dataclass(frozen=True)
class ByteRows:
    """Rows backed by bytes in memory or in a mapped file."""

    data: Tensor
    """(N, bytes of a row) uint8."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    mapping: mmap.mmap | None = None
    """What `data` is a view of, if it is a file's."""
    skip: int = 0
    """Bytes of the mapping before row 0."""

    def __len__(self) -> int:
        return self.data.shape[0]

    def take(self, indices: Tensor) -> Tensor:
        """See `Rows.take`."""
        return self.data.index_select(0, indices).view(self.dtype).view(-1, *self.shape)

    def announce(self, row: int) -> None:
        """Let the operating system begin to read a row that will be taken."""
        if self.mapping is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        row_bytes = self.data.shape[1]
        start = self.skip + row * row_bytes
        page = start - start % mmap.PAGESIZE  # the call takes whole pages
        self.mapping.madvise(mmap.MADV_WILLNEED, page, start + row_bytes - page)


class ShardedRows:
    """Several `Rows` of one shape, end to end.

    Mapped files are copied from row by row, on the calling thread alone: a batch takes few rows of each of many files,
    and an OpenMP region per file costs more than its copy, by far where the cores have other work (256 rows of 16 KB of
    eight files on two cores: 370,000 rows/s so, 120,000 with index_select per file; 300,000 and 2,000 beside others).
    """

    def __init__(self, shards: Sequence[Rows]) -> None:
        self.shards = list(shards)
        self.dtype, self.shape = shards[0].dtype, shards[0].shape
        sizes = np.array([len(shard) for shard in shards], dtype=np.int64)
        self._ends = sizes.cumsum()
        self._starts = self._ends - sizes
        self._mapped = [shard for shard in shards if isinstance(shard, ByteRows)]
        self._arrays = [shard.data.numpy() for shard in self._mapped]  # to index them is ten times faster than tensors
        self._taken = np.zeros(len(self), dtype=np.bool_)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def take(self, indices: Tensor) -> Tensor:
        """See `Rows.take`."""
        numbers = indices.numpy()
        owner = np.searchsorted(self._ends, numbers, side="right")
        local = numbers - self._starts[owner]
        if len(self._mapped) < len(self.shards):
            return self._take_by_shard(owner, local)
        self._announce(numbers, owner, local)
        out = torch.empty((len(numbers), *self.shape), dtype=self.dtype)
        if len(numbers):
            pairs = zip(owner.tolist(), local.tolist(), strict=True)
            rows = [self._arrays[shard][row] for shard, row in pairs]
            np.concatenate(rows, out=out.view(-1).view(torch.uint8).numpy())
        return out

    def _announce(self, numbers: np.ndarray, owner: np.ndarray, local: np.ndarray) -> None:
        """Have all rows that were never taken read at once: page faults would wait for the disk one after the other.

        256 rows of 16 KB from a cold disk: 45 ms without, 12 ms with it. Only those, since they are in memory
        afterwards, and to announce a row takes as long as to copy it.
        """
        fresh = ~self._taken[numbers]
        if fresh.any():
            for shard, row in zip(owner[fresh].tolist(), local[fresh].tolist(), strict=True):
                self._mapped[shard].announce(row)
            self._taken[numbers] = True

    def _take_by_shard(self, owner: np.ndarray, local: np.ndarray) -> Tensor:
        """Where rows are no bytes in memory: each shard is asked once."""
        out = torch.empty((len(owner), *self.shape), dtype=self.dtype)
        for number in np.unique(owner).tolist():
            where = np.flatnonzero(owner == number)
            out[torch.from_numpy(where)] = self.shards[number].take(torch.from_numpy(local[where]))
        return out


class HDF5Rows:
    """Rows of a chunked or compressed HDF5 data set, read through one handle that stays open."""

    def __init__(self, dataset) -> None:
        self._dataset = dataset
        self.dtype, self.shape = _torch_dtype(dataset.dtype), tuple(dataset.shape[1:])

    def __len__(self) -> int:
        return self._dataset.shape[0]

    def take(self, indices: Tensor) -> Tensor:
        """See `Rows.take`. h5py wants increasing indices without repeats."""
        unique, inverse = indices.unique(return_inverse=True)
        return torch.from_numpy(self._dataset[unique.numpy()])[inverse]


Loaders = dict[str, Callable[[], Rows]]
"""The arrays of a file by name. Each is checked when it is loaded: what is not asked for may be anything."""


def read_npy(path: Path) -> ByteRows:
    """A .npy file, mapped. ValueError if it is damaged, empty or of objects."""
    return _map_npy(path, 0, path.name)


def read_npz(path: Path) -> Loaders:
    """The arrays of a .npz file: those stored without compression are mapped, the others read into memory."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    return {info.filename.removesuffix(".npy"): partial(_load_member, path, info) for info in members}


def _load_member(path: Path, info: zipfile.ZipInfo) -> ByteRows:
    name = info.filename.removesuffix(".npy")
    if info.compress_type == zipfile.ZIP_STORED:
        return _map_npy(path, _member_offset(path, info), name, info.file_size)
    with zipfile.ZipFile(path) as archive:
        with archive.open(info) as stream:
            shape, _, dtype = _npy_header(stream, name)
            _check_fits(stream.tell(), shape, dtype.itemsize, info.file_size, name)
        _torch_dtype(dtype, name)
        with archive.open(info) as stream:
            return _from_memory(np.lib.format.read_array(stream, allow_pickle=False), name)


def read_safetensors(path: Path) -> Loaders:
    """The tensors of a .safetensors file, mapped."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", _exactly(stream.read(8), 8))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {length} bytes: not a safetensors file")
        header = json.loads(_exactly(stream.read(length), length))
    if not (isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values())):
        raise ValueError("its header is no table of tensors: not a safetensors file")
    header.pop("__metadata__", None)
    return {name: partial(_load_tensor, path, 8 + length, name, entry) for name, entry in header.items()}


def _load_tensor(path: Path, data_start: int, name: str, entry: dict) -> ByteRows:
    if entry["dtype"] not in _SAFETENSORS_DTYPES:
        raise ValueError(f"'{name}' has type {entry['dtype']}, expected one of {', '.join(_SAFETENSORS_DTYPES)}")
    start, end = entry["data_offsets"]
    dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    size = path.stat().st_size - data_start
    if not (type(start) is int and type(end) is int and 0 <= start <= end):
        raise ValueError(f"'{name}' lies at bytes {start}..{end} of the data, which cannot be")
    if end > size:
        raise ValueError(f"the file ends early: '{name}' lies at bytes {start}..{end} of {size:,} bytes of data")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"'{name}' has {end - start} bytes, which does not suit its shape {shape}")
    return _map_bytes(path, data_start + start, shape, dtype, name)


def read_hdf5(path: Path) -> Loaders:
    """What lies at the top of an HDF5 file: contiguous data sets are mapped, the others read through h5py.

    Raises:
        ImportError: h5py is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"reading {path} needs h5py: run `pip install erdfast[hdf5]`") from error
    handle = h5py.File(path, "r")  # stays open: opening it per sample is what makes other loaders slow

    def load(name: str) -> Rows:
        dataset = handle[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim == 0:
            raise ValueError(f"'{name}' is no data set with rows")
        _check_virtual(dataset, name)
        offset = dataset.id.get_offset()  # None where the data lie in chunks or in other files
        dtype = _torch_dtype(dataset.dtype, name)
        if offset is not None and dataset.file.filename == handle.filename:  # a link may lead into another file
            return _map_bytes(path, offset, dataset.shape, dtype, name)
        _check_sides(dataset.shape, name)
        return HDF5Rows(dataset)

    return {name: partial(load, name) for name in map(str, handle)}


def _check_virtual(dataset, name: str) -> None:
    """HDF5 itself reads zeros where what a virtual data set is made of is missing."""
    if not dataset.is_virtual:
        return
    import h5py

    path = Path(dataset.file.filename)
    for source in dataset.virtual_sources():
        file = path if source.file_name == "." else path.parent / source.file_name
        if not file.exists():
            raise ValueError(f"'{name}' is made of {source.file_name}, which is missing")
        with h5py.File(file, "r") as opened:
            if source.dset_name not in opened:
                raise ValueError(f"'{name}' is made of '{source.dset_name}' in {file.name}, which is missing")


def _npy_header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"'{name}' has npy version {version}, expected 1.0 or 2.0")
    return readers[version](stream)


def _map_npy(path: Path, offset: int, name: str, size: int | None = None) -> ByteRows:
    """The array whose header begins at `offset`; header and data must fit into `size` bytes, if given."""
    with path.open("rb") as stream:
        stream.seek(offset)
        shape, fortran, dtype = _npy_header(stream, name)
        start = stream.tell()
    torch_dtype = _torch_dtype(dtype, name)
    if fortran and len(shape) > 1:
        raise ValueError(f"'{name}' is stored in Fortran order: save numpy.ascontiguousarray of it")
    if size is not None:
        _check_fits(start - offset, shape, torch_dtype.itemsize, size, name)
    return _map_bytes(path, start, shape, torch_dtype, name)


def _check_sides(shape: tuple[int, ...], name: str) -> None:
    if len(shape) == 0 or 0 in shape:
        raise ValueError(f"'{name}' is empty: its shape is {tuple(shape)}")
    if not all(type(side) is int and side > 0 for side in shape):
        raise ValueError(f"'{name}' has the shape {tuple(shape)}, which cannot be")


def _check_fits(offset: int, shape: tuple[int, ...], itemsize: int, size: int, name: str) -> None:
    _check_sides(shape, name)
    needed = offset + math.prod(shape) * itemsize
    if needed > size:
        raise ValueError(f"the file ends early: '{name}' needs {needed:,} bytes, there are {size:,}")


def _map_bytes(path: Path, offset: int, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> ByteRows:
    _check_fits(offset, shape, dtype.itemsize, path.stat().st_size, name)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    skip, count = offset % mmap.ALLOCATIONGRANULARITY, shape[0] * row_bytes
    with path.open("rb") as stream:
        # Copy on write never touches the file, and spares PyTorch's warning about memory it may not write to.
        mapping = mmap.mmap(stream.fileno(), skip + count, access=mmap.ACCESS_COPY, offset=offset - skip)
    data = np.frombuffer(mapping, np.uint8, count, skip).reshape(shape[0], row_bytes)
    return ByteRows(torch.from_numpy(data), dtype, tuple(shape[1:]), mapping, skip)


def _from_memory(array: np.ndarray, name: str) -> ByteRows:
    dtype = _torch_dtype(array.dtype, name)
    if array.ndim == 0 or array.size == 0:
        raise ValueError(f"'{name}' is empty: its shape is {array.shape}")
    array = np.ascontiguousarray(array)
    return ByteRows(torch.from_numpy(array.reshape(len(array), -1).view(np.uint8)), dtype, array.shape[1:])


def _torch_dtype(dtype: np.dtype, name: str = "array") -> torch.dtype:
    code = f"{dtype.kind}{dtype.itemsize}"
    if dtype.hasobject:
        raise ValueError(f"'{name}' holds Python objects, which would have to be unpickled: save plain numbers")
    if code not in _TORCH_DTYPES or not dtype.isnative:
        raise ValueError(f"'{name}' has type {dtype.str}, expected one of {', '.join(_TORCH_DTYPES)} in native order")
    return _TORCH_DTYPES[code]


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: after the 30 bytes, name and extra field of its LOCAL header."""
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", _exactly(stream.read(4), 4))
    return info.header_offset + 30 + name_bytes + extra_bytes


def _exactly(data: bytes, length: int) -> bytes:
    if len(data) != length:
        raise ValueError(f"the file ends early: expected {length} more bytes, got {len(data)}")
    return data
