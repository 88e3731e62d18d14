"""safetensors files that everyone may read, equal for equal content, complete or absent; checksums."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 22


def save_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """A safetensors file that everyone may read, with notes in its header.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError  # not for those who only read checksums
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt", **(notes or {})})
        settle_header(path)
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    except SafetensorError as error:  # safetensors hides a full disk in an error of its own
        raise OSError(f"cannot write {path}: {error}") from error


def replace_tensors(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str] | None = None) -> None:
    """`save_tensors`, complete or absent; makes the folder if need be.

    Raises:
        OSError: it cannot be written; `path` is as it was and nothing else remains.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_tensors(temporary, tensors, notes)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def settle_header(path: Path) -> None:
    """Put the notes in a safetensors header into order: they come in any, and equal runs shall leave equal files."""
    with path.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def checksum(file: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def tensors_checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of names and bytes of tensors on the CPU, in the order of their names."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
