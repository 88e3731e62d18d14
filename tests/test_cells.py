"""Processes that train cells: one that is killed is told in a line, and none outlives its parent."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from erdfast.cells import read_cell, run_missing
from tests.runs import ROOT


@dataclass(frozen=True)
class Number:
    """A cell that says who computed it."""

    value: int

    @property
    def name(self) -> str:
        return f"number{self.value}"


def square(cell: Number) -> dict[str, Any]:
    if cell.value == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return dataclasses.asdict(cell) | {"square": cell.value**2}


def wait_for_ever(cell: Number) -> dict[str, Any]:
    Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
    time.sleep(600)
    return dataclasses.asdict(cell)


def test_a_process_that_is_killed_is_told_and_what_is_done_is_kept(tmp_path):
    with pytest.raises(OSError, match="was killed, for want of memory perhaps; what is done is kept"):
        run_missing(square, [Number(2), Number(13)], tmp_path, workers=1)
    found = read_cell(tmp_path, Number(2))
    assert found is not None
    assert found["square"] == 4


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody fetches."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    code = (
        "from pathlib import Path; from erdfast.cells import run_missing; from tests.test_cells import *\n"
        f"if __name__ == '__main__': run_missing(wait_for_ever, [Number(1)], Path({str(tmp_path / 'cells')!r}), 1)"
    )
    pid_file = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PID_FILE": str(pid_file)}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.1)
    worker = int(pid_file.read_text())
    assert alive(worker)
    parent.kill()
    parent.wait()
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)
