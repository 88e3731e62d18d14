"""Every variant of every kernel compiles for A100 and H100 without spills; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_aot(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "bench.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.parametrize("kernel", ["add_noise", "diffusion_loss", "reduction"])
def test_no_variant_spills(kernel):
    done = run_aot("--json", "--kernel", kernel)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert {r["cc"] for r in reports} == {80, 90}
    for r in reports:
        assert r["spill_bytes"] == 0, r
        assert r["stack_bytes"] == 0, r
        assert 0 < r["registers"] <= 255, r


def test_aligned_samples_are_read_in_16_byte_pieces():
    done = run_aot("--json", "--kernel", "add_noise", "--cc", "80")
    widths = {r["name"]: r["widest_load_bytes"] for r in map(json.loads, done.stdout.splitlines())}
    assert widths["fp32 key"] == 16
    assert widths["bf16 key"] == 8
    assert widths["fp32 key odd n"] == 4


def test_refuses_the_interpreter_and_unknown_kernels():
    interpreted = run_aot(TRITON_INTERPRET="1")
    assert interpreted.returncode != 0 and "TRITON_INTERPRET is set" in interpreted.stderr
    unknown = run_aot("--kernel", "conv")
    assert unknown.returncode != 0 and "choose from add_noise, diffusion_loss" in unknown.stderr
