"""`python -m erdfast.sample --run FILE`: samples of anybody's checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from erdfast import cli, ema, sample, train
from erdfast.models import ADMUNetConfig, DiTConfig
from erdfast.models.recognise import HEADS
from erdfast.presets import MODELS
from erdfast.process import Process
from erdfast.sampling import sample as draw
from tests.models.test_load_published import random_network
from tests.runs import TINY

SMALL = DiTConfig(width=48, depth=2, num_heads=4, input_shape=(3, 8, 8), num_classes=3, learn_sigma=True)


@pytest.fixture(autouse=True)
def known_width(monkeypatch) -> None:
    """So that a network of this width counts as published."""
    monkeypatch.setitem(HEADS, 48, 4)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save({"ema": random_network(SMALL).state_dict()}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def arguments(*options: object) -> list[str]:
    return [str(option) for option in ("--num", 4, "--steps", 3, "--precision", "fp32", *options)]


def test_pictures_are_those_of_the_sampler(checkpoint, tmp_path, capsys) -> None:
    assert sample.main(["--run", str(checkpoint), *arguments("--out", tmp_path / "s.npz", "--cfg-scale", 1.5)]) == 0
    out = capsys.readouterr().out
    assert "averaged weights under 'ema'" in out
    assert "learned variance is not used" in out
    assert "sampled as eps prediction on the schedule ddpm_linear" in out
    with np.load(tmp_path / "s.npz") as made:
        pictures, labels = made["arr_0"], made["arr_1"]
    assert labels.tolist() == [0, 1, 2, 0]
    process = Process(schedule="ddpm_linear", target="eps", weighting="constant")
    x = draw(random_network(SMALL), process, num=4, steps=3, cfg_scale=1.5, classes=None, batch_size=256)
    expected = ((x + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert (np.abs(pictures.astype(float) - expected) <= 1).all()


def test_a_sit_is_drawn_along_its_flow(checkpoint, tmp_path, capsys) -> None:
    options = arguments("--family", "sit", "--out", tmp_path / "s.npz")
    assert sample.main(["--run", str(checkpoint), *options]) == 0
    assert "sampled as u prediction on the schedule flow" in capsys.readouterr().out
    sit = random_network(SMALL)
    theirs = draw(_Turned(sit), Process(schedule="flow", target="u", weighting="constant"), num=4, steps=3)
    with np.load(tmp_path / "s.npz") as made:
        expected = ((theirs + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
        assert (np.abs(made["arr_0"].astype(float) - expected) <= 1).all()


class _Turned(torch.nn.Module):
    """A SiT's network asked in its own convention."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.input_shape = network, network.input_shape
        self.num_classes, self.null_class = network.num_classes, network.null_class
        self.out_channels = network.out_channels
        self.anchor = next(network.parameters())

    def forward(self, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        return -self.network(x, 1 - time, y)


def test_a_preset_and_a_process_may_be_named(tmp_path, capsys) -> None:
    config = MODELS["adm_unet_tiny"]
    assert isinstance(config, ADMUNetConfig)
    torch.save(random_network(config).state_dict(), tmp_path / "unet.pt")
    options = ["--run", str(tmp_path / "unet.pt"), *arguments("--model", "adm_unet_tiny")]
    assert _error(capsys, options) == f"{tmp_path}/unet.pt does not say how it was trained: add --schedule and --target"
    assert sample.main([*options, "--schedule", "cosine", "--target", "eps"]) == 0
    assert (tmp_path / "samples.png").exists()
    assert "sampled as eps prediction on the schedule cosine" in capsys.readouterr().out


def test_what_does_not_go_together_is_one_line(checkpoint, tmp_path, capsys) -> None:
    lines = {
        ("--run", checkpoint, "--family", "jit"): "is a dit, not a jit",
        ("--run", checkpoint, "--family", "flux"): "flux",
        ("--run", checkpoint, "--model", "dit_b3"): "unknown model 'dit_b3'",
        ("--run", checkpoint, "--model", "dit_b2"): "does not fit this DiT",
        ("--run", checkpoint, "--weights", "w.safetensors"): "go with a run",
        ("--run", checkpoint, "--target", "k9"): "unknown target 'k9'",
        ("--run", checkpoint, "--target", "k"): "target k is learnt, and",
        ("--run", tmp_path, "--family", "dit"): "family is for published checkpoints",
        ("--run", tmp_path / "absent.pt"): "absent.pt",
    }
    for options, message in lines.items():
        assert message in _error(capsys, [str(option) for option in options])
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither .safetensors nor" in _error(capsys, ["--run", str(tmp_path / "notes.txt")])
    (tmp_path / "cut.pt").write_bytes(checkpoint.read_bytes()[:500])
    assert "cut.pt" in _error(capsys, ["--run", str(tmp_path / "cut.pt")])


def test_another_process_is_another_job(checkpoint, tmp_path, capsys) -> None:
    options = ["--run", str(checkpoint), *arguments("--out", tmp_path / "s.npz")]
    assert sample.main(options) == 0
    with np.load(tmp_path / "s.npz") as made:
        before = made["arr_0"]
    assert sample.main([*options, "--target", "v"]) == 0
    assert "drawn before" not in capsys.readouterr().out
    with np.load(tmp_path / "s.npz") as made:
        assert (made["arr_0"] != before).any()


@pytest.mark.parametrize("name", ["model.safetensors", "model-std0.08-step00000100.safetensors"])
def test_weights_of_a_run_of_ours_are_not_taken_for_published_ones(checkpoint, tmp_path, capsys, name) -> None:
    state = torch.load(checkpoint, weights_only=True)["ema"]
    places = [tmp_path / "run" / name, tmp_path / "run" / "checkpoints" / "00000100" / name]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file(state, place)
    (tmp_path / "run" / "config.json").write_text("{}")
    for place in places:
        assert f"belongs to the run {tmp_path}/run: give the folder" in _error(capsys, ["--run", str(place)])


def test_copied_weights_of_a_run_of_ours_are_not_taken_for_published_ones(tmp_path, capsys) -> None:
    run = tmp_path / "run"
    assert train.main([*TINY, "--steps", "2", "--ema-std", "0.1", "--ema-snapshot-every", "1", "--out", str(run)]) == 0
    average = tmp_path / "average.safetensors"
    assert ema.main(["--run", str(run), "--std", "0.1", "--out", str(average)]) == 0
    weights = run / "checkpoints" / "00000002" / "model.safetensors"
    copied = shutil.copy(weights, tmp_path / "copied.safetensors")
    for path in (copied, average):
        assert f"{path} holds weights of a run of erdfast, not how they" in _error(capsys, ["--run", str(path)])


def _error(capsys, options: list[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: sample.main(options), "erdfast.sample")
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("erdfast.sample: error: ")
