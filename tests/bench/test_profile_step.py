"""The profile of a training step: kernels find their class, and the table and the file hold what was measured."""

import json
from pathlib import Path

import pytest

from bench import profile_step
from bench.report import render_result


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_NTN", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "matrix products"),
        ("attention_backward_kernel", "attention"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("adamw_ema_kernel", "optimiser"),
        ("diffusion_loss_kernel", "noise and loss"),
        ("modulated_norm_grad_kernel", "norm and residual"),
        ("triton_per_fused_native_layer_norm_backward_3", "norm and residual"),
        ("triton_poi_fused_add_gelu_mm_2", "elementwise"),
        ("gelu_grad_kernel", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
    ],
)
def test_class_of(kernel: str, expected: str) -> None:
    assert profile_step.class_of(kernel) == expected


def test_gaps_are_what_no_kernel_fills() -> None:
    row = profile_step.summarize({"adamw_ema_kernel": (1.0, 1.0), "gemm": (6.0, 40.0)}, step_ms=10.0)
    assert row["classes"] == {"matrix products": 6.0, "gaps": 3.0, "optimiser": 1.0}
    assert row["launches"] == 41
    assert [entry["kernel"] for entry in row["top"]] == ["gemm", "adamw_ema_kernel"]


def test_a_step_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model uvit_tiny --batch 2 --side ours --steps 1 --warmup 1 --results"
    profile_step.main([*arguments.split(), str(tmp_path)])
    (path,) = tmp_path.rglob("profile_uvit_tiny_2_ours.json")
    result = json.loads(path.read_text())
    row = result["rows"][0]
    assert sum(row["classes"].values()) == pytest.approx(max(row["ms"], sum(row["classes"].values())))
    assert {"matrix products", "optimiser", "gaps"} <= set(row["classes"])
    assert "uvit_tiny batch 2 ours" in capsys.readouterr().out
    assert "| matrix products |" in render_result(result)
