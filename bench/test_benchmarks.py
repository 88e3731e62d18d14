"""The entry of `pytest bench --benchmark-only`; see conftest.py. Committed results come from the files themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.device import default_device
from bench.harness import Case, Measurement

ROUNDS, WARMUP = 10, 2
_held: dict[tuple[str, str], Measurement] = {}
"""The case at hand: its passes and sides share their inputs."""


def measurement(op: str, case: Case, *, with_compile: bool) -> Measurement:
    """The inputs and sides of a case; those of the case before are freed."""
    if (op, case.name) not in _held:
        _held.clear()
        _held[op, case.name] = Measurement(case, default_device(), compiled=None if with_compile else False)
    return _held[op, case.name]


def test_op(measured: tuple[str, Case, str, str], benchmark: Any, request: pytest.FixtureRequest) -> None:
    op, case, kind, side = measured
    run = measurement(op, case, with_compile=bool(request.config.getoption("--with-compile")))
    prepare, number = run.prepare(side, kind), itertools.count()
    benchmark.group = f"{op}: {case.name} {kind}"

    def setup() -> tuple[tuple[Callable[[], object]], dict[str, Any]]:
        return (prepare(next(number)),), {}

    def call(work: Callable[[], object]) -> None:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=WARMUP)
