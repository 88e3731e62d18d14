"""What a run continues from when the newest checkpoint is damaged, or something was cut off beside it."""

import math

import pytest
import torch

from erdfast.config import EmaConfig
from erdfast.training.checkpoint_files import read_model
from erdfast.training.ema import average_names
from erdfast.training.health import Health
from erdfast.training.parallel import World
from erdfast.training.snapshots import list_snapshots
from erdfast.training.trainer import Trainer
from tests.runs import tiny_config, tiny_trainer

CPU = torch.device("cpu")


def flip_a_byte(checkpoint):
    (file,) = (checkpoint / "state").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_with_a_flipped_byte_is_left_out(tmp_path):
    tiny_trainer(tmp_path, steps=6, checkpoint_every=2, keep_last=3).train()
    newest, older = tmp_path / "checkpoints" / "00000006", tmp_path / "checkpoints" / "00000004"
    flip_a_byte(newest)
    lines: list[str] = []
    trainer = tiny_trainer(tmp_path, steps=6, checkpoint_every=2, keep_last=3)
    trainer.say = lines.append
    trainer.restore()
    assert trainer.step == 4
    assert len(lines) == 1
    assert str(newest) in lines[0]
    assert "does not have the checksum" in lines[0]
    trainer.train()  # and writes it anew
    again = tiny_trainer(tmp_path, steps=6)
    again.restore()
    assert again.step == 6
    for path in (newest, older, older.with_name("00000002")):
        flip_a_byte(path)
    with pytest.raises(ValueError, match=r"holds no complete checkpoint.*00000006.*00000004.*00000002"):
        tiny_trainer(tmp_path, steps=6).restore()


def test_published_weights_with_a_flipped_byte_are_not_sampled(tmp_path):
    tiny_trainer(tmp_path, steps=1).train()
    checkpoint = tmp_path / "checkpoints" / "00000001"
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"00000001 is damaged: model\.safetensors does not have the checksum"):
        read_model(checkpoint)


def test_a_run_killed_between_snapshot_and_checkpoint_has_both_in_the_end(tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*_, **__):
        raise Killed

    options = {"steps": 8, "checkpoint_every": 4, "ema_std": (0.05, 0.1)}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(Killed):
            tiny_trainer(tmp_path, **options).train()
    trainer = tiny_trainer(tmp_path, **options)
    trainer.restore()
    trainer.train()
    assert [(s.step, s.std) for s in list_snapshots(tmp_path)] == [(4, 0.05), (4, 0.1), (8, 0.05), (8, 0.1)]


def test_averages_that_round_alike_have_names_of_their_own():
    assert average_names(EmaConfig(ema_decay=(0.999, 0.9999))) == ["0.999", "0.9999"]
    assert average_names(EmaConfig(ema_std=(0.05, 0.1))) == ["std0.050", "std0.100"]
    for config in (EmaConfig(ema_std=(0.05, 0.0501)), EmaConfig(ema_decay=(0.9999999, 0.99999999))):
        assert len(set(average_names(config))) == 2
    for options in ({"ema_decay": (0.9, 0.9)}, {"ema_std": (0.05, 0.05)}):
        with pytest.raises(ValueError, match="every average must be another"):
            tiny_config(**options).validate()


def test_a_window_without_a_finite_loss_has_none():
    health = Health(World(device=CPU), stop=False)
    health.add_step(torch.tensor(2.0), None)
    assert health.spike(health.read(str)) is None  # what is usual: 2
    for loss in (math.inf, math.nan):
        health.add_step(torch.tensor(loss), None)
    losses = health.read(str)
    assert math.isnan(losses.mean)
    assert math.isnan(losses.largest)
    assert health.spike(losses) is None
    health.add_step(torch.tensor(2.5), None)
    assert health.spike(health.read(str)) is None  # and is still about 2
