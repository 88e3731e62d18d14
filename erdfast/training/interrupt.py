"""SIGTERM and Ctrl-C end a run after the step in hand, so that its state can be saved."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """While active, the first SIGTERM or SIGINT only sets `received`; a second one acts as it would have."""

    def __init__(self) -> None:
        self.received: str | None = None
        """The name of the signal, once there was one."""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal returned
        self._previous = {}

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._restore()
