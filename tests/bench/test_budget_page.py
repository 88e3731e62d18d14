"""The budget of a step adds up, names its gaps from the largest, and takes a profile where there is one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import budget_page
from bench.budget import step_budget
from bench.profile_step import class_of
from bench.roofline import MACHINES
from erdfast import presets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "h200"
    path.mkdir()
    sheet = MACHINES["h200"]
    rates = {"copy_bytes_per_s": sheet.bytes_per_s / 2, "matmul_flops_per_s": {"bfloat16": sheet.flops_per_s / 2}}
    row = {"pass": "both", "share": 0.5, "flops": 0, "fields": {"dtype": "bfloat16"}}
    (path / "modulated_norm.json").write_text(json.dumps({"op": "modulated_norm", "ceilings": rates, "rows": [row]}))
    return path


def rows_of(page: str, model: str) -> dict[str, list[str]]:
    section = page.split(f"## {model}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return {name: rest for name, *rest in cells[2:]}


KERNELS = {
    "linear": "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN",
    "attention": "attention_forward_kernel",
    "modulated_norm": "modulated_norm_kernel",
    "adamw_ema": "adamw_ema_kernel",
    "diffusion_loss": "diffusion_loss_kernel",
    "gelu": "gelu_kernel",
    "residual": "triton_poi_fused_add_3",
    "bias": "triton_red_fused_sum_2",
    "sum": "at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
    "skip_linear": "triton_poi_fused_cat_1",
    "casts": "at::native::direct_copy_kernel_cuda",
}
"""What a profile calls the kernels of each op."""


def test_an_op_is_in_the_class_in_which_a_profile_finds_it() -> None:
    works = step_budget(presets.model_config("uvit_h2"), 2)
    assert {work.op for work in works} == KERNELS.keys()
    for work in works:
        found = class_of(KERNELS[work.op])
        assert budget_page.JOINED.get(found, found) == budget_page._class(work)


def test_a_predicted_budget_adds_up(folder: Path) -> None:
    page = budget_page.budget_page(folder)
    assert page is not None
    for model in budget_page.NETWORKS:
        *classes, step = rows_of(page, model).values()
        for column in (0, 1, 3):
            assert sum(float(row[column]) for row in classes) == pytest.approx(float(step[column]), abs=0.05)
        gaps = [float(row[3]) for row in classes]
        assert gaps == sorted(gaps, reverse=True)
        assert all(row[2] == "" for row in classes)
        assert float(step[1]) > float(step[0]) > 0
    assert page.count("images/s predicted") == len(budget_page.NETWORKS)


def test_a_profile_takes_the_place_of_the_prediction(folder: Path) -> None:
    classes = {"matrix products": 300.0, "attention": 70.0, "elementwise": 30.0, "copies": 5.0, "gaps": 9.0}
    profile = {"rows": [{"ms": 400.0, "classes": classes}]}  # some ran side by side
    (folder / "profile_uvit_h2_128_ours_compile.json").write_text(json.dumps(profile))
    page = budget_page.budget_page(folder)
    assert page is not None
    rows = rows_of(page, "uvit_h2")
    assert [rows[name][2] for name in ("matrix products", "elementwise and copies", "gaps", "step")] == [
        "300.00", "35.00", "9.00", "400.00",
    ]  # fmt: skip
    assert float(rows["gaps"][3]) == 9.0
    assert float(rows["attention"][3]) == pytest.approx(70 - float(rows["attention"][0]), abs=0.01)
    assert re.search(r"## uvit_h2\n.*?320 images/s measured", page, re.DOTALL)
    assert page.count("images/s predicted") == len(budget_page.NETWORKS) - 1


def test_devices_without_a_data_sheet_or_rates_have_none(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "x86"
    folder.rename(other)
    assert budget_page.budget_page(other) is None
    (tmp_path / "a100").mkdir()
    assert budget_page.budget_page(tmp_path / "a100") is None


@pytest.mark.parametrize("rows", [[], [{"ms": 1.0, "classes": {}}] * 2, [{"ms": None, "classes": {}}], [{"ms": 1.0}]])
def test_a_damaged_profile_is_named(folder: Path, rows: list[dict[str, object]]) -> None:
    (folder / "profile_dit_b2_128_ours_compile.json").write_text(json.dumps({"op": "profile_step", "rows": rows}))
    with pytest.raises(ValueError, match=r"h200/profile_dit_b2_128_ours_compile.json is damaged"):
        budget_page.budget_page(folder)
