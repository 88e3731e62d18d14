"""A run that is stopped, killed or out of disk goes on as if nothing had happened, to the last bit."""

import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from erdfast import cli, train
from erdfast.training import checkpoint_files
from erdfast.training.checkpoint_files import complete_checkpoints, newest_checkpoint
from erdfast.training.metrics import read_metrics
from erdfast.training.trainer import complete_step
from tests.runs import TINY, all_tensors, assert_same_bits, start, tiny_trainer, wait_until, words

STEPS = 120
OPTIONS = [
    *TINY,
    *words("--target k --schedule flow --weighting constant --lr-schedule cosine --warmup-steps 10"),
    *words(f"--steps {STEPS} --log-every 1 --seed 5"),
]


def run_here(*arguments: object) -> int:
    return train.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run that the others must equal."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run_here(*OPTIONS, "--out", run) == 0
    return run


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def without_speed(run: Path) -> list[dict]:
    return [
        {key: value for key, value in record.items() if key != "images_per_s"}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def test_killed_before_the_first_checkpoint(tmp_path, capsys, undisturbed):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(undisturbed / "config.json", run)
    assert run_here("--resume", run) == 0
    assert "starting from step 0" in capsys.readouterr().out
    assert_same_bits(all_tensors(run), all_tensors(undisturbed))


def test_stopped_before_the_first_step(tmp_path):
    first = tiny_trainer(tmp_path, steps=3)
    first.save(wait=True)
    second = tiny_trainer(tmp_path, steps=3)
    second.restore()
    assert second.step == 0
    assert second.train() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resuming_changes_nothing(tmp_path, capsys, undisturbed, number):
    run = tmp_path / "run"
    with start([*OPTIONS, "--out", run]) as process:
        wait_until(lambda: lines(run) >= 5, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    step = complete_step(run)
    assert step is not None
    assert 5 <= step < STEPS
    name = signal.Signals(number).name
    assert f"{name} at step {step}: state saved; continue with python -m erdfast.train --resume {run}\n" in out
    assert "Traceback" not in err
    assert not (run / "summary.png").exists()

    assert run_here("--resume", run) == 0
    assert f"resuming {run} at step {step} of {STEPS}" in capsys.readouterr().out
    assert_same_bits(all_tensors(run), all_tensors(undisturbed))
    assert_same_bits(load_file(run / "model.safetensors"), load_file(undisturbed / "model.safetensors"))
    assert without_speed(run) == without_speed(undisturbed)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path, undisturbed):
    """kill -9 at random moments, most of them while a checkpoint is written, as one is after every step."""
    run, chance = tmp_path / "run", random.Random(0)
    arguments = [*OPTIONS, "--out", run, "--checkpoint-every", "1", "--keep-last", "3"]
    kills = 0
    for _ in range(4):
        done = complete_step(run) or 0
        with start(arguments) as process:
            wait_until(lambda done=done: (complete_step(run) or 0) > done + 2, process)
            time.sleep(chance.uniform(0.0, 0.1))
            process.kill()
            process.communicate(timeout=120)
        kills += process.returncode == -signal.SIGKILL
        assert len(complete_checkpoints(run / "checkpoints")) in (3, 4)
        arguments = ["--resume", run]
    assert kills >= 2
    assert complete_step(run) is not None
    assert run_here("--resume", run) == 0
    assert_same_bits(all_tensors(run), all_tensors(undisturbed))
    assert without_speed(run) == without_speed(undisturbed)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [f"{step:08d}" for step in (STEPS - 2, STEPS - 1, STEPS)]  # nothing half written is left


def test_every_state_survives_in_one_process(tmp_path):
    """All options with state of their own, without a process for each."""
    for name, options in {
        "bf16": {"precision": "bf16"},
        "accumulated": {"accumulation": 2, "model": "dit_tiny", "stratified": True},
        "clipped": {"grad_clip": 0.1, "lr_schedule": "cosine", "warmup_steps": 3},
        "k(t)": {"target": "k(t)", "schedule": "flow", "weighting": "constant"},
        "k2": {"target": "k2", "schedule": "flow", "weighting": "constant", "label_drop": 0.0},
    }.items():
        whole, halves = tmp_path / f"{name}-whole", tmp_path / f"{name}-halves"
        tiny_trainer(whole, steps=6, **options).train()
        first = tiny_trainer(halves, steps=6, checkpoint_every=3, **options)
        stop_after_save(first)
        with pytest.raises(Stopped):
            first.train()
        assert complete_step(halves) == 3
        second = tiny_trainer(halves, steps=6, **options)
        second.restore()
        second.train()
        assert_same_bits(all_tensors(halves), all_tensors(whole))


class Stopped(Exception):
    """What ends a trainer in the middle."""


def stop_after_save(trainer):
    save = trainer.save

    def save_and_stop():
        save(wait=True)
        raise Stopped

    trainer.save = save_and_stop


def test_metrics_have_no_step_twice(tmp_path):
    first = tiny_trainer(tmp_path, steps=10, checkpoint_every=4, log_every=1)
    stop_after_save(first)
    with pytest.raises(Stopped):
        first.train()
    with (tmp_path / "metrics.jsonl").open("a") as stream:  # logged after the checkpoint, before a crash
        stream.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')
    second = tiny_trainer(tmp_path, steps=10, log_every=1)
    second.restore()
    second.train()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 11))


# ---------------------------------------------------------------------- options of a resumed run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert run_here(*TINY, "--steps", 4, "--out", run) == 0
    return run


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--lr", "1"], "was started with lr 0.001; resuming cannot change it to 1.0. Start a new run for that"),
        (["--batch-size", "16"], "batch_size 8"),
        (["--seed", "1"], "seed 0"),
        (["--target", "x0"], "target eps"),
        (["--model", "dit_tiny"], "model uvit_tiny"),
        (["--data", "digits"], "data mixture:4x8x8"),
        (["--precision", "bf16"], "precision fp32"),
        (["--recipe", "digits"], "recipe tiny_uvit"),
        (["--betas", "0.5", "0.5"], "betas (0.9, 0.999)"),
    ],
)
def test_what_weights_depend_on_cannot_change(copy, changed, message):
    with pytest.raises(ValueError, match="was started with") as caught:
        run_here("--resume", copy, *changed)
    assert message in str(caught.value)
    assert complete_step(copy) == 4


def test_what_was_said_before_may_be_said_again(copy):
    options = cli.parse_train(["--resume", str(copy), "--lr", "1e-3", "--model", "uvit_tiny", "--log-every", "7"])
    assert (options.log_every, options.steps, options.resume) == (7, 4, copy)


def test_more_steps_are_remembered(copy, tmp_path):
    assert run_here("--resume", copy, "--steps", 7) == 0
    assert complete_step(copy) == 7
    saved = json.loads((copy / "config.json").read_text())
    assert (saved["steps"], saved["resume"]) == (7, None)  # a later --resume needs no other option
    long = tmp_path / "long"
    assert run_here(*TINY, "--steps", 7, "--out", long) == 0
    assert_same_bits(all_tensors(copy), all_tensors(long))


def test_fewer_steps_than_done_are_refused(copy):
    with pytest.raises(ValueError, match="is at step 4 already; --steps 3 cannot undo that"):
        run_here("--resume", copy, "--steps", 3)
    assert json.loads((copy / "config.json").read_text())["steps"] == 4


def test_resuming_a_finished_run_changes_nothing(copy):
    before = all_tensors(copy)
    records = read_metrics(copy / "metrics.jsonl")
    assert run_here("--resume", copy) == 0
    assert_same_bits(all_tensors(copy), before)
    assert read_metrics(copy / "metrics.jsonl") == records


def test_a_checkpoint_of_another_network_is_refused(copy, tmp_path):
    other = tiny_trainer(tmp_path / "other", model="dit_tiny", steps=4)
    other.train()
    shutil.rmtree(newest_checkpoint(copy))
    shutil.copytree(newest_checkpoint(tmp_path / "other"), copy / "checkpoints" / "00000004")
    with pytest.raises(ValueError, match=r"tensors differ, such as ema/.*absent"):
        run_here("--resume", copy)


def test_damaged_and_incomplete_checkpoints_are_left_out(copy, capsys):
    assert run_here("--resume", copy, "--steps", 6, "--checkpoint-every", 1) == 0
    newest = newest_checkpoint(copy)
    (state,) = (newest / "state").iterdir()
    content = bytearray(state.read_bytes())
    content[-3] ^= 255
    state.write_bytes(content)
    capsys.readouterr()
    assert run_here("--resume", copy, "--steps", 6) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {newest} is left out: checkpoint {newest} is damaged: state/{state.name} does not have" in out
    assert f"resuming {copy} at step 5 of 6" in out
    assert content != state.read_bytes()  # written anew
    state.write_bytes(content[:-1])
    assert run_here("--resume", copy, "--steps", 7) == 0
    out = capsys.readouterr().out
    assert f"checkpoint {newest} is left out: {state.relative_to(newest)} has {len(content) - 1:,} bytes" in out
    assert f"resuming {copy} at step 5 of 7" in out


# ---------------------------------------------------------------------- a full disk


def fail_after(monkeypatch, good: int, bad: int):
    """os.fsync works `good` times and then fails `bad` times."""
    calls = 0

    def fsync(descriptor, real=os.fsync):
        nonlocal calls
        calls += 1
        if good < calls <= good + bad:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(checkpoint_files.os, "fsync", fsync)


def test_a_checkpoint_that_does_not_fit_does_not_end_the_run(tmp_path, monkeypatch):
    said = []
    trainer = tiny_trainer(tmp_path / "full", steps=6, checkpoint_every=2)
    trainer.say = said.append
    with monkeypatch.context() as patch:
        fail_after(patch, good=7, bad=1)  # the first checkpoint takes seven
        trainer.train()
    (line,) = [line for line in said if "cannot be written" in line]
    assert line.startswith("the checkpoint of step 4 in ")
    assert line.endswith("No space left on device; training goes on")
    assert [path.name for path in complete_checkpoints(tmp_path / "full" / "checkpoints")] == ["00000002", "00000006"]
    tiny_trainer(tmp_path / "plain", steps=6).train()
    assert_same_bits(all_tensors(tmp_path / "full"), all_tensors(tmp_path / "plain"))


def test_log_lines_and_pictures_that_do_not_fit_do_not_end_the_run(tmp_path, monkeypatch):
    said = []
    trainer = tiny_trainer(tmp_path, steps=6, log_every=1, sample_every=2, sample_num=2, sample_steps=2)
    trainer.say = said.append

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("erdfast.training.metrics.MetricsWriter.write", full)
    monkeypatch.setattr(trainer.preview, "save", full)
    trainer.train()
    assert complete_step(tmp_path) == 6
    assert [line.partition(":")[0] for line in said if "could not" in line] == [
        "metrics.jsonl could not be written",
        "pictures could not be written",
    ]


def test_the_last_checkpoint_must_fit(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, steps=4, checkpoint_every=2)
    fail_after(monkeypatch, good=7, bad=1000)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert complete_step(tmp_path) == 2


def test_a_real_limit_on_files(copy):
    """The operating system refuses to write more than 300 kB to a file; state.safetensors needs more."""
    before = all_tensors(copy)
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))\n"
    )
    with start(["--resume", copy, "--steps", 8, "--checkpoint-every", 2], code=limit) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    warnings = [line for line in out.splitlines() if line.endswith("training goes on")]
    assert [line.partition(" in ")[0] for line in warnings] == ["the checkpoint of step 6"]
    errors = [line for line in err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("erdfast.train: error: the checkpoint of step 8 in ")
    assert "Traceback" not in err
    assert [path.name for path in (copy / "checkpoints").iterdir()] == ["00000004"]
    assert_same_bits(all_tensors(copy), before)
