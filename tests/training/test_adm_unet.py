"""Training an ADM UNet: the loss falls; compiled, recomputed and divided over processes it is the same run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from erdfast import presets
from erdfast.training.metrics import read_metrics
from erdfast.training.parallel import World
from tests.runs import all_tensors, assert_same_bits, tiny_trainer
from tests.training.rank_cases import DROPPING, run_cases
from tests.training.test_parallel import torchrun

UNET: dict[str, Any] = {"model": "adm_unet_dropping", "data": "mixture:3x16x16", "batch_size": 4}
LINEAR: dict[str, Any] = {"steps": 3, "lr": 1e2, "adam_eps": 1e3}
"""Plain gradient descent, which does not amplify rounding: see rank_cases.py."""


@pytest.fixture(autouse=True)
def dropping_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in DROPPING.items():
        monkeypatch.setitem(presets.MODELS, name, config)


def test_the_loss_falls(tmp_path: Path) -> None:
    tiny_trainer(tmp_path, **UNET, steps=24, log_every=6, lr=1e-3).train()
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]


def test_a_recomputed_run_ends_as_another(tmp_path: Path) -> None:
    tiny_trainer(tmp_path / "kept", **UNET, steps=2).train()
    tiny_trainer(tmp_path / "again", **UNET, steps=2, recompute="full").train()
    assert_same_bits(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "kept"))


def test_a_compiled_run_ends_as_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options: dict[str, Any] = UNET | LINEAR | {"model": "adm_unet_tiny"}
    with torch._dynamo.config.patch(recompile_limit=8):  # PyTorch's own, which the trainer raises
        eager, compiled = (tiny_trainer(tmp_path / mode, **options, compile=mode) for mode in ("none", "block"))
        eager.train()
        compiled.train()
    torch._dynamo.reset()
    # What precedes the network, and blocks that all differ.
    assert counters["stats"]["unique_graphs"] == 1 + len(eager.model.blocks_for_sharding())
    assert not counters["graph_break"]
    for name, parameter in compiled.parameters.items():
        torch.testing.assert_close(parameter, eager.parameters[name], rtol=1e-5, atol=1e-6)


def test_the_number_of_processes_changes_nothing_but_rounding(tmp_path: Path) -> None:
    alone = run_cases(tmp_path, {"unet": UNET | LINEAR}, World(device=torch.device("cpu")))["unet"]
    ways = {"ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp", "recompute": "full"}}
    ends = torchrun(2, tmp_path, {name: UNET | LINEAR | own for name, own in ways.items()})
    assert ends["fsdp"]["sharded"] > 100
    for end in ends.values():
        assert end["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert end["levels"] == alone["levels"]
        for kind in ("norms", "weights", "averages"):
            assert end[kind] == pytest.approx(alone[kind], rel=1e-5)
    assert alone["losses"][-1] != alone["losses"][0]
