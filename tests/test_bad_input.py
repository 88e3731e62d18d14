"""Whatever users get wrong ends with code 2 and one line that names it; nothing is left behind."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from erdfast import cli, evaluate, sample, train
from erdfast.training.checkpoint_files import newest_checkpoint
from erdfast.training.run_directory import lock_run
from tests.runs import TINY, refused, single_thread, words

SMALL = ["--model", "uvit_tiny"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Runs that were started by mistake would appear here."""
    monkeypatch.chdir(tmp_path)


def make_run(folder: Path, *arguments: object) -> Path:
    run = folder / "run"
    train.main([*TINY, "--steps", "2", "--out", str(run), *map(str, arguments)])
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def unguided(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("unguided"), "--label-drop", 0, "--schedule", "flow", "--target", "u")


@pytest.fixture
def run(finished, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ---------------------------------------------------------------------- values and combinations

VALUES = [
    # names
    ("--model uvit_h3", ["unknown model 'uvit_h3'", "did you mean 'uvit_h2'", "dit_xl2", "uvit_digits"]),
    ("--recipe erd_dit_s3", ["unknown recipe 'erd_dit_s3'", "did you mean", "tiny_dit"]),
    ("--data imagenet", ["unknown data 'imagenet'", "'digits'", "mixture:CxHxW", ".npz"]),
    ("--data mixture:4x8", ["'4x8'", "mixture:4x8", "mixture:4x32x32"]),
    ("--schedule linear", ["'linear'", "cosine", "ddpm_linear", "flow"]),
    ("--target noise", ["'noise'", "eps", "k(t)"]),
    ("--weighting minsnr", ["'minsnr'", "min_snr", "erd_repo"]),
    ("--time-sampler lognormal", ["'lognormal'", "logit_normal", "uniform"]),
    ("--precision int8", ["'int8'", "bf16", "auto"]),
    ("--attention fast", ["'fast'", "flash", "triton", "xformers"]),
    ("--attention cudnn", ["'cudnn'", "CUDA"]),
    ("--compile fast", ["'fast'", "none", "max-autotune"]),
    ("--loss-space y", ["'y'", "target", "x0"]),
    ("--allocation snr", ["'snr'", "time", "logsnr"]),
    # combinations
    ("--as-sampling --target k --schedule flow", ["as_sampling", "'k'"]),
    ("--loss-space x0 --weighting min_snr", ["loss_space='x0'", "'min_snr'"]),
    ("--kappa-clip 0.05", ["kappa_clip=0.05", "loss_space"]),
    ("--schedule flow --num-timesteps 500", ["num_timesteps=500", "continuous"]),
    ("--allocation logsnr --weighting constant", ["allocation='logsnr'", "'erd'"]),
    ("--logit-mean 1", ["logit_mean=1.0", "logit_normal"]),
    ("--gamma 5", ["gamma=5.0", "'erd'"]),
    ("--k-init 0.3", ["k_init=0.3", "'eps'"]),
    ("--k-bins 64 --target k --schedule flow", ["k_bins=64", "k(t)"]),
    ("--k-lr 1e-3", ["k_lr 0.001 has no effect", "'eps' learns nothing", "k(t)"]),
    ("--data mixture:3x8x8", ["mixture:3x8x8", "4x8x8"]),
    ("--data digits", ["digits", "1x8x8", "4x8x8"]),
    # numbers
    ("--batch-size 0", ["batch_size is 0", "at least 1"]),
    ("--batch-size 10 --accumulation 4", ["batch_size 10", "accumulation 4"]),
    ("--accumulation 0", ["accumulation is 0"]),
    ("--steps 0", ["steps is 0", "at least 1"]),
    ("--steps 5000000000", ["steps is 5000000000", "2^32"]),
    ("--lr -1e-3", ["lr is -0.001", "above 0"]),
    ("--lr nan", ["lr is nan", "finite"]),
    ("--lr inf", ["lr is inf", "finite"]),
    ("--k-lr -1 --target k", ["k_lr is -1.0", "at least 0"]),
    ("--k-lr nan --target k", ["k_lr is nan", "finite"]),
    ("--k-init 0 --target k", ["k_init=0.0", "strictly between 0 and 1"]),
    ("--k-init 1 --target k2", ["k_init=1.0", "strictly between 0 and 1"]),
    ("--k-init nan --target k(t)", ["k_init=nan", "strictly between 0 and 1"]),
    ("--k-bins 0 --target k(t)", ["k_bins=0", "at least 1"]),
    ("--k-bins 2.5 --target k(t)", ["2.5", "--k-bins"]),
    ("--kappa-clip -0.1 --target k --schedule flow --loss-space u", ["kappa_clip=-0.1", "at least 0"]),
    ("--kappa-clip inf --target k --schedule flow --loss-space u", ["kappa_clip=inf"]),
    ("--betas 0.9 1.0", ["betas is (0.9, 1.0)", "[0, 1)"]),
    ("--adam-eps 0", ["adam_eps is 0.0"]),
    ("--weight-decay -1", ["weight_decay is -1.0"]),
    ("--warmup-steps -1", ["warmup_steps is -1"]),
    ("--grad-clip -1", ["grad_clip is -1.0", "0 does not clip"]),
    ("--ema-decay 1", ["ema_decay is 1.0", "[0, 1)"]),
    ("--label-drop 1.5", ["label_drop is 1.5", "[0, 1]"]),
    ("--seed -1", ["seed is -1"]),
    ("--log-every 0", ["log_every is 0"]),
    ("--checkpoint-every 0", ["checkpoint_every is 0"]),
    ("--keep-last 0", ["keep_last is 0"]),
    ("--sample-every -1", ["sample_every is -1"]),
    ("--sample-steps 1", ["sample_steps is 1"]),
    ("--noise-scale 0", ["noise_scale=0.0"]),
    ("--num-timesteps 1", ["num_timesteps=1"]),
    ("--normalize perhaps", ["'perhaps'", "--normalize"]),
    # without effect
    ("--ema-snapshot-every 5", ["ema_snapshot_every 5 has no effect", "--ema-std"]),
    ("--ddp-bf16 --parallel none", ["ddp_bf16 has no effect with parallel none", "ddp or auto"]),
    ("--ddp-bf16 --parallel fsdp", ["ddp_bf16 has no effect with parallel fsdp"]),
    ("--ddp-bf16 --parallel hsdp", ["ddp_bf16 has no effect with parallel hsdp"]),
    ("--device a100", ["device a100 is a prediction's", "--gpus"]),
    ("--device a100 --dry-run", ["device a100 is a prediction's", "--gpus"]),
]


@pytest.mark.parametrize(("arguments", "parts"), VALUES, ids=[text for text, _ in VALUES])
def test_values(capsys, tmp_path, arguments, parts):
    model = [] if "--model" in arguments or "--recipe" in arguments else SMALL
    line = refused(capsys, train.main, [*model, *words(arguments)])
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []


def test_wandb_that_is_not_installed(capsys, tmp_path, monkeypatch):
    """Said before a run directory is made, let alone a step."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refused(capsys, train.main, [*TINY, "--wandb", "project", "--steps", "1"])
    assert "logging to Weights & Biases needs wandb: run `pip install wandb`" in line
    assert list(tmp_path.iterdir()) == []


def test_fp16_on_a_cpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(capsys, train.main, [*SMALL, "--precision", "fp16"])
    assert "fp16" in line
    assert "choose bf16, fp32 or auto" in line


# ---------------------------------------------------------------------- data


def latents(count: int = 8) -> np.ndarray:
    return np.random.RandomState(0).randn(count, 4, 8, 8).astype(np.float32)


def write_data(name: str) -> None:
    match name:
        case "empty_folder":
            Path(name).mkdir()
        case "flat.npz":
            np.savez(name, latents=np.zeros((8, 256), np.float32))
        case "other_shape.npz":
            np.savez(name, latents=np.zeros((8, 4, 16, 16), np.float32))
        case "pixels.npz":
            np.savez(name, arr_0=np.zeros((8, 8, 8, 4), np.uint8))
        case "objects.npz":
            np.savez(name, latents=np.array([{"a": 1}], dtype=object))
        case "other_names.npz":
            np.savez(name, weights=latents())
        case "text.npz" | "text.npy" | "text.safetensors" | "text.h5" | "file.bin":
            Path(name).write_text("this is no array")
        case "cut.safetensors":
            save_file({"latents": torch.from_numpy(latents())}, name)
            whole = Path(name).read_bytes()
            Path(name).write_bytes(whole[: len(whole) // 2])
        case "negative.npz":
            np.savez(name, latents=latents(), labels=np.array([0, 1, 2, -3, 4, 5, 6, 7]))
        case "fractions.npz":
            np.savez(name, latents=latents(), labels=np.linspace(0, 1, 8))
        case "few_labels.npz":
            np.savez(name, latents=latents(), labels=np.arange(5))
        case "none.npz":
            np.savez(name, latents=latents(0))
        case "nan.npz":
            np.savez(name, latents=np.where(latents() > 1, np.nan, latents()).astype(np.float32))
        case _:
            assert "missing" in name


DATA = {
    "missing.npz": ["no such file"],
    "missing/folder": ["no such file or folder"],
    "empty_folder": ["neither erdfast.json, *.safetensors, latents.npy"],
    "flat.npz": ["latents must be float (N, C, H, W)", "(N, 256)"],
    "other_shape.npz": ["4x16x16", "4x8x8"],
    "pixels.npz": ["arr_0 must be uint8 (N, H, W, 1 or 3)", "8, 8, 4"],
    "objects.npz": ["'latents' holds Python objects"],
    "other_names.npz": ["expected an array 'arr_0'", "'weights'"],
    "text.npz": ["cannot be read"],
    "text.npy": ["cannot be read"],
    "text.safetensors": ["cannot be read"],
    "text.h5": ["text.h5"],
    "file.bin": ["unknown file type '.bin'", ".npz", ".safetensors"],
    "cut.safetensors": ["the file ends early", "'latents'"],
    "negative.npz": ["labels must be in 0..7, found -3"],
    "fractions.npz": ["labels must be 8 integers"],
    "few_labels.npz": ["labels must be 8 integers"],
    "none.npz": ["'latents' is empty"],
    "nan.npz": ["not finite"],
}


@pytest.mark.parametrize("name", DATA)
def test_data(capsys, tmp_path, name):
    write_data(name)
    before = sorted(tmp_path.iterdir())
    line = refused(capsys, train.main, [*SMALL, "--data", name])
    assert all(part in line for part in [name, *DATA[name]]), line
    assert sorted(tmp_path.iterdir()) == before


def test_data_that_are_gone_when_a_run_continues(capsys, tmp_path):
    np.savez("data.npz", latents=latents(), labels=np.arange(8))
    made = make_run(tmp_path, "--data", "data.npz")
    Path("data.npz").unlink()
    for main, flag in ((train.main, "--resume"), (sample.main, "--run"), (evaluate.main, "--run")):
        assert "data.npz: no such file" in refused(capsys, main, [flag, made])


# ---------------------------------------------------------------------- run directories


def test_out_that_holds_a_run(capsys, run):
    line = refused(capsys, train.main, [*TINY, "--out", run])
    assert f"{run} already holds a run (config.json): continue it with --resume {run}" in line


@pytest.mark.parametrize("left", ["checkpoints", "metrics.jsonl", "model.safetensors"])
def test_out_that_holds_the_rest_of_a_run(capsys, run, left):
    for path in run.iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert f"{run} already holds a run ({left})" in refused(capsys, train.main, [*TINY, "--out", run])
    assert (run / left).exists()


def test_a_run_that_is_being_trained(capsys, run):
    with lock_run(run):
        line = refused(capsys, train.main, ["--resume", run, "--steps", "99"])
    assert f"{run} is being trained by another process" in line


@pytest.mark.parametrize("text", ["", "digitz"])
def test_data_that_is_nothing(capsys, text):
    assert f"unknown data '{text}'" in refused(capsys, train.main, [*TINY, "--data", text])


@pytest.mark.parametrize("error", [MemoryError("no"), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory(capsys, error):
    def main() -> int:
        raise error

    with pytest.raises(SystemExit, match="2"):
        cli.run(main, "erdfast.train")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("erdfast.train: error: out of memory")
    assert "--batch-size" in line


def test_other_runtime_errors_are_ours_and_keep_their_traceback():
    def main() -> int:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.run(main, "erdfast.train")


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_out_that_cannot_be_made(capsys, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    line = refused(capsys, train.main, [*TINY, "--out", name])
    assert f"the run directory {name} cannot be made" in line


def test_a_file_where_runs_would_go(capsys, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    assert "the run directory runs cannot be made" in refused(capsys, train.main, TINY)


SHARD = "state/shard-00001-model-00001-of-00001.safetensors"


@pytest.mark.parametrize(("main", "flag"), [(train.main, "--resume"), (sample.main, "--run"), (evaluate.main, "--run")])
class TestNoRun:
    """Every entry point that reads a run says the same."""

    def test_missing(self, capsys, tmp_path, main, flag):
        line = refused(capsys, main, [flag, "nowhere"])
        assert "nowhere is not a run directory: nowhere/config.json: No such file or directory" in line
        assert list(tmp_path.iterdir()) == []

    def test_another_folder(self, capsys, tmp_path, main, flag):
        (tmp_path / "photos").mkdir()
        assert "photos is not a run directory" in refused(capsys, main, [flag, "photos"])

    def test_a_file(self, capsys, tmp_path, main, flag):
        (tmp_path / "file").write_text("")
        assert "file is not a run directory" in refused(capsys, main, [flag, "file"])

    def test_without_checkpoints(self, capsys, run, main, flag):
        shutil.rmtree(run / "checkpoints")
        line = refused(capsys, main, [flag, run])
        assert f"{run} holds no complete checkpoint (looked in {run}/checkpoints)" in line

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", "{}", '{"process": {}, "optimizer": {}}', "\x00", '{"a": ' * 100_000]
    )
    def test_damaged_options(self, capsys, run, main, flag, content):
        (run / "config.json").write_text(content)
        line = refused(capsys, main, [flag, run])
        assert f"{run}/config.json does not hold the options of a training run" in line

    @pytest.mark.parametrize(("group", "value"), [("process", []), ("optimizer", None), ("preview", 3)])
    def test_options_that_are_no_group(self, capsys, run, main, flag, group, value):
        options = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(options | {group: value}))
        line = refused(capsys, main, [flag, run])
        assert f"{run}/config.json does not hold the options" in line
        assert f"({group} is {value}; it must be an object of options)" in line

    @pytest.mark.parametrize("file", ["state.json", SHARD, "model.safetensors"])
    def test_a_damaged_checkpoint(self, capsys, run, main, flag, file):
        path = newest_checkpoint(run)
        (path / file).write_bytes(b"\xff" * 64)
        line = refused(capsys, main, [flag, run])
        assert f"{run} holds no complete checkpoint" in line
        assert f"checkpoint {path} is left out: " in line
        assert file in line

    def test_a_truncated_checkpoint(self, capsys, run, main, flag):
        path = newest_checkpoint(run) / SHARD
        content = path.read_bytes()
        path.write_bytes(content[:-100])
        line = refused(capsys, main, [flag, run])
        assert f"{SHARD} has {len(content) - 100:,} bytes instead of {len(content):,}" in line

    def test_a_checkpoint_of_another_model(self, capsys, run, main, flag):
        options = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(options | {"model": "dit_tiny"}))
        line = refused(capsys, main, [flag, run])
        assert str(newest_checkpoint(run)) in line
        assert ("tensors differ, such as" in line) or ("does not fit" in line)
        assert len(line) < 1000

    def test_a_checkpoint_without_its_averages(self, capsys, run, main, flag):
        path = newest_checkpoint(run)
        (path / "model.safetensors").unlink()
        assert f"checkpoint {path} is left out: model.safetensors is missing" in refused(capsys, main, [flag, run])


def test_resuming_with_another_learning_rate(capsys, run):
    line = refused(capsys, train.main, ["--resume", run, "--lr", "1"])
    assert f"{run} was started with lr 0.001; resuming cannot change it to 1.0" in line


def test_damaged_metrics_do_not_block_good_weights(capsys, run):
    log = run / "metrics.jsonl"
    log.write_text('nonsense\n{"step": 1}\n{"loss": 1.5}\n')
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0
    assert f"{log}: 1 line that is no record was moved to {log}.damaged\n" in capsys.readouterr().out
    assert (run / "metrics.jsonl.damaged").read_text() == "nonsense\n"
    assert log.read_text().startswith('{"step": 1}\n{"loss": 1.5}\n{"step": 4')


def test_pictures_may_change_when_a_run_continues(run):
    """They do not change the weights: tests/training/test_trainer.py."""
    arguments = words("--steps 4 --sample-every 3 --sample-num 2 --sample-steps 2 --sample-cfg-scale 1")
    assert train.main(["--resume", str(run), *arguments]) == 0
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["00000003.png", "00000004.png"]


def test_options_of_no_effect_that_an_older_version_saved(capsys, run):
    """They do not keep a run from being read; going on with them is refused like beginning with them."""
    options = json.loads((run / "config.json").read_text()) | {"device": "a100"}
    options["ema"]["ema_snapshot_every"] = 7
    (run / "config.json").write_text(json.dumps(options))
    assert sample.main(["--run", str(run), *words("--num 2 --steps 2")]) == 0
    line = refused(capsys, train.main, ["--resume", run, "--steps", "3"])
    assert "ema_snapshot_every 7 has no effect without power-function averages" in line
    assert train.main(["--resume", str(run), *words("--steps 3 --ema-snapshot-every 0")]) == 0


# ---------------------------------------------------------------------- sampling and evaluation

SAMPLING = [
    ("--num 0", ["num is 0", "at least 1"]),
    ("--num many", ["--num", "'many'"]),
    ("--steps 0", ["steps is 0"]),
    ("--batch-size 0", ["batch_size is 0"]),
    ("--seed -1", ["seed is -1"]),
    ("--cfg-scale -1", ["cfg_scale is -1.0"]),
    ("--cfg-scale nan", ["cfg_scale is nan"]),
    ("--interval 0.8 0.2", ["interval is (0.8, 0.2)", "in order"]),
    ("--interval 0 2", ["interval is (0.0, 2.0)"]),
    ("--classes 3 12", ["[12]", "0..9"]),
    ("--classes -1", ["-1"]),
    ("--sampler plms", ["'plms'", "edm_heun", "dpmpp_2m", "discrete"]),
    ("--level-set linear", ["'linear'", "'edm'", "'iddpm'", "'vp'"]),
    ("--precision fp8", ["'fp8'", "bf16"]),
    ("--out grid.jpg", ["grid.jpg", ".png or .npz"]),
    ("--out folder.png", ["folder.png is a folder"]),
    ("--out file/below.png", ["--out file/below.png cannot be written: File exists"]),
    ("--out file/deep/below.npz", ["--out file/deep/below.npz cannot be written: Not a directory"]),
]


@pytest.mark.parametrize(("arguments", "parts"), SAMPLING, ids=[text for text, _ in SAMPLING])
def test_sampling(capsys, tmp_path, finished, arguments, parts):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("in the way")
    line = refused(capsys, sample.main, ["--run", finished, "--steps", "2", "--num", "2", *words(arguments)])
    assert all(part in line for part in parts), line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
    assert not (finished / "samples.png").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--cfg-scale 2", ["null class"]),
        ("--sampler plms", ["'plms'", "'heun'", "continuous"]),
        ("--level-set iddpm", ["'iddpm'", "'uniform'", "labels"]),
    ],
)
def test_sampling_a_continuous_run_without_null_class(capsys, unguided, arguments, parts):
    line = refused(capsys, sample.main, ["--run", unguided, *words(arguments)])
    assert all(part in line for part in parts), line


def test_classes_of_a_run_without_labels(capsys, tmp_path):
    np.savez("data.npz", latents=latents())
    made = make_run(tmp_path, "--data", "data.npz")
    line = refused(capsys, sample.main, ["--run", made, "--classes", "1"])
    assert f"--classes (1,): {made} was trained without labels" in line
    assert "class" in refused(capsys, sample.main, ["--run", made, "--cfg-scale", "2"])


@pytest.mark.parametrize(("arguments", "part"), [("--steps 0", "steps is 0"), ("--batch-size 0", "batch_size is 0")])
def test_evaluation(capsys, finished, arguments, part):
    assert part in refused(capsys, evaluate.main, ["--run", finished, *words(arguments)])


def test_evaluating_another_data_set(capsys, finished):
    line = refused(capsys, evaluate.main, ["--run", finished])
    assert f"{finished} was trained on mixture:4x8x8; only runs on digits can be evaluated" in line


# ---------------------------------------------------------------------- divergence


def test_a_run_that_diverges(capsys, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.main([*TINY, "--lr", "1e30", "--steps", "50", "--out", str(run)]), "erdfast.train")
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]  # the progress bar stands above
    for part in ("erdfast.train: error: the loss is not finite at step ", "log-SNR ", "no checkpoint yet", "--lr"):
        assert part in last
    assert not (run / "checkpoints").exists()
