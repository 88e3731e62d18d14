"""What each process of tests/training/test_parallel.py does: short runs, one after the other, their ends as JSON.

torchrun --nproc-per-node 2 tests/training/rank_cases.py FOLDER '{"name": {options}, ...}'
"""

from __future__ import annotations

import json
import sys
import unittest.mock
from pathlib import Path
from typing import Any

import torch

from erdfast import presets
from erdfast.training import precision
from erdfast.training.metrics import read_metrics
from erdfast.training.parallel import World, full_tensor, open_world
from erdfast.training.setup import open_data
from erdfast.training.trainer import Trainer
from tests.runs import tiny_config

LINEAR = {"steps": 20, "log_every": 1, "checkpoint_every": 1000, "lr": 1e3, "adam_eps": 1e3, "weight_decay": 0.0}
"""A large epsilon makes AdamW plain gradient descent: with its own, the sign of a gradient would amplify rounding."""
DROPPING = {
    "adm_unet_dropping": presets.model_config("adm_unet_tiny", dropout=0.2),
    "jit_dropping": presets.model_config("jit_tiny", dropout=0.2),
}
"""No preset is both small and drops numbers."""


def run_case(folder: Path, name: str, options: dict[str, Any], world: World) -> dict[str, Any] | None:
    """Losses by step, sums of the weights and averages at the end, a learnt target and its averages (here, and in every
    process), and what this case is; of the first process."""
    folder = folder / f"{name}-{world.size}"
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**(LINEAR | options))
    with unittest.mock.patch.object(precision, "_fp8_backend", return_value="reference"):  # these are CPUs
        trainer = Trainer(config, open_data(config), folder, world, say=lambda _line: None)
        trainer.train()
    weights = [float(full_tensor(p.detach()).double().square().sum()) for p in trainer.parameters.values()]
    trainer.averaged.refresh()
    averages = [float(p.double().square().sum()) for p in trainer.averaged.model.parameters()]
    learnt = [number for number, name in enumerate(trainer.parameters) if name.startswith("process.")]
    target = [[*trainer.parameters.values()][number].detach().flatten() for number in learnt]
    target += [average[number].flatten() for average in trainer.ema.averages for number in learnt]
    own = torch.cat([torch.zeros(0), *target])
    everyone = torch.zeros(world.size, own.numel())
    everyone[world.rank] = own
    world.all_reduce(everyone)
    if not world.is_main:
        return None
    records = read_metrics(folder / "metrics.jsonl")
    return {
        "losses": [record["loss"] for record in records],
        "levels": [record["count_by_logsnr"] for record in records],
        "norms": [record["grad_norm"] for record in records],
        "fp8": [record.get("fp8_loss_difference") for record in records],
        "weights": weights,
        "averages": averages,
        "target": own.tolist(),
        "of_processes": everyone.tolist(),
        "mode": trainer.mode,
        "sharded": sum(hasattr(p, "full_tensor") for p in trainer.parameters.values()),
    }


def run_cases(folder: Path, cases: dict[str, dict[str, Any]], world: World) -> dict[str, Any]:
    """All of them, by name."""
    with unittest.mock.patch.dict(presets.MODELS, DROPPING):
        return {name: run_case(folder, name, options, world) for name, options in cases.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with open_world(torch.device("cpu")) as joined:
        results = run_cases(target, json.loads(sys.argv[2]), joined)
    if joined.is_main:
        (target / f"results-{joined.size}.json").write_text(json.dumps(results))
