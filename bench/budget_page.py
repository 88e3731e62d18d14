"""The budget of a training step by class: bench/results/<device>/budget.md, rendered by `python -m bench.report`.

The least time (bench.roofline at the device's measured rates), what bench.step_model predicts from its measured
kernels, and what bench.profile_step measured, where it has. The gap is what could be won.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bench.budget import Work
from bench.roofline import MACHINES
from bench.step_model import BATCH, NETWORKS, Calibration, Step, Uncalibrated, calibrate, predict

CLASS_OF_OP = {
    "linear": "matrix products",
    "convolution": "matrix products",
    "attention": "attention",
    "modulated_norm": "norm and residual",
    "norm": "norm and residual",
    "adamw_ema": "optimiser",
    "diffusion_loss": "noise and loss",
}
"""Classes of bench.profile_step; every other op is elementwise or a copy, which a compiler joins as it likes."""
REST = "elementwise and copies"
JOINED: dict[str, str] = {"elementwise": REST, "copies": REST}

Times = Mapping[str, float]


class Profile(NamedTuple):
    """A profiled step in milliseconds; kernels that ran side by side count twice in the sum of the classes."""

    ms: float
    classes: Times


def budget_page(folder: Path) -> str | None:
    """The page of a device, bench/results/<device>; None if its data sheet or its rates are not known.

    Raises:
        ValueError: a result is damaged; the message names its file.
    """
    try:
        calibration = calibrate(folder)
    except Uncalibrated:
        return None
    parts = [
        f"# The budget of a training step on {folder.name}",
        "",
        f"{BATCH} images, bf16, milliseconds; rendered by `python -m bench.report`. Least: operations or bytes, of the "
        "passes that are made, at the rates of a large product and a large copy that were measured here. Predicted: "
        "with what kernels reached of those (bench/step_model.py), measured nowhere. Measured: by "
        "bench/profile_step.py, where it was run. Gap: from the least to the measured time, or to the predicted one; "
        "until bench/bench_linear.py has measured them, products are predicted without one.",
    ]
    for model in NETWORKS:
        step = predict(model, calibration.gpu, BATCH, calibration, folder)
        parts += ["", f"## {model}", "", _table(step, calibration, _profile(folder, model))]
    return "\n".join(parts) + "\n"


def _table(step: Step, calibration: Calibration, profile: Profile | None) -> str:
    machine = calibration.reached(MACHINES[step.gpu])
    least, predicted = defaultdict(float), defaultdict(float)
    for work, ms in step.works:
        least[_class(work)] += work.floor_ms(machine)
        predicted[_class(work)] += ms
    measured = None if profile is None else profile.classes
    found: Times = predicted if measured is None else measured
    names = sorted({*least, *found}, key=lambda name: least.get(name, 0.0) - found.get(name, 0.0))
    lines = ["| class | least | predicted | measured | gap |", "|---|---|---|---|---|"]
    for name in names:
        seen = None if measured is None else measured.get(name, 0.0)
        lines.append(_line(name, least.get(name, 0.0), predicted.get(name, 0.0), seen))
    ms, source = (step.ms, "predicted") if profile is None else (profile.ms, "measured")
    lines += [_line("step", sum(least.values()), step.ms, None if profile is None else ms), ""]
    lines.append(f"{step.batch / (1e-3 * ms):,.0f} images/s {source}")
    return "\n".join(lines)


def _line(name: str, least: float, predicted: float, measured: float | None) -> str:
    seen, ms = ("", predicted) if measured is None else (f"{measured:.2f}", measured)
    return f"| {name} | {least:.2f} | {predicted:.2f} | {seen} | {ms - least:.2f} |"


def _class(work: Work) -> str:
    return CLASS_OF_OP.get(work.op, REST)


def _profile(folder: Path, model: str) -> Profile | None:
    """Of the compiled step."""
    path = folder / f"profile_{model}_{BATCH}_ours_compile.json"
    if not path.exists():
        return None
    try:
        (row,) = json.loads(path.read_text())["rows"]
        classes: dict[str, float] = defaultdict(float)
        for name, ms in row["classes"].items():
            classes[str(JOINED.get(name, name))] += float(ms)
        return Profile(float(row["ms"]), classes)
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder.name}/{path.name} is damaged ({type(error).__name__}: {error})") from error
