"""The budget of a step adds up to what the models say, and the machines are those of the data sheets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import roofline
from bench.budget import linear
from bench.roofline import MACHINES, step_budget, totals, with_measurements
from erdfast import presets
from erdfast.models import DiTConfig, UViTConfig
from erdfast.models.flops import parameter_count, training_flops
from erdfast.models.rope_layers import RopeConfig


@pytest.mark.parametrize("model", presets.MODELS)
@pytest.mark.parametrize("batch", [1, 128])
def test_operations_agree_with_the_models(model: str, batch: int) -> None:
    config = presets.model_config(model)
    assert sum(work.flops for work in step_budget(config, batch)) == batch * training_flops(config)


def test_options_of_a_network_are_counted() -> None:
    for options in ({"mlp_time_embed": True}, {"conv": False}, {"num_classes": 0}, {"mlp_ratio": 3.0}):
        config = presets.model_config("uvit_tiny", **options)
        assert sum(work.flops for work in step_budget(config, 3)) == 3 * training_flops(config)
    for options in ({"context_length": 0}, {"num_classes": 0}, {"mlp_ratio": 3.0}, {"dropout": 0.5}):
        config = presets.model_config("jit_tiny", **options)
        assert sum(work.flops for work in step_budget(config, 3)) == 3 * training_flops(config)
    for options in ({"resblock_updown": False}, {"use_scale_shift_norm": False}, {"num_classes": 0}, {"dropout": 0.5}):
        config = presets.model_config("adm_unet_tiny", **options)
        assert sum(work.flops for work in step_budget(config, 3)) == 3 * training_flops(config)
    config = presets.model_config("dit_tiny", learn_sigma=True)
    assert sum(work.flops for work in step_budget(config, 3)) == 3 * training_flops(config)


@pytest.mark.parametrize("model", ["uvit_h2", "dit_xl2", "lightningdit_xl1", "jit_b16", "adm_unet_imagenet64"])
def test_fusions_save_traffic_and_the_optimiser_moves_36_bytes(model: str) -> None:
    config = presets.model_config(model)
    budget = step_budget(config, 128)
    assert all(work.fused_bytes <= work.eager_bytes for work in budget)
    (update,) = [work for work in budget if work.op == "adamw_ema"]
    assert update.fused_bytes == 36 * parameter_count(config)
    flops, fused, eager = totals(budget, MACHINES["h200"])
    compute = 1e3 * flops / MACHINES["h200"].flops_per_s
    assert compute < fused < eager < 3 * compute


TINY = ("uvit_tiny", "dit_tiny", "lightningdit_tiny", "jit_tiny", "adm_unet_tiny")


@pytest.mark.parametrize("model", TINY)
def test_biases_sum_up_the_gradients_of_what_they_were_added_to(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, batch, added = presets.model_config(model), 3, []
    for name in ("linear", "conv2d", "conv1d"):
        function = getattr(F, name)

        def count(x, weight, bias=None, *rest, function=function, **options):
            out = function(x, weight, bias, *rest, **options)
            added.append(0 if bias is None else out.numel())
            return out

        monkeypatch.setattr(F, name, count)
    x, y = torch.randn(batch, *config.input_shape), torch.zeros(batch, dtype=torch.int64)
    config.build()(x, torch.full((batch,), 0.5), y)
    (sums,) = [work for work in step_budget(config, batch) if work.op == "bias"]
    expected = sum(added)
    if isinstance(config, UViTConfig):  # the extra tokens are counted in both embeddings of patches
        expected += batch * config.extra_tokens * (config.width + config.input_shape[0] * config.patch_size**2)
    assert sums.fused_bytes == 2 * expected
    # The modulations of all blocks and the last layer are one work.
    joined = config.depth if isinstance(config, DiTConfig | RopeConfig) else 0
    assert sums.count == sum(number > 0 for number in added) - joined


def test_every_norm_of_a_network_is_there() -> None:
    for model, depth in (("uvit_h2", 29), ("dit_b2", 12), ("lightningdit_b1", 12), ("jit_l16", 24)):
        budget = step_budget(presets.model_config(model), 2)
        norms = [work.count for work in budget if work.detail.endswith("norm")]
        residuals = [work.count for work in budget if work.op == "residual" or "residual" in work.detail]
        assert (sum(norms), sum(residuals)) == (2 * depth + 1, 2 * depth)


def test_floor_is_the_longer_of_compute_and_memory() -> None:
    machine = roofline.Machine(name="m", flops_per_s=1e12, bytes_per_s=1e9, source="a test")
    work = linear("fc", 1, 1000, 100, 100)
    assert (work.flops, work.fused_bytes) == (6 * 10**7, 3 * 2 * 210_000)
    assert work.floor_ms(machine) == pytest.approx(1.26)
    assert work.bound(machine) == "memory"
    assert MACHINES["a100"].flops_per_s == 312e12
    assert MACHINES["h100"].bytes_per_s == 3.35e12
    measured, sheet = MACHINES["h200_measured"], MACHINES["h200"]
    assert (measured.flops_per_s, measured.bytes_per_s) < (sheet.flops_per_s, sheet.bytes_per_s)


def test_measurements_of_the_same_size_stand_beside(tmp_path: Path) -> None:
    budget = step_budget(presets.model_config("dit_tiny"), 2)
    (gelu,) = [work for work in budget if work.op == "gelu"]
    fields = dict(gelu.fields or {})
    assert fields == {"shape": [2 * 16, 256], "approximate": "tanh", "dtype": "bfloat16"}
    rows = [
        {"fields": fields | changed, "pass": kind, "timings": [{"fused": {"p50_ms": ms}}]}
        for changed, kind, ms in (
            ({"shape": [9, 9]}, "both", 1.0),
            ({"dtype": "float32"}, "both", 2.0),
            ({"more": 1}, "forward", 3.0),
            ({"more": 1}, "both", 4.0),
        )
    ]
    (tmp_path / "gelu.json").write_text(json.dumps({"rows": rows}))
    update = {
        "fields": {"model": "dit_tiny", "clip": False},
        "pass": "forward",
        "timings": [{"fused": {"p50_ms": 5.0}}],
    }
    (tmp_path / "adamw_ema.json").write_text(json.dumps({"rows": [update]}))
    measured = {work.op: work.measured_ms for work in with_measurements(budget, tmp_path)}
    assert measured["gelu"] == gelu.count * 4.0
    assert measured["adamw_ema"] == 5.0
    assert measured["attention"] is None


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--model", "dit_xl2", "--device", "a100", "--batch", "32"])
    text = capsys.readouterr().out
    assert "dit_xl2 on a100: 312 TFLOP/s, 2.04 TB/s; batch 32" in text
    assert "(data sheet, 80 GB SXM)" in text
    assert "gated residual, modulated norm" in text
    assert "711.7 per image" in text
    with pytest.raises(SystemExit):
        roofline.main(["--batch", "0"])
    assert "--batch: must be at least 1, not 0" in capsys.readouterr().err
