"""torch.compile of a step: as few graphs as there are kinds of blocks, whole, made once, with the same numbers."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import cache_dir

from erdfast import presets
from erdfast.training.plan import compiled_folder
from erdfast.training.trainer import Trainer
from tests.runs import tiny_trainer
from tests.training.rank_cases import DROPPING

STEPS = 20


@pytest.fixture(autouse=True)
def dropping_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(presets.MODELS, "jit_dropping", DROPPING["jit_dropping"])


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch: pytest.MonkeyPatch):
    """What is counted is done by the tracer; a back end that calls what was traced takes seconds, not minutes."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def train(run: Path, compile: str, **options: Any) -> Trainer:
    """Twenty steps with all that surrounds them: dropped labels, log lines, averages, pictures, a checkpoint."""
    own: dict[str, Any] = {
        "steps": STEPS,
        "log_every": 5,
        "sample_every": 8,
        "sample_num": 2,
        "sample_steps": 2,
        "checkpoint_every": 10,
    }
    trainer = tiny_trainer(run, compile=compile, label_drop=0.5, **(own | options))
    assert trainer.train() is None
    return trainer


@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        # What precedes the network; the first block, which has no sum to make; blocks without and with a long skip.
        ({"model": "uvit_tiny", "compile": "block"}, 4),
        ({"model": "dit_tiny", "compile": "block"}, 3),
        ({"model": "uvit_tiny", "compile": "full"}, 1),
        # Blocks before and behind the label's tokens; of those behind them, some that drop numbers.
        ({"model": "lightningdit_tiny", "compile": "block"}, 3),
        ({"model": "jit_dropping", "compile": "block", "recompute": "selective"}, 5),
        # A part of the batch is a part: where it lies in the batch is a tensor.
        ({"model": "uvit_tiny", "compile": "block", "accumulation": 2}, 4),
        ({"model": "dit_tiny", "compile": "full", "accumulation": 2, "target": "k", "schedule": "flow"}, 1),
        # Blocks that are computed again in backward, and make their sums themselves; several averages, whose decays
        # change; updates that are judged.
        ({"model": "uvit_tiny", "compile": "block", "recompute": "full", "ema_std": (0.05, 0.1)}, 3),
        ({"model": "dit_tiny", "compile": "full", "recompute": "selective", "on_nonfinite": "skip"}, 1),
    ],
)
def test_graphs_are_few_whole_and_made_once(tmp_path, options, graphs):
    train(tmp_path, **options)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert not counters["recompiles"]
    assert counters["frames"]["ok"] == counters["frames"]["total"]


@pytest.mark.parametrize(
    ("model", "compile"),
    [
        *itertools.product(["uvit_tiny", "dit_tiny"], ["block", "full"]),
        ("lightningdit_tiny", "full"),
        ("jit_dropping", "block"),
    ],
)
def test_compiled_runs_end_as_eager_ones(tmp_path, model, compile):
    linear: dict[str, Any] = {"lr": 1e3, "adam_eps": 1e3, "steps": 6, "sample_every": 0, "model": model}
    if model == "dit_tiny":  # a learnable target is compared too
        linear |= {"target": "k", "schedule": "flow", "grad_clip": 0.3}
    eager, compiled = (train(tmp_path / mode, mode, **linear) for mode in ("none", compile))
    assert compiled.parameters.keys() == eager.parameters.keys()
    moved = [abs(float(p.detach())) > 1e-3 for name, p in eager.parameters.items() if name.startswith("process.")]
    assert moved == ([True] if model == "dit_tiny" else [])
    for name, parameter in compiled.parameters.items():
        torch.testing.assert_close(parameter, eager.parameters[name], rtol=1e-5, atol=1e-6)


def test_what_the_compiler_makes_is_found_by_a_restart(tmp_path, monkeypatch):
    """By the run's path, but not in it: a run directory that is passed on holds nothing that is executed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        del os.environ[name]  # what the trainer sets is taken back
    cache_dir()  # torch writes its default into the environment
    tiny_trainer(tmp_path / "run", compile="block")
    folder = compiled_folder(tmp_path / "run")
    assert folder.parent == tmp_path / "home" / "erdfast" / "compiled"
    assert folder.stat().st_mode & 0o077 == 0
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder / "inductor")
    assert compiled_folder(tmp_path / "other") != folder
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))
    tiny_trainer(tmp_path / "other", compile="block")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "elsewhere")  # the user's own
