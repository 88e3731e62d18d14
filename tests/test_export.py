"""python -m erdfast.export: a run's averaged weights for diffusers; and how their folder is written."""

import errno
import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from erdfast import ema, export
from erdfast.models import diffusers_dit, from_diffusers, save_diffusers
from erdfast.models.diffusers_dit import CONFIG, CONVENTION, INDEX, PROCESS, WEIGHTS
from erdfast.published_run import open_run
from tests.models.test_diffusers_dit import BASE, CASES, content, edit, network
from tests.runs import ROOT, assert_same_bits, refused, tiny_trainer, words

CPU = torch.device("cpu")


def trained(run, **options):
    process = {"weighting": "constant"} if "schedule" in options else {}
    given: dict[str, Any] = {"model": "dit_tiny", "steps": 6} | process | options
    tiny_trainer(run, **given).train()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "dit", ema_std=(0.05, 0.1), ema_snapshot_every=1)


def exported(run, out, *more):
    assert export.main(["--run", str(run), "--out", str(out), *map(str, more)]) == 0
    return json.loads((out / PROCESS).read_text())


def diffusers_model(folder) -> Any:
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(str(folder), local_files_only=True)


def test_the_averaged_weights_are_written(run, tmp_path, capsys):
    notes = exported(run, tmp_path / "dit")
    assert sorted(path.name for path in (tmp_path / "dit").iterdir()) == sorted([CONFIG, WEIGHTS, PROCESS])
    wanted = open_run(run, "fp32", CPU)
    assert_same_bits(from_diffusers(tmp_path / "dit").state_dict(), wanted.model.state_dict())
    assert (notes["model"], notes["step"], notes["null_class"]) == ("dit_tiny", 6, 10)
    assert type(wanted.process)(**notes["process"]).describe() == wanted.process.describe()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"written: {tmp_path / 'dit'} (dit_tiny, step 6) for diffusers' DiTTransformer2DModel")
    assert "predicts eps on the schedule cosine, timestep 0 to 999" in line
    assert "use_published_frequencies(transformer)" in line


def test_diffusers_computes_what_the_run_does(run, tmp_path):
    notes = exported(run, tmp_path / "dit")
    transformer = diffusers_model(tmp_path / "dit")
    exec(notes["after_loading"])
    opened = open_run(run, "fp32", CPU)
    x, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 3, 9, notes["null_class"]])
    rows = torch.tensor([0, 17, 500, 999])
    timestep = torch.tensor(notes["levels"]["timestep"])[rows]
    with torch.no_grad():
        wanted = opened.model(x, opened.process.coefficients(rows).time, y)
        found = transformer(x, timestep=timestep, class_labels=y).sample
    assert wanted.abs().max() > 1e-3
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max() + 1e-7


def test_the_table_of_levels(run, tmp_path):
    levels = exported(run, tmp_path / "dit")["levels"]
    found = open_run(run, "fp32", CPU).process.coefficients(torch.arange(1000), torch.float64)
    columns = {
        "timestep": found.time,
        "alpha": found.alpha,
        "sigma": found.sigma,
        "c_x": found.c_x,
        "c_eps": found.c_eps,
    }
    assert levels == {name: column.tolist() for name, column in columns.items()}


@pytest.mark.parametrize("schedule", ["cosine", "ddpm_linear", "logsnr_linear"])
@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_the_scheduler_is_the_process(tmp_path, schedule, target):
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    notes = exported(trained(tmp_path / "run", steps=1, schedule=schedule, target=target), tmp_path / "dit")
    scheduler: Any = DDIMScheduler.from_config(notes["scheduler"])
    alpha = torch.tensor(notes["levels"]["alpha"], dtype=torch.float64)
    assert (scheduler.alphas_cumprod.double().sqrt() - alpha).abs().max() < 1e-4
    assert notes["timestep_factor"] == 1
    scheduler.set_timesteps(10)
    process = open_run(tmp_path / "run", "fp32", CPU).process
    x_t, prediction = torch.randn(2, 2, 4, 8, 8)
    for t in (100, 500, 800):
        x0 = scheduler.step(prediction, t, x_t).pred_original_sample
        assert (x0 - process.to_x0(prediction, x_t, torch.tensor([t]))).abs().max() < 1e-3 * x0.abs().max()


def test_fewer_steps_have_a_factor(tmp_path):
    notes = exported(trained(tmp_path / "run", steps=1, schedule="cosine", num_timesteps=250), tmp_path / "dit")
    assert (notes["timestep_factor"], notes["scheduler"]["num_train_timesteps"]) == (4, 250)
    assert notes["levels"]["timestep"] == [4.0 * t for t in range(250)]


def test_flow_matching(tmp_path, capsys):
    notes = exported(trained(tmp_path / "run", steps=1, schedule="flow", target="u"), tmp_path / "dit")
    assert "predicts u on the schedule flow, timestep 0 to 1," in capsys.readouterr().out
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(notes["scheduler"])
    scheduler.set_timesteps(4)
    process = open_run(tmp_path / "run", "fp32", CPU).process
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    for n, timestep in enumerate(scheduler.timesteps):
        t, after = timestep[None] * notes["timestep_factor"], scheduler.sigmas[n + 1]
        c = process.coefficients(t)
        assert c.time == pytest.approx(float(scheduler.sigmas[n]))
        prediction = c.c_x * x0 + c.c_eps * eps
        stepped = scheduler.step(prediction, timestep, c.alpha * x0 + c.sigma * eps).prev_sample
        assert (stepped - ((1 - after) * x0 + after * eps)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "flow", "target": "v"},
        {"schedule": "vp", "target": "eps"},
        {"schedule": "cosine", "target": "k"},
        {"schedule": "cosine", "target": "score"},
        {"schedule": "cosine", "noise_scale": 2.0},
    ],
)
def test_other_processes_have_a_table_and_no_scheduler(tmp_path, options):
    notes = exported(trained(tmp_path / "run", steps=1, **options), tmp_path / "dit")
    assert notes["scheduler"] is None
    assert {len(column) for column in notes["levels"].values()} == {
        1001 if options["schedule"] in ("flow", "vp") else 1000
    }
    if options.get("target") == "k":
        c_x, c_eps = notes["levels"]["c_x"], notes["levels"]["c_eps"]
        assert {round(c_x[0] - c_eps[0], 12), *(c_x[0] - value for value in c_x)} == {1.0, 0.0}


def test_without_label_drop_there_is_no_null_class(tmp_path):
    assert exported(trained(tmp_path / "run", steps=1, label_drop=0.0), tmp_path / "dit")["null_class"] is None


def test_weights_of_another_average(run, tmp_path):
    weights = tmp_path / "average.safetensors"
    assert ema.main([*words("--std 0.08 --step 5 --run"), str(run), "--out", str(weights)]) == 0
    notes = exported(run, tmp_path / "dit", "--weights", weights)
    wanted = open_run(run, "fp32", CPU, weights)
    assert (notes["step"], wanted.step) == (5, 5)
    assert_same_bits(from_diffusers(tmp_path / "dit").state_dict(), wanted.model.state_dict())


def test_what_it_wrote_it_replaces(run, tmp_path):
    exported(run, tmp_path / "dit")
    before = content(tmp_path / "dit")
    exported(run, tmp_path / "dit")
    assert content(tmp_path / "dit") == before


def test_other_backbones_are_refused_by_name(tmp_path, capsys):
    trained(tmp_path / "run", model="uvit_tiny", steps=1)
    line = refused(capsys, export.main, ["--run", tmp_path / "run", "--out", tmp_path / "out"])
    assert "trained uvit_tiny, a uvit; diffusers has a counterpart of dit alone" in line
    assert not (tmp_path / "out").exists()


def test_bad_input(run, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for arguments, message in (
        (["--run", run, "--out", tmp_path / "mine"], "mine holds notes.txt, which was not written here"),
        (["--run", run, "--out", run], "which was not written here; choose another folder"),
        (["--run", run, "--out", tmp_path / "file"], "file is a file; choose a folder"),
        (["--run", run, "--out", tmp_path / "file" / "dit"], "file"),
        (["--run", tmp_path / "gone", "--out", tmp_path / "out"], "gone"),
        (["--run", run, "--out", tmp_path / "out", "--weights", tmp_path / "gone.safetensors"], "cannot be read"),
        (["--run", run], "--out"),
        (["--run", run, "--out", tmp_path / "out", "--precision", "bf16"], "--precision"),
    ):
        assert message in refused(capsys, export.main, arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


# ---------------------------------------------------------------------- the folder


@pytest.fixture
def folder(tmp_path):
    save_diffusers(network(), tmp_path / "dit")
    return tmp_path / "dit"


def test_what_was_written_here_is_replaced(folder):
    save_diffusers(network(seed=1), folder, {"step": 3})
    assert json.loads((folder / PROCESS).read_text()) == {"step": 3}
    assert_same_bits(from_diffusers(folder).state_dict(), network(seed=1).state_dict())
    save_diffusers(network(CASES["no labels"]), folder)
    assert sorted(content(folder)) == [CONFIG, WEIGHTS]  # the notes were about the other
    assert from_diffusers(folder).config == CASES["no labels"]
    assert [path.name for path in folder.parent.iterdir()] == ["dit"]


def test_an_empty_folder_and_missing_parents(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b/c"):
        save_diffusers(network(), tmp_path / name)
        assert from_diffusers(tmp_path / name).config == BASE
        assert {(tmp_path / name / file).stat().st_mode & 0o777 for file in (CONFIG, WEIGHTS)} == {0o644}


def test_a_folder_behind_a_link_stays_there(tmp_path, folder):
    (tmp_path / "link").symlink_to(folder)
    save_diffusers(network(seed=1), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_bits(from_diffusers(folder).state_dict(), network(seed=1).state_dict())


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda f: (f / "notes.txt").write_text("mine"), "holds notes.txt"),
        (lambda f: (f / INDEX).write_text("{}"), f"holds {INDEX}"),
        (lambda f: edit(f / CONFIG, **{CONVENTION: "absent"}), "holds config.json"),
        (lambda f: edit(f / CONFIG, _diffusers_version="0.42.1"), "holds config.json"),
        (lambda f: (f / CONFIG).write_text("{"), "holds config.json"),
        (lambda f: (f / CONFIG).unlink(), f"holds {WEIGHTS}"),
    ],
)
def test_other_folders_are_not_replaced(folder, prepare, message):
    prepare(folder)
    before = content(folder)
    with pytest.raises(ValueError, match=rf"{message}, which was not written here; choose another folder"):
        save_diffusers(network(seed=1), folder)
    assert content(folder) == before


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "dit").write_text("mine")
    with pytest.raises(ValueError, match="dit is a file; choose a folder"):
        save_diffusers(network(), tmp_path / "dit")


@pytest.mark.parametrize("failing", ["replace_tensors", "write_text"])
@pytest.mark.parametrize("there_is_one", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing, there_is_one):
    folder = tmp_path / "dit"
    if there_is_one:
        save_diffusers(network(), folder, {"step": 1})
    before = content(folder) if there_is_one else None

    def full(path, *_args):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(diffusers_dit, failing, full)
        with pytest.raises(OSError, match="No space left"):
            save_diffusers(network(seed=1), folder, {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["dit"][:there_is_one]
    if there_is_one:
        assert content(folder) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from erdfast.models import DiTConfig, diffusers_dit
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(diffusers_dit, sys.argv[2], die)
config = DiTConfig(input_shape=(4, 8, 8), width=64, depth=1, num_heads=2)
diffusers_dit.save_diffusers(config.build(), Path(sys.argv[1]))
"""


@pytest.mark.parametrize("there_is_one", [True, False])
def test_a_killed_process_leaves_what_was_there(tmp_path, there_is_one):
    folder = tmp_path / "dit"
    if there_is_one:
        save_diffusers(network(), folder)
    before = content(folder) if there_is_one else None
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), "_move"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert (content(folder) if folder.exists() else None) == before
    assert (tmp_path / ".dit.partial" / WEIGHTS).exists()
    save_diffusers(network(seed=1), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["dit"]
    assert_same_bits(from_diffusers(folder).state_dict(), network(seed=1).state_dict())
