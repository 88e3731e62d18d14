"""Files that are complete or absent: written under a temporary name, flushed to the disk, renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary stream that replaces `path` when the block ends without an exception; makes the folder if need be.

    Raises:
        OSError: it cannot be written; `path` is as it was and nothing else remains.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".partial")
    try:
        os.fchmod(handle, 0o644)  # mkstemp's 0600 would hide the file from colleagues
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            error.filename = str(target)  # a full disk does not say where it is
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a small UTF-8 file."""
    with atomic_write(path) as stream:
        stream.write(text.encode())
