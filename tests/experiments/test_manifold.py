"""The manifold experiment: cells are functions of their settings, runs go on, results are summed up as they are."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from erdfast.cells import read_cell, rounded, run_missing
from erdfast.diagnostics.linear_theory import k_star
from erdfast.diagnostics.manifold_data import MANIFOLDS
from erdfast.experiments import manifold, manifold_cells
from erdfast.experiments.manifold_cells import (
    LOSSES,
    Cell,
    Mlp,
    make_process,
    prediction_errors,
    run_cell,
    sample_errors,
)
from erdfast.experiments.manifold_report import METRICS, over_seeds, render, write_report
from erdfast.process import Process
from tests.runs import refused, single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def cell(**options: Any) -> Cell:
    own: dict[str, Any] = {"manifold": "subspace", "dim": 2, "network": "mlp", "loss": "u", "k": None, "seed": 0}
    own |= {"ambient": 16, "steps": 12, "batch": 16}
    return Cell(**(own | options))


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured on few samples."""
    monkeypatch.setattr(manifold_cells, "HELD_OUT", 32)
    monkeypatch.setattr(manifold_cells, "SAMPLED", 32)


class Best(torch.nn.Module):
    """The best possible network for a target: E[y | x_t] by the known posterior."""

    num_classes = 0

    def __init__(self, data, process: Process) -> None:
        super().__init__()
        self.data, self.process, self.input_shape = data, process, (data.ambient, 1, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        c = self.process.coefficients(time.double(), dtype=torch.float64)
        best = self.data.posterior_mean(x.flatten(1), c.alpha.clamp(min=1e-4), c.sigma)  # pure noise says nothing
        eps = (x.flatten(1).double() - c.alpha[:, None] * best) / c.sigma[:, None]
        return (c.c_x[:, None] * best + c.c_eps[:, None] * eps).float().view_as(x)


@pytest.mark.parametrize("k", [0.25, 0.9])
@pytest.mark.parametrize("name", MANIFOLDS)
def test_a_perfect_network_has_no_excess(name, k):
    settings = cell(manifold=name)
    data, process = MANIFOLDS[name](16, 2, 0), make_process("u", k)
    errors = prediction_errors(settings, data, Best(data, process), process)
    assert errors["x0_error"] == pytest.approx(errors["bayes"], rel=1e-3)
    assert max(errors[key] for key in ("x0_excess", "x0_excess_middle", "u_excess")) < 1e-4
    if name == "subspace":  # d sigma^2/(alpha^2 + sigma^2), over the times
        t = (torch.arange(32) + 0.5) / 32
        assert errors["bayes"] == pytest.approx(float(2 * (t**2 / (t**2 + (1 - t) ** 2)).mean()), rel=0.05)
    samples = sample_errors(settings, data, Best(data, process), process)
    assert samples["off_manifold"] < 0.05
    assert samples["frechet"] < 0.05


def test_a_network_that_says_nothing_is_measured_as_that():
    """0 for k*x0 - (1-k)*eps at k = 0.5 is x0_hat = x_t/(alpha + sigma)*... = x_t on the straight path."""
    data, process = MANIFOLDS["subspace"](16, 2, 0), make_process("u", 0.5)
    network = Mlp(16)
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    errors = prediction_errors(cell(), data, network, process)
    t = (torch.arange(32) + 0.5) / 32
    wanted = (t.square() * (2 + 16)).mean()  # |x_t - x0|^2 = t^2 |eps - x0|^2
    assert errors["x0_error"] == pytest.approx(float(wanted), rel=0.05)


@pytest.mark.parametrize("options", [{}, {"network": "linear", "loss": "target"}, {"manifold": "torus", "k": 1.0}])
@pytest.mark.usefixtures("coarse")
def test_a_cell_is_a_function_of_its_settings(options):
    first, again = run_cell(cell(**options)), run_cell(cell(**options))
    assert first == again
    assert first != run_cell(cell(seed=1, **options))
    trace = first["k_trace"]
    assert (trace == []) == ("k" in options)
    if trace:
        assert trace[0] == [0.0, 0.5]
        assert trace[-1][0] == 12.0
        assert first["k_end"] != 0.5
    else:
        assert first["k_end"] == pytest.approx(options["k"])
    assert METRICS.keys() <= first.keys()
    assert first["bayes"] <= first["x0_error"]


@pytest.mark.usefixtures("coarse")
def test_a_linear_layer_learns_the_k_of_the_theory():
    """The whole chain at work: data, noise, loss, gradient of w_k, optimiser; theorem 3.2 is its answer."""
    found = run_cell(cell(network="linear", loss="target", dim=8, steps=500, batch=64))
    assert found["k_end"] == pytest.approx(k_star(16, 8), abs=0.03)


def test_the_plan_has_every_cell_once():
    for quick in (False, True):
        cells = list(manifold.planned_cells(quick=quick))
        assert len({c.name for c in cells}) == len(cells)
        assert all(c.loss in LOSSES and c.manifold in MANIFOLDS for c in cells)
        for c in cells:
            MANIFOLDS[c.manifold](c.ambient, c.dim, c.seed)  # has room
    assert {c.seed for c in manifold.planned_cells(quick=False)} == set(manifold.SEEDS)


# ---------------------------------------------------------------------- runs


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """A plan of three cells of a few steps."""
    cells = [cell(seed=0), cell(seed=1), cell(k=0.0)]
    monkeypatch.setattr(manifold, "planned_cells", lambda *, quick: iter(cells))
    return cells


def test_results_and_what_is_made_of_them(tmp_path, small, capsys):
    assert manifold.main(["--out", str(tmp_path / "out"), "--workers", "1"]) == 0
    assert f"written: {tmp_path}/out/results.json" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["cells", "manifold.md", "manifold.png", "results.json"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(results["cells"]) == 3
    assert {"commit", "torch", "command"} <= results["environment"].keys()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
    for found, wanted in zip(results["cells"], small, strict=True):
        assert {name: found[name] for name in dataclasses.asdict(wanted)} == dataclasses.asdict(wanted)
    text = (tmp_path / "out" / "manifold.md").read_text()
    learnt = over_seeds(results["cells"][:2], "k_end")
    assert f"{learnt[0]:.3f} (+-{learnt[1]:.3f})" in text
    assert "### subspace, d = 2" in text
    # Once more: nothing is trained, and nothing changes but the day.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert run_missing(manifold.run_cell, small, tmp_path / "out" / "cells", 1) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == before


def write_made_up(folder: Path, settings: Cell, **changed: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{settings.name}.json"
    path.write_text(json.dumps(rounded(dataclasses.asdict(settings)) | changed))
    return path


def test_what_is_there_is_kept_and_what_does_not_fit_is_not(tmp_path):
    settings = cell(k=k_star(64, 4))  # 0.9411764705882353: kept in six digits
    assert read_cell(tmp_path, settings) is None
    write_made_up(tmp_path, settings, x0_error=1.5)
    found = read_cell(tmp_path, settings)
    assert found is not None
    assert found["x0_error"] == 1.5
    assert read_cell(tmp_path, dataclasses.replace(settings, seed=1)) is None
    for changed in ({"steps": 13}, {"k": 0.5}, {"ambient": 32}):
        write_made_up(tmp_path, settings, **changed)
        assert read_cell(tmp_path, settings) is None
    path = write_made_up(tmp_path, settings)
    path.write_text(path.read_text()[:-5])
    assert read_cell(tmp_path, settings) is None


def made_up(**options: Any) -> dict[str, Any]:
    values = dict.fromkeys(METRICS, 1.25) | {"bayes": 0.5, "k_end": 0.75, "k_trace": []}
    return dataclasses.asdict(cell(**options)) | values


ENVIRONMENT = dict.fromkeys(("command", "erdfast", "torch", "device", "commit"), "x")


def test_tables_have_means_and_spread_over_seeds(tmp_path):
    cells = [made_up(seed=seed) | {"k_end": k} for seed, k in ((0, 0.7), (1, 0.8))]
    cells += [made_up(k=1.0) | {"off_manifold": 1e-15}]
    results = {"date": "2026-01-01", "environment": ENVIRONMENT, "cells": cells}
    text = render(results)
    assert "| subspace | 2 | 2 | 0.889 | 0.889 | 0.750 (+-0.071) |" in text
    assert "| 1.000 | 1.25 | 1.25 | 1.25 | 1.25 | 0 | 1.25 |" in text
    assert "The least possible x0 error is 0.5 " in text
    write_report(results, tmp_path)
    assert (tmp_path / "manifold.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--out", "x", "--workers", "0"], ["workers is 0", "at least 1"]),
        (["--workers", "2"], ["--out"]),
        (["--out", "x", "--fast"], ["--fast"]),
    ],
)
def test_bad_options_are_one_line(capsys, monkeypatch, tmp_path, arguments, parts):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, manifold.main, arguments)
    assert all(part in line for part in parts), line
    assert list(tmp_path.iterdir()) == []
