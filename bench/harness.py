"""Interleaved timing of several implementations of the same work, and where the results are kept.

All sides run in one process, one call after the other in every round, on inputs that rotate so that no side profits
from another's warm caches. A result names device, versions, date and commit, and is a ratio of medians with its spread.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds per call."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    rounds: int


def synchronize() -> None:
    """Wait for a GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(sides: Mapping[str, Callable[[int], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """Time every side once per round; each is called with the number of the round, to choose its inputs by."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, call in sides.items():
            synchronize()
            start = time.perf_counter()
            call(i)
            synchronize()
            if i >= warmup:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: summarize(values) for name, values in samples.items()}


def summarize(values_ms: Sequence[float]) -> Timing:
    """Quantiles of one side's calls."""
    p20, p50, p80 = (float(torch.tensor(values_ms, dtype=torch.float64).quantile(q)) for q in (0.2, 0.5, 0.8))
    return Timing(p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=len(values_ms))


def ratio(slow: Timing, fast: Timing) -> dict[str, float]:
    """How many times faster, by medians; low and high compare the quantiles crosswise."""
    return {
        "median": slow.p50_ms / fast.p50_ms,
        "low": slow.p20_ms / fast.p80_ms,
        "high": slow.p80_ms / fast.p20_ms,
    }


def copy_rate(numel: int = 1 << 25, rounds: int = 9) -> float:
    """Bytes per second that this device copies (read and written), for float32 arrays far larger than its caches."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source, target = torch.ones(numel, device=device), torch.zeros(numel, device=device)
    timing = interleave({"copy": lambda _: target.copy_(source)}, rounds)["copy"]
    return 2 * 4 * numel / (1e-3 * timing.p50_ms)


def device_name() -> str:
    """Short name of what is measured: folder of bench/results."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "_").lower()
    flags = "avx512" if "avx512" in torch.backends.cpu.get_cpu_capability().lower() else "cpu"
    return f"{platform.machine()}_{flags}_{torch.get_num_threads()}threads"


def environment() -> dict[str, Any]:
    """What a result must name to be believed."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
    }


def save(op: str, results: Sequence[Mapping[str, Any]]) -> Path:
    """Write bench/results/<device>/<op>.json."""
    path = RESULTS / device_name() / f"{op}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"op": op, "environment": environment(), "results": list(results)}, indent=2) + "\n")
    return path


def as_dict(timings: Mapping[str, Timing]) -> dict[str, dict[str, float]]:
    """For JSON."""
    return {name: asdict(timing) for name, timing in timings.items()}


def spread(timings: Sequence[Timing]) -> float:
    """Median relative distance between the 20% and 80% quantiles: above 0.3 the machine was busy."""
    return statistics.median((t.p80_ms - t.p20_ms) / t.p50_ms for t in timings)
