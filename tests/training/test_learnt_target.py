"""A learnable target through a whole run: its own rate, its gradient, its averages, what it leaves and who uses it."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from erdfast import sample, train
from erdfast.config import EmaConfig, OptimizerConfig
from erdfast.published_run import open_run
from erdfast.training import preview
from erdfast.training.checkpoint_files import newest_checkpoint, read_tensors
from erdfast.training.ema import Ema
from erdfast.training.metrics import read_metrics
from erdfast.training.optimizer import build_optimizer, set_learning_rates
from erdfast.training.speed import Speedometer
from erdfast.training.target_figure import draw_target, has_learnt_target
from erdfast.training.trainer import Trainer
from tests.runs import TINY, all_tensors, assert_same_bits, tiny_trainer, words

CPU = torch.device("cpu")
LEARNT: dict[str, Any] = {"target": "k", "schedule": "flow", "weighting": "constant", "loss_space": "u"}


def w_k_of(trainer: Trainer) -> Tensor:
    (w_k,) = [p for name, p in trainer.parameters.items() if name.startswith("process.")]
    return w_k.detach()


def steps(trainer: Trainer, count: int) -> Trainer:
    """Optimiser steps and nothing else."""
    for _ in range(count):
        trainer._train_step()
    trainer.loader.close()
    return trainer


# ---------------------------------------------------------------------- the optimiser


def groups(**options: Any):
    """An optimiser of a network's and a target's parameter, each with gradient 1."""
    parameters = {"model.a": nn.Parameter(torch.ones(2)), "process.target.w_k": nn.Parameter(torch.ones(()))}
    config = OptimizerConfig(lr=0.1, **options)
    optimizer = build_optimizer(parameters, config, Ema(parameters, EmaConfig()))
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    return parameters, config, optimizer


def test_its_rate_is_the_networks_by_default_and_its_own_where_it_is_named():
    for own, moved in ({}, 0.1), ({"k_lr": 0.0}, 0.0), ({"k_lr": 0.01}, 0.01), ({"k_lr": 0.5}, 0.5):
        parameters, config, optimizer = groups(**own)
        set_learning_rates(optimizer, config, 0, 10)
        optimizer.step()  # AdamW's first step is the rate
        assert parameters["model.a"].tolist() == pytest.approx([0.9, 0.9])
        assert parameters["process.target.w_k"].item() == pytest.approx(1.0 - moved)


def test_its_rate_follows_warm_up_and_schedule():
    _, config, optimizer = groups(k_lr=0.3, warmup_steps=4, lr_schedule="cosine")
    for step in range(12):
        set_learning_rates(optimizer, config, step, 12)
        network, target = (group["lr"] for group in optimizer.param_groups)
        assert target == pytest.approx(3.0 * network)
    assert 0 < target < 0.05


def test_it_does_not_decay():
    parameters, _, optimizer = groups(weight_decay=0.5)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert parameters["model.a"].tolist() == pytest.approx([0.95, 0.95])
    assert parameters["process.target.w_k"].item() == 1.0


def test_its_gradient_counts_for_the_norm_and_is_clipped_with_it(tmp_path):
    trainer = tiny_trainer(tmp_path, grad_clip=1e-3, betas=(0.0, 0.9), **LEARNT)
    steps(trainer, 1)
    gradients = {name: trainer.optimizer.state[p]["exp_avg"] for name, p in trainer.parameters.items()}
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    (learnt,) = [gradient for name, gradient in gradients.items() if name.startswith("process.")]
    assert float(learnt.abs()) > 0


def test_fixed_targets_have_one_group(tmp_path):
    trainer = tiny_trainer(tmp_path)
    assert len(trainer.optimizer.param_groups) == 1
    trainer.loader.close()


# ---------------------------------------------------------------------- the gradient


@pytest.mark.parametrize("options", [{}, {"accumulation": 2}, {"precision": "bf16"}])
def test_one_pass_gives_the_prediction_and_the_target_their_gradients(tmp_path, monkeypatch, options):
    """The op's forward pass is all that reads the data: w_k's gradient comes from its sums."""
    launched, op = [], importlib.import_module("erdfast.ops.diffusion_loss")
    launch = op._launch
    monkeypatch.setattr(op, "_launch", lambda *a: (launched.append(a[-3]), launch(*a))[1])
    trainer = tiny_trainer(tmp_path, betas=(0.0, 0.9), **(LEARNT | options))
    start = w_k_of(trainer).clone()
    steps(trainer, 1)
    assert len(launched) == options.get("accumulation", 1)
    assert all((grad is not None) for grad in launched)  # written in that very pass
    assert w_k_of(trainer) != start


def test_low_precision_is_not_the_targets(tmp_path):
    """Under autocast w_k's gradient is float32's, but for the rounding of the prediction."""
    found = {}
    for precision in ("fp32", "bf16"):
        trainer = steps(tiny_trainer(tmp_path / precision, betas=(0.0, 0.9), precision=precision, **LEARNT), 1)
        (name,) = [name for name in trainer.parameters if name.startswith("process.")]
        found[precision] = float(trainer.optimizer.state[trainer.parameters[name]]["exp_avg"])
    assert found["bf16"] == pytest.approx(found["fp32"], rel=2e-2)
    assert found["bf16"] != found["fp32"]


def test_a_loss_scale_changes_nothing(tmp_path):
    ends = {}
    for name, scale in ("plain", None), ("scaled", 2.0**16):
        trainer = tiny_trainer(tmp_path / name, grad_clip=0.1, **LEARNT)
        if scale:
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        ends[name] = w_k_of(steps(trainer, 4)).clone()
    assert ends["plain"] != 0
    torch.testing.assert_close(ends["scaled"], ends["plain"], rtol=1e-6, atol=0)


def test_gradients_that_overflow_leave_it_where_it_is(tmp_path):
    trainer = tiny_trainer(tmp_path, **LEARNT)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-100)
    steps(trainer, 1)
    assert w_k_of(trainer) == 0
    assert float(trainer.ema.averages[0][-1]) == 0
    trainer._train_step()
    assert w_k_of(trainer) != 0
    assert bool(w_k_of(trainer).isfinite())


@pytest.mark.parametrize("target", ["k", "k2", "k(t)"])
def test_parts_of_a_batch_are_the_batch(tmp_path, target):
    """A large epsilon makes AdamW linear in the gradient: a part that counted twice would show."""
    linear: dict[str, Any] = {"lr": 1e3, "adam_eps": 1e3, "k_lr": 3e3, "grad_clip": 0.3}
    ends = []
    for accumulation in (1, 2):
        options = LEARNT | linear | {"target": target, "accumulation": accumulation}
        trainer = steps(tiny_trainer(tmp_path / str(accumulation), **options), 6)
        ends.append([w_k_of(trainer).clone(), trainer.ema.averages[0][-1].clone()])
    assert float(ends[0][0].abs().max()) > 1e-3
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- averages and checkpoints


@pytest.mark.parametrize("own", [{"ema_decay": (0.5, 0.9)}, {"ema_std": (0.05, 0.1)}])
def test_every_average_has_its_own(tmp_path, own):
    trainer = tiny_trainer(tmp_path, lr=1e-2, **(LEARNT | own))
    expected = [w_k_of(trainer).double() for _ in trainer.ema.names]
    for step in range(5):
        decays = trainer.ema.decays(step)
        trainer._train_step()
        now = w_k_of(trainer).double()
        expected = [decay * old + (1 - decay) * now for old, decay in zip(expected, decays, strict=True)]
    trainer.loader.close()
    found = [average[-1].double() for average in trainer.ema.averages]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert len({float(value) for value in found}) == 2
    assert trainer.averaged.process.target_values()["k"] == torch.sigmoid(found[-1].float())


class Stopped(Exception):
    """What ends a trainer in the middle."""


@pytest.mark.parametrize("target", ["k", "k(t)"])
def test_resumed_to_the_bit_with_all_that_goes_with_it(tmp_path, target):
    options: dict[str, Any] = LEARNT | {"target": target, "steps": 6, "k_lr": 3e-2, "weight_decay": 0.1}
    options |= {"grad_clip": 0.1, "lr_schedule": "cosine", "warmup_steps": 3, "ema_decay": (0.5, 0.9)}
    tiny_trainer(tmp_path / "whole", **options).train()
    first = tiny_trainer(tmp_path / "halves", checkpoint_every=3, **options)
    save = first.save

    def save_and_stop(**_: Any) -> None:
        save(wait=True)
        raise Stopped

    first.save = save_and_stop
    with pytest.raises(Stopped):
        first.train()
    second = tiny_trainer(tmp_path / "halves", **options)
    second.restore()
    assert bool((w_k_of(second) != 0).any())
    second.train()
    assert_same_bits(all_tensors(tmp_path / "halves"), all_tensors(tmp_path / "whole"))


# ---------------------------------------------------------------------- what a run leaves, and who uses it


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints with another k each, far from where it began."""
    folder = tmp_path_factory.mktemp("learnt") / "run"
    options = words("--target k --schedule flow --weighting constant --loss-space u --k-lr 2 --ema-decay 0.9 0.5")
    options += words("--steps 4 --checkpoint-every 2 --log-every 1 --sample-every 2 --sample-num 4 --sample-steps 2")
    assert train.main([*TINY, *options, "--tensorboard", "--out", str(folder)]) == 0
    return folder


def published_k(checkpoint: Path) -> float:
    (value,) = read_tensors(checkpoint, "published/process.").values()
    return float(torch.sigmoid(value))


def test_every_checkpoint_is_sampled_with_its_own(run, tmp_path):
    older = Path(shutil.copytree(run, tmp_path / "older"))
    shutil.rmtree(newest_checkpoint(older))
    (older / "model.safetensors").unlink()
    learnt = {}
    for folder in (run, older):
        opened = open_run(folder, "fp32", CPU)
        learnt[folder] = float(opened.process.target_values()["k"])
        assert learnt[folder] == pytest.approx(published_k(newest_checkpoint(folder)))
        (average,) = read_tensors(newest_checkpoint(folder), "ema/0.5/process.").values()
        assert torch.sigmoid(average).item() == pytest.approx(learnt[folder])
    assert abs(learnt[run] - learnt[older]) > 0.01
    assert 0.5 not in learnt.values()


def test_samples_depend_on_it(run, tmp_path):
    """Another k with the same network gives other samples: the checkpoint's is used, not that of the options."""
    assert sample.main(words(f"--run {run} --num 4 --steps 3 --out {tmp_path / 'a.npz'}")) == 0
    opened = open_run(run, "fp32", CPU)
    fresh = opened.config.process.build()
    pictures = {}
    for name, process in ("learnt", opened.process), ("fresh", fresh):
        options: dict[str, Any] = {"num": 4, "steps": 3, "seed": 0, "classes": list(range(10))}
        pictures[name] = opened.dataset.to_images(sample_of(opened.model, process, **options))
    with np.load(tmp_path / "a.npz") as archive:
        drawn = archive["arr_0"].astype(int)
    assert np.abs(drawn - pictures["learnt"]).max() <= 1
    assert np.abs(drawn - pictures["fresh"]).max() > 5


def sample_of(model, process, **options) -> Tensor:
    from erdfast.sampling import sample as draw

    return draw(model, process, **options)


def test_pictures_during_training_use_the_average(tmp_path, monkeypatch):
    seen = []
    draw = preview.sample
    monkeypatch.setattr(
        preview, "sample", lambda model, process, **o: (seen.append(process), draw(model, process, **o))[1]
    )
    trainer = tiny_trainer(tmp_path, steps=2, sample_every=2, sample_num=2, sample_steps=2, k_lr=0.5, **LEARNT)
    trainer.train()
    trainer.finish()
    trained, average = float(trainer.process.target_values()["k"]), float(torch.sigmoid(trainer.ema.averages[-1][-1]))
    assert float(seen[0].target_values()["k"]) == pytest.approx(average)
    assert average != pytest.approx(trained, abs=1e-3)


def test_every_log_line_has_it(run):
    values = [record["k"] for record in read_metrics(run / "metrics.jsonl") if "k" in record]
    assert len(values) == 4
    assert len({*values, 0.5}) == 5


@pytest.mark.parametrize(("target", "names"), [("k", {"k"}), ("k2", {"k0", "k1"}), ("k(t)", {"k_min", "k_max"})])
def test_tensorboard_has_it_too(tmp_path, target, names):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = LEARNT | {"target": target, "steps": 2, "log_every": 1, "tensorboard": True}
    tiny_trainer(tmp_path, **options).train()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {name for name in events.Tags()["scalars"] if name.startswith("k")} == names
    (record,) = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["step"] == 2]
    for name in names:
        assert events.Scalars(name)[-1].value == pytest.approx(record[name])


@pytest.mark.parametrize(
    ("values", "words_"),
    [
        ({"k": 0.52249}, "loss 0.5000, k 0.522, 9.5 images/s"),
        ({"k0": 0.556, "k1": 0.509}, "loss 0.5000, k 0.556 and 0.509, 9.5 images/s"),
        ({"k": [0.3, 0.56], "k_min": 0.3, "k_max": 0.56}, "loss 0.5000, k 0.300 to 0.560, 9.5 images/s"),
        ({}, "loss 0.5000, 9.5 images/s"),
    ],
)
def test_the_progress_bar_shows_it(values, words_):
    assert Speedometer(CPU, 1.0).describe({"loss": 0.5, "images_per_s": 9.5} | values) == words_


def colors(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def records(**learnt: Any) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0 / step} | learnt for step in range(1, 41)]


LEARNT_RECORDS: list[tuple[dict[str, Any], list[str], str]] = [
    ({"k": 0.7}, ["k, last 0.7"], "training step"),
    (
        {"k0": 0.4, "k1": 0.8},
        ["k₀, factor of the data, last 0.4", "k₁, factor of the noise, last 0.8"],
        "training step",
    ),
    ({"k": [0.2, 0.5, 0.9], "k_min": 0.2, "k_max": 0.9}, ["k(t), 0.2 to 0.9"], "time t      clean  ←  →  noise"),
]


@pytest.mark.parametrize(("learnt", "labels", "x_label"), LEARNT_RECORDS)
def test_the_panel_shows_what_was_learnt(learnt, labels, x_label):
    from matplotlib.figure import Figure

    for k_init in (None, 0.45):
        axes = Figure().add_subplot()
        draw_target(axes, records(**learnt), k_init)
        legend = axes.get_legend()
        assert legend is not None
        shown = [text.get_text() for text in legend.get_texts()]
        assert shown == labels + ([] if k_init is None else ["start, 0.45"])
        assert axes.get_xlabel() == x_label
        assert axes.get_ylabel() == ("k₀, k₁" if "k0" in learnt else "k")
        curves = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axes.get_lines()}
        value = learnt.get("k", learnt.get("k0"))
        assert curves[labels[0]].tolist() == (value if isinstance(value, list) else [value] * 40)
        low, high = axes.get_ylim()
        assert all(low < number < high for label in shown for number in curves[label])


def test_the_summary_has_that_panel(tmp_path):
    """In the lower right quarter, which is empty where nothing was learnt."""
    from erdfast.training.figures import save_summary

    found = []
    for name, learnt in ("without.png", {}), ("with.png", {"k": 0.7}):
        save_summary(tmp_path / name, records(**learnt), None, title="a run")
        image = colors(tmp_path / name)
        quarter = image[image.shape[0] // 2 :, image.shape[1] // 2 :]
        found.append(int((np.abs(quarter - np.array([0, 0x72, 0xB2])).max(-1) < 8).sum()))
    assert found[0] == 0
    assert found[1] > 200


def test_the_floor_of_a_learnt_target_is_that_of_its_end_alone(tmp_path, monkeypatch):
    """Errors in the targets before it may be lower."""
    from erdfast.training import figures

    labels = []
    monkeypatch.setattr(figures, "_draw_loss_by_logsnr", lambda *arguments: labels.append(arguments[-1]))
    for learnt in {}, {"k": 0.7}:
        figures.save_summary(tmp_path / "a.png", records(**learnt), None, title="a run", floor=[(0.0, 0.1)])
    assert labels == ["Bayes floor (no model can be lower)", "Bayes floor of the target at the end"]


@pytest.mark.parametrize("learnt", [{"k": None}, {"k": [None, 0.5]}, {"k": []}])
def test_a_panel_needs_numbers(tmp_path, learnt):
    assert not has_learnt_target(records(**learnt))
    assert has_learnt_target([*records(**learnt), {"step": 41, "loss": 1.0, "k": 0.5}])


def test_a_panel_beside_evaluations(tmp_path):
    """Then there are three rows, and both are drawn."""
    from erdfast.training.figures import save_summary

    evaluation = {"kind": "evaluation", "step": 40, "eval_fd": 1.0, "settings": {"num": 10}}
    heights = {}
    for name, found in (("two", records(k=0.6)), ("three", [*records(k=0.6), evaluation])):
        save_summary(tmp_path / f"{name}.png", found, None, title="a run", k_init=0.5)
        heights[name] = colors(tmp_path / f"{name}.png").shape[0]
    assert heights["three"] == pytest.approx(1.5 * heights["two"], rel=0.05)


def test_runs_of_before_have_the_networks_rate(run, tmp_path):
    """config.json without k_lr, as older versions wrote it."""
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    values = json.loads((copy / "config.json").read_text())
    assert values["optimizer"].pop("k_lr") == 2.0
    (copy / "config.json").write_text(json.dumps(values))
    assert train.main(["--resume", str(copy), "--steps", "5"]) == 0
    assert published_k(newest_checkpoint(copy)) != published_k(newest_checkpoint(run))
