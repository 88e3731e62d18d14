"""Predictions of a step follow from the results of a device, and say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_attention, bench_gelu, bench_modulated_norm, bench_qk_norm_rope, bench_swiglu, step_model
from bench.budget import step_budget
from bench.harness import RESULTS
from bench.roofline import MACHINES
from erdfast import presets

H200 = MACHINES["h200"]


def result(op: str, *rows: dict[str, Any]) -> dict[str, Any]:
    rates = {"copy_bytes_per_s": H200.bytes_per_s / 2, "matmul_flops_per_s": {"bfloat16": H200.flops_per_s / 4}}
    return {"op": op, "ceilings": rates, "rows": rows}


def row(share: float | None, **options: Any) -> dict[str, Any]:
    fields = {"dtype": "bfloat16"} | options.pop("fields", {})
    timings = [{"fused": {"p50_ms": 1.0}}]
    return {"pass": "both", "share": share, "flops": 0, "fields": fields, "timings": timings} | options


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "h200"
    path.mkdir()
    norms = [row(0.5), row(0.9), row(0.7), row(0.1, fields={"dtype": "float32"}), {**row(0.2), "pass": "forward"}]
    (path / "modulated_norm.json").write_text(json.dumps(result("modulated_norm", *norms, row(None))))
    (path / "attention.json").write_text(json.dumps(result("attention", row(0.25, flops=7))))
    (path / "other.json").write_text(json.dumps({"op": "other", "rows": []}))
    return path


def test_shares_of_a_measured_device(folder: Path) -> None:
    found = step_model.calibrate("h200", folder)
    assert (found.flops, found.bytes, found.memory) == pytest.approx((0.25, 0.5, 0.7))
    assert found.kernels == pytest.approx({"modulated_norm": 0.7, "attention": 0.25})
    reached = found.reached(MACHINES["a100"])
    assert (reached.flops_per_s, reached.bytes_per_s) == pytest.approx((312e12 / 4, 2.04e12 / 2))


def test_a_step_is_the_sum_of_its_ops(folder: Path) -> None:
    found = step_model.calibrate("h200", folder)
    step = step_model.predict("uvit_h2", "a100", 128, found, folder)
    reached = found.reached(MACHINES["a100"])
    shares = {"linear": 1.0, "modulated_norm": 0.7, "attention": 0.25}
    budget = step_budget(presets.model_config("uvit_h2"), 128)
    expected = sum(work.floor_ms(reached) / shares.get(work.op, 0.7) for work in budget)
    assert step.ms == pytest.approx(expected)
    assert step.least_ms == pytest.approx(sum(work.floor_ms(reached) for work in budget))
    assert step.images_per_s == pytest.approx(128 / expected * 1e3)
    assert step.mfu == pytest.approx(799.2e9 * step.images_per_s / 312e12, rel=1e-4)
    assert 0 < step.part("attention") < step.part("linear") < step.part("linear", "attention") < 1


def test_a_time_measured_at_that_size_there_is_taken(folder: Path) -> None:
    (attention,) = [work for work in step_budget(presets.model_config("uvit_h2"), 128) if work.op == "attention"]
    here = row(0.25, flops=7, fields=dict(attention.fields or {}), timings=[{"fused": {"p50_ms": 3.0}}])
    (folder / "attention.json").write_text(json.dumps(result("attention", here)))
    found = step_model.calibrate("h200", folder)

    def milliseconds(device: str, batch: int) -> float:
        works = step_model.predict("uvit_h2", device, batch, found, folder).works
        return next(ms for work, ms in works if work.op == "attention")

    assert milliseconds("h200", 128) == pytest.approx(29 * 3.0)
    for device, batch in (("h200", 64), ("h100", 128)):
        (attention,) = [w for w in step_budget(presets.model_config("uvit_h2"), batch) if w.op == "attention"]
        least = attention.floor_ms(found.reached(MACHINES[device]))
        assert milliseconds(device, batch) == pytest.approx(least / 0.25)


def test_what_cannot_be_predicted_from(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data sheet of box is known; known: a100, h100, h200"):
        step_model.calibrate("box", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no measured op that memory limits"):
        step_model.calibrate("h200", tmp_path / "empty")


@pytest.mark.parametrize(
    ("op", "model", "make"),
    [
        ("attention", "uvit_h2", bench_attention.cases),
        ("attention", "dit_b2", bench_attention.cases),
        ("gelu", "dit_b2", bench_gelu.cases),
        ("swiglu", "lightningdit_xl1", bench_swiglu.cases),
        ("qk_norm_rope", "jit_b16", bench_qk_norm_rope.cases),
        ("modulated_norm", "dit_xl2", bench_modulated_norm.cases),
    ],
)
def test_the_budget_names_sizes_as_the_benchmarks_do(op, model, make) -> None:
    """Names alone: the sizes of a CPU's cases are smaller."""
    works = [w for w in step_budget(presets.model_config(model), 128) if w.op == op and w.fields]
    assert works
    names = [set(case.fields) for case in make("cpu", [torch.bfloat16])]
    assert all(any(set(work.fields or {}) <= known for known in names) for work in works)


def test_attention_of_the_published_step_was_measured() -> None:
    folder = RESULTS / "h200"
    step = step_model.predict("uvit_h2", "h200", 128, step_model.calibrate("h200", folder), folder)
    (measured,) = [work.measured_ms for work, _ in step.works if work.op == "attention"]
    assert measured is not None


def test_the_command_says_that_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    step_model.main(["--model", "dit_xl2", "--device", "a100", "--batch", "32"])
    text = capsys.readouterr().out
    assert "dit_xl2 on a100, batch 32, bf16: PREDICTED from results on h200" in text
    assert "as measured kernels that memory limits" in text
    assert "images/s, MFU" in text
    step_model.main([])
    text = capsys.readouterr().out
    assert text.count("| A100 |") == len(step_model.NETWORKS)
    assert "measured nowhere" in text
    with pytest.raises(SystemExit):
        step_model.main(["--batch", "0"])
    assert "--batch: must be at least 1, not 0" in capsys.readouterr().err
