"""Text files that come with pictures: lists of names, partitions, attributes, labels; every error names the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from .sample_files import LARGEST_FILE

_SEPARATORS = re.compile(r"[,\s]+")


def read_text(path: Path) -> str:
    """A whole text file.

    Raises:
        ValueError: it is missing, too large, or no text; names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: {'it is a folder, expected a file' if path.is_dir() else 'no such file'}")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: it has {path.stat().st_size:,} bytes, more than {LARGEST_FILE:,}")
    try:
        return path.read_text(encoding="utf-8-sig")  # tables that were edited on Windows may begin with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: it is no text: {error}") from error


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers, from 1 on, and words of the lines that are not empty; commas part words as spaces do.

    Raises:
        ValueError: see `read_text`; or there is no such line.
    """
    found = False
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if words := [word for word in _SEPARATORS.split(line) if word]:
            found = True
            yield number, words
    if not found:
        raise ValueError(f"{path}: it is empty")
