"""Options of evaluations: what is refused before a run begins, and what a run that is resumed keeps of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from erdfast import cli, train
from erdfast.config import EvalConfig, TrainConfig
from erdfast.training.evaluation_records import evaluated_steps
from tests.evaluation.inception_files import save_pictures
from tests.runs import TINY, refused, tiny_trainer, words


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--eval-num 9", ["eval_num 9 has no effect without eval_every", "--eval-every"]),
        ("--eval-every -1", ["eval_every is -1"]),
        ("--eval-every 2 --eval-metrics kid", ["eval_metrics is ('kid',)", "fid, sfid, is, precision, recall"]),
        ("--eval-every 2 --eval-inception weights.pth", ["eval_inception", "has no effect: without eval_reference"]),
        ("--eval-every 2 --eval-metrics fid", ["eval_metrics ('fid',) has no effect: without eval_reference"]),
        ("--eval-every 2 --eval-cfg-scale 2 --label-drop 0", ["eval_cfg_scale 2", "label_drop is 0", "choose 1"]),
        ("LATENTS --eval-every 2", ["eval_every 2", "--eval-reference", "npz of ADM"]),
        ("LATENTS --eval-every 2 --eval-cfg-scale 2", ["eval_cfg_scale 2", "the data have no labels"]),
        ("LATENTS --eval-every 2 --eval-reference real.npz", ["--eval-inception", "pytorch-fid"]),
        ("LATENTS PICTURES", ["latents.safetensors holds latents", "AutoencoderKL", "--eval-vae"]),
        ("LATENTS PICTURES --eval-vae none", ["none holds no config.json"]),
        ("DIGITS PICTURES --eval-vae vae", ["vae is for latents, but digits holds pictures: leave it out"]),
        ("DIGITS --eval-every 2 --eval-reference none.npz --eval-inception weights.pth", ["none.npz: no such file"]),
        ("DIGITS --eval-every 2 --eval-reference poor.npz --eval-inception weights.pth", ["poor.npz", "'mu'"]),
        ("DIGITS --eval-every 2 --eval-reference no.npz --eval-inception weights.pth", ["no.npz", "no covariance"]),
        (
            "REAL --eval-every 2 --eval-reference real.npz --eval-inception none.pth",
            ["none.pth: no such file", "91 MiB"],
        ),
    ],
)
def test_bad_options_are_one_line_and_no_run(files, capsys, monkeypatch, options, parts):
    if options.startswith("REAL"):
        monkeypatch.undo()
    monkeypatch.chdir(files)
    np.savez("poor.npz", something=np.zeros(3))
    statistics = {"mu": np.zeros(6), "sigma": -np.eye(6), "mu_s": np.zeros(5), "sigma_s": np.eye(5)}
    save_pictures(Path("no.npz"), 9, **statistics)
    for short, long in (
        ("LATENTS", "--data latents.safetensors"),
        ("DIGITS", "--model uvit_digits --data digits"),
        ("REAL", "--model uvit_digits --data digits"),
        ("PICTURES", "--eval-every 2 --eval-reference real.npz --eval-inception weights.pth"),
    ):
        options = options.replace(short, long)
    line = refused(capsys, train.main, [*TINY, "--steps", "3", "--out", "run", *words(options)])
    assert all(part in line for part in parts), line
    assert not Path("run").exists()


def test_options_come_back(tmp_path, monkeypatch):
    """From config.json, from another folder; and can be switched off."""
    monkeypatch.chdir(tmp_path)
    options = EvalConfig(eval_every=3, eval_reference=Path("r.npz"), eval_metrics=("fid",))
    made = TrainConfig(model="uvit_tiny", evaluation=options)
    config = train.resolve(made, torch.device("cpu"), say=lambda _line: None)
    assert config.evaluation.eval_reference == tmp_path / "r.npz"
    assert TrainConfig.from_json(config.to_json(), "config.json") == config
    tiny_trainer(tmp_path / "run", steps=4, eval_every=2, eval_num=12, eval_steps=2)
    resumed = cli.parse_train(["--resume", "run", "--eval-num", "9"])
    assert resumed.evaluation == EvalConfig(eval_every=2, eval_num=9, eval_steps=2)
    off = cli.parse_train(["--resume", "run", "--eval-every", "0"])
    assert off.evaluation == EvalConfig()
    off.validate()


def test_from_the_command_line(tmp_path, capsys):
    arguments = words("--steps 4 --log-every 2 --checkpoint-every 2 --eval-every 2 --eval-num 10 --eval-steps 2")
    assert train.main([*TINY, *arguments, "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in shown if "evaluation" in line] == [
        "evaluation at step 2",
        "evaluation at step 4",
        "best evaluation",
    ]
    assert train.main(["--resume", str(tmp_path / "run"), "--steps", "5"]) == 0
    assert evaluated_steps(tmp_path / "run") == [2, 4, 5]
