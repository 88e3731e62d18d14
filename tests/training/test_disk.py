"""A run directory that takes nothing more for a while: training goes on, says so, and saves again when it can."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from erdfast.training.checkpoint import CheckpointWriter
from erdfast.training.checkpoint_files import complete_checkpoints, complete_step
from erdfast.training.metrics import MetricsWriter, read_metrics
from erdfast.training.parallel import World
from erdfast.training.snapshots import list_snapshots
from erdfast.training.trainer import Trainer
from tests.runs import all_tensors, assert_same_bits, tiny_trainer

QUICK: dict[str, Any] = {"steps": 10, "log_every": 1, "checkpoint_every": 2, "keep_last": 9}


@contextlib.contextmanager
def blocked(folder: Path) -> Iterator[None]:
    """No file can be made in a folder while a file has its name: root may write anywhere else."""
    aside = folder.with_name("aside")
    if folder.exists():
        folder.rename(aside)
    folder.write_text("in the way")
    yield
    folder.unlink()
    if aside.exists():
        aside.rename(folder)


def block_between(trainer: Trainer, folder: Path, first: int, last: int) -> None:
    """From before step `first` to after step `last`."""
    step, stack = trainer._one_step, contextlib.ExitStack()

    def one_step(*arguments: Any) -> None:
        if trainer.step + 1 == first:
            trainer.writer.wait()
            stack.enter_context(blocked(folder))
        step(*arguments)
        if trainer.step == last:
            if thread := trainer.writer._thread:  # it fails now, and the trainer has yet to ask
                thread.join()
            stack.close()

    trainer._one_step = one_step  # pyright: ignore[reportAttributeAccessIssue]  # of fewer words


def listening(trainer: Trainer) -> list[str]:
    """What the trainer says from now on."""
    said: list[str] = []
    trainer.say = said.append
    return said


def test_checkpoints_that_cannot_be_written_for_a_while(tmp_path):
    run = tmp_path / "run"
    trainer = tiny_trainer(run, **QUICK)
    said = listening(trainer)
    block_between(trainer, run / "checkpoints", 3, 6)
    trainer.train()
    warnings = [line for line in said if "cannot be written" in line]
    assert [line.partition(" in ")[0] for line in warnings] == [f"the checkpoint of step {step}" for step in (4, 6)]
    assert all(line.endswith("; training goes on") for line in warnings)
    found = [int(path.name) for path in complete_checkpoints(run / "checkpoints")]
    assert found == [2, 8, 10]
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 11))
    tiny_trainer(tmp_path / "undisturbed", steps=10).train()
    assert_same_bits(all_tensors(run), all_tensors(tmp_path / "undisturbed"))


def test_a_failure_is_said_at_the_next_log_line(tmp_path):
    """Not when the next checkpoint is due, which may be hours later."""
    trainer = tiny_trainer(tmp_path, **dict(QUICK, steps=9, checkpoint_every=4, log_every=2))
    said = listening(trainer)
    block_between(trainer, tmp_path / "checkpoints", 3, 4)
    seen: dict[int, int] = {}
    log = trainer._log

    def log_and_count(*arguments: Any) -> dict[str, Any]:
        record = log(*arguments)
        seen[trainer.step] = sum("the checkpoint of step 4 in" in line for line in said)
        return record

    trainer._log = log_and_count  # pyright: ignore[reportAttributeAccessIssue]  # of fewer words
    trainer.train()
    assert seen == {2: 0, 4: 0, 6: 1, 8: 1, 9: 1}
    assert complete_step(tmp_path) == 9


def test_polling_waits_for_nothing(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=1, world=World(device=torch.device("cpu")))
    release = threading.Event()

    def write(*_arguments: Any) -> None:
        release.wait(20.0)
        raise OSError("no space left")

    monkeypatch.setattr(writer, "_write", write)
    writer.save(1, {}, {}, {})
    writer.poll()
    thread = writer._thread
    assert thread is not None
    assert thread.is_alive()
    release.set()
    thread.join()
    with pytest.raises(OSError, match="no space left"):
        writer.poll()
    writer.poll()
    writer.wait()


def test_the_last_state_must_be_written(tmp_path):
    trainer = tiny_trainer(tmp_path, **QUICK)
    listening(trainer)
    block_between(trainer, tmp_path / "checkpoints", 5, 11)
    with pytest.raises(OSError, match=r"the checkpoint of step 10 in .* cannot be written"):
        trainer.train()
    assert [int(path.name) for path in complete_checkpoints(tmp_path / "aside")] == [2, 4]


def test_metrics_that_do_not_fit_to_the_end(tmp_path, monkeypatch):
    """The last lines are lost when the file is closed; the state and the reason why a run ends are not."""
    monkeypatch.setattr(MetricsWriter, "truncate_after", on_a_full_device)
    trainer = tiny_trainer(tmp_path / "run", **QUICK)
    said = listening(trainer)
    trainer.train()
    (line,) = [line for line in said if "could not be written" in line]
    assert line.startswith("metrics.jsonl could not be written: [Errno 28] No space left on device")
    assert complete_step(tmp_path / "run") == 10

    diverging = tiny_trainer(tmp_path / "diverging", **dict(QUICK, lr=1e30))
    with pytest.raises(ArithmeticError, match="not finite"):
        diverging.train()


def on_a_full_device(writer: MetricsWriter, _step: int) -> int:
    writer._stream.close()
    writer._stream = Path("/dev/full").open("a")  # noqa: SIM115  # the writer closes it
    return 0


def test_every_log_is_closed_where_one_fails(tmp_path):
    class Board:
        closed = 0

        def close(self) -> None:
            self.closed += 1
            raise OSError("the board does not fit either")

        finish = close

    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer._board, writer._wandb = board, wandb = Board(), Board()  # pyright: ignore[reportAttributeAccessIssue]
    on_a_full_device(writer, 0)
    with pytest.raises(OSError, match="No space left"):
        writer.write({"step": 1})
    with pytest.raises(OSError, match=r"No space left|does not fit"):
        writer.close()
    assert (board.closed, wandb.closed, writer._stream.closed) == (1, 1, True)


def test_snapshots_of_averages_that_cannot_be_written_for_a_while(tmp_path):
    trainer = tiny_trainer(tmp_path, ema_std=(0.05, 0.1), **QUICK)
    said = listening(trainer)
    block_between(trainer, tmp_path / "ema", 3, 6)
    trainer.train()
    (line,) = [line for line in said if "could not be written" in line]  # for two snapshots of two averages
    assert line.startswith("a snapshot of the averages could not be written: ")
    assert line.endswith("; training goes on")
    assert sorted({snapshot.step for snapshot in list_snapshots(tmp_path)}) == [2, 8, 10]
    assert complete_step(tmp_path) == 10
