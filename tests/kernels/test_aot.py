"""Every variant of every kernel compiles for A100 and H100 without spills; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.variants import op_names

ROOT = Path(__file__).parents[2]


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "bench.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    done = run_aot("--json", "--jobs", str(os.cpu_count() or 1))
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_file_has_variants():
    launched = {p.stem for p in (ROOT / "kernels").glob("*.py")} - {"layout", "philox"}
    assert launched == set(op_names())


def test_no_variant_spills(reports):
    assert {"add_noise", "diffusion_loss", "add_partials", "scale"} <= {r["kernel"] for r in reports}
    assert {r["cc"] for r in reports} == {80, 90}
    for r in reports:
        assert r["spill_bytes"] == 0, r
        assert r["stack_bytes"] == 0, r
        assert 0 < r["registers"] <= 255, r


@pytest.mark.parametrize("kernel", ["add_noise", "diffusion_loss"])
def test_aligned_samples_are_read_in_wide_pieces(kernel, reports):
    widths = {(r["name"], r["cc"]): r["widest_load_bytes"] for r in reports if r["kernel"] == kernel}
    for cc in (80, 90):
        assert widths["fp32 key", cc] == 16
        assert widths["bf16 key", cc] == 8
        assert widths["fp32 key odd n", cc] == 4


def test_refuses_the_interpreter_and_unknown_kernels():
    interpreted = run_aot(TRITON_INTERPRET="1")
    assert interpreted.returncode != 0
    assert "TRITON_INTERPRET is set" in interpreted.stderr
    unknown = run_aot("--kernel", "conv")
    assert unknown.returncode != 0
    assert f"choose from {', '.join(op_names())}" in unknown.stderr
