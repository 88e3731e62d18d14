"""`pytest bench --benchmark-only`: every op, case, pass and side through pytest-benchmark.

A group is one pass of one case; its members are the sides. Cases are those of this device, in float32 on a CPU, in bf16
on a GPU. torch.compile is left out unless asked for by --with-compile: it takes ten seconds a case.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.benchmarks import benchmark_names, load_benchmark
from bench.device import default_device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--with-compile", action="store_true", help="measure torch.compile of eager too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One parameter set per (op, case, pass, side)."""
    if "measured" in metafunc.fixturenames:
        metafunc.parametrize("measured", list(_parameters(bool(metafunc.config.getoption("--with-compile")))))


def _parameters(with_compile: bool) -> Iterator[object]:
    device = default_device()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for name in benchmark_names():
        benchmark = load_benchmark(name)
        for case in benchmark.cases(device, [dtype]):
            for kind in case.all_passes():
                sides = [*case.sides, *(["compile"] if with_compile and case.compile else [])]
                for side in sides:
                    identity = f"{benchmark.OP}-{case.name}-{kind}-{side}".replace(" ", "_")
                    yield pytest.param((benchmark.OP, case, kind, side), id=identity)
