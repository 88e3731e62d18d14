"""`diagnose mixture`: all figures, numbers and the page from short trainings, and a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from erdfast import diagnose
from erdfast.cells import Check, read_cell, rounded
from erdfast.diagnostics import mixture, toy_cells, toy_findings
from erdfast.diagnostics.mixture import SECTIONS, Mixture, diagnose_mixture, planned_cells
from erdfast.diagnostics.toy_findings import CLAIMS
from erdfast.diagnostics.toy_training import ToyNetwork
from tests.runs import refused, single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def run_here(
    run_cell: Callable[..., dict[str, Any]], cells: Sequence[Any], folder: Path, workers: int, check: Check
) -> int:
    """In place of processes, which would take longer to start than all trainings take."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if read_cell(folder, cell, check) is None]
    for cell in missing:
        (folder / f"{cell.name}.json").write_text(json.dumps(rounded(run_cell(cell))))
    return len(missing)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One process, two targets, a narrow network, a few points; how many cells each run trains."""
    trained = []

    def run(*arguments: Any) -> int:
        trained.append(run_here(*arguments))
        return trained[-1]

    sizes = {"iterations": 5, "per_mode": 6, "kernel_per_mode": 3, "gram_per_mode": 2}
    monkeypatch.setattr(mixture, "run_missing", run)
    monkeypatch.setattr(mixture, "QUICK", sizes)
    for module in (mixture, toy_findings):
        monkeypatch.setattr(module, "PROCESSES", ("flow",))
        monkeypatch.setattr(module, "TARGETS", ("eps", "u"))
    monkeypatch.setattr(toy_cells, "ToyNetwork", lambda scale: ToyNetwork(scale, width=8))
    return trained


def test_figures_numbers_and_page(small, tmp_path, capsys):
    arguments = ["mixture", "--out", str(tmp_path), "--quick"]
    assert diagnose.main(arguments) == 0
    page = tmp_path / "index.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {page}"
    text = page.read_text(encoding="utf-8")
    for section in SECTIONS:
        name = f"{section.name}_flow"
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        numbers = json.loads((tmp_path / f"{name}.json").read_text())
        assert list(numbers) == ["about", "eps", "u"]
        assert f"{name}.png" in text
    assert text.count("data:image/png;base64,") == len(SECTIONS)
    assert "--quick" in text
    assert "So few iterations" in text
    for claim in CLAIMS:
        assert claim.says.replace("'", "&#x27;") in text
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert set(claims["excess"]["flow"]["eps"]) == {"value", "holds"}
    losses = json.loads((tmp_path / "loss_flow.json").read_text())["u"]
    assert {len(curve) for curve in losses.values()} == {40}


def test_a_run_that_was_stopped_goes_on(small, tmp_path, monkeypatch):
    pages: list[list[dict[str, Any]]] = []
    monkeypatch.setattr(mixture, "write_page", lambda cells, out, about: pages.append(cells))
    monkeypatch.setattr(mixture, "TARGETS", ("u",))
    options = Mixture(out=tmp_path, quick=True)
    diagnose_mixture(options, {})
    next((tmp_path / "cells").glob("flow-u-bin3*")).unlink()
    diagnose_mixture(options, {})
    diagnose_mixture(options, {})
    assert small == [6, 1, 0]
    assert pages[0] == pages[1] == pages[2]
    assert [cell["part"] for cell in pages[0]] == [None, 0, 1, 2, 3, 4]


def test_all_of_the_toy_is_planned():
    for quick in (False, True):
        cells = planned_cells(Mixture(out=Path("x"), quick=quick, seed=3, time_scale=2.0))
        assert len({cell.name for cell in cells}) == len(cells) == 3 * 4 * 6
        assert {(cell.seed, cell.time_scale, cell.batch) for cell in cells} == {(3, 2.0, 512)}
        assert {cell.part for cell in cells} == {None, 0, 1, 2, 3, 4}
        assert {cell.iterations for cell in cells} == ({100} if quick else {2000})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "0"], "workers is 0; it must be at least 1"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--time-scale", "0"], "time_scale is 0.0; it must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message, capsys, tmp_path):
    assert message in refused(capsys, diagnose.main, ["mixture", "--out", tmp_path / "x", *options])
    assert not (tmp_path / "x").exists()
