"""SIGTERM and Ctrl-C end a run after a step in hand, the same one in all processes, so that its state can be saved."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ECHO_S = {signal.SIGTERM: 10.0, signal.SIGINT: 1.0}
"""Seconds after the first signal in which another is the same wish again: a scheduler tells every process of a job to
end, and torchrun tells its own once more; a terminal's Ctrl-C reaches all of them too."""
SIGNALS = tuple(ECHO_S)


class Interrupt:
    """While active, the first SIGTERM or SIGINT only sets `received`; one well after it acts as it would have."""

    def __init__(self) -> None:
        self.received: str | None = None
        """The name of the signal, once there was one."""
        self._previous: dict[int, object] = {}
        self._first_s = 0.0

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._first_s = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._first_s > ECHO_S[signal.Signals(number)]:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal returned
        self._previous = {}

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._restore()


class Vote:
    """Whether any process has been told to stop, without waiting: what is sent in one step is read in the next.

    Signals reach the processes of a run in different steps; who stopped alone would leave the others waiting for ever.
    """

    def __init__(self, world_size: int) -> None:
        self._alone = world_size == 1
        self._flag: Tensor | None = None
        self._sending: Any = None

    def poll(self, received: str | None) -> str | None:
        """Once per step in every process: the signal that all of them stop for now, if any."""
        if self._alone:
            return received
        stop = self._read()
        number = 0 if received is None else int(signal.Signals[received])
        self._flag = torch.tensor(number, dtype=torch.int32)  # on the host: the device does not wait
        self._sending = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, async_op=True)
        return stop

    def close(self) -> None:
        """Take back what is under way; all processes call it after the same step."""
        self._read()

    def _read(self) -> str | None:
        if self._sending is None or self._flag is None:
            return None
        self._sending.wait()
        self._sending, number = None, int(self._flag)
        return signal.Signals(number).name if number else None
