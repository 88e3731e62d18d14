"""Evaluations during training: what is measured, when, and that training does not notice."""

from __future__ import annotations

import errno
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from erdfast import cli
from erdfast.config import EvalConfig
from erdfast.data.vae import Decoder
from erdfast.evaluation.digits import digits_report
from erdfast.evaluation.frechet import FeatureStatistics
from erdfast.evaluation.measurement import Measurement
from erdfast.evaluation.mixture import KnownMixture
from erdfast.sampling import sample, save_npz
from erdfast.training import evaluation, metrics, speed
from erdfast.training.evaluation_records import best, comparable, evaluated_steps
from erdfast.training.figures import GREEN
from erdfast.training.metrics import MetricsWriter, read_metrics
from erdfast.training.parallel import World
from erdfast.training.trainer import Trainer
from tests.runs import all_tensors, assert_same_bits, tiny_trainer
from tests.training.test_figures import count_color
from tests.training.test_resume import Stopped, stop_after_save
from tests.vaes import save_tiny_vae

CPU = torch.device("cpu")
EVAL: dict[str, Any] = {"eval_every": 2, "eval_num": 12, "eval_steps": 2}
FLOW: dict[str, Any] = {"schedule": "flow", "target": "u", "weighting": "constant"}


def changed(**options: Any) -> dict[str, Any]:
    """EVAL, but for some."""
    return EVAL | options


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if record.get("kind") == "evaluation"]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def listening(trainer: Trainer) -> list[str]:
    """What is said from now on."""
    said: list[str] = []
    trainer.say = trainer.evaluator.say = said.append
    return said


def watched_steps(trainer: Trainer) -> list[int]:
    """The steps that are evaluated from now on, tried ones too."""
    steps, evaluate = [], trainer.evaluator.evaluate

    def note(step: int) -> dict[str, Any] | None:
        steps.append(step)
        return evaluate(step)

    trainer.evaluator.evaluate = note
    return steps


# ---------------------------------------------------------------------- when, and that nothing else changes


@pytest.mark.parametrize("options", [{}, {"target": "k", "schedule": "flow", "weighting": "constant"}])
def test_training_does_not_notice(tmp_path, options):
    quick = {"steps": 5, "log_every": 1, "checkpoint_every": 3, **options}
    tiny_trainer(tmp_path / "without", **quick).train()
    trainer = tiny_trainer(tmp_path / "with", **quick, **EVAL)
    said = listening(trainer)
    assert trainer.train() is None
    assert_same_bits(all_tensors(tmp_path / "with"), all_tensors(tmp_path / "without"))
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    found = evaluations(tmp_path / "with")
    assert [record["step"] for record in found] == [2, 4, 5]  # and one at the end
    assert list(found[0]) == ["kind", "step", "eval_fd", "eval_accuracy", "settings"]
    assert found[0]["settings"] == {"num": 12, "steps": 2, "cfg_scale": 1.0, "reference": None}
    assert len({record["eval_fd"] for record in found}) == 3  # the averages move
    lines = [line for line in said if line.startswith("evaluation")]
    assert [line.partition(":")[0] for line in lines] == [f"evaluation at step {step}" for step in (2, 4, 5)]
    assert re.fullmatch(r"evaluation at step 2: FD [\d.e+]+, accuracy [\d.]+% \(12 images, \d+ s\)", lines[0])


def test_there_are_none_by_default(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=2, log_every=1)
    trainer.train()
    trainer.finish()
    assert all("kind" not in record for record in read_metrics(tmp_path / "metrics.jsonl"))


def test_its_time_is_not_that_of_training(tmp_path, monkeypatch):
    """By a clock of which a step takes a second and an evaluation a million."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(speed, "time", clock)
    trainer = tiny_trainer(tmp_path, steps=5, log_every=1, **EVAL)
    step, begin = trainer._train_step, trainer.evaluator.measure.begin  # pyright: ignore[reportOptionalMemberAccess]

    def timed(work, seconds):
        def wrapper(*arguments):
            clock.now += seconds
            return work(*arguments)

        return wrapper

    trainer._train_step = timed(step, 1.0)
    object.__setattr__(trainer.evaluator.measure, "begin", timed(begin, 1e6))
    trainer.train()
    assert clock.now > 3e6
    assert trainer.speed.elapsed == pytest.approx(5.0)
    rates = [record["images_per_s"] for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record]
    assert rates == pytest.approx([8.0] * 5)


def test_the_bar_counts_images(tmp_path, monkeypatch):
    bars, made = [], evaluation.progress_bar

    def progress_bar(world, **options):
        bars.append((options, made(world, **options)))
        return bars[-1][1]

    monkeypatch.setattr(evaluation, "progress_bar", progress_bar)
    tiny_trainer(tmp_path, steps=1, **changed(eval_num=70)).train()
    ((options, bar),) = bars
    assert (options["desc"], options["total"], options["unit"]) == ("evaluation at step 1", 70, "image")
    assert (options["leave"], bar.n) == (False, 70)


def test_logs_of_others_receive_the_numbers(tmp_path, monkeypatch):
    seen: list[tuple[str, float, int]] = []
    board = types.SimpleNamespace(add_scalar=lambda *point: seen.append(point), close=lambda: None)
    monkeypatch.setattr(metrics, "_open_tensorboard", lambda *_: board)
    tiny_trainer(tmp_path, steps=2, log_every=1, tensorboard=True, **EVAL).train()
    (record,) = evaluations(tmp_path)
    assert [point for point in seen if point[0].startswith("eval")] == [
        ("eval_fd", record["eval_fd"], 2),
        ("eval_accuracy", record["eval_accuracy"], 2),
    ]


# ---------------------------------------------------------------------- what


def drawn(trainer: Trainer, num: int, **options: Any) -> torch.Tensor:
    """The images of an evaluation, at once."""
    model, process = trainer.averaged.model, trainer.averaged.process
    return sample(model, process, num=num, seed=evaluation.EVAL_SEED, steps=2, **options)


def test_digits_are_measured_as_by_evaluate(tmp_path):
    options = changed(eval_num=90, eval_cfg_scale=1.5)
    trainer = tiny_trainer(tmp_path, model="uvit_digits", data="digits", steps=1, **FLOW, **options)
    trainer.train()
    images = drawn(trainer, 90, cfg_scale=1.5)
    report = digits_report(lambda labels, _: images[: len(labels)], num_unguided=90, num_guided=90)
    (record,) = evaluations(tmp_path)
    assert record["eval_fd"] == pytest.approx(report.frechet_distance, rel=1e-4)
    assert record["eval_accuracy"] == pytest.approx(report.label_accuracy, abs=1e-9)
    assert record["settings"]["cfg_scale"] == 1.5


def test_a_mixture_is_measured_by_what_is_known_of_it(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=1, **FLOW, **changed(eval_num=90))
    trainer.train()
    known, images = KnownMixture(trainer.dataset), drawn(trainer, 90)  # pyright: ignore[reportArgumentType]
    (record,) = evaluations(tmp_path)
    distance = FeatureStatistics.of(known.features(images)).gaussian().distance(known.gaussian)
    assert record["eval_fd"] == pytest.approx(distance, rel=1e-4)
    assert record["eval_accuracy"] == known.num_recognised(images, torch.arange(90) % 10) / 90


def of_pictures(files: Path, **options: Any) -> dict[str, Any]:
    return EVAL | {"eval_reference": files / "real.npz", "eval_inception": files / "weights.pth"} | options


def measured(files: Path, pictures: np.ndarray, reference: str = "real.npz") -> dict[str, float]:
    """By erdfast.evaluate's way, of a file."""
    save_npz(files / "drawn.npz", pictures)
    names = ("fid", "sfid", "is", "precision", "recall")
    arguments = [files / "drawn.npz"], files / reference, files / "weights.pth", names
    (row,) = Measurement(device=CPU).pictures(*arguments, save=files / "saved.npz")
    return row.values


def as_measured(record: dict[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}


def test_latents_are_measured_as_pictures(files):
    vae = save_tiny_vae(files / "vae")
    options = of_pictures(files, eval_vae=vae, eval_num=70)
    common = {"data": str(files / "latents.safetensors"), "steps": 2, "label_drop": 0.0, "latent_scale": "sd"}
    trainer = tiny_trainer(files / "run", **common, **FLOW, **options)
    assert trainer.dataset.vae_units is not None
    trainer.train()
    pictures = Decoder(vae, CPU, torch.float32, trainer.dataset.vae_units).pictures(drawn(trainer, 70))
    expected = measured(files, pictures)
    (record,) = evaluations(files / "run")
    assert as_measured(record) == pytest.approx(expected, rel=1e-6)
    assert record["settings"]["reference"] == "real.npz"

    # Statistics that were saved are the same, and nothing of the reference has to be computed.
    saved = options | {"eval_reference": files / "saved.npz"}
    again = tiny_trainer(files / "again", **common, **FLOW, **saved)
    assert again.evaluator.measure.prepare() is None  # pyright: ignore[reportOptionalMemberAccess]
    again.train()
    assert as_measured(evaluations(files / "again")[0]) == pytest.approx(expected, rel=1e-6)


def test_grey_pictures_with_some_metrics(files):
    options = of_pictures(files, eval_metrics=("is", "fid"), eval_num=40)
    trainer = tiny_trainer(files / "run", model="uvit_digits", data="digits", steps=1, **FLOW, **options)
    said = listening(trainer)
    trainer.train()
    expected = measured(files, trainer.dataset.to_images(drawn(trainer, 40)))
    found = as_measured(evaluations(files / "run")[0])
    assert found == pytest.approx({"fid": expected["fid"], "is": expected["is"]}, rel=1e-6)
    assert any(line.startswith("evaluation at step 1: IS 1.") for line in said)


def test_too_few_images_for_fid_are_said(files):
    said: list[str] = []
    trainer = tiny_trainer(files / "run", model="uvit_digits", data="digits")
    config = cli.with_options(trainer.config, of_pictures(files, eval_num=6))
    Trainer(config, trainer.dataset, files / "run", trainer.world, say=said.append)
    assert [line for line in said if line.startswith("eval_num 6 is no more than the 6 features")]


# ---------------------------------------------------------------------- going on


def test_a_run_that_is_resumed_evaluates_what_it_has_not(tmp_path):
    options = {"steps": 6, "log_every": 1, **EVAL}
    tiny_trainer(tmp_path / "whole", **options).train()
    run = tmp_path / "halves"
    first = tiny_trainer(run, checkpoint_every=3, **options)
    stop_after_save(first)
    with pytest.raises(Stopped):
        first.train()
    second = tiny_trainer(run, **options)
    steps = watched_steps(second)
    second.restore()
    second.train()
    assert steps == [4, 6]
    assert evaluations(run) == evaluations(tmp_path / "whole")
    assert_same_bits(all_tensors(run), all_tensors(tmp_path / "whole"))

    third = tiny_trainer(run, **options)  # which has nothing left to do
    steps = watched_steps(third)
    third.restore()
    third.train()
    assert steps == []
    assert evaluated_steps(run) == [2, 4, 6]


def test_an_evaluation_that_was_killed_is_made_up_for(tmp_path):
    options = {"steps": 6, "checkpoint_every": 2, **EVAL}
    tiny_trainer(tmp_path / "whole", **options).train()
    run = tmp_path / "halves"
    first = tiny_trainer(run, **options)
    evaluate = first.evaluator.evaluate

    def die_at_4(step: int) -> dict[str, Any] | None:
        if step == 4:
            raise Stopped
        return evaluate(step)

    first.evaluator.evaluate = die_at_4
    with pytest.raises(Stopped):
        first.train()
    assert evaluated_steps(run) == [2]
    second = tiny_trainer(run, **options)
    steps = watched_steps(second)
    second.restore()
    assert second.step == 4  # saved before the evaluation
    second.train()
    assert steps == [4, 6]
    assert evaluations(run) == evaluations(tmp_path / "whole")


@pytest.mark.parametrize(("at", "steps_left"), [(2, [2, 4, 5]), (5, [5])])
def test_a_signal_ends_an_evaluation(tmp_path, at, steps_left):
    options = {"steps": 5, **EVAL}
    trainer = tiny_trainer(tmp_path, **options)
    said, steps, apart = listening(trainer), watched_steps(trainer), trainer.evaluator._apart

    def interrupt(what, total, work, step):
        if step == at:
            trainer.interrupt.received = "SIGTERM"
        return apart(what, total, work, step)

    trainer.evaluator._apart = interrupt
    assert trainer.train() == (None if at == 5 else "SIGTERM")
    assert steps[-1] == at
    assert at not in evaluated_steps(tmp_path)
    assert f"no evaluation at step {at}: the run has been told to stop" in said
    again = tiny_trainer(tmp_path, **options)
    steps = watched_steps(again)
    again.restore()
    again.train()
    assert steps == steps_left
    assert evaluated_steps(tmp_path) == [2, 4, 5]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (None, "the samples hold values that are not finite"),
    ],
)
def test_a_run_survives_an_evaluation_that_fails(tmp_path, monkeypatch, error, words):
    tiny_trainer(tmp_path / "without", steps=4).train()
    made = evaluation.sample_batches

    def sample_batches(*arguments, **options):
        for start, images in made(*arguments, **options):
            if trainer.step > 2:
                yield start, images
            elif error is None:
                yield start, images * float("nan")
            else:
                raise error

    monkeypatch.setattr(evaluation, "sample_batches", sample_batches)
    trainer = tiny_trainer(tmp_path / "with", steps=4, **EVAL)
    said = listening(trainer)
    trainer.train()
    assert evaluated_steps(tmp_path / "with") == [4]
    (line,) = [line for line in said if line.startswith("no evaluation")]
    assert line.startswith("no evaluation at step 2: ")
    assert words in line
    assert_same_bits(all_tensors(tmp_path / "with"), all_tensors(tmp_path / "without"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no covariance")])
def test_a_run_survives_sums_that_cannot_be_joined(tmp_path, error):
    tiny_trainer(tmp_path / "without", steps=4).train()
    trainer = tiny_trainer(tmp_path / "with", steps=4, **EVAL)
    assert trainer.evaluator.measure is not None
    begin = trainer.evaluator.measure.begin

    def failing(total):
        sums = begin(total)
        if trainer.step <= 2:
            sums.values = lambda: (_ for _ in ()).throw(error)
        return sums

    object.__setattr__(trainer.evaluator.measure, "begin", failing)  # which is frozen
    said = listening(trainer)
    trainer.train()
    assert evaluated_steps(tmp_path / "with") == [4]
    assert f"no evaluation at step 2: {error}" in said
    assert_same_bits(all_tensors(tmp_path / "with"), all_tensors(tmp_path / "without"))


def test_a_record_that_cannot_be_written(tmp_path, monkeypatch):
    write = MetricsWriter.write

    def full(self, record):
        if record.get("step") == 2 and "kind" in record:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, record)

    monkeypatch.setattr(MetricsWriter, "write", full)
    trainer = tiny_trainer(tmp_path, steps=4, log_every=1, **EVAL)
    said = listening(trainer)
    trainer.train()
    assert evaluated_steps(tmp_path) == [4]
    assert len(losses(tmp_path)) == 4
    assert [line for line in said if line.startswith("metrics.jsonl could not be written: ")]


# ---------------------------------------------------------------------- at the end


def record(step: int, *, num: int = 5000, **values: float | None) -> dict[str, Any]:
    named = {f"eval_{name}": value for name, value in values.items()}
    return {"kind": "evaluation", "step": step, **named, "settings": {"num": num}}


def test_the_best_of_those_that_compare():
    fids = [record(1000, fid=3.0, precision=0.9), record(2000, fid=2.0, precision=0.1), record(3000, fid=2.5)]
    assert best(fids) == (2000, "FID 2")
    assert best([record(1000, accuracy=0.9), record(2000, accuracy=0.98765)]) == (2000, "accuracy 98.8%")
    assert best([]) is None
    assert best([record(1000, fid=None), record(2000, fid=5.0)]) == (2000, "FID 5")
    assert best([record(1000, fid=None)]) is None
    others = [{"step": 1, "loss": 0.1}, record(1000, num=50, fid=1.0), *fids]
    assert comparable(others) == fids
    assert comparable(others[:1]) == []


def test_the_end_of_a_run(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=4, log_every=1, **EVAL)
    said = listening(trainer)
    trainer.train()
    trainer.finish()
    chosen = best(evaluations(tmp_path))
    assert chosen is not None
    assert said[-1] == f"best evaluation: {chosen.value} at step {chosen.step}"
    assert count_color(tmp_path / "summary.png", GREEN) > 100  # the accuracy, of which other panels have nothing


def test_shares_are_even_and_so_are_batches(tmp_path):
    trainer = tiny_trainer(tmp_path, **EVAL)
    for size, num, most in ((1, 12, 8), (3, 100, 64), (8, 5000, 256), (7, 5, 8)):
        config, counts = EvalConfig(eval_every=1, eval_num=num), []
        for rank in range(size):
            world = World(rank=rank, size=size, device=CPU)
            one = evaluation.Evaluator(
                config,
                trainer.evaluator.measure,
                trainer.averaged,
                trainer.precision,
                world,
                batch_size=most,
                run=tmp_path,
                interrupted=lambda: False,
                say=lambda _line: None,
            )
            assert one._first == sum(counts)
            counts.append(one._count)
            limit = min(max(most, evaluation.SMALLEST_BATCH), evaluation.LARGEST_BATCH)
            assert one._batch_size <= limit
            if one._count:
                batches = -(-one._count // one._batch_size)
                assert batches == -(-one._count // limit)  # as few as can be, and equal within rounding
                assert batches * one._batch_size - one._count < batches
        assert sum(counts) == num
        assert max(counts) - min(counts) <= 1
