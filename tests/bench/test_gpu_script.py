"""bench/gpu.sh: the stages that it names exist, and run at toy size."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.benchmarks import benchmark_names

ROOT = Path(__file__).parents[2]


def gpu(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env | {"PYTHON": sys.executable}, cwd="/")


def test_lists_its_stages() -> None:
    listed = [line.split()[0] for line in gpu().stdout.splitlines()]
    assert {name.removeprefix("bench.") for name in benchmark_names()} < set(listed)
    assert {"check", "tests_ops", "tests_kernels", "memcheck", "bench_sampler", "loader", "digits"} < set(listed)
    assert {f"step_{m}{small}" for m in ("uvit_h2", "dit_xl2", "dit_b2") for small in ("", "_small")} < set(listed)
    wrong = gpu("conv")
    assert wrong.returncode == 2
    assert "no stage is called conv; choose from:\ncheck" in wrong.stderr


def test_the_wheels_in_its_header_cover_what_it_installs() -> None:
    text = (ROOT / "bench" / "gpu.sh").read_text()
    header = " ".join(line.lstrip("# ") for line in text.split("set -euo pipefail")[0].splitlines())
    installed = re.search(r'"\$\{pip\[@\]\}" (tyro.*?)\n  "\$', text, re.DOTALL)
    assert installed is not None
    assert set(installed[1].replace("\\", "").split()) < set(header.split())


@pytest.mark.parametrize(
    ("stage", "wanted"),
    [
        ("check", "ceilings can be measured"),
        ("bench_add_noise", "x eager"),
        ("tests_kernels", "test_add_noise.py"),
        ("loader", "ran: loader, gather, hdf5"),
        ("weighting", "results.json, weighting_excess.png"),
        ("compare_kernels_dit_xl2", "  ours_compile "),
        ("accuracy_uvit_h2", "  worst "),
    ],
)
def test_a_stage_runs_at_toy_size(stage: str, wanted: str, tmp_path: Path) -> None:
    done = gpu("--dry-run", stage, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert wanted in done.stdout
    said = re.sub(r"\d+%\|.*", "", done.stdout)  # without progress bars
    assert not re.search(r"bytes_per_s|[GT]B/s|FLOP/s|%", said)  # no rates of toy sizes
    assert f"== {stage}: all well" in done.stdout
    assert wanted in (tmp_path / f"{stage}.log").read_text()


def test_a_command_that_takes_too_long_is_stopped() -> None:
    done = gpu("--dry-run", "check", LIMIT_S="0.2")
    assert done.returncode == 1
    assert "stopped after 0.2 s" in done.stdout
    assert "== check: not all well" in done.stdout
