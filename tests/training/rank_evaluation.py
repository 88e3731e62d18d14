"""What each process of tests/training/test_evaluation_ranks.py does: short runs with evaluations, one after the other.

torchrun --nproc-per-node 2 tests/training/rank_evaluation.py FOLDER '{"name": {options}, ...}'

Each process writes FOLDER/ranks-SIZE-RANK.json: by case, the records, what was said, and the images it measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erdfast.training import measures
from erdfast.training.metrics import read_metrics
from erdfast.training.parallel import World, open_world
from erdfast.training.setup import open_data
from erdfast.training.trainer import Trainer
from tests.evaluation.inception_files import use_small_network
from tests.runs import tiny_config
from tests.training.rank_cases import LINEAR

FAILING = {"fails here": 0, "fails there": 1}
"""Cases in which a process runs out of memory at its first evaluation, and which one."""
PATHS = ("eval_reference", "eval_inception", "eval_vae")
"""Which JSON, as the tuple `ema_decay`, has no type for."""


class Watched:
    """A measure that notes the images it is given, and can fail at its first evaluation."""

    def __init__(self, measure: Any, fails: bool) -> None:
        self.prepare, self._begin, self._fails = measure.prepare, measure.begin, fails
        self.ids: list[list[int]] = []
        """Of each evaluation."""

    def begin(self, total: int) -> Any:
        sums, drawn = self._begin(total), []
        self.ids.append(drawn)
        add = sums.add

        def note(images: Tensor, ids: Tensor, labels: Tensor | None) -> None:
            drawn.extend(ids.tolist())
            if self._fails and len(self.ids) == 1:
                raise torch.OutOfMemoryError("out of memory, says the test")
            add(images, ids, labels)

        sums.add = note
        return sums


def run_case(folder: Path, name: str, options: dict[str, Any], world: World) -> dict[str, Any]:
    """One run, as this process sees it."""
    run = folder / f"{name}-{world.size}"
    run.mkdir(parents=True, exist_ok=True)
    changed = {key: Path(options[key]) for key in PATHS if key in options} | {"ema_decay": (*options["ema_decay"],)}
    config = tiny_config(**(LINEAR | options | changed))
    dataset, said = open_data(config), []
    watched = Watched(measures.open_measure(config, dataset, world), FAILING.get(name) == world.rank)
    trainer = Trainer(config, dataset, run, world, say=said.append, measure=watched)
    trainer.train()
    world.barrier()
    evaluations = [record for record in read_metrics(run / "metrics.jsonl") if record.get("kind") == "evaluation"]
    return {"mode": trainer.mode, "ids": watched.ids, "said": said, "evaluations": evaluations}


def run_cases(folder: Path, cases: dict[str, dict[str, Any]], world: World) -> dict[str, Any]:
    """All of them, by name, with the small network in Inception's place."""
    with pytest.MonkeyPatch.context() as patch:
        use_small_network(patch)
        return {name: run_case(folder, name, options, world) for name, options in cases.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    with open_world(torch.device("cpu")) as joined:
        results = run_cases(target, json.loads(sys.argv[2]), joined)
    (target / f"ranks-{joined.size}-{joined.rank}.json").write_text(json.dumps(results))
