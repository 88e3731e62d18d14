"""What several processes say about an error: each case in turn, its lines on stderr, exit codes as JSON in FOLDER.

torchrun --nproc-per-node 2 tests/training/erring_ranks.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from erdfast import cli, train
from erdfast.training.parallel import World, open_world
from tests.runs import TINY

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[1])


def alike(_world: World) -> int:
    raise ValueError("alike")


def alone(_world: World) -> int:
    if RANK == 1:
        raise ValueError("alone")
    return 0


def waited_for(world: World) -> int:
    if RANK == 1:
        raise ValueError("not there")
    world.barrier()
    return 0


def different(_world: World) -> int:
    raise ValueError(f"different {RANK}")


def fails() -> None:
    raise OSError("in the first")


def first(world: World) -> int:
    assert world.first(lambda: f"two words of {RANK}") == "two words of 0"
    assert world.first(lambda: None) == "None"
    world.first(fails)
    return 0


def joined(case: Callable[[World], int]) -> int:
    with open_world(torch.device("cpu")) as world:
        return case(world)


def training(*options: str) -> Callable[[], int]:
    return lambda: train.main([*TINY, *options])


CASES: dict[str, Callable[[], int]] = {
    "alike": lambda: joined(alike),
    "alone": lambda: joined(alone),
    "different": lambda: joined(different),
    "waited for": lambda: joined(waited_for),
    "first": lambda: joined(first),
    "bad option": training("--batch-size", "0"),
    "unknown option": training("--no-such-option"),
    "taken": training("--out", str(FOLDER / "taken")),
    "wandb": training("--out", str(FOLDER / "new"), "--wandb", "project"),
}

if __name__ == "__main__":
    sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType]  # not installed
    codes = {}
    for number, (name, case) in enumerate(CASES.items()):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # so that each meets anew
        codes[name] = cli.exit_code(case, name)
    (FOLDER / f"{RANK}.json").write_text(json.dumps(codes))
