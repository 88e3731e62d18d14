"""Runs that version 0.1 began: their options and checkpoints of format 1 are read, and training goes on bit by bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from erdfast import train
from erdfast.config import EmaConfig, TrainConfig
from erdfast.published_run import open_run
from erdfast.training.checkpoint_files import STATE, newest_checkpoint, read_tensors
from erdfast.training.metrics import read_metrics
from erdfast.training.run_directory import load_run_config
from erdfast.training.state import PUBLISHED_PROCESS
from tests.runs import TINY, all_tensors, assert_same_bits, tiny_trainer, words

CPU = torch.device("cpu")
LEARNT = words("--target k --schedule flow --weighting constant --lr 1e-2 --ema-decay 0.9")
FIELDS = words(
    "model data recipe steps batch_size accumulation label_drop precision compile attention seed out resume dry_run "
    "log_every checkpoint_every keep_last tensorboard process optimizer preview"
)
"""Of version 0.1's config.json."""


def age_config(run: Path) -> None:
    """Rewrite config.json as version 0.1 wrote it."""
    values = json.loads((run / "config.json").read_text())
    old: dict[str, Any] = {name: values[name] for name in FIELDS} | {"compile": "none"}
    (old["optimizer"]["ema_decay"],) = values["ema"]["ema_decay"]
    (run / "config.json").write_text(json.dumps(old))


def age_checkpoint(path: Path) -> None:
    """Rewrite a checkpoint of one process in format 1."""
    tensors = {}
    for name, value in read_tensors(path, "").items():
        if name.startswith(PUBLISHED_PROCESS):
            name = f"ema/process/{name.removeprefix(PUBLISHED_PROCESS)}"
        elif name.startswith("ema/"):  # the network's were in model.safetensors alone
            continue
        tensors[name] = value.reshape(()) if value.numel() == 1 and name.endswith("/step") else value
    shutil.rmtree(path / STATE)
    save_file(tensors, path / "state.safetensors", metadata={"format": "pt"})
    step = int(path.name)
    (path / "state.json").write_text(json.dumps({"format": 1, "step": step, "scaler": {}}))


@pytest.fixture(scope="module")
def young(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("young") / "run"
    assert train.main([*TINY, *LEARNT, "--steps", "4", "--log-every", "2", "--out", str(run)]) == 0
    return run


@pytest.fixture
def old(young: Path, tmp_path: Path) -> Path:
    run = Path(shutil.copytree(young, tmp_path / "old"))
    age_config(run)
    age_checkpoint(newest_checkpoint(run))
    return run


def test_it_goes_on_with_nothing_but_its_name(young, old, tmp_path):
    new = Path(shutil.copytree(young, tmp_path / "new"))
    for run in (old, new):
        assert train.main(["--resume", str(run), "--steps", "6"]) == 0
    assert_same_bits(all_tensors(old), all_tensors(new))
    assert_same_bits(load_file(old / "model.safetensors"), load_file(new / "model.safetensors"))
    losses = [[record["loss"] for record in read_metrics(run / "metrics.jsonl")] for run in (old, new)]
    assert losses[0] == losses[1]
    assert (newest_checkpoint(old) / STATE).is_dir()  # today's format from now on
    assert load_run_config(old).ema == EmaConfig(ema_decay=(0.9,))


def test_it_is_opened_as_any_other(young, old):
    found, wanted = (open_run(run, "fp32", CPU) for run in (old, young))
    assert_same_bits(found.model.state_dict(), wanted.model.state_dict())
    assert_same_bits(found.process.state_dict(), wanted.process.state_dict())


@pytest.mark.parametrize("file", ["state.safetensors", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None])
def test_a_damaged_one_is_named(old, file, content):
    path = newest_checkpoint(old)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=rf"checkpoint {path} cannot be restored: .*; remove that folder"):
        train.main(["--resume", str(old), "--steps", "6"])


@pytest.mark.parametrize("file", ["state.safetensors", "model.safetensors", "state.json"])
def test_one_that_lacks_a_file_is_left_out(old, file):
    path = newest_checkpoint(old)
    (path / file).unlink()
    with pytest.raises(ValueError, match=rf"checkpoint {path} is left out: .*{file}"):
        train.main(["--resume", str(old), "--steps", "6"])


@pytest.mark.parametrize("group", ["weights", "optimizer", "ema"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(old, group):
    path = newest_checkpoint(old) / "state.safetensors"
    whole = load_file(path)
    name = next(name for name in sorted(whole) if name.startswith(f"{group}/process") and "w_k" in name)
    for changed in (whole | {name: torch.zeros(3, 5, 7)}, {key: value for key, value in whole.items() if key != name}):
        save_file(changed, path)
        with pytest.raises(ValueError, match=rf"cannot be restored: it has no {group}/process\..*w_k.* of shape \("):
            train.main(["--resume", str(old), "--steps", "6"])


def test_it_has_one_average(old):
    trainer = tiny_trainer(
        old, target="k", schedule="flow", weighting="constant", ema_decay=(0.9, 0.99), steps=6, batch_size=8
    )
    with pytest.raises(ValueError, match="it has one average of the weights, this run 2"):
        trainer.restore()


@pytest.mark.parametrize(
    "missing",
    [
        "gpus device latent_scale",
        "evaluation",
        "eval_vae eval_num",
        "ema_std ema_snapshot_every wandb",
        "k_bins allocation",
        "weight_decay",
    ],
)
def test_options_that_came_later_have_their_defaults(missing):
    values = json.loads(TrainConfig().to_json())
    removed = set()
    for group in (values, *(values[name] for name in ("process", "optimizer", "ema", "preview", "evaluation"))):
        for name in set(words(missing)) & group.keys():
            removed.add(name)
            del group[name]
    assert removed == set(words(missing))
    assert TrainConfig.from_json(json.dumps(values), "config.json") == TrainConfig()


def test_a_run_that_was_begun_elsewhere_goes_on_here(tmp_path, monkeypatch):
    """Neither the folder in which it was started nor where it lay matters."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    monkeypatch.chdir(there)
    save_file({"latents": torch.randn(20, 4, 8, 8)}, there / "data.safetensors")
    assert train.main([*TINY, *words("--data data.safetensors --steps 2 --out run")]) == 0
    shutil.move(there / "run", here / "moved")
    monkeypatch.chdir(here)
    assert train.main(words("--resume moved --steps 3")) == 0
    assert newest_checkpoint(here / "moved").name == "00000003"
    assert list(here.iterdir()) == [here / "moved"]
