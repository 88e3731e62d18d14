"""Evaluations by two processes: the images of one, divided, and the same values; who fails keeps no one waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from erdfast.training.parallel import World
from tests.evaluation.inception_files import save_pictures
from tests.runs import ROOT
from tests.training.rank_evaluation import run_cases
from tests.vaes import save_tiny_vae

OPTIONS: dict[str, Any] = {"steps": 4, "eval_every": 2, "eval_num": 75, "eval_steps": 2}
OPTIONS |= {"schedule": "flow", "target": "u", "weighting": "constant", "ema_decay": [0.1]}
"""With averages that soon forget where they came from, so that steps differ."""
NUM = OPTIONS["eval_num"]


def cases(folder: Path) -> dict[str, dict[str, Any]]:
    """By name, for two processes."""
    pictures = {
        "eval_reference": str(folder / "real.npz"),
        "eval_inception": str(folder / "weights.pth"),
        "eval_vae": str(folder / "vae"),
    }
    return {
        "known ddp": OPTIONS | {"parallel": "ddp"},
        "known fsdp": OPTIONS | {"parallel": "fsdp"},
        "pictures fsdp": OPTIONS | pictures | {"parallel": "fsdp"},
        "fails here": OPTIONS | {"parallel": "ddp"},
        "fails there": OPTIONS | {"parallel": "fsdp"},
    }


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    """What one process, and each of two, saw."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_pictures(folder / "real.npz", 70)
    (folder / "weights.pth").write_bytes(b"made up")
    save_tiny_vae(folder / "vae")
    two = cases(folder)
    alone = {name: options | {"parallel": "none"} for name, options in two.items() if not name.startswith("fails")}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests/training/rank_evaluation.py")
    done = subprocess.run(
        [*command, script, str(folder), json.dumps(two)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((folder / f"ranks-2-{rank}.json").read_text()) for rank in range(2)]
    one = run_cases(folder, alone, World(device=torch.device("cpu")))
    return {name: [one.get(name, {}), *(rank[name] for rank in ranks)] for name in two} | {"stderr": [done.stderr]}  # pyright: ignore[reportReturnType]  # one text


def values(record: dict[str, Any]) -> dict[str, float]:
    return {key.removeprefix("eval_"): value for key, value in record.items() if key.startswith("eval_")}


@pytest.mark.parametrize("name", ["known ddp", "known fsdp", "pictures fsdp"])
def test_two_processes_measure_what_one_does(ends, name):
    one, first, second = ends[name]
    assert (one["mode"], first["mode"]) == ("none", name.split()[1])
    assert [record["step"] for record in first["evaluations"]] == [2, 4]
    assert first["evaluations"] == second["evaluations"]  # of one file
    metrics = ["fid", "sfid", "is", "precision", "recall"] if name.startswith("pictures") else ["fd", "accuracy"]
    for ours, theirs in zip(one["evaluations"], first["evaluations"], strict=True):
        assert list(values(theirs)) == list(values(ours)) == metrics
        for metric, value in values(ours).items():
            share = metric in ("accuracy", "precision", "recall")  # rounding may move an image over its border
            assert values(theirs)[metric] == pytest.approx(value, rel=1e-3, abs=2.5 / NUM if share else 0), metric
    early, late = (values(record)[metrics[0]] for record in one["evaluations"])
    assert early != pytest.approx(late, rel=1e-2)  # what training changes is more than the tolerance


@pytest.mark.parametrize("name", ["known ddp", "known fsdp", "pictures fsdp"])
def test_each_measures_its_share(ends, name):
    one, first, second = ends[name]
    assert one["ids"] == [list(range(NUM))] * 2
    for ours, theirs in zip(first["ids"], second["ids"], strict=True):
        assert ours + theirs == list(range(NUM))
        assert abs(len(ours) - len(theirs)) <= 1


@pytest.mark.parametrize(("name", "why"), [("fails here", "out of memory, says"), ("fails there", "another process")])
def test_a_process_that_fails_keeps_no_other_waiting(ends, name, why):
    _, first, second = ends[name]
    assert [record["step"] for record in first["evaluations"]] == [4]
    (line,) = [line for line in first["said"] if line.startswith("no evaluation")]
    assert line.startswith(f"no evaluation at step 2: {why}")
    assert not [line for line in second["said"] if "evaluation" in line]
    assert len(first["ids"]) == len(second["ids"]) == 2


def test_the_other_process_says_its_reason(ends):
    (stderr,) = ends["stderr"]
    assert "evaluation at step 2: process 1: out of memory, says the test" in stderr
