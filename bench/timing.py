"""Interleaved timing of several implementations of the same work: one call of each side a round, quantiles of many.

On a GPU a call is timed by events on the device, in a stream that a flush of the L2 cache and a short sleep keep ahead
of the host: what is measured is the kernels and the gaps between them, as in a training step whose host runs ahead, on
inputs that come from memory. The host's own time per call is kept beside it: where it is longer, the host is the limit
in a loop that does nothing else. On a CPU the host's clock is all there is, and inputs rotate instead of a flush.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Prepare = Callable[[int], Callable[[], object]]
"""A side: given the number of a call, does what is not timed and returns what is."""

CYCLES_PER_MS = 2_000_000
"""Of a GPU at 2 GHz; a slower one sleeps a little longer."""
HEAD_START_MS = (0.2, 20.0)
"""The GPU sleeps before each timed call for half as long again as the host took for the last one, within these bounds:
by the time it wakes, the whole call is waiting for it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int
    host_ms: float | None = None
    """Median time in which the host enqueued a call; None where the host does the work itself."""


class HostClock:
    """Times calls that the host runs itself."""

    def __init__(self) -> None:
        self.calls_ms: list[float] = []

    def call(self, work: Callable[[], object]) -> None:
        """Run and time once."""
        start = time.perf_counter()
        work()  # its result is freed within the timing: given back memory costs time too
        self.calls_ms.append(1e3 * (time.perf_counter() - start))

    def timing(self, warmup: int) -> Timing:
        """Of all calls but the first `warmup`."""
        return summarize(self.calls_ms[warmup:])


class CudaClock:
    """Times calls on the device by events; `flush` is a buffer that overwrites the L2 cache."""

    def __init__(self, flush: torch.Tensor) -> None:
        self.flush = flush
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.host_ms: list[float] = []

    def call(self, work: Callable[[], object]) -> None:
        """Enqueue once between two events."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        shortest, longest = HEAD_START_MS
        head_start = min(max(1.5 * self.host_ms[-1], shortest), longest) if self.host_ms else shortest
        self.flush.zero_()
        torch.cuda._sleep(int(CYCLES_PER_MS * head_start))
        start.record()
        before = time.perf_counter()
        result = work()
        self.host_ms.append(1e3 * (time.perf_counter() - before))
        end.record()
        self.events.append((start, end))
        del result

    def timing(self, warmup: int) -> Timing:
        """Of all calls but the first `warmup`; waits for the device."""
        torch.cuda.synchronize()
        values = [start.elapsed_time(end) for start, end in self.events[warmup:]]
        return summarize(values, host_ms=statistics.median(self.host_ms[warmup:]))


def interleave(
    sides: Mapping[str, Prepare], rounds: int, warmup: int = 3, *, device: str | None = None
) -> dict[str, Timing]:
    """Time every side once per round, beginning with another side each time.

    Args:
        sides: each is called with a number that grows from call to call over all sides, to choose its inputs by:
            what one side has just read is not what the next one reads.
        rounds: timed calls of each side.
        warmup: calls before them, which also compile.
        device: "cuda" or "cpu"; by default cuda where there is a GPU.
    """
    on_gpu = (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    flush = torch.empty(_flush_bytes() if on_gpu else 0, dtype=torch.int8, device="cuda" if on_gpu else "cpu")
    clocks = {name: CudaClock(flush) if on_gpu else HostClock() for name in sides}
    names, number = list(sides), 0
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            work = sides[name](number)
            clocks[name].call(work)
            del work  # frees a graph before the next side allocates
            number += 1
        if on_gpu:
            torch.cuda.synchronize()
    return {name: clock.timing(warmup) for name, clock in clocks.items()}


def _flush_bytes() -> int:
    return 4 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def summarize(values_ms: Sequence[float], host_ms: float | None = None) -> Timing:
    """Quantiles of one side's calls."""
    p20, p50, p80 = (float(torch.tensor(values_ms, dtype=torch.float64).quantile(q)) for q in (0.2, 0.5, 0.8))
    return Timing(p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=len(values_ms), host_ms=host_ms)


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster, by medians; low and high compare the quantiles crosswise."""
    return {
        "median": slow.p50_ms / fast.p50_ms,
        "low": slow.p20_ms / fast.p80_ms,
        "high": slow.p80_ms / fast.p20_ms,
    }


def spread(timings: Sequence[Timing]) -> float:
    """Median relative distance between the 20% and 80% quantiles: above 0.3 the machine was busy."""
    return statistics.median((t.p80_ms - t.p20_ms) / t.p50_ms for t in timings)
