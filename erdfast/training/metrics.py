"""What a run writes down about itself, and the loss per noise level, gathered without waiting for the
device."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erdfast.atomic import atomic_write, write_text

LOGSNR_EDGES: tuple[float, ...] = tuple(float(edge) for edge in range(-10, 11))
"""Edges of the 20 bins of log-SNR; the first and the last bin are open outwards."""


class MetricsWriter:
    """Appends one JSON object per line to a file, each flushed at once, so that `tail -f` and a crash see all
    of them.

    Opening the file removes a torn last line (a crash in the middle of a write), so that the next record
    starts on its own. Whole lines that are no records, which nothing written here leaves, are moved to
    <name>.damaged beside it: a log must not keep good weights from being trained on.

    Args:
        path: the jsonl file; it and its folder are made if need be.
        tensorboard: folder for TensorBoard's files as well; None writes none.
        wandb: project of Weights & Biases that receives the numbers as well, over the network; None writes none.
        say: prints a line for people.

    Raises:
        ImportError: TensorBoard or Weights & Biases are wanted but not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tensorboard: str | os.PathLike[str] | None = None,
        wandb: str | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.path = Path(path)
        self._tensorboard_folder = tensorboard
        self._wandb = None if wandb is None else _open_wandb(wandb, self.path.parent)
        self._board = None if tensorboard is None else _open_tensorboard(tensorboard, None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(self.path)
        _set_aside(self.path, say)
        self._stream = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record of numbers, strings, lists, and tensors or NumPy values (read here: on the host).

        Numbers that are not finite are written as null, which every JSON reader accepts. TensorBoard and Weights &
        Biases receive each plain number under its name, at the record's "step".
        """
        plain = {key: _plain(value) for key, value in record.items()}
        self._stream.write(json.dumps(plain, allow_nan=False) + "\n")
        self._stream.flush()
        if "step" not in plain:
            return
        numbers = {
            key: value
            for key, value in plain.items()
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, plain["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=plain["step"])

    def truncate_after(self, step: int) -> int:
        """Forget the records with a "step" beyond `step`, which a resumed run will write again; returns how
        many.

        Atomic: the file is the old one or the shortened one, whatever happens.
        """
        self._stream.close()
        records = read_metrics(self.path)
        kept = [record for record in records if record.get("step", step) <= step]
        if len(kept) < len(records):
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            if self._board is not None and self._tensorboard_folder is not None:
                self._board.close()
                self._board = _open_tensorboard(self._tensorboard_folder, step + 1)
        self._stream = self.path.open("a", encoding="utf-8")
        return len(records) - len(kept)

    def close(self) -> None:
        """Close the files, each of them even where another's last lines do not fit; harmless when repeated."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._stream.close)
            if self._board is not None:
                stack.callback(self._board.close)
            if self._wandb is not None:
                stack.callback(self._wandb.finish)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of a jsonl file, in order. A torn last line is left out; a missing file has no records.

    Raises:
        ValueError: a line before the last is no record; names it.
    """
    path = Path(path)
    records = []
    for number, line in enumerate(_whole_lines(path), start=1):
        try:
            records.append(_parse_record(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}: {line[:80]!r}") from error
    return records


class LossByLogsnr:
    """Mean squared error by noise level, summed up where the model runs: no host synchronisation until it is
    read.

    Sums are ordered the same way every time (a masked sum and no atomic additions), and a NaN stays in its
    bin.

    Args:
        edges: increasing bin edges in log-SNR, at least two; below the first counts to the first bin, beyond
            the last to the last.
        device: where the losses are.
    """

    def __init__(self, edges: Sequence[float] = LOGSNR_EDGES, *, device: torch.device | str = "cpu") -> None:
        self.edges = [float(edge) for edge in edges]
        if len(self.edges) < 2 or any(b <= a for a, b in zip(self.edges, self.edges[1:], strict=False)):
            raise ValueError(f"edges must be two or more increasing numbers, got {self.edges}")
        self._inner = torch.tensor(self.edges[1:-1], dtype=torch.float32, device=device)
        self._numbers = torch.arange(len(self.edges) - 1, device=device)
        self.totals = torch.zeros(2, len(self.edges) - 1, dtype=torch.float64, device=device)
        """Sums of the losses and numbers of samples, (2, bins) float64: several processes add theirs by
        all-reduce."""

    def update(self, logsnr: Tensor, mse: Tensor) -> None:
        """Add a batch: log-SNR and unweighted mean squared error per sample, (B,) each, on the device."""
        bins = torch.bucketize(logsnr.detach().float(), self._inner)
        member = bins[:, None] == self._numbers[None, :]
        self.totals[0] += torch.where(member, mse.detach().double()[:, None], 0.0).sum(dim=0)
        self.totals[1] += member.sum(dim=0)

    def read_and_reset(
        self, all_reduce: Callable[[Tensor], object] | None = None
    ) -> tuple[list[float | None], list[int]]:
        """Mean per bin (None where there were no samples) and number of samples per bin; then starts from
        zero.

        Waits for the device: once per log line. `all_reduce` sums the (2, bins) float64 totals of all
            processes in place.
        """
        if all_reduce is not None:
            all_reduce(self.totals)
        sums, counts = self.totals.tolist()
        self.totals.zero_()
        means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
        return means, [int(count) for count in counts]


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _whole_lines(path: Path) -> list[bytes]:
    """Without what follows the last newline, which was never completed."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _parse_record(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError("not a JSON record") from error
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    step = record.get("step", 0)
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError("expected a whole number as step")
    return record


def _set_aside(path: Path, say: Callable[[str], None]) -> None:
    """Move lines that are no records to <name>.damaged, after what lies there already.

    They are on the disk there before they are gone here: a crash between the two may leave them twice, never lost.
    """
    good, bad = [], []
    for line in _whole_lines(path):
        try:
            _parse_record(line)
        except ValueError:
            bad.append(line + b"\n")
        else:
            good.append(line + b"\n")
    if not bad:
        return
    aside = path.with_name(f"{path.name}.damaged")
    with aside.open("ab") as stream:
        stream.writelines(bad)
        stream.flush()
        os.fsync(stream.fileno())
    with atomic_write(path) as stream:
        stream.writelines(good)
    lines = "1 line that is no record was" if len(bad) == 1 else f"{len(bad):,} lines that are no records were"
    say(f"{path}: {lines} moved to {aside}")


def _drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        data = stream.read()
        stream.truncate(data.rfind(b"\n") + 1)


def _open_tensorboard(folder: str | os.PathLike[str], purge_step: int | None):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("TensorBoard logs need tensorboard: run `pip install erdfast[logging]`") from error
    return SummaryWriter(os.fspath(folder), purge_step=purge_step)


def board_folder(run: Path) -> Path | None:
    """Where a run's TensorBoard logs go; None where TensorBoard is not installed."""
    return run / "tensorboard" if importlib.util.find_spec("tensorboard") is not None else None


def import_wandb():
    """The package; raises ImportError, saying what to install, where it is missing."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError("logging to Weights & Biases needs wandb: run `pip install wandb`") from error
    return wandb


def _open_wandb(project: str, run: Path):
    """The same run again where this one continues: its id is the directory's name."""
    wandb = import_wandb()
    return wandb.init(project=project, name=run.name, id=run.resolve().name, dir=str(run), resume="allow")
