"""What is measured on the toy, on networks of which the answer is known."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erdfast.diagnostics import toy_cells, toy_measures
from erdfast.diagnostics.effective_rank import effective_rank
from erdfast.diagnostics.ntk import cosines, eigenvalues, ntk, traced
from erdfast.diagnostics.toy_cells import ToyCell, run_cell
from erdfast.diagnostics.toy_data import Task, bayes_floor, held_out, toy_mixture
from erdfast.diagnostics.toy_measures import LEVELS, bin_interval
from erdfast.diagnostics.toy_training import ToyNetwork
from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


class Best:
    """The best possible network, `off` by that much in every element; its features are x_t, turned into 6 dimensions
    and shifted."""

    def __init__(self, task: Task, off: float = 0.0) -> None:
        self.task, self.off = task, off
        self.turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0))).Q[:2]

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        c = self.task.coefficients(time)
        return toy_mixture(0).target_mean(x, c.alpha, c.sigma, c.c_x, c.c_eps) + self.off

    def hidden(self, x: Tensor, time: Tensor) -> Tensor:
        return x.flatten(1) @ self.turn + 4.0


def best(task: Task, off: float = 0.0) -> Any:
    return Best(task, off)


def test_the_bins_part_the_levels():
    parts = [[at for at in LEVELS if low < at < high] for low, high in map(bin_interval, range(5))]
    assert [len(part) for part in parts] == [8] * 5
    assert [at for part in parts for at in part] == list(LEVELS)
    assert bin_interval(None) == (0.0, 1.0)


@pytest.mark.parametrize("target", ["eps", "u"])
def test_the_best_network_has_no_excess_and_the_floor_for_its_error(target):
    task = Task("vp", target)
    found = toy_measures.errors(best(task), task, bin_interval(2), 500, 0)
    assert found["time"] == [at for at in LEVELS if 0.4 < at < 0.6]
    assert max(found["excess"]) < 1e-12
    floor = bayes_floor(task, torch.tensor(found["time"]), 0).tolist()
    assert found["loss"] == pytest.approx(floor, rel=0.1)
    off = toy_measures.errors(best(task, 0.3), task, bin_interval(2), 500, 0)
    assert off["excess"] == pytest.approx([0.09] * 8, rel=1e-6)
    assert toy_measures.floors(task, 0)[16:24] == pytest.approx(floor, rel=1e-6)


@pytest.mark.parametrize(("target", "power"), [("eps", 2.0), ("x0", 2 * 4.09)])
def test_what_is_predictable_and_what_is_not_make_up_the_target(target, power):
    found = toy_measures.phases(Task("gvp", target), 1000, 0)
    for phase in found:
        assert phase["signal"] ** 2 + phase["noise"] ** 2 == pytest.approx(power, rel=0.06)
    shares = [phase["contaminated"] for phase in found]
    assert (shares[0] > 0.9, shares[-1] > 0.9) == (target == "eps", target == "x0")
    clean = held_out(Task("gvp", target), 0.02, 1000, 0)
    noise = (clean.y - clean.best).flatten(1).norm(dim=1)
    assert shares[0] == pytest.approx(float((noise > clean.best.flatten(1).norm(dim=1)).double().mean()))
    assert len(found[0]["signals"]) == len(found[0]["noises"]) == 80


def test_features_that_are_the_input_have_its_geometry():
    """On flow: spread sqrt(4.09 (1-t)^2 + t^2); nearest means are linear, so a probe finds what can be found."""
    task = Task("flow", "x0")
    found = toy_measures.features(best(task), task, 800, 0)
    spreads = [(4.09 * (1 - t) ** 2 + t**2) ** 0.5 for t in toy_measures.FEATURE_TIMES]
    assert [part["spread"] for part in found] == pytest.approx([s / spreads[0] for s in spreads], rel=0.05)
    between = [4 * (1 - t) ** 2 / (4.09 * (1 - t) ** 2 + t**2) for t in toy_measures.FEATURE_TIMES]
    assert [part["between"] for part in found] == pytest.approx(between, abs=0.03)
    for part in found:
        assert part["probe"] == pytest.approx(part["best"], abs=0.03)
        assert part["rank"] == pytest.approx(2.0, abs=0.01)
    assert found[0]["best"] == 1.0
    assert 0.25 < found[-1]["best"] < 0.45
    # The plane of the two components holds all there is: distances from the first time's mean are kept.
    points = held_out(task, 0.9, 800, 0)
    shown = torch.cat([torch.arange(40) + 800 * mode for mode in range(4)])
    center = held_out(task, 0.1, 800, 0).x_t.flatten(1).mean(0)
    wanted = (points.x_t.flatten(1) - center).norm(dim=1)[shown]
    torch.testing.assert_close(torch.tensor(found[-1]["x"]).norm(dim=0), wanted, rtol=1e-4, atol=1e-4)
    assert found[-1]["mode"] == points.mode[shown].tolist()


def test_kernels_are_those_of_torch_func(monkeypatch):
    monkeypatch.setattr(toy_measures, "KERNEL_TIMES", (0.05, 0.6))
    monkeypatch.setattr(toy_measures, "COUPLING_TIMES", (0.1, 0.9))
    torch.manual_seed(0)
    network, task = ToyNetwork(width=12), Task("flow", "eps")
    start = copy.deepcopy(network)
    nn.init.normal_(network.readout.weight)
    found = toy_measures.kernels(network, start, task, 3, 0, 2)
    for name, measured in (("trained", network), ("start", start)):
        for number, at in enumerate((0.05, 0.6)):
            points = held_out(task, at, 3, 0)
            values = eigenvalues(ntk(measured, (points.x_t, points.time)))
            assert found[name]["top"][number] == pytest.approx(values[:3].tolist(), rel=1e-4)
            assert found[name]["rank"][number] == pytest.approx(float(effective_rank(values)), rel=1e-4)
    points = held_out(task, 0.95, 2, 0)
    gram = cosines(traced(ntk(network, (points.x_t, points.time))))
    assert found["grams"][1]["time"] == 0.95
    torch.testing.assert_close(torch.tensor(found["grams"][1]["gram"]), gram, rtol=0, atol=1e-3)
    pairs = [float(gram[2 * mode, 2 * mode + 1]) for mode in range(4)]
    assert found["grams"][1]["within"] == pytest.approx(sum(pairs) / 4, abs=1e-4)
    rest = (float(gram.sum()) - 8 - 2 * sum(pairs)) / 48
    assert found["grams"][1]["between"] == pytest.approx(rest, abs=1e-4)
    jacobians = [ntk(network, (p.x_t, p.time)) for p in (held_out(task, at, 2, 0) for at in (0.1, 0.9))]
    norms = [float(own.norm()) for own in jacobians]
    early, late = (held_out(task, at, 2, 0) for at in (0.1, 0.9))
    joint = ntk(network, (torch.cat([early.x_t, late.x_t]), torch.cat([early.time, late.time])))
    wanted = float(joint[:8, :, 8:].square().sum()) / (norms[0] * norms[1])
    assert found["coupling"]["cosine"][0] == pytest.approx([1.0, wanted], rel=1e-4)


def test_predictions_stand_beside_the_best_ones():
    task = Task("flow", "v")
    found = toy_measures.predictions(best(task, 0.1), task, 0)
    assert [part["time"] for part in found] == list(toy_measures.PREDICTION_TIMES)
    for part in found:
        assert part["distance"] == pytest.approx(0.1 * 2**0.5, rel=1e-6)
        difference = torch.tensor(part["network"]) - torch.tensor(part["best"])
        torch.testing.assert_close(difference, torch.full((2, 160), 0.1), rtol=1e-4, atol=1e-5)


def cell(**options: Any) -> ToyCell:
    own: dict[str, Any] = {"process": "flow", "target": "eps", "part": None, "seed": 0, "iterations": 10}
    own |= {"time_scale": 1.0, "per_mode": 16, "kernel_per_mode": 4, "gram_per_mode": 2, "batch": 16}
    return ToyCell(**(own | options))


def test_a_cell_is_a_function_of_its_settings():
    found = run_cell(cell())
    assert found == run_cell(cell())
    assert json.loads(json.dumps(found)) == found
    assert dataclasses.asdict(cell()).items() <= found.items()
    assert len(found["floors"]) == len(found["errors"]["loss"]) == 40
    assert len(found["kernels"]["start"]["rank"]) == 21
    assert found["kernels"]["start"] != found["kernels"]["trained"]
    assert run_cell(cell(time_scale=10.0))["errors"]["loss"] != found["errors"]["loss"]
    assert "early_errors" not in found


def test_a_cell_of_a_bin_is_measured_on_the_way_too(monkeypatch):
    trained: list[tuple[int, int]] = []
    original = toy_cells.ToyTraining.run

    def run(self, until: int) -> None:
        trained.append((self.step, until))
        assert self.interval == (0.4, 0.6)
        original(self, until)

    monkeypatch.setattr(toy_cells.ToyTraining, "run", run)
    found = run_cell(cell(part=2))
    assert trained == [(0, 2), (2, 10)]
    assert found["early_errors"]["time"] == found["errors"]["time"] == [at for at in LEVELS if 0.4 < at < 0.6]
    assert found["early_errors"]["excess"] != found["errors"]["excess"]
    assert "kernels" not in found


def test_no_two_cells_have_one_file():
    names = [
        cell(process=process, target=target, part=part, seed=seed, iterations=iterations, time_scale=scale).name
        for process in ("flow", "vp")
        for target in ("eps", "x0")
        for part in (None, 0, 4)
        for seed in (0, 1)
        for iterations in (1, 20)
        for scale in (1.0, 1000.0)
    ]
    assert len(set(names)) == len(names) == 96
