"""LightningDiT and JiT, which drops numbers, learn in as many steps as a test may take."""

from __future__ import annotations

import pytest

from erdfast import presets
from erdfast.training.metrics import read_metrics
from tests.runs import single_thread, tiny_trainer
from tests.training.rank_cases import DROPPING


@pytest.mark.parametrize("model", ["lightningdit_tiny", "jit_dropping"])
def test_the_loss_falls(tmp_path, monkeypatch, model):
    monkeypatch.setitem(presets.MODELS, "jit_dropping", DROPPING["jit_dropping"])
    options = {"schedule": "flow", "target": "x0", "weighting": "constant", "lr": 3e-3, "batch_size": 32}
    trainer = tiny_trainer(tmp_path, model=model, steps=40, log_every=10, stratified=True, **options)
    with single_thread():
        assert trainer.train() is None
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert losses[-1] < 0.7 * losses[0], losses


def test_dropout_is_of_training_alone(tmp_path, monkeypatch):
    """Evaluations and pictures come from the averaged network, which needs no key."""
    monkeypatch.setitem(presets.MODELS, "jit_dropping", DROPPING["jit_dropping"])
    options = {"schedule": "flow", "target": "x0", "sample_every": 1, "sample_num": 2, "sample_steps": 2}
    trainer = tiny_trainer(tmp_path, model="jit_dropping", steps=2, **options)
    assert trainer.train() is None
    assert trainer.model.training
    assert not trainer.averaged.model.training
    assert list((tmp_path / "samples").iterdir())
