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


def test_what_is_no_result_is_put_aside_and_made_anew(tmp_path, capsys):
    for number, text in enumerate(("no JSON", '{"value": 3}', "[" * 100_000)):
        (tmp_path / "number2.json").write_text(text)
        assert run_missing(square, [Number(2)], tmp_path, 1, check=lambda found: found["square"]) == 1
        assert (tmp_path / f"number2.json.unusable{number + 1}").read_text() == text
        assert f"it is now number2.json.unusable{number + 1}, and made anew" in capsys.readouterr().err
        assert read_cell(tmp_path, Number(2)) == {"value": 2, "square": 4}
    assert run_missing(square, [Number(2)], tmp_path, 1, check=lambda found: found["square"]) == 0


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody fetches."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False


def start_waiting(tmp_path: Path, **options: Any) -> tuple[subprocess.Popen[str], int]:
    """A process that runs two cells which never end, and the process of the first."""
    code = (
        "from pathlib import Path; from erdfast.cells import run_missing; from tests.test_cells import *\n"
        "if __name__ == '__main__':\n"
        f"    run_missing(wait_for_ever, [Number(1), Number(2)], Path({str(tmp_path / 'cells')!r}), 1)"
    )
    pid_file = tmp_path / "pid"
    env = {**os.environ, "PID_FILE": str(pid_file)}
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, **options)
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.1)
    worker = int(pid_file.read_text())
    assert alive(worker)
    return parent, worker


def wait_for_end(worker: int) -> None:
    deadline = time.monotonic() + 60
    while alive(worker):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_no_process_outlives_a_parent_that_is_killed(tmp_path):
    parent, worker = start_waiting(tmp_path, stderr=subprocess.DEVNULL)
    parent.kill()
    parent.wait()
    wait_for_end(worker)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_ctrl_c_ends_at_once_what_would_run_for_minutes(tmp_path):
    parent, worker = start_waiting(tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does
    _, said = parent.communicate(timeout=60)
    assert f"stopped; what is done is kept in {tmp_path / 'cells'}" in said
    assert "for want of memory" not in said
    wait_for_end(worker)
