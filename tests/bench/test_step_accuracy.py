"""Errors of a step's loss and gradients: measured against float32 of the same data, weights and noise."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import report, step_accuracy
from bench.step_accuracy import SIDES, Gradient, compare, differentiate
from bench.step_sides import StepOptions, trainer
from erdfast.ops import backend
from erdfast.training.trainer import Trainer
from tests.runs import single_thread, words

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


EXACT = Gradient("fp32", 2.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0]), "tiny": torch.tensor([1e-4])})


def test_errors_are_relative_and_name_the_worst_parameter_of_any_weight() -> None:
    changed = {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([12.0]), "tiny": torch.tensor([5.0])}
    row = compare(Gradient("bf16", 2.02, changed), EXACT)
    assert row["loss_error"] == pytest.approx(0.01)
    assert row["gradient_error"] == pytest.approx((0.25 + 25) ** 0.5 / 13, rel=1e-4)
    assert (row["worst"], row["worst_error"]) == ("a", pytest.approx(0.1))


def test_what_cannot_be_compared() -> None:
    one = Gradient("fp32", 1.0, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match="gradients of other parameters than in float32: b, tiny"):
        compare(one, EXACT)
    with pytest.raises(ValueError, match=r"not finite: a$"):
        compare(one._replace(parameters={"a": torch.tensor([1.0, float("nan")])}), one)
    with pytest.raises(ValueError, match="not finite: the loss"):
        compare(one._replace(loss=float("inf")), one)
    nothing = one._replace(parameters={"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="there is no relative error"):
        compare(one, nothing)


@pytest.mark.parametrize("model", ["uvit_tiny", "dit_tiny"])
def test_every_parameter_has_a_gradient_that_bf16_has_nearly(model: str) -> None:
    options = StepOptions(model=model, batch=4, samples=16)
    makes = {"float32": partial(trainer, compiled="none", precision="fp32"), **SIDES}
    exact, plain = (differentiate(makes[name], options, CPU, plain=True) for name in ("float32", "plain"))
    assert all(gradient.abs().max() > 0 for gradient in exact.parameters.values())
    assert (exact.precision, plain.precision) == ("fp32", "bf16")
    row = compare(plain, exact)
    assert 1e-4 < row["gradient_error"] < 0.02
    assert 0 < abs(row["loss_error"]) < 1e-3
    again = differentiate(makes["float32"], options, CPU, plain=True)
    assert all(torch.equal(again.parameters[name], gradient) for name, gradient in exact.parameters.items())


@pytest.mark.parametrize("plain", [True, False])
def test_the_plain_step_runs_none_of_our_ops(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    options = StepOptions(model="uvit_tiny", batch=4, samples=4)

    def make(options: StepOptions, device: torch.device) -> Trainer:
        step = trainer(options, device, compiled="none", precision="fp32")
        monkeypatch.setattr(
            importlib.import_module("erdfast.ops.attention"), "measured_backend", lambda *_: seen.append("table")
        )
        step.diffusion.register_forward_pre_hook(lambda *_: seen.append(backend.default_of("diffusion_loss")))
        return step

    differentiate(make, options, CPU, plain=plain)
    assert seen[0] == ("reference" if plain else None)
    assert ("table" in seen) == (not plain)


def test_a_run_is_written_as_it_goes_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_accuracy.main(words(f"--model dit_tiny --batch 4 --sides plain ours --results {tmp_path}"))
    (path,) = tmp_path.glob("*/accuracy_dit_tiny_4.json")
    result = json.loads(path.read_text())
    assert [(row["side"], row["precision"]) for row in result["rows"]] == [
        ("float32", "fp32"),
        ("plain", "bf16"),
        ("ours", "bf16"),
    ]
    assert "side ours_compile" in result["missing"]
    table = report.render_result(result)
    assert f"| plain | bf16 | {result['rows'][1]['loss']:.5f} |" in table
    assert "float32" not in report.render_result(result, ["plain"])
    with pytest.raises(report.ReportError, match="no row of step_accuracy has all of: other"):
        report.render_result(result, ["other"])
    assert "gradient's error" in capsys.readouterr().out


def test_a_side_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setitem(step_accuracy.SIDES, "ours_full", fail)  # type: ignore[arg-type]  # never returns
    with pytest.raises(SystemExit) as stop:
        step_accuracy.main(words(f"--model dit_tiny --batch 4 --sides ours_full ours --results {tmp_path}"))
    assert stop.value.code == 1
    (path,) = tmp_path.glob("*/accuracy_dit_tiny_4.json")
    result = json.loads(path.read_text())
    assert not result["complete"]
    assert [row.get("failed") for row in result["rows"]] == [None, "AssertionError", None]
    assert "ours_full     not measured: AssertionError" in capsys.readouterr().out
    assert "ours_full" not in report.render_result(result)


def test_another_way_to_compile_does_not_replace_a_full_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_accuracy, "default_sides", lambda _: ["ours"])
    step_accuracy.main(words(f"--model dit_tiny --batch 2 --results {tmp_path}"))
    with pytest.raises(SystemExit) as stop:
        step_accuracy.main(words(f"--model dit_tiny --batch 2 --compile full --results {tmp_path}"))
    assert stop.value.code == 2
    assert "this one would lack compile block" in capsys.readouterr().err


def test_a_batch_is_counted_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        step_accuracy.main(["--batch", "0"])
    assert stop.value.code == 2
    assert "--batch: must be at least 1, not 0" in capsys.readouterr().err
