"""The entry points together: train, sample, evaluate, as a user would call them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erdfast import evaluate, sample, train
from erdfast.evaluation.digits import DigitsReport
from erdfast.presets import build_model
from erdfast.published_run import open_run
from erdfast.training.checkpoint_files import newest_checkpoint, read_tensors
from tests.runs import ROOT, TINY, single_thread, start, words

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("end_to_end") / "run"
    options = words("--steps 4 --log-every 2 --checkpoint-every 2 --sample-every 2 --sample-num 20 --sample-steps 2")
    assert train.main([*TINY, *options, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A run with a learnable target on a continuous schedule."""
    folder = tmp_path_factory.mktemp("learnt") / "run"
    options = words("--schedule flow --target k --weighting constant --steps 4 --lr 0.1 --ema-decay 0.5")
    assert train.main([*TINY, *options, "--out", str(folder)]) == 0
    return folder


def draw(run: Path, out: Path, *arguments: object) -> dict[str, np.ndarray]:
    options = ["--run", run, "--out", out, "--precision", "fp32", *arguments]
    assert sample.main([str(option) for option in options]) == 0
    with np.load(out, allow_pickle=False) as archive:
        return dict(archive)


def test_what_a_run_leaves(run):
    assert sorted(path.name for path in run.iterdir()) == words(
        "checkpoints config.json environment.json metrics.jsonl model.safetensors samples summary.png"
    )
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["00000002", "00000004"]
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["00000002.png", "00000004.png"]
    network = build_model("uvit_tiny")
    network.load_state_dict(load_file(run / "model.safetensors"))
    for name in ("summary.png", "samples/00000004.png"):
        with Image.open(run / name) as picture:
            assert np.asarray(picture).std() > 1


def test_training_says_what_it_does(tmp_path, capsys):
    assert train.main([*TINY, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("recipe tiny_uvit: cosine schedule, eps target, erd weighting; batch 8, lr 0.001")
    assert lines[1].startswith("recipe set: --lr 0.001")
    assert lines[2].startswith("changed: ")
    assert lines[3].startswith("uvit_tiny: 161,892 parameters, 0.0178 GFLOP per image")
    assert lines[4].startswith("data: 50,000 samples 4x8x8, 10 classes")
    assert lines[-1] == f"summary: {tmp_path}/run/summary.png"


@pytest.mark.slow
def test_as_modules(tmp_path):
    """python -m erdfast.train in a folder of its own: a numbered run directory appears there."""
    with start([*TINY, "--steps", "2", "--log-every", "1"], cwd=tmp_path) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["000-uvit_tiny-mixture-4x8x8"]
    assert "summary: runs/000-uvit_tiny-mixture-4x8x8/summary.png" in out
    assert "warn" not in err.lower()


# ---------------------------------------------------------------------- samples


def test_npz_as_adm_writes_it(run, tmp_path):
    found = draw(run, tmp_path / "deep" / "samples.npz", "--num", 25, "--steps", 3)
    assert found.keys() == {"arr_0", "arr_1"}
    assert (found["arr_0"].dtype, found["arr_0"].shape) == (np.uint8, (25, 8, 8, 3))
    assert found["arr_1"].tolist() == [number % 10 for number in range(25)]  # classes in turn
    assert found["arr_0"].std() > 1


def test_classes_in_turn(run, tmp_path):
    found = draw(run, tmp_path / "s.npz", "--num", 8, "--steps", 2, "--classes", 7, 2, 5)
    assert found["arr_1"].tolist() == [7, 2, 5, 7, 2, 5, 7, 2]


def test_samples_do_not_depend_on_the_batch(run, tmp_path):
    common = ["--num", 12, "--steps", 4, "--cfg-scale", 2, "--seed", 3]
    whole = draw(run, tmp_path / "a.npz", *common)
    parts = draw(run, tmp_path / "b.npz", *common, "--batch-size", 5)
    again = draw(run, tmp_path / "c.npz", *common)
    fewer = draw(run, tmp_path / "d.npz", *common, "--num", 7)
    assert (whole["arr_0"] == again["arr_0"]).all()
    # Rounding may move a value over the edge between two grey levels.
    assert np.abs(whole["arr_0"].astype(int) - parts["arr_0"]).max() <= 1
    assert np.abs(whole["arr_0"][:7].astype(int) - fewer["arr_0"]).max() <= 1
    other = draw(run, tmp_path / "e.npz", *common, "--seed", 4)
    assert np.abs(whole["arr_0"].astype(int) - other["arr_0"]).mean() > 5


@pytest.mark.parametrize(
    "arguments",
    ["--cfg-scale 3", "--classes 4", "--steps 5", "--sampler edm_euler", "--level-set iddpm", "--seed 9"],
)
def test_every_option_counts(run, tmp_path, arguments):
    common = ["--num", 6, "--steps", 3]
    plain = draw(run, tmp_path / "a.npz", *common)
    changed = draw(run, tmp_path / "b.npz", *common, *arguments.split())
    assert (plain["arr_0"] != changed["arr_0"]).any()


def test_guidance_outside_its_interval_does_nothing(run, tmp_path):
    common = ["--num", 6, "--steps", 3]
    plain = draw(run, tmp_path / "a.npz", *common)
    outside = draw(run, tmp_path / "b.npz", *common, "--cfg-scale", 3, "--interval", 0, 0)
    assert np.abs(plain["arr_0"].astype(int) - outside["arr_0"]).max() <= 1


def test_a_picture_by_default(run, tmp_path, capsys):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    assert sample.main(["--run", str(copy), "--num", "20", "--steps", "2"]) == 0
    assert re.fullmatch(
        rf"20 samples: {re.escape(str(copy))}/samples\.png \([\d,.]+ images/s\)\n", capsys.readouterr().out
    )
    with Image.open(copy / "samples.png") as picture:
        width, height = picture.size
        assert width > 3 * height  # ten classes side by side in two rows
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_a_continuous_run_with_a_learnt_target(learnt, tmp_path):
    found = draw(learnt, tmp_path / "a.npz", "--num", 4, "--steps", 3, "--cfg-scale", 2)
    assert found["arr_0"].shape == (4, 8, 8, 3)
    euler = draw(learnt, tmp_path / "b.npz", "--num", 4, "--steps", 3, "--cfg-scale", 2, "--sampler", "euler")
    assert (found["arr_0"] != euler["arr_0"]).any()


def test_data_without_labels(tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_file({"latents": torch.randn(20, 4, 8, 8, generator=generator)}, tmp_path / "latents.safetensors")
    options = ["--data", tmp_path / "latents.safetensors", "--steps", 2, "--out", tmp_path / "run"]
    assert train.main([*TINY, *map(str, options)]) == 0
    assert draw(tmp_path / "run", tmp_path / "s.npz", "--num", 3, "--steps", 2).keys() == {"arr_0"}


# ---------------------------------------------------------------------- a run as others open it


def test_open_run_has_the_averages(run):
    opened = open_run(run, "fp32", CPU)
    assert (opened.step, opened.config.model, opened.precision.name) == (4, "uvit_tiny", "fp32")
    assert not opened.model.training
    published = load_file(run / "model.safetensors")
    assert all(torch.equal(value, published[name]) for name, value in opened.model.state_dict().items())
    assert opened.dataset.shape == opened.model.input_shape == (4, 8, 8)
    assert opened.process.describe()["weighting"] == "erd"


def test_open_run_has_the_averaged_target(learnt):
    checkpoint = newest_checkpoint(learnt)
    (average,) = [value for name, value in read_tensors(checkpoint, "ema/").items() if "/process." in name]
    (trained,) = [value for name, value in read_tensors(checkpoint, "weights/process.").items() if "w_k" in name]
    (opened,) = [value for name, value in open_run(learnt, "fp32", CPU).process.state_dict().items() if "w_k" in name]
    assert opened.item() == average.item() != trained.item()


def test_a_run_that_is_still_going_can_be_opened(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints" / "00000004")
    (copy / "checkpoints" / ".00000004.partial").mkdir()
    (copy / "model.safetensors").unlink()
    assert open_run(copy, "fp32", CPU).step == 2


# ---------------------------------------------------------------------- evaluation


def test_evaluation_is_written_down(tmp_path, monkeypatch, capsys):
    """The measure itself is tested elsewhere; here a short one takes its place."""
    seen = []

    def short_report(draw):
        labels = torch.tensor([3, 1, 4])
        seen.append(draw(labels, 2.0))
        assert draw(labels, 1.0).shape == (3, 1, 8, 8)
        assert torch.equal(draw(labels, 2.0), seen[-1])
        fields = {"label_accuracy": 0.5, "frechet_distance": 1.25, "num_guided": 3, "num_unguided": 3, "cfg_scale": 2.0}
        return DigitsReport(**fields, frechet_distance_real_halves=0.5)

    monkeypatch.setattr(evaluate, "digits_report", short_report)
    run = tmp_path / "run"
    options = words("--model uvit_digits --steps 2 --batch-size 8 --precision fp32 --sample-every 0")
    assert train.main([*options, "--out", str(run)]) == 0  # evaluates at its end
    assert "label accuracy 50.0% (3 samples, guidance 2); Frechet distance 1.250" in capsys.readouterr().out
    assert evaluate.main(["--run", str(run), "--steps", "3", "--seed", "7"]) == 0
    written = json.loads((run / "evaluation.json").read_text())
    assert (written["step"], written["sampler_steps"], written["seed"]) == (2, 3, 7)
    assert written["frechet_distance"] == 1.25
    assert len(seen) == 2


def test_tests_leave_nothing_in_the_repository():
    assert not (ROOT / "runs" / "000-uvit_tiny-mixture-4x8x8").exists()
