"""The benchmarks of ops that exist: a file bench_<op>.py with `OP` and `cases` is one."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

WHOLE = ("bench_loader", "bench_train_step")
"""These measure no op, and have command lines of their own."""


def benchmark_names() -> list[str]:
    """Modules of all ops, in order."""
    found = (path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return sorted(f"bench.{name}" for name in found if name not in WHOLE)


def load_benchmark(name: str) -> ModuleType:
    """A module with `OP` and `cases`.

    Raises:
        TypeError: the module lacks one of them.
    """
    module = importlib.import_module(name)
    for attribute in ("OP", "cases", "main"):
        if not hasattr(module, attribute):
            raise TypeError(f"{name} has no {attribute}; see bench/harness.py for what a benchmark is")
    return module
