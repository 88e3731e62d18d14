"""What an unfinished folder is being made of: going on with other options would mix two results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from erdfast.atomic import write_text


def begin_job(
    path: Path, job: dict[str, Any], *, settled: dict[str, Any] | None = None, advice: str = "choose another --out"
) -> dict[str, Any] | None:
    """Write what a folder is made of, or compare it with what is written there; by one process.

    Args:
        path: the file.
        job: JSON values by name.
        settled: more of them, which hold from the first time on and are not compared.
        advice: what to do where they differ, for people.

    Returns:
        What was written there before; None where the work begins.

    Raises:
        ValueError: it was begun with other values, of which it names the first; or the file is damaged.
        OSError: it cannot be read or written.
    """
    text = json.dumps({**job, **(settled or {})}, indent=1) + "\n"
    if not path.exists():
        write_text(path, text)
        return None
    begun, now = _read(path), json.loads(text)
    different = [name for name in job if begun.get(name) != now[name]]
    if different:
        name = different[0]
        raise ValueError(
            f"{path.parent} was begun with {name} {begun.get(name)!r}, which is now {now[name]!r}: {advice}"
        )
    for left in path.parent.glob(".*.partial"):  # of a process that was killed
        left.unlink(missing_ok=True)
    return begun


def _read(path: Path) -> dict[str, Any]:
    try:
        job = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(job, dict):
        raise ValueError(f"{path} cannot be read: it is no JSON object")
    return job
