"""The same run in 1, 2 and 4 processes, split in every way: the same samples, times, labels and noise, the same end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from erdfast.training.parallel import World, choose_mode
from erdfast.training.plan import micro_batches, resolve_compile
from tests.runs import ROOT, tiny_config
from tests.training.rank_cases import run_cases

CPU = torch.device("cpu")
ALONE: dict[str, dict[str, Any]] = {
    "plain": {"stratified": True},
    "learnt": {"target": "k", "schedule": "flow", "grad_clip": 0.3, "k_lr": 3e3, "ema_decay": (0.9, 0.99)},
    "learnt(t)": {"target": "k(t)", "schedule": "flow", "loss_space": "u", "lr": 1e2, "ema_std": (0.1,)},
    "dit": {"model": "dit_tiny", "steps": 6},
    "lightningdit": {"model": "lightningdit_tiny", "steps": 6, "schedule": "flow", "target": "u"},
    "jit": {"model": "jit_dropping", "steps": 8, "schedule": "flow", "target": "x0", "lr": 3e2},
}
TWO: dict[str, dict[str, Any]] = {
    "plain ddp": {"parallel": "ddp"},
    "plain fsdp": {"parallel": "fsdp"},
    "plain ddp accumulation": {"parallel": "ddp", "accumulation": 2},
    "plain fsdp accumulation": {"parallel": "fsdp", "accumulation": 2},
    "learnt ddp": {"parallel": "ddp"},
    "learnt fsdp": {"parallel": "fsdp", "recompute": "full"},
    "learnt ddp accumulation": {"parallel": "ddp", "accumulation": 2},
    "learnt fsdp accumulation": {"parallel": "fsdp", "accumulation": 2},
    "learnt(t) ddp": {"parallel": "ddp"},
    "learnt(t) fsdp": {"parallel": "fsdp"},
    "dit fsdp": {"parallel": "fsdp"},
    "lightningdit fsdp": {"parallel": "fsdp"},
    "jit ddp": {"parallel": "ddp", "accumulation": 2},
    "jit fsdp": {"parallel": "fsdp", "recompute": "full"},
}
FOUR: dict[str, dict[str, Any]] = {"plain auto": {"parallel": "auto"}, "plain fsdp": {"parallel": "fsdp"}}


def with_options(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A case's own options on top of those of the case of one process that its name begins with."""
    return {name: ALONE[name.split()[0]] | own for name, own in cases.items()}


def torchrun(processes: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests/training/rank_cases.py")
    done = subprocess.run(
        [*command, script, str(folder), json.dumps(cases)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"results-{processes}.json").read_text())


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parallel")
    return {
        1: run_cases(folder, ALONE, World(device=CPU)),
        2: torchrun(2, folder, with_options(TWO)),
        4: torchrun(4, folder, with_options(FOUR)),
    }


@pytest.mark.parametrize(("size", "name"), [*((2, name) for name in TWO), *((4, name) for name in FOUR)])
def test_the_number_of_processes_changes_nothing_but_rounding(ends, size, name):
    alone, several = ends[1][name.split()[0]], ends[size][name]
    assert len(several["losses"]) == len(alone["losses"]) >= 6
    assert several["losses"] == pytest.approx(alone["losses"], rel=0, abs=1e-6)
    assert several["levels"] == alone["levels"]  # every sample at the same noise level, step by step
    assert several["norms"] == pytest.approx(alone["norms"], rel=1e-5)
    assert several["weights"] == pytest.approx(alone["weights"], rel=1e-5)
    assert several["averages"] == pytest.approx(alone["averages"], rel=1e-5)
    assert alone["losses"][-1] != alone["losses"][0]


@pytest.mark.parametrize("name", [name for name in TWO if name.startswith("learnt")])
def test_a_learnt_target_is_the_same_in_every_process(ends, name):
    """Its gradient is averaged over processes once, whatever splits the network: twice, or not at all, would show."""
    alone, several = ends[1][name.split()[0]], ends[2][name]
    assert several["target"] == pytest.approx(alone["target"], rel=1e-4, abs=1e-6)
    assert max(map(abs, alone["target"])) > 1e-3
    first, second = several["of_processes"]
    assert first == second  # to the last bit


def test_the_network_was_split_where_it_should_be(ends):
    assert ends[1]["plain"]["mode"] == "none"
    assert (ends[4]["plain auto"]["mode"], ends[4]["plain auto"]["sharded"]) == ("ddp", 0)  # it fits in memory
    assert ends[2]["plain fsdp"]["sharded"] > 20
    assert ends[2]["learnt fsdp"]["sharded"] == ends[2]["plain fsdp"]["sharded"]  # k is whole in every process


def world(size: int, local: int) -> World:
    return World(size=size, local_size=local, device=CPU)


@pytest.mark.parametrize(
    ("processes", "memory", "mode"),
    [
        ((1, 1), 1, "none"),
        ((8, 8), 1, "ddp"),
        ((8, 8), 2**60, "fsdp"),
        ((16, 8), 2**60, "hsdp"),
        ((4, 1), 2**60, "fsdp"),
    ],
)
def test_auto_takes_what_fits(processes, memory, mode):
    assert choose_mode("auto", world(*processes), memory) == mode


@pytest.mark.parametrize(
    ("asked", "processes", "words"),
    [
        ("all", (2, 2), "unknown parallel mode 'all'; choose from auto, none, ddp, fsdp, hsdp"),
        ("none", (2, 2), "torchrun started 2; choose ddp, fsdp or auto"),
        ("fsdp", (1, 1), "needs several processes: torchrun --nproc-per-node 2"),
        ("hsdp", (8, 8), "needs several machines of several processes, not 1 of 8"),
    ],
)
def test_modes_that_cannot_be(asked, processes, words):
    with pytest.raises(ValueError, match=words):
        choose_mode(asked, world(*processes), 1)


def test_the_parts_of_all_processes_are_the_batch():
    config = tiny_config(batch_size=24, accumulation=3)
    parts = [part for rank in range(4) for part in micro_batches(config, World(rank=rank, size=4, device=CPU))]
    covered = sorted(index for offset, count in parts for index in range(offset, offset + count))
    assert covered == list(range(24))
    with pytest.raises(ValueError, match="batch_size 24 is not divisible by 5 processes times accumulation 3"):
        micro_batches(config, World(size=5, device=CPU))


def test_one_graph_cannot_gather_weights():
    assert resolve_compile("auto", "fsdp", CPU) == "none"
    assert resolve_compile("auto", "fsdp", torch.device("cuda")) == "block"
    with pytest.raises(ValueError, match="compile full makes one graph, which fsdp cannot gather weights in"):
        resolve_compile("full", "fsdp", CPU)
