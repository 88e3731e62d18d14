"""What is measured on: its name, versions, and what it can do at best, measured too."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .timing import interleave

ROOT = Path(__file__).parent.parent
MEASURED_SOURCES = ("erdfast", "kernels", "csrc", "bench/*.py")
"""Uncommitted changes here make a result "dirty"; results of other benchmarks do not."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most that this device did in the same process."""

    copy_bytes_per_s: float
    """Read and written by a copy of arrays far larger than the caches."""
    matmul_flops_per_s: dict[str, float] = field(default_factory=dict)
    """Of a large square matrix product on random data, by dtype."""

    def floor_s(self, num_bytes: int, flops: int = 0, dtype: str = "bfloat16") -> float | None:
        """The least time for this traffic and these operations: the longer of the two.

        None where there are operations in a dtype whose rate was not measured.
        """
        memory_s = num_bytes / self.copy_bytes_per_s
        if not flops:
            return memory_s
        rate = self.matmul_flops_per_s.get(dtype)
        return None if rate is None else max(memory_s, flops / rate)


def default_device() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


SHALLOW = 64
"""Inner side of the products by which it is seen how fast a CPU multiplies."""


def measure_ceilings(device: str | None = None, *, quick: bool = False) -> Ceilings:
    """Measure both; `quick` takes sizes that prove only that it works."""
    device = device or default_device()
    # On a CPU no result below 32 MiB: glibc would learn to keep blocks of that size (see harness.py).
    size = 256 if quick else 8192 if device == "cuda" else 4096
    dtypes = ("float32", "bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16")
    return Ceilings(
        copy_bytes_per_s=copy_rate(device, 1 << 18 if quick else 1 << 25 if device == "cpu" else 1 << 28),
        matmul_flops_per_s={name: matmul_rate(device, getattr(torch, name), size) for name in dtypes},
    )


def copy_rate(device: str, numel: int, rounds: int = 9) -> float:
    """Bytes per second that are copied (read and written) in float32 arrays of `numel` elements."""
    source, target = torch.rand(numel, device=device), torch.zeros(numel, device=device)
    timing = interleave({"copy": lambda _: lambda: target.copy_(source)}, rounds, device=device)["copy"]
    return 2 * 4 * numel / (1e-3 * timing.p50_ms)


def matmul_rate(device: str, dtype: torch.dtype, size: int, rounds: int = 3) -> float:
    """Operations per second of a product of two square matrices; float32 as torch.set_float32_matmul_precision says.

    On a CPU they are less deep than wide where a product would take more than a second: one without bfloat16
    instructions needs minutes for it.
    """
    depth = size if device == "cuda" else min(size, SHALLOW)
    if depth < size:
        depth = min(size, max(depth, int(depth / _matmul_seconds(device, dtype, size, depth, 1))))
    return 2 * size**2 * depth / _matmul_seconds(device, dtype, size, depth, rounds)


def _matmul_seconds(device: str, dtype: torch.dtype, size: int, depth: int, rounds: int) -> float:
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((size, depth), (depth, size)))
    timing = interleave({"matmul": lambda _: lambda: a @ b}, rounds, warmup=1 if rounds == 1 else 3, device=device)
    return 1e-3 * timing["matmul"].p50_ms


def device_name() -> str:
    """Short name of what is measured: folder of bench/results."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace("NVIDIA ", "").replace(" ", "_").lower()
    flags = "avx512" if "avx512" in torch.backends.cpu.get_cpu_capability().lower() else "cpu"
    return f"{platform.machine()}_{flags}_{torch.get_num_threads()}threads"


def environment() -> dict[str, Any]:
    """What a result must name to be believed."""
    return {
        "device": device_name(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "driver": _driver(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the working tree, "-dirty" if what is measured was changed since.

    A copy of the sources without their history cannot tell: whoever made the copy sets ERDFAST_COMMIT.
    """
    if given := os.environ.get("ERDFAST_COMMIT"):
        return given
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown"
    changed = _output("git", "status", "--porcelain", "--", *MEASURED_SOURCES)
    return f"{head}-dirty" if changed else head


def _processor() -> str | None:
    """As Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    return (_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()[0] or None


def _output(*command: str) -> str | None:
    """What a command prints; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
