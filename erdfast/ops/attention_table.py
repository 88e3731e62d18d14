"""Which attention back end `auto` takes: rows that were measured, never a measurement in passing.

A run must not depend on what else its machine was doing when it started, and two ranks of a run must not choose
differently. So back ends are timed by an explicit command alone, `python -m bench.bench_attention --save-table`, and
`auto` only looks rows up: the user's (attention_table.json in $ERDFAST_CACHE, by default ~/.cache/erdfast) before those
that come with the package. Where there is no row, PyTorch chooses.

A row is {"device", "dtype", "keys", "head_width", "mode", "backend"}: the GPU's name or "cpu"; "bfloat16"; the bucket
of the number of keys (the least of KEY_BUCKETS that is not smaller); a number or "any"; "training", "inference" or
"any"; a name of TABLE_BACKENDS. The most specific row wins; other fields, such as the times, are for readers.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

KEY_BUCKETS = (16, 32, 64, 128, 192, 256, 320, 512, 1024, 2048, 4096)
MODES = ("training", "inference")
TABLE_BACKENDS = (
    "auto",
    "flash",
    "efficient",
    "cudnn",
    "math",
    "flash_attn2",
    "flash_attn3",
    "flash_attn4",
    "xformers",
    "triton",
)
"""What a row may name; "auto" leaves the choice to PyTorch. (The reference is a definition, not a choice.)"""
SHIPPED = Path(__file__).with_name("attention_table.json")

Key = tuple[str, str, int, "int | str", str]


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_traced(function: Function) -> Function:
    """What torch.compiler.assume_constant_result does, without its import of the compiler and Triton."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    return function


def key_bucket(keys: int) -> int | None:
    """The bucket of a number of keys; None beyond the last. Traceable: a compiled graph holds for its whole bucket."""
    for bucket in KEY_BUCKETS:
        if keys <= bucket:
            return bucket
    return None


def device_label(device: torch.device) -> str:
    """How rows name a device: "NVIDIA H200", "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@constant_when_traced
def table_head_widths() -> tuple[int, ...]:
    """The head widths that some row names. (A tracer compares a symbolic width with these.)"""
    return _head_widths()


@constant_when_traced
def measured_backend(
    device: torch.device, dtype: torch.dtype, bucket: int, head_width: int | None, training: bool
) -> str | None:
    """The back end of the most specific row, or None. The answer for given arguments stays the same in a process.

    Args:
        device, dtype: of q.
        bucket: `key_bucket` of the number of keys.
        head_width: None for one that no row names.
        training: whether gradients are wanted.
    """
    return _lookup(device, dtype, bucket, head_width, MODES[0] if training else MODES[1])


def reload() -> None:
    """Forget what was read, so that the next look-up reads the tables again."""
    _lookup.cache_clear()
    _head_widths.cache_clear()
    _tables.cache_clear()


def user_path() -> Path:
    """Where this user's rows are."""
    folder = os.environ.get("ERDFAST_CACHE", "")
    return (Path(folder) if folder else Path.home() / ".cache" / "erdfast") / "attention_table.json"


def read_rows(path: Path) -> dict[Key, dict[str, Any]]:
    """The rows of a table by key; none where there is no file, and one warning that names a file that is damaged."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _damaged(path, error)
    try:
        return {row_key(row): row for row in json.loads(text)["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        return _damaged(path, error)


def render_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a table, sorted, a row a line."""
    ordered = sorted(rows, key=lambda row: tuple(map(str, row_key(row))))
    lines = ",\n".join("    " + json.dumps(dict(row)) for row in ordered)
    return '{\n  "rows": [\n' + lines + "\n  ]\n}\n"


def row_key(row: Mapping[str, Any]) -> Key:
    """What a row is found by.

    Raises:
        ValueError, KeyError: it is no row.
    """
    if row["keys"] not in KEY_BUCKETS:
        raise ValueError(f"keys is {row['keys']!r}; choose from {', '.join(map(str, KEY_BUCKETS))}")
    if row["backend"] not in TABLE_BACKENDS:
        raise ValueError(f"backend is {row['backend']!r}; choose from {', '.join(TABLE_BACKENDS)}")
    return row["device"], row["dtype"], row["keys"], row["head_width"], row["mode"]


@functools.cache
def _lookup(device: torch.device, dtype: torch.dtype, bucket: int, head_width: int | None, mode: str) -> str | None:
    label, name = device_label(device), str(dtype).removeprefix("torch.")
    widths = ("any",) if head_width is None else (head_width, "any")
    for table in _tables():
        for width in widths:
            for kind in (mode, "any"):
                row = table.get((label, name, bucket, width, kind))
                if row is not None:
                    return row["backend"]
    return None


@functools.cache
def _head_widths() -> tuple[int, ...]:
    return tuple(sorted({key[3] for table in _tables() for key in table if isinstance(key[3], int)}))


@functools.cache
def _tables() -> tuple[dict[Key, dict[str, Any]], ...]:
    return read_rows(user_path()), read_rows(SHIPPED)


def _damaged(path: Path, error: Exception) -> dict[Key, dict[str, Any]]:
    # Read once a process, so said once.
    warnings.warn(f"the attention table {path} cannot be read ({error}) and is ignored", RuntimeWarning, stacklevel=2)
    return {}
