"""Predictions of a step follow from the results of a device, and say what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    bench_attention,
    bench_gelu,
    bench_linear,
    bench_modulated_norm,
    bench_qk_norm_rope,
    bench_swiglu,
    step_model,
)
from bench.budget import Work, step_budget
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
    write(path, "modulated_norm", *norms, row(None))
    write(path, "attention", attention_row(64, 2.0))
    drawn = [row(share, fields={"noise": noise, "work": "all"}) for share, noise in ((0.2, "drawn"), (0.9, "given"))]
    write(path, "diffusion_loss", *drawn)
    (path / "other.json").write_text(json.dumps({"op": "other", "rows": []}))
    return path


def write(folder: Path, op: str, *rows: dict[str, Any]) -> None:
    (folder / f"{op}.json").write_text(json.dumps(result(op, *rows)))


def attention_row(batch: int, ms: float) -> dict[str, Any]:
    fields = {"batch": batch, "heads": 16, "tokens": 258, "width": 72}
    return row(None, flops=7, fields=fields, timings=[{"fused": {"p50_ms": ms}}])


def attention_of(batch: int) -> Work:
    (work,) = [w for w in step_budget(presets.model_config("uvit_h2"), batch) if w.op == "attention"]
    return work


def milliseconds_of_attention(folder: Path, gpu: str, batch: int) -> float:
    works = step_model.predict("uvit_h2", gpu, batch, step_model.calibrate(folder), folder).works
    return next(ms for work, ms in works if work.op == "attention")


def test_shares_of_a_measured_device(folder: Path) -> None:
    found = step_model.calibrate(folder)
    assert (found.gpu, found.flops, found.bytes, found.others) == pytest.approx(("h200", 0.25, 0.5, 0.7))
    assert found.kernels.keys() == {"modulated_norm", "attention", "diffusion_loss"}
    assert found.kernels["modulated_norm"] == pytest.approx((0.7, 0.7))
    assert found.kernels["diffusion_loss"] == pytest.approx((0.2, 0.2))
    flops, num_bytes = attention_of(64).flops / 29, attention_of(64).fused_bytes / 29
    share = (flops / (H200.flops_per_s / 4) / 2e-3, num_bytes / (H200.bytes_per_s / 2) / 2e-3)
    assert found.kernels["attention"] == pytest.approx(share)
    reached = found.reached(MACHINES["a100"])
    assert (reached.flops_per_s, reached.bytes_per_s) == pytest.approx((312e12 / 4, 2.04e12 / 2))


def test_what_is_not_like_a_step_is_not_taken(folder: Path) -> None:
    found = step_model.calibrate(folder)
    write(folder, "add_noise", row(0.1))
    write(folder, "skip_linear", row(0.9, flops=5))
    (folder / "modulated_norm.partial.json").write_text(json.dumps(result("modulated_norm", row(0.01))))
    (folder / "notes.json").write_text(json.dumps({"op": "notes", "ceilings": {"copy_bytes_per_s": 1}}))
    assert step_model.calibrate(folder) == found


def test_a_step_is_the_sum_of_its_ops(folder: Path) -> None:
    found = step_model.calibrate(folder)
    step = step_model.predict("uvit_h2", "a100", 128, found, folder)
    reached = found.reached(MACHINES["a100"])
    shares = {"linear": 1.0, "diffusion_loss": 0.2}
    budget = step_budget(presets.model_config("uvit_h2"), 128)
    others = [work for work in budget if work.op != "attention"]
    expected = sum(work.floor_ms(reached) / shares.get(work.op, 0.7) for work in others)
    slower = max(H200.flops_per_s / 312e12, H200.bytes_per_s / 2.04e12)  # what the A100 has less of
    expected += 2 * 29 * 2.0 * slower
    assert step.ms == pytest.approx(expected)
    assert step.least_ms == pytest.approx(sum(work.floor_ms(reached) for work in budget))
    assert step.images_per_s == pytest.approx(128 / expected * 1e3)
    assert step.mfu == pytest.approx(799.2e9 * step.images_per_s / 312e12, rel=1e-4)
    assert 0 < step.part("attention") < step.part("linear") < step.part("linear", "attention") < 1


def test_a_time_measured_at_that_size_there_is_taken(folder: Path) -> None:
    assert milliseconds_of_attention(folder, "h200", 64) == pytest.approx(29 * 2.0)
    write(folder, "attention", attention_row(64, 2.0), attention_row(128, 3.0), attention_row(256, 6.0))
    assert milliseconds_of_attention(folder, "h200", 128) == pytest.approx(29 * 3.0)
    assert milliseconds_of_attention(folder, "h200", 32) == pytest.approx(29 * 0.75)  # the median: 3 for 128
    assert milliseconds_of_attention(folder, "h100", 128) > 29 * 3.0


def test_measured_products_take_the_place_of_a_large_one(folder: Path) -> None:
    fields = {"shape": [33024, 1152, 4608], "dtype": "bfloat16"}
    measured = {"pass": "forward", "flops": 1, "timings": [{"fused": {"p50_ms": 2.5}}]}
    write(folder, "linear", row(0.8, **measured, fields=fields), row(0.1, **measured, fields={"dtype": "float32"}))
    found = step_model.calibrate(folder)
    assert found.kernels["linear"] == pytest.approx((0.8, 0.8))
    for gpu, fc1 in (("h200", 29 * 2.5), ("a100", None)):
        times = {work.detail: (work, ms) for work, ms in step_model.predict("uvit_h2", gpu, 128, found, folder).works}
        reached = found.reached(MACHINES[gpu])
        expected = {name: times[name][0].floor_ms(reached) / 0.8 for name in ("qkv", "fc1")}
        assert times["qkv"][1] == pytest.approx(expected["qkv"])
        assert times["fc1"][1] == pytest.approx(expected["fc1"] if fc1 is None else fc1)


def test_what_cannot_be_predicted_from(folder: Path, tmp_path: Path) -> None:
    for name, message in (
        ("box", "no data sheet of box is known; known: a100, h100, h200"),
        ("h100_80gb_hbm3", "h100_80gb_hbm3 has no op that memory limits: run `bash bench/gpu.sh bench_modulated_norm`"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(step_model.Uncalibrated, match=message):
            step_model.calibrate(tmp_path / name)
    folder.rename(tmp_path / "h100_pcie")
    assert step_model.calibrate(tmp_path / "h100_pcie").gpu == "h100"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"ceilings": null}',
        '{"op": "gelu", "ceilings": {"copy_bytes_per_s": 1, "matmul_flops_per_s": {"bfloat16": 1}}}',
        '{"op": "gelu", "rows": [], "ceilings": {"matmul_flops_per_s": {"bfloat16": 1}}}',
        '{"op": "gelu", "rows": [{}], "ceilings": {"copy_bytes_per_s": 1, "matmul_flops_per_s": {"bfloat16": 1}}}',
    ],
)
def test_a_damaged_result_is_named(folder: Path, text: str) -> None:
    (folder / "gelu.json").write_text(text)
    with pytest.raises(ValueError, match=r"h200/gelu.json is damaged \(\w+: "):
        step_model.calibrate(folder)


@pytest.mark.parametrize(
    ("op", "model", "make"),
    [
        ("attention", "uvit_h2", bench_attention.cases),
        ("attention", "dit_b2", bench_attention.cases),
        ("gelu", "dit_b2", bench_gelu.cases),
        ("linear", "uvit_h2", bench_linear.cases),
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
    step = step_model.predict("uvit_h2", "h200", 128, step_model.calibrate(folder), folder)
    (measured,) = [work.measured_ms for work, _ in step.works if work.op == "attention"]
    assert measured is not None


@pytest.mark.parametrize("model", step_model.NETWORKS)
def test_nothing_is_faster_than_its_least(model: str) -> None:
    folder = RESULTS / "h200"
    found = step_model.calibrate(folder)
    for gpu in step_model.DEVICES:
        step = step_model.predict(model, gpu, 128, found, folder)
        machine = found.reached(MACHINES[gpu])
        assert all(ms >= work.floor_ms(machine) for work, ms in step.works)


def test_the_command_says_that_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    step_model.main(["--model", "dit_xl2", "--device", "a100", "--batch", "32"])
    text = capsys.readouterr().out
    assert "dit_xl2 on a100, batch 32, bf16: PREDICTED from results on h200" in text
    assert "as measured ops that memory limits" in text
    assert "images/s, MFU" in text
    step_model.main([])
    text = capsys.readouterr().out
    assert text.count("| A100 |") == len(step_model.NETWORKS)
    assert "measured nowhere" in text
    with pytest.raises(SystemExit):
        step_model.main(["--batch", "0"])
    assert "--batch: must be at least 1, not 0" in capsys.readouterr().err
