"""A signal ends the run in all processes after the same step, and asking costs no step any waiting."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from erdfast.training import interrupt as interrupt_module
from erdfast.training.interrupt import Interrupt, Vote


@pytest.mark.parametrize("echo", [signal.SIGTERM, signal.SIGINT])
def test_an_echo_of_the_first_signal_changes_nothing(echo):
    """torchrun passes on the signal that a scheduler has sent to its processes as well."""
    seen: list[int] = []
    before = signal.signal(echo, lambda number, _frame: seen.append(number))
    try:
        with Interrupt() as interrupt:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), echo)
            assert (interrupt.received, seen) == ("SIGTERM", [])
    finally:
        signal.signal(echo, before)


def test_the_first_signal_is_kept_and_a_later_one_acts_as_it_would_have(monkeypatch):
    monkeypatch.setattr(interrupt_module, "ECHO_S", {signal.SIGTERM: -1.0, signal.SIGINT: -1.0})
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        with Interrupt() as interrupt:
            assert interrupt.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert (interrupt.received, seen) == ("SIGTERM", [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == [signal.SIGTERM]
        with Interrupt():
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # nothing is left behind
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, before)


def test_one_process_stops_at_once():
    vote = Vote(1)
    assert vote.poll(None) is None
    assert vote.poll("SIGINT") == "SIGINT"
    vote.close()


class Work:
    """What an asynchronous all-reduce returns."""

    def __init__(self) -> None:
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1


def test_a_poll_waits_for_nothing_of_its_own_step(monkeypatch: pytest.MonkeyPatch):
    sent: list[tuple[torch.Tensor, Work]] = []

    def all_reduce(tensor: torch.Tensor, op: object, async_op: bool) -> Work:
        assert (tensor.device.type, op, async_op) == ("cpu", dist.ReduceOp.MAX, True)
        sent.append((tensor, Work()))
        return sent[-1][1]

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    vote = Vote(2)
    assert vote.poll(None) is None
    assert [work.waited for _, work in sent] == [0]
    sent[0][0].fill_(int(signal.SIGTERM))  # another process has been told to stop
    assert vote.poll(None) == "SIGTERM"
    assert [work.waited for _, work in sent] == [1, 0]
    vote.close()
    assert [work.waited for _, work in sent] == [1, 1]
    vote.close()
    assert len(sent) == 2


STEPS = 6


def vote_in(rank: int, folder: str) -> None:
    """Poll once a step until all stop; the second process gets a signal in its third step. Writes what it saw."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    vote, seen = Vote(2), []
    with Interrupt() as interrupt:
        while len(seen) < STEPS and not (seen and seen[-1]):
            if rank == 1 and len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            seen.append(vote.poll(interrupt.received))
    vote.close()
    dist.destroy_process_group()
    Path(folder, str(rank)).write_text(" ".join(map(str, seen)))


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path: Path):
    mp.spawn(vote_in, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["None None None SIGTERM"] * 2
