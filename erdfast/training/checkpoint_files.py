"""Checkpoints as they lie on the disk: complete or absent, tensors as safetensors, numbers as JSON, never unpickled.

    checkpoints/00001000/
        state/*.safetensors   weights, averages, optimiser: a file of each process, its shards
        model.safetensors     averaged weights under the published names: for everyone else
        state.json            step, loss scale, format; size and checksum of every file

A checkpoint is written under a temporary name, flushed to the disk, and renamed: a crash at any moment leaves the older
checkpoints whole, and a folder without the temporary name is complete. Format 1, of one process, has state.safetensors
in place of the folder state/, and no checksums.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from erdfast.tensor_files import checksum, sync

FORMAT = 2
KNOWN_FORMATS = (1, FORMAT)
STATE, MODEL, NUMBERS = "state", "model.safetensors", "state.json"
OURS = {"trained_by": "erdfast"}
"""In the header of files of weights: how they were trained, only the run's config.json says."""
FORMAT_1_STATE = "state.safetensors"
FORMAT_1_FILES = (MODEL, FORMAT_1_STATE, NUMBERS)


def is_ours(path: Path) -> bool:
    """Whether a safetensors file holds weights of a run; no, if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return OURS.items() <= (file.metadata() or {}).items()
    except (OSError, SafetensorError):
        return False


def checkpoint_path(run: Path, step: int) -> Path:
    """Where a run keeps its checkpoint of a step."""
    return run / "checkpoints" / f"{step:08d}"


def temporary_path(checkpoint: Path) -> Path:
    """Under which a checkpoint is written, and removed."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


# ---------------------------------------------------------------------------- which there are


def find_newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run directory, and a line about each newer one that is not."""
    skipped = []
    for path in reversed(named_checkpoints(run / "checkpoints")):
        reason = incomplete(path)
        if reason is None:
            return path, skipped
        skipped.append(f"checkpoint {path} is left out: {reason}")
    return None, skipped


def complete_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint; None if there is none."""
    path, _ = find_newest(run)
    return None if path is None else int(path.name)


def newest_checkpoint(run: Path) -> Path:
    """The newest complete checkpoint of a run directory.

    Raises:
        ValueError: there is none; says what is wrong with those that there are.
    """
    path, skipped = find_newest(run)
    if path is None:
        raise ValueError("; ".join([f"{run} holds no complete checkpoint (looked in {run / 'checkpoints'})", *skipped]))
    return path


def named_checkpoints(folder: Path) -> list[Path]:
    """Folders called like a checkpoint, oldest first."""
    return sorted((path for path in folder.glob("[0-9]*") if _is_number(path.name)), key=lambda path: int(path.name))


def _is_number(name: str) -> bool:
    return re.fullmatch("[0-9]+", name) is not None  # str.isdigit takes "3²" for one


def complete_checkpoints(folder: Path) -> list[Path]:
    """Those that are complete, oldest first."""
    return [path for path in named_checkpoints(folder) if incomplete(path) is None]


def incomplete(path: Path) -> str | None:
    """What a checkpoint lacks or has too much, by the names and sizes of its files; None if nothing."""
    try:
        numbers = read_numbers(path)
    except ValueError as error:
        return str(error)
    if numbers["format"] == 1:
        missing = [name for name in FORMAT_1_FILES if not (path / name).is_file()]
        return f"{missing[0]} is missing" if missing else None
    found = {str(file.relative_to(path)): file.stat().st_size for file in _read_files(path)}
    listed = numbers["files"]
    for name in sorted({*found, *listed, MODEL}):
        if name not in found:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} is not listed in {NUMBERS}"
        if found[name] != listed[name]["bytes"]:
            return f"{name} has {found[name]:,} bytes instead of {listed[name]['bytes']:,}"
    return None


def _read_files(path: Path) -> list[Path]:
    """The files of a checkpoint that are read as tensors; others that lie there do no harm."""
    files = [path / MODEL, path / FORMAT_1_STATE, *(path / STATE).glob("*.safetensors")]
    return [file for file in files if file.is_file()]


def verify(path: Path) -> None:
    """Read all files of a checkpoint of format 2 and compare their checksums.

    Raises:
        ValueError: one differs, or is read although it has none; names it.
    """
    files = read_numbers(path)["files"]
    if files and (extra := [file for file in _read_files(path) if str(file.relative_to(path)) not in files]):
        raise ValueError(f"checkpoint {path} is damaged: {extra[0].relative_to(path)} is not listed in {NUMBERS}")
    for name, entry in files.items():
        _verify_file(path, name, entry)


def _verify_file(path: Path, name: str, entry: Mapping[str, int]) -> None:
    if checksum(path / name) != entry["crc32"]:
        raise ValueError(f"checkpoint {path} is damaged: {name} does not have the checksum that it was written with")


# ---------------------------------------------------------------------------- reading


def read_numbers(path: Path) -> dict[str, Any]:
    """state.json: "format", "step" and "files" (empty in format 1), and what else was written into it.

    Raises:
        ValueError: it is missing, damaged, of another format, or of another step than the folder's name says.
    """
    file = path / NUMBERS
    numbers = _read_json(file)
    version = numbers.get("format") if isinstance(numbers, dict) else None
    if not isinstance(numbers, dict) or not _is_count(version) or version not in KNOWN_FORMATS:
        raise ValueError(f"{file} is of no format that is known here ({', '.join(map(str, KNOWN_FORMATS))})")
    step = numbers.get("step")
    if not _is_count(step) or not _is_number(path.name) or step != int(path.name):
        raise ValueError(f"{file} says that it is of step {step!r}")
    if version == 1:
        return numbers | {"files": {}}
    if (wrong := _wrong_files(numbers.get("files")) or _wrong_counters(numbers)) is not None:
        raise ValueError(f"{file} is damaged: {wrong}")
    return numbers


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _wrong_files(files: Any) -> str | None:
    """What is wrong with the sizes and checksums of format 2; None if nothing."""
    if not isinstance(files, dict) or not files:
        return f'"files" is {_short(files)}; it must say bytes and crc32 of every file'
    for name, entry in files.items():
        if not isinstance(entry, dict) or not all(_is_count(entry.get(key)) for key in ("bytes", "crc32")):
            return f"{name} has {_short(entry)} for bytes and crc32; both must be whole numbers, at least 0"
    return None


def _wrong_counters(numbers: Mapping[str, Any]) -> str | None:
    """What is wrong with the loss scale or the count of updates that were left out."""
    for name in ("scaler", "health"):
        if not isinstance(numbers.get(name, {}), dict):
            return f'"{name}" is {_short(numbers[name])}; it must be an object'
    skipped = numbers.get("health", {}).get("skipped", [0, 0])
    if not isinstance(skipped, list) or len(skipped) != 2 or not all(_is_count(value) for value in skipped):
        return f'"skipped" is {_short(skipped)}; it must be two whole numbers, at least 0'
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _short(value: Any) -> str:
    return "missing" if value is None else reprlib.repr(value)


def read_model(path: Path) -> dict[str, Tensor]:
    """The averaged weights, on the CPU.

    Raises:
        ValueError: the file is damaged.
    """
    with _naming(path):
        entry = read_numbers(path)["files"].get(MODEL)  # format 1 has none
        if entry is not None:
            _verify_file(path, MODEL, entry)
        return load_file(path / MODEL)


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors of the state whose names begin so, whole and on the CPU; the prefix is cut off.

    Such as were not sharded: what is in pieces is put together by `load_into` (checkpoint.py) alone.

    Raises:
        ValueError: a file is damaged.
    """
    found: dict[str, Tensor] = {}
    with _naming(path):
        for file in state_files(path):
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118  # not a dict
                    if name.startswith(prefix):
                        found[name.removeprefix(prefix)] = stream.get_tensor(name)
    return found


def state_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint's state, in the order of their names."""
    old = path / FORMAT_1_STATE
    return [old] if old.exists() else sorted((path / STATE).glob("*.safetensors"))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path} cannot be read: {error}; remove that folder to continue from an older one"
        ) from error


# ---------------------------------------------------------------------------- writing


def write_numbers(folder: Path, step: int, numbers: Mapping[str, Any], sums: Mapping[str, int]) -> None:
    """state.json of a folder whose other files, with these checksums, are all there; written last."""
    files = {name: {"bytes": (folder / name).stat().st_size, "crc32": value} for name, value in sorted(sums.items())}
    content = {"format": FORMAT, "step": step, **numbers, "files": files}
    (folder / NUMBERS).write_text(json.dumps(content, indent=2) + "\n")
    sync(folder / NUMBERS)


def finish(temporary: Path, target: Path) -> None:
    """Give a folder that is complete its name.

    Raises:
        OSError: a checkpoint that a newer version wrote is in the way, or the disk is full.
    """
    sync(temporary)
    if target.exists():  # damaged: a complete one would have been resumed from
        _refuse_unknown_format(target)
        shutil.rmtree(target)
    temporary.rename(target)
    sync(target.parent)


def _refuse_unknown_format(path: Path) -> None:
    """What cannot be read here may be all that another version needs."""
    try:
        numbers = _read_json(path / NUMBERS)
    except ValueError:
        return
    version = numbers.get("format") if isinstance(numbers, dict) else None
    if version is not None and not (_is_count(version) and version in KNOWN_FORMATS):
        raise FileExistsError(
            f"{path / NUMBERS} is of format {_short(version)}, which is not known here "
            f"({', '.join(map(str, KNOWN_FORMATS))}): move {path} elsewhere, or use the version that wrote it"
        )


def remove_old(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """All complete checkpoints but the newest `keep_last` and those of every `keep_every`-th step."""
    for old in complete_checkpoints(folder)[:-keep_last]:
        if not keep_every or int(old.name) % keep_every:
            doomed = temporary_path(old)
            with contextlib.suppress(OSError):  # one checkpoint too many does no harm
                old.rename(doomed)  # so that a crash leaves no half of it under its own name
            shutil.rmtree(doomed, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """What a crash has left."""
    for left in folder.glob(".*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def publish(checkpoint: Path, run: Path) -> Path:
    """Put a checkpoint's averaged weights at the top of the run directory, atomically."""
    target, temporary = run / MODEL, run / ".model.safetensors.partial"
    try:
        shutil.copyfile(checkpoint / MODEL, temporary)
        sync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
