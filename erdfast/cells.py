"""Cells of an experiment: each trained in a process of one thread and kept in a file of its own.

So what is stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from statistics import mean, stdev
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from tqdm import tqdm

from erdfast.atomic import write_text


class Cell(Protocol):
    """A frozen dataclass of numbers, strings and None: all that a result depends on."""

    @property
    def name(self) -> str:
        """Of its file; no two cells of an experiment have the same."""
        ...

    __dataclass_fields__: ClassVar[dict[str, Any]]


AnyCell = TypeVar("AnyCell", bound=Cell)
Check = Callable[[dict[str, Any]], object]
"""Raises LookupError, TypeError, ValueError or ArithmeticError where a result lacks what its report needs."""


def run_missing(
    run_cell: Callable[[AnyCell], dict[str, Any]],
    cells: Sequence[AnyCell],
    folder: Path,
    workers: int,
    check: Check | None = None,
) -> int:
    """Run the cells that have no file yet, each in a process of one thread; returns how many there were.

    A file that is damaged or of other settings is put aside under another name, which is said.

    Args:
        run_cell: of a module, not a closure; gives the cell's own fields and what was measured.
        cells: in the order in which they are run.
        folder: of their files.
        workers: processes at a time.
        check: of results; see `read_cell`.

    Raises:
        OSError: a result cannot be written, or a process was killed; what is done is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if read_cell(folder, cell, check) is None]
    for cell in missing:
        put_aside(folder / f"{cell.name}.json")
    context = multiprocessing.get_context("spawn")  # threads of this process would not survive a fork
    with ProcessPoolExecutor(workers, context, initializer=_start_worker) as pool:
        jobs = [pool.submit(_run_and_write, run_cell, cell, folder) for cell in missing]
        try:
            for job in tqdm(as_completed(jobs), total=len(cells), initial=len(cells) - len(jobs), unit="cell"):
                job.result()
        except BrokenProcessPool as error:
            reason = "a process that trained a cell was killed, for want of memory perhaps; what is done is kept in"
            raise ChildProcessError(f"{reason} {folder}: start again, with fewer workers") from error
        except BaseException:
            _end(pool)
            print(f"stopped; what is done is kept in {folder}", file=sys.stderr)
            raise
    return len(missing)


def put_aside(path: Path) -> None:
    """Give a file that is no result another name, if it exists: somebody may want to know what it was."""
    if path.exists():
        other = next(o for n in itertools.count(1) if not (o := path.with_name(f"{path.name}.unusable{n}")).exists())
        path.rename(other)
        print(f"{path} is damaged or of other settings: it is now {other.name}, and made anew", file=sys.stderr)


def _end(pool: ProcessPoolExecutor) -> None:
    """Now: a cell takes minutes, and one that is written is written whole."""
    workers = list((pool._processes or {}).values())  # a name of Python's own: there is none for others before 3.14
    pool.shutdown(wait=False, cancel_futures=True)
    for process in workers:
        process.terminate()


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the first one ends the others
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Whoever waits for cells after their parent was killed would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_and_write(run_cell: Callable[[AnyCell], dict[str, Any]], cell: AnyCell, folder: Path) -> None:
    write_text(folder / f"{cell.name}.json", json.dumps(rounded(run_cell(cell))) + "\n")


def rounded(value: Any) -> Any:
    """Floats to six significant digits: what is beyond depends on the machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return {key: rounded(item) for key, item in value.items()} if isinstance(value, dict) else value


def select(cells: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The results of these settings."""
    return [cell for cell in cells if all(cell[name] == value for name, value in wanted.items())]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, which is 0 for a single seed."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def read_cell(folder: Path, cell: Cell, check: Check | None = None) -> dict[str, Any] | None:
    """The result of a cell; None if there is none, or one of other settings, or one that does not pass the check."""
    try:
        found = json.loads((folder / f"{cell.name}.json").read_text(encoding="utf-8"))
        if not is_of(found, cell):
            return None
        if check is not None:
            check(found)
    except (FileNotFoundError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return None
    return found


def is_of(found: Any, cell: Cell) -> bool:
    """Whether a result is one of these settings."""
    wanted = rounded(dataclasses.asdict(cell))
    return isinstance(found, dict) and all(found.get(name) == value for name, value in wanted.items())
