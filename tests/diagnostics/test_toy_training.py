"""The toy's network and training, against the paper's numbers and a step written by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from erdfast import philox
from erdfast.diagnostics.toy_data import CORNERS, Task, held_out, toy_mixture
from erdfast.diagnostics.toy_training import ToyNetwork, ToyTraining
from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def small(seed: int = 0) -> ToyNetwork:
    torch.manual_seed(seed)
    return ToyNetwork(width=16)


def training(network: ToyNetwork, target: str = "eps", **options: Any) -> ToyTraining:
    own: dict[str, Any] = {"batch": 32, "seed": 7}
    return ToyTraining(network, Task("flow", target), **(own | options))


def values(network: ToyNetwork) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_network_is_the_papers():
    network = ToyNetwork()
    assert [tuple(p.shape) for p in network.parameters() if p.ndim == 2] == [
        (256, 66),
        (256, 256),
        (256, 256),
        (2, 256),
    ]
    x, t = torch.randn(5, 2, 1, 1), torch.rand(5)
    hidden = network.hidden(x, t)
    assert hidden.shape == (5, 256)
    assert network(x, t).shape == x.shape
    torch.testing.assert_close(network(x, t).flatten(1), hidden @ network.readout.weight.T + network.readout.bias)
    faster = ToyNetwork(time_scale=10.0)
    faster.load_state_dict(network.state_dict())
    torch.testing.assert_close(faster(x, t), network(x, 10.0 * t))
    assert not torch.equal(faster(x, t), network(x, t))


def test_a_step_is_one_of_adam_on_the_plain_squared_error():
    network = small()
    by_hand = copy.deepcopy(network)
    training(network, "u").run(2)
    optimizer = torch.optim.Adam(by_hand.parameters(), 1e-3)
    task, data = Task("flow", "u"), toy_mixture(7)
    for step in range(2):
        ids = torch.arange(32 * step, 32 * step + 32)
        x0 = data.gather(ids).x
        t = task.process.sample_time(32, seed=7, step=0, rank_offset=32 * step)
        eps = philox.normal(7, step, torch.arange(32), 2).float().view_as(x0)
        column = t.view(-1, 1, 1, 1)
        pred = by_hand((1 - column) * x0 + column * eps, t)
        optimizer.zero_grad()
        (pred - (eps - x0)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(values(network), values(by_hand), rtol=0, atol=2e-5)
    assert float((values(network) - values(small())).abs().max()) > 1e-3


def test_a_run_does_not_depend_on_how_it_is_cut():
    whole, cut = small(), small()
    training(whole).run(7)
    in_parts = training(cut)
    in_parts.run(3)
    in_parts.run(3)
    assert in_parts.step == 3
    in_parts.run(7)
    assert torch.equal(values(whole), values(cut))
    other = small()
    training(other, seed=8).run(7)
    assert not torch.equal(values(whole), values(other))


def test_times_and_samples_are_those_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        ToyTraining, "_update", lambda self, x0, c: (seen.append((x0, c)), setattr(self, "step", self.step + 1))
    )
    training(small(), interval=(0.4, 0.6)).run(150)
    times = torch.stack([c.time for _, c in seen])
    assert times.shape == (150, 32)
    assert 0.4 <= float(times.min()) < 0.405
    assert 0.595 < float(times.max()) <= 0.6
    assert len(times.unique()) > 4500  # no batch is drawn twice
    x0 = torch.stack([x0 for x0, _ in seen]).view(-1, 2)
    assert len(x0.unique(dim=0)) == 150 * 32
    assert float((x0[:, None] - torch.tensor(CORNERS)).norm(dim=2).min(1).values.max()) < 1.6


def test_training_brings_the_network_closer_to_the_best_prediction():
    points = held_out(Task("flow", "x0"), 0.2, 100, 7)
    network = small()

    def distance() -> float:
        with torch.no_grad():
            return float((network(points.x_t, points.time).double() - points.best).square().mean())

    before = distance()
    training(network, "x0", batch=128).run(300)
    assert distance() < 0.1 * before
