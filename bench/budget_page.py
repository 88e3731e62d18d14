"""The budget of a training step by class: bench/results/<device>/budget.md, rendered by `python -m bench.report`.

The least time (bench.roofline at the device's measured rates), what bench.step_model predicts from its measured
kernels, and what bench.profile_step measured, where it has. The gap is what could be won.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.budget import Work
from bench.roofline import MACHINES
from bench.step_model import BATCH, NETWORKS, Calibration, Step, calibrate, predict

CLASS_OF_OP = {
    "linear": "matrix products",
    "convolution": "matrix products",
    "attention": "attention",
    "modulated_norm": "norm and residual",
    "residual": "norm and residual",
    "norm": "norm and residual",
    "adamw_ema": "optimiser",
    "diffusion_loss": "noise and loss",
}
"""Classes of bench.profile_step; every other op is elementwise or a copy, which a compiler joins as it likes."""
REST = "elementwise and copies"
JOINED = {"elementwise": REST, "copies": REST}

Times = Mapping[str, float]


def budget_page(folder: Path) -> str | None:
    """The page of a device; None if its data sheet or its rates are not known.

    Args:
        folder: bench/results/<device>, with a name of MACHINES.
    """
    if folder.name not in MACHINES:
        return None
    try:
        calibration = calibrate(folder.name, folder)
    except ValueError:
        return None
    parts = [
        f"# The budget of a training step on {folder.name}",
        "",
        f"{BATCH} images, bf16, milliseconds; rendered by `python -m bench.report`. Least: operations or bytes at the "
        "rates of a large product and a large copy that were measured here. Predicted: with what kernels reached of "
        "those (bench/step_model.py), measured nowhere. Measured: by bench/profile_step.py, where it was run. Gap: "
        "from the least to the measured time, or to the predicted one; products are predicted without one.",
    ]
    for model in NETWORKS:
        step = predict(model, folder.name, BATCH, calibration, folder)
        parts += ["", f"## {model}", "", _table(step, calibration, _measured(folder, model))]
    return "\n".join(parts) + "\n"


def _table(step: Step, calibration: Calibration, measured: Times | None) -> str:
    machine = calibration.reached(MACHINES[step.device])
    least, predicted = defaultdict(float), defaultdict(float)
    for work, ms in step.works:
        least[_class(work)] += work.floor_ms(machine)
        predicted[_class(work)] += ms
    found: Times = predicted if measured is None else measured
    names = sorted({*least, *found}, key=lambda name: least.get(name, 0.0) - found.get(name, 0.0))
    lines = ["| class | least | predicted | measured | gap |", "|---|---|---|---|---|"]
    for name in names:
        lines.append(_line(name, least.get(name, 0.0), predicted.get(name, 0.0), found.get(name, 0.0), measured))
    total = sum(found.values())
    lines += [_line("step", sum(least.values()), sum(predicted.values()), total, measured), ""]
    source = "predicted" if measured is None else "measured"
    lines.append(f"{step.batch / (1e-3 * total):,.0f} images/s {source}")
    return "\n".join(lines)


def _line(name: str, least: float, predicted: float, found: float, measured: Times | None) -> str:
    seen = "" if measured is None else f"{found:.2f}"
    return f"| {name} | {least:.2f} | {predicted:.2f} | {seen} | {found - least:.2f} |"


def _class(work: Work) -> str:
    return CLASS_OF_OP.get(work.op, REST)


def _measured(folder: Path, model: str) -> Times | None:
    """Of the compiled step, by class."""
    path = folder / f"profile_{model}_{BATCH}_ours_compile.json"
    if not path.exists():
        return None
    (row,) = json.loads(path.read_text())["rows"]
    return _joined(row["classes"])


def _joined(classes: Mapping[str, Any]) -> Times:
    times: dict[str, float] = defaultdict(float)
    for name, ms in classes.items():
        times[JOINED.get(name, name)] += ms
    return times
