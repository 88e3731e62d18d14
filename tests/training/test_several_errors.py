"""An error that all processes meet is one line; one that a single process meets is not lost."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, int]], Path]:
    """Stderr of all processes, their exit codes by case, and the folder."""
    folder = tmp_path_factory.mktemp("errors")
    (folder / "taken" / "checkpoints").mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "training" / "erring_ranks.py"), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "lines", "codes"),
    [
        ("alike", ["alike"], (2, 2)),
        ("alone", ["alone"], (0, 2)),
        ("different", ["different 0", "different 1"], (2, 2)),
        ("waited for", ["not there"], (1, 2)),
        ("first", ["in the first"], (2, 2)),
        ("bad option", ["batch_size is 0; it must be at least 1 and below 2^31"], (2, 2)),
        ("unknown option", ["Unrecognized options: --no-such-option"], (2, 2)),
        ("taken", ["{folder}/taken already holds a run (checkpoints): continue it with"], (2, 2)),
        ("wandb", ["logging to Weights & Biases needs wandb: run `pip install wandb`"], (2, 2)),
    ],
)
def test_error_lines_of_two_processes(said, case, lines, codes):
    text, found, folder = said
    errors = sorted(re.findall(rf"^{case}: error: (.*)$", text, flags=re.MULTILINE))
    assert len(errors) == len(lines), errors
    for error, line in zip(errors, lines, strict=True):
        assert error.startswith(line.format(folder=folder))
    assert tuple(codes_of[case] for codes_of in found) == codes
    assert "Traceback" not in text
    assert not (folder / "new").exists()
