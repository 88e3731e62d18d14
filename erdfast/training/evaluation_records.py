"""Evaluations as metrics.jsonl has them, one record each, and what is said about them.

{"kind": "evaluation", "step": 2000, "eval_fd": 3.214, "eval_accuracy": 0.975, "settings": {"num": 5000, ...}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from erdfast.config import EvalConfig
from erdfast.evaluation.measure import METRICS

from .metrics import read_metrics

KIND = "evaluation"
_PREFIX = "eval_"

Record = Mapping[str, Any]


def make_record(config: EvalConfig, step: int, values: Mapping[str, float]) -> dict[str, Any]:
    """A record of values by metric; its settings are all without which values do not compare."""
    reference = None if config.eval_reference is None else config.eval_reference.name
    settings = {"num": config.eval_num, "steps": config.eval_steps, "cfg_scale": config.eval_cfg_scale}
    named = {_PREFIX + name: value for name, value in values.items()}
    return {"kind": KIND, "step": step, **named, "settings": settings | {"reference": reference}}


def values_of(record: Record) -> dict[str, float]:
    """By metric, in the order in which they were measured; without those that are not finite, which are null."""
    found = {key.removeprefix(_PREFIX): value for key, value in record.items() if key.startswith(_PREFIX)}
    return {name: value for name, value in found.items() if name in METRICS and value is not None}


def comparable(records: Sequence[Record]) -> list[Record]:
    """Out of all records of a run the evaluations that were made as the last one was, in order."""
    found = [record for record in records if record.get("kind") == KIND]
    return [record for record in found if record.get("settings") == found[-1].get("settings")]


def evaluated_steps(run: Path) -> list[int]:
    """At which metrics.jsonl has an evaluation."""
    return [record["step"] for record in read_metrics(run / "metrics.jsonl") if record.get("kind") == KIND]


class Best(NamedTuple):
    """An evaluation by its first metric."""

    step: int
    value: str
    """"FD 3.214"."""


def best(records: Sequence[Record]) -> Best | None:
    """The best evaluation by its first metric; None of none.

    Args:
        records: see `comparable`.
    """
    name = next(iter(values_of(records[-1])), None) if records else None
    known = [record for record in records if name in values_of(record)]
    if name is None or not known:
        return None
    sign = 1.0 if METRICS[name].better == "lower" else -1.0
    chosen = min(known, key=lambda record: sign * values_of(record)[name])
    return Best(chosen["step"], describe({name: values_of(chosen)[name]}))


def describe(values: Mapping[str, float]) -> str:
    """For people: "FD 3.214, accuracy 97.5%"."""
    return ", ".join(f"{METRICS[name].title} {_show(name, value)}" for name, value in values.items())


def _show(metric: str, value: float) -> str:
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.4g}"
