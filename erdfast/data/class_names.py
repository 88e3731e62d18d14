"""Readable names of classes, from the files that people have of ImageNet's.

| file | holds |
|---|---|
| text | "tench, Tinca tinca" per class, in order; or "n01440764 tench, Tinca tinca" in any order |
| .json | a list of those, {"n01440764": "tench"}, or {"0": ["n01440764", "tench"]} as Keras has it |
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .label_files import SYNSET
from .text_tables import read_text

_NAMED = re.compile(rf"({SYNSET})(?:\s+|\s*[,:]\s*)(.+)")


class _Entry(NamedTuple):
    key: str
    """Synset, or place."""
    name: str


def read_class_names(path: Path, classes: Sequence[str], count: int) -> tuple[str, ...]:
    """One name per class.

    Args:
        path: a file of the table.
        classes: synsets in the order of labels; none where they are not known.
        count: how many classes there are.

    Raises:
        ValueError: it cannot be read, or lacks a class; names it.
    """
    names = dict(_from_json(path) if path.suffix == ".json" else _from_text(path))
    keyed = any(re.fullmatch(SYNSET, key) for key in names)
    keys = (classes or sorted(names)) if keyed else [str(place) for place in range(count)]
    if missing := next((key for key in keys if key not in names), None):
        raise ValueError(f"{path}: it has no name for class {missing}")
    if len(keys) != count or (not keyed and len(names) != count):
        raise ValueError(f"{path}: it has {len(names):,} names for {count:,} classes")
    return tuple(names[key] for key in keys)


def _from_text(path: Path) -> Iterator[_Entry]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    for place, line in enumerate(filter(None, lines)):
        yield _entry(str(place), line)


def _from_json(path: Path) -> Iterator[_Entry]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        text = str(error) or type(error).__name__
        raise ValueError(text if text.startswith(str(path)) else f"{path}: cannot be read: {text}") from error
    pairs = enumerate(content) if isinstance(content, list) else content.items() if isinstance(content, dict) else ()
    found = False
    for key, value in pairs:
        found = True
        yield _of_json(path, str(key), value)
    if not found:
        raise ValueError(f"{path}: it holds neither a list nor an object of names")


def _of_json(path: Path, key: str, value: object) -> _Entry:
    if isinstance(value, str) and value.strip():
        return _entry(key, value.strip())
    if isinstance(value, list) and len(value) > 1 and all(isinstance(part, str) for part in value[:2]):
        return _Entry(value[0], value[1]) if re.fullmatch(SYNSET, value[0]) else _Entry(key, value[0])
    raise ValueError(f"{path}: the name of {key} is {value!r:.100}, expected a text")


def _entry(key: str, text: str) -> _Entry:
    named = _NAMED.fullmatch(text)
    return _Entry(named[1], named[2]) if named else _Entry(key, text)
