"""The committed table of what the compiler says lists the variants that exist."""

from __future__ import annotations

import json
import sys

import pytest

from bench import aot
from bench.aot import SHARED_MEMORY_LIMIT, TABLE, programs_per_sm
from bench.variants import op_names, variants_of


def test_the_committed_table_lists_exactly_the_variants_that_exist() -> None:
    rows = json.loads(TABLE.read_text())["rows"]
    listed = sorted((row["kernel"], row["name"], row["cc"]) for row in rows)
    variants = [v for op in op_names() for v in variants_of(op)]
    wanted = sorted((v.kernel, v.name, cc) for v in variants for cc in v.ccs)
    assert listed == wanted, "python -m bench.aot --save, then python -m bench.report"


def test_nothing_in_it_spills_and_everything_fits() -> None:
    for row in json.loads(TABLE.read_text())["rows"]:
        assert row["spill_bytes"] == row["stack_bytes"] == 0, row
        assert row["shared_bytes"] <= SHARED_MEMORY_LIMIT[row["cc"]], row
        assert row["programs_per_sm"] >= 1, row
        assert row["warp_share"] == row["programs_per_sm"] * row["num_warps"] / 64


@pytest.mark.parametrize(
    ("cc", "registers", "shared", "warps", "wanted"),
    [
        (80, 32, 0, 8, 8),  # all 64 warps
        (80, 16, 0, 1, 32),  # the hardware's own limit
        (80, 255, 0, 4, 2),  # registers: 8 warps of 8,192
        (90, 33, 0, 8, 6),  # registers come in eights: 40 leave 51 warps, 48 in whole groups of four
        (80, 32, 60 * 1024, 4, 2),  # shared memory: 61 of 164 KiB each
        (90, 32, 60 * 1024, 4, 3),  # 61 of 228
    ],
)
def test_programs_that_an_sm_holds(cc: int, registers: int, shared: int, warps: int, wanted: int) -> None:
    assert programs_per_sm(cc, registers, shared, warps) == wanted


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--kernel", "nosuch"], "no kernel is called nosuch; choose from adamw_ema, add_noise"),
        (["--jobs", "0"], "--jobs: must be at least 1, not 0"),
        (["--jobs", "many"], "--jobs: must be a whole number, not 'many'"),
        (["--save", "--cc", "90"], "leave --kernel and --cc out"),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_rule(
    arguments: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["aot", *arguments])
    with pytest.raises(SystemExit) as stop:
        aot.main()
    assert stop.value.code == 2
    assert wanted in capsys.readouterr().err
