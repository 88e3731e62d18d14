"""What is saved survives kill -9 at any moment, in one process and in several: the end is as if undisturbed."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erdfast import train
from erdfast.training.checkpoint_files import complete_checkpoints, complete_step, verify
from erdfast.training.metrics import read_metrics
from erdfast.training.plan import compiled_folder
from tests.runs import ROOT, TINY, all_tensors, assert_same_bits, start, wait_until, words

KILLS = int(os.environ.get("ERDFAST_KILLS", "6"))
"""The more, the longer: ERDFAST_KILLS=50 takes three minutes on a core."""
STEPS = 300
OPTIONS = [
    *TINY,
    *words(f"--steps {STEPS} --log-every 20 --seed 5 --checkpoint-every 2 --keep-last 2 --keep-every 100"),
]
SHARED_STEPS = 12
SHARED = [*TINY, *words(f"--steps {SHARED_STEPS} --log-every 1 --checkpoint-every 1 --parallel fsdp --batch-size 4")]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    assert train.main([*map(str, OPTIONS), "--out", str(undisturbed)]) == 0
    chance = random.Random(0)
    killed = 0
    for number in range(KILLS):
        done = complete_step(run) or 0
        if done >= STEPS:
            break
        with start([*OPTIONS, "--out", run, "--resume", "auto"]) as process:
            if number % 4:  # most often while steps and checkpoints follow each other, sometimes while it starts
                wait_until(lambda done=done: (complete_step(run) or 0) > done, process)
                time.sleep(chance.uniform(0.0, 0.05))
            else:
                time.sleep(chance.uniform(0.0, 3.0))
            process.kill()
            process.communicate(timeout=120)
        killed += process.returncode == -signal.SIGKILL
        for path in complete_checkpoints(run / "checkpoints"):
            verify(path)
        assert (complete_step(run) or 0) >= done
    assert killed >= min(KILLS, 3)
    assert train.main([*map(str, OPTIONS), "--out", str(run), "--resume", "auto"]) == 0
    assert_same_bits(all_tensors(run), all_tensors(undisturbed))
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == [f"{step:08d}" for step in (100, 200, STEPS - 2, STEPS)]


def torchrun(*arguments: object) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # other tests of this process may have set them
    environment = {name: value for name, value in os.environ.items() if name not in caches}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Two processes, undisturbed."""
    run = tmp_path_factory.mktemp("shared") / "run"
    with torchrun("-m", "erdfast.train", *SHARED, "--out", run) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert complete_step(run) == SHARED_STEPS
    return run


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again(tmp_path, shared):
    run = tmp_path / "run"
    script = ROOT / "tests" / "training" / "crashing_rank.py"
    options = [*SHARED, "--out", run, "--resume", "auto"]
    with torchrun("--max-restarts", "1", script, run, *options) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"resuming {run} at step" in out
    assert_same_bits(all_tensors(run), all_tensors(shared))


def test_the_end_of_a_process_waits_for_no_collective(tmp_path):
    """Gloo's threads are not stopped in the middle: that would end a complete run with SIGABRT."""
    with torchrun(ROOT / "tests" / "training" / "late_collective.py", tmp_path) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at exit", "thread"]


@pytest.mark.slow
def test_preemption_of_several_processes(tmp_path, shared):
    run = tmp_path / "run"
    options = [*SHARED, "--out", run, "--resume", "auto"]
    with torchrun("-m", "erdfast.train", *options) as process:
        wait_until(lambda: (complete_step(run) or 0) >= 2, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    step = complete_step(run)
    assert step is not None
    with torchrun("-m", "erdfast.train", *options) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert step == SHARED_STEPS or f"resuming {run} at step {step} of {SHARED_STEPS}" in out
    assert_same_bits(all_tensors(run), all_tensors(shared))


@pytest.mark.slow
def test_two_processes_go_on_as_one(tmp_path, shared):
    """A checkpoint of two shards, continued by one process without sharding: equal but for rounding."""
    run = tmp_path / "run"
    shorter = [*SHARED, "--steps", "6", "--out", run]
    with torchrun("-m", "erdfast.train", *shorter) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert train.main(["--resume", str(run), "--steps", str(SHARED_STEPS), "--parallel", "auto"]) == 0
    assert_close(run, shared)


@pytest.mark.slow
def test_a_compiled_network_of_full_size_goes_on_in_one_process(tmp_path, monkeypatch):
    """dit_s2 split by FSDP2, compiled by block, saved in the background; then whole, eager, from the step before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    linear = words("--lr 1e3 --adam-eps 1e3 --weight-decay 0 --no-tensorboard --precision fp32")  # not Adam's signs
    rest = words("--batch-size 2 --steps 2 --log-every 1 --checkpoint-every 1 --sample-every 0")
    network = words("--model dit_s2 --data mixture --parallel fsdp --compile block")
    with torchrun("-m", "erdfast.train", *network, *linear, *rest, "--out", shared) as process:
        out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert "fsdp on 2 processes, 1 images each, fp32, compile block" in out
    assert "cannot be written" not in out
    assert any((compiled_folder(shared) / "inductor").rglob("*.cpp"))
    checkpoints = complete_checkpoints(shared / "checkpoints")
    assert [path.name for path in checkpoints] == ["00000001", "00000002"]
    for path in checkpoints:
        verify(path)
        assert len(list((path / "state").iterdir())) == 2  # each process wrote its shards

    shutil.copytree(shared, alone, ignore=shutil.ignore_patterns("00000002"))
    assert train.main(["--resume", str(alone), "--parallel", "none", "--compile", "none"]) == 0
    assert_close(alone, shared)
    one, two = ([record["loss"] for record in read_metrics(run / "metrics.jsonl")] for run in (alone, shared))
    assert one == pytest.approx(two, rel=1e-5)
    before, after = (load_file(path / "model.safetensors") for path in checkpoints)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def assert_close(run: Path, other: Path) -> None:
    """Equal but for rounding, in every tensor of the newest checkpoint."""
    alone, wanted = all_tensors(run), all_tensors(other)
    assert alone.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (alone[name] - value).abs().max() <= 2e-4 * max(1.0, float(value.abs().max())), name
