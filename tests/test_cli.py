"""From the command line to options, and from an error to one line and an exit code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from erdfast import cli, presets, recipes, train
from erdfast.cli import parse, parse_train
from erdfast.config import EvaluateConfig, SampleConfig, TrainConfig
from erdfast.training.run_directory import create_run_directory, load_run_config
from tests.runs import refused, tiny_config, words

COUNTS = {
    "uvit_s2": 44_772_516,
    "uvit_m2": 130_891_940,
    "uvit_l2": 286_763_172,
    "uvit_h2": 500_832_164,
    "dit_s2": 32_957_200,
    "dit_b2": 130_500_112,
    "dit_l2": 458_086_416,
    "dit_xl2": 675_111_184,
}


def test_without_options_the_digits():
    options = parse_train([])
    assert (options.model, options.data, options.recipe) == ("uvit_digits", "digits", "digits")
    assert options.steps == recipes.recipe("digits")["steps"]
    assert options.process.stratified


def test_a_model_brings_its_recipe():
    options = parse_train(["--model", "uvit_h2"])
    assert (options.recipe, options.optimizer.betas, options.data) == ("erd_uvit_h2", (0.99, 0.99), None)
    assert parse_train(["--model=uvit_h2"]) == options


def test_a_recipe_brings_its_model_and_the_command_line_wins():
    arguments = words("--recipe erd_dit_b2 --model dit_s2 --lr 3e-4 --weighting min_snr --gamma 5 --betas 0.9 0.95")
    options = parse_train(arguments)
    assert (options.recipe, options.model) == ("erd_dit_b2", "dit_s2")
    assert (options.optimizer.lr, options.optimizer.betas) == (3e-4, (0.9, 0.95))
    assert (options.process.weighting, options.process.gamma) == ("min_snr", 5.0)
    assert options.batch_size == 256  # the recipe's
    assert parse_train(["--recipe", "erd_dit_b2"]).model == "dit_b2"


def test_order_and_spelling_do_not_matter():
    first = parse_train(words("--steps 7 --model dit_tiny --batch-size 4"))
    assert parse_train(words("--batch_size 4 --model dit_tiny --steps 7")) == first


def test_arguments_come_from_the_command_line_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train", "--model", "uvit_tiny", "--steps", "3"])
    assert parse_train().steps == 3
    monkeypatch.setattr(sys, "argv", words("sample --run a --classes 3 1"))
    assert parse(SampleConfig, None) == SampleConfig(run=Path("a"), classes=(3, 1))


def test_switches():
    options = parse_train(words("--stratified --as-sampling --normalize False --model uvit_tiny"))
    assert (options.process.stratified, options.process.as_sampling, options.process.normalize) == (True, True, False)
    assert not parse_train(["--no-stratified"]).process.stratified


def test_resuming_starts_from_the_runs_own_options(tmp_path):
    saved = tiny_config(out=tmp_path / "run", steps=9, lr=0.25)
    create_run_directory(saved)
    options = parse_train(["--resume", str(tmp_path / "run"), "--steps", "12"])
    assert (options.steps, options.optimizer.lr, options.resume) == (12, 0.25, tmp_path / "run")
    assert load_run_config(tmp_path / "run") == saved


def test_a_run_with_the_next_free_number(tmp_path):
    names = []
    for _ in range(2):
        names.append(create_run_directory(tiny_config(data="some/where/my data.npz"), tmp_path).name)
    assert names == ["000-uvit_tiny-my-data.npz", "001-uvit_tiny-my-data.npz"]
    (tmp_path / "041-other").mkdir()
    (tmp_path / "notes").mkdir()
    assert create_run_directory(tiny_config(), tmp_path).name == "042-uvit_tiny-mixture-4x8x8"


def test_what_is_kept_for_resuming_does_not_resume_or_dry_run(tmp_path):
    run = create_run_directory(tiny_config(out=tmp_path / "run", dry_run=True, resume=Path("x")))
    saved = json.loads((run / "config.json").read_text())
    assert (saved["resume"], saved["dry_run"]) == (None, False)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--batch-size", "abc"], ["--batch-size", "'abc'"]),
        (["--lr", "fast"], ["--lr", "'fast'"]),
        (["--no-such-flag", "3"], ["--no-such-flag"]),
        (["--batchsize", "3"], ["--batchsize", "Perhaps you meant: --batch-size"]),
        (["--precision", "int8"], ["'int8'", "--precision", "'fp32'", "'bf16'", "'fp16'", "'fp8'"]),
        (["--lr-schedule", "linear"], ["'linear'", "'constant'", "'cosine'"]),
        (["--betas", "0.9"], ["--betas", "2 values"]),
        (["--steps"], ["--steps"]),
        (["--model"], ["--model"]),
        (["stray"], ["stray"]),
    ],
)
def test_what_cannot_be_parsed_is_one_line(capsys, monkeypatch, arguments, parts):
    for framed in (False, True):  # tyro draws lines where the terminal has them
        monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", framed, raising=False)
        line = refused(capsys, train.main, arguments)
        assert all(part in line for part in parts), line
        assert not re.search(r"[│─╭╯]|--- |\x1b|For full helptext|Unrecognized options *;", line), line


def test_a_missing_run_is_one_line(capsys):
    from erdfast import evaluate, sample

    for main in (sample.main, evaluate.main):
        assert "--run" in refused(capsys, main, [])


@pytest.mark.parametrize("config_type", [SampleConfig, EvaluateConfig, TrainConfig])
def test_help_is_tyros_own(capsys, config_type):
    with pytest.raises(SystemExit) as stop:
        parse(config_type, ["--help"], TrainConfig() if config_type is TrainConfig else None)
    shown = capsys.readouterr()
    assert stop.value.code in (0, None)
    assert "usage: python -m erdfast." in shown.out
    assert "options" in shown.out
    assert "-h, --help" in shown.out
    assert shown.err == ""


def test_help_names_the_module(capsys):
    from erdfast import ema, evaluate, sample

    for main in (ema.main, evaluate.main, sample.main, train.main):
        with pytest.raises(SystemExit):
            main(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: python -m {main.__module__} ")


# ---------------------------------------------------------------------- exit codes


def test_success_is_zero(capsys):
    for code in (0, None):
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda code=code: code, "program")
        assert stop.value.code in (0, None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\n  lines"),
        ImportError("two\n  lines"),
        OSError("two\n  lines"),
        ArithmeticError("two\n  lines"),
        FileNotFoundError("two lines"),
    ],
)
def test_errors_that_users_can_mend_are_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, "program")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "program: error: two lines\n"


def test_interrupted_before_training(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.run(main, "program")
    assert stop.value.code == 130
    assert capsys.readouterr().err == "program: interrupted\n"


@pytest.mark.parametrize("error", [AssertionError, TypeError, KeyError, IndexError, RuntimeError])
def test_our_own_mistakes_show_where_they_are(error):
    def main():
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        cli.run(main, "program")


LEAVE = """
import atexit, sys, threading, time
from erdfast import cli
atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
sys.stdout.write("no end of line, ")
{more}
cli._leave({code})
"""


def leave(code: int, more: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LEAVE.format(code=code, more=more)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(command, env=environment, text=True, **options)


@pytest.mark.parametrize("code", [0, 3])
def test_one_of_several_does_what_is_to_be_done_at_exit(code):
    done = leave(code, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "no end of line, thread\nat exit\n", "")


def test_one_of_several_says_that_its_output_was_lost():
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as stdout:
        assert leave(0, stdout=stdout).returncode == 120
        assert leave(3, stdout=stdout).returncode == 3
    assert leave(0, "sys.stdout = None", stdout=subprocess.PIPE).returncode == 0


def test_a_world_size_alone_is_no_reason_to_leave(monkeypatch):
    for size in ("2", "", "abc"):
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: 3, "program")
        assert stop.value.code == 3


# ---------------------------------------------------------------------- dry run


@pytest.mark.parametrize("model", presets.MODELS)
def test_dry_run(capsys, tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--model", model, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    if model in COUNTS:
        assert f"{model}: {COUNTS[model]:,} parameters, " in shown
    else:
        assert f"{model}: " in shown
    for part in ("GFLOP per image", "memory for ", "GiB (parameters ", "activations ", "checkpoint: "):
        assert part in shown
    assert list(tmp_path.iterdir()) == []


def test_dry_run_counts_one_micro_batch(capsys):
    def activations(*arguments):
        train.main(["--model", "uvit_s2", "--dry-run", "--precision", "fp32", *arguments])
        return capsys.readouterr().out

    assert "memory for 32 images at a time in fp32" in activations("--batch-size", "128", "--accumulation", "4")
    assert "memory for 128 images at a time" in activations("--batch-size", "128")


def test_a_guessed_data_set_is_said(capsys):
    train.main(["--model", "uvit_h2", "--dry-run"])
    assert "no --data: training on the embedded Gaussian mixture, 4x32x32" in capsys.readouterr().out
    train.main(["--dry-run"])
    assert "no --data" not in capsys.readouterr().out


def test_dry_run_counts_every_average(capsys):
    def ema_gib(*decays):
        train.main(["--model", "dit_s2", "--dry-run", "--ema-decay", *decays])
        return float(re.findall(r"ema ([\d.]+)", capsys.readouterr().out)[-1])

    assert ema_gib("0.9", "0.99", "0.999") == pytest.approx(3 * ema_gib("0.9"), abs=0.02)
