"""Result files: complete or absent on the disk, and a full run is never replaced by less than a full run by accident.

A run that lacks something (dtypes, rounds, torch.compile) says so in its file, and is refused where the file of a full
run already lies. A full run that replaces another is kept beside it, in <name>.partial.json, until its last row is in.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from erdfast.atomic import write_text

PARTIAL = ".partial.json"
POLICY = (
    "A full run has all default dtypes and sides, torch.compile and at least the default number of rounds. Anything "
    "else is saved as incomplete, and refused where the file of a full run lies: --no-save prints only, --results "
    "FOLDER saves elsewhere, --overwrite replaces the file. Until a full run is finished, it does not replace another: "
    "its rows lie in <op>.partial.json."
)
"""For --help: see `help_text`."""


def help_text() -> str:
    """The policy, below the options."""
    return textwrap.fill(POLICY, 100, break_on_hyphens=False)


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception for a table: its kind and the first line of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:limit]}" if said else type(error).__name__


def is_complete(path: Path) -> bool:
    """Whether the file of a full run lies there."""
    try:
        return bool(json.loads(path.read_text()).get("complete", True))
    except (OSError, ValueError, AttributeError):
        return False


class ResultFile:
    """Where the rows of one run go."""

    def __init__(self, path: Path, *, missing: Sequence[str], overwrite: bool) -> None:
        """missing: what the run lacks of a full one, in words.

        Raises:
            ValueError: it lacks something, and the file of a full run must not be overwritten; or its folder cannot be.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{path.parent} cannot be a folder of results: {error.strerror}") from None
        self.path, self.missing = path, list(missing)
        self._keeps = is_complete(path) and not overwrite
        if self._keeps and self.missing:
            raise ValueError(
                f"{path} holds a full run, and this one would lack {', '.join(self.missing)}: "
                "say --no-save, --results FOLDER or --overwrite"
            )

    def write(self, head: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, finished: bool) -> Path:
        """Save what there is; `finished`: nothing is still to come, and nothing failed. Gives the file written."""
        complete = finished and not self.missing
        partial = self.path.with_suffix(PARTIAL)
        path = partial if self._keeps and not complete else self.path
        lacking = {"missing": self.missing} if self.missing else {}
        result = {**head, "complete": complete, **lacking, "rows": list(rows)}
        write_text(path, json.dumps(result, indent=2) + "\n")
        if complete:
            partial.unlink(missing_ok=True)
        return path
