"""Errors of a step's loss and gradients: measured against float32 of the same data, weights and noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import report, step_accuracy
from bench.step_accuracy import Gradient, compare, differentiate, sides
from bench.step_sides import StepOptions
from tests.runs import single_thread, words

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


def test_errors_are_relative_and_name_the_worst_parameter_of_any_weight() -> None:
    exact = Gradient(2.0, {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([12.0]), "tiny": torch.tensor([1e-4])})
    found = Gradient(2.02, {"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([12.0]), "tiny": torch.tensor([5.0])})
    row = compare(found, exact)
    assert row["loss_error"] == pytest.approx(0.01)
    assert row["gradient_error"] == pytest.approx((0.25 + 25) ** 0.5 / 13, rel=1e-4)
    assert (row["worst"], row["worst_error"]) == ("a", pytest.approx(0.1))
    with pytest.raises(ValueError, match="gradients of other parameters than in float32: b, tiny"):
        compare(Gradient(1.0, {"a": torch.ones(2)}), exact)


@pytest.mark.parametrize("model", ["uvit_tiny", "dit_tiny"])
def test_every_parameter_has_a_gradient_that_bf16_has_nearly(model: str) -> None:
    options = StepOptions(model=model, batch=4, samples=16)
    makes = sides(["plain", "ours"])
    exact, plain = (differentiate(makes[name], options, CPU, plain=True) for name in ("float32", "plain"))
    assert all(gradient.abs().max() > 0 for gradient in exact.parameters.values())
    row = compare(plain, exact)
    assert 1e-4 < row["gradient_error"] < 0.02
    assert 0 < abs(row["loss_error"]) < 1e-3
    again = differentiate(makes["float32"], options, CPU, plain=True)
    assert all(torch.equal(again.parameters[name], gradient) for name, gradient in exact.parameters.items())


def test_a_run_is_written_and_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step_accuracy.main(words(f"--model dit_tiny --batch 4 --sides plain ours --results {tmp_path}"))
    (path,) = tmp_path.glob("*/accuracy_dit_tiny_4.json")
    result = json.loads(path.read_text())
    assert [row["side"] for row in result["rows"]] == ["float32", "plain", "ours"]
    assert "side ours_compile" in result["missing"]
    table = report.render_result(result)
    assert f"| plain | {result['rows'][1]['loss']:.5f} |" in table
    assert "gradient's error" in capsys.readouterr().out


def test_a_side_that_fails_is_named_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setitem(step_accuracy.VARIANTS, "ours_full", fail)  # type: ignore[arg-type]  # never returns
    with pytest.raises(SystemExit) as stop:
        step_accuracy.main(words(f"--model dit_tiny --batch 4 --sides ours_full ours --results {tmp_path}"))
    assert stop.value.code == 1
    (path,) = tmp_path.glob("*/accuracy_dit_tiny_4.json")
    result = json.loads(path.read_text())
    assert not result["complete"]
    assert [row.get("failed") for row in result["rows"]] == [None, "RuntimeError: out of memory", None]
    assert "ours_full     not measured: RuntimeError: out of memory" in capsys.readouterr().out
    assert "ours_full" not in report.render_result(result)


def test_a_batch_is_counted_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        step_accuracy.main(["--batch", "0"])
    assert stop.value.code == 2
    assert "--batch: must be at least 1, not 0" in capsys.readouterr().err
