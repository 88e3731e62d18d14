"""One cell of the manifold experiment: train one network on one manifold with one target, and measure it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from erdfast.config import OptimizerConfig
from erdfast.diagnostics.manifold_data import MANIFOLDS, Manifold
from erdfast.evaluation.frechet import Gaussian
from erdfast.ops import NoiseKey, add_noise
from erdfast.process import Process
from erdfast.sampling import sample

from .training_loop import Examples, train

LOSSES = {
    "target": {"loss_space": "target"},
    "u": {"loss_space": "u", "kappa_clip": 0.05},
    "u_unclipped": {"loss_space": "u", "kappa_clip": 0.0},
}
"""Where the error is measured: as in k-Diff's theorem 3.2; in its algorithm 1 with the floor of D that table 4 has for
pixels; the same without a floor, as table 4 has it for latents."""
EMA_DECAY = 0.99
KNOWN_ENDS = 1e-9
"""A fixed k of 0 or 1 is this far from it: the target `k` is a sigmoid."""
TIME_WAVES = 16
"""Pairs of sine and cosine that tell the network the time."""
TIMES_MEASURED = 32
HELD_OUT, SAMPLED, SAMPLER_STEPS = 1024, 2048, 25
TRACED = 40
"""Points of a trajectory of k."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained."""

    manifold: str
    """subspace or torus."""
    dim: int
    """Intrinsic dimension d."""
    network: str
    """linear (one layer for all times, as in the theory) or mlp (three hidden layers, twice as wide as the data)."""
    loss: str
    """A name of LOSSES."""
    k: float | None
    """A fixed target, or None: learnt from 0.5."""
    seed: int
    """Of embedding, data, noise and weights."""
    ambient: int = 64
    """D."""
    steps: int = 1500
    """Optimiser steps on fresh samples."""
    batch: int = 256
    """Samples of each."""

    @property
    def name(self) -> str:
        """Of its file."""
        k = "learnt" if self.k is None else f"k{self.k:.4f}"
        return (
            f"{self.manifold}-d{self.dim:02d}-{self.network}-{self.loss}-{k}-{self.steps}x{self.batch}-seed{self.seed}"
        )


class Mlp(nn.Module):
    """SiLU layers on (x, waves of the time); seen by samplers as a network on D channels of one pixel."""

    num_classes = 0

    def __init__(self, ambient: int) -> None:
        super().__init__()
        self.input_shape, width = (ambient, 1, 1), 2 * ambient
        sizes = [ambient + 2 * TIME_WAVES, width, width, width]
        layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, ambient))
        frequencies = torch.exp(torch.linspace(0.0, math.log(100.0), TIME_WAVES))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, D, ...) and (B,) in [0, 1] => like x."""
        phases = time.float()[:, None] * self.get_buffer("frequencies")
        return self.layers(torch.cat([x.flatten(1), phases.sin(), phases.cos()], dim=1)).view_as(x)


class LinearLayer(nn.Module):
    """One matrix, whatever the time (k-Diff, eq. 2); zero at first."""

    num_classes = 0

    def __init__(self, ambient: int) -> None:
        super().__init__()
        self.input_shape = (ambient, 1, 1)
        self.weight = nn.Parameter(torch.zeros(ambient, ambient))

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, D, ...) => like x."""
        return (x.flatten(1) @ self.weight.T).view_as(x)


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"linear": LinearLayer, "mlp": Mlp}
OPTIMIZERS = {
    "linear": OptimizerConfig(lr=5e-3, k_lr=1e-2, betas=(0.9, 0.99), lr_schedule="cosine"),
    "mlp": OptimizerConfig(lr=2e-3, k_lr=1e-2, betas=(0.9, 0.99), lr_schedule="cosine", warmup_steps=50),
}
"""k needs its own rate in a run of this length: at the network's it would move by less than 1 in w_k."""


def make_process(loss: str, k: float | None) -> Process:
    """Flow with uniform times and the target `k`; trained if `k` is None."""
    start = 0.5 if k is None else min(max(k, KNOWN_ENDS), 1.0 - KNOWN_ENDS)
    process = Process("flow", "k", "constant", k_init=start, **LOSSES[loss])
    return process.requires_grad_(k is None)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and measure: a pure function of the cell."""
    torch.manual_seed(cell.seed)
    manifold = MANIFOLDS[cell.manifold](cell.ambient, cell.dim, cell.seed)
    network, process = NETWORKS[cell.network](cell.ambient), make_process(cell.loss, cell.k)
    trace = train_cell(cell, manifold, network, process)
    network.requires_grad_(False)
    process.requires_grad_(False)
    found: dict[str, Any] = dataclasses.asdict(cell) | {"k_end": float(process.target_values()["k"]), "k_trace": trace}
    return found | prediction_errors(cell, manifold, network, process) | sample_errors(cell, manifold, network, process)


def train_cell(cell: Cell, manifold: Manifold, network: nn.Module, process: Process) -> list[list[float]]:
    """Train both in place; they end as their averages. Returns (step, k) along the way where k is learnt."""
    x0s, times = training_data(cell, manifold, process)
    trace = [[0.0, float(process.target_values()["k"])]]

    def follow_k(done: int, _: object) -> None:
        if done % max(cell.steps // TRACED, 1) == 0:
            trace.append([float(done), float(process.target_values()["k"])])

    train(
        network,
        process,
        lambda step: Examples(x0s[step], times[step]),
        steps=cell.steps,
        seed=cell.seed,
        optimizer=OPTIMIZERS[cell.network],
        ema_decay=EMA_DECAY,
        after_step=follow_k if cell.k is None else None,
    )
    return trace if cell.k is None else []


def training_data(cell: Cell, manifold: Manifold, process: Process) -> tuple[Tensor, Tensor]:
    """(steps, B, D) samples and (steps, B) times, the same for every target: no sample is seen twice."""
    num = cell.steps * cell.batch
    x0 = manifold.draw(num, torch.Generator().manual_seed(1000 + cell.seed))
    times = process.sample_time(num, seed=cell.seed, step=0)
    return x0.unflatten(0, (cell.steps, cell.batch)), times.unflatten(0, (cell.steps, cell.batch))


@torch.no_grad()
def prediction_errors(cell: Cell, manifold: Manifold, network: nn.Module, process: Process) -> dict[str, float]:
    """Held-out squared errors, summed over D dimensions and averaged over times: the same times and noise for all.

    x0_error: of the prediction as clean data. x0_excess: its distance from the best possible one, E[x0 | x_t]; and
    over the middle half of the times alone, where no conversion divides by a small number. u_excess: the same in the
    velocity as the sampler takes it, with the floor of D: what samples depend on.
    """
    x0 = manifold.draw(HELD_OUT, torch.Generator().manual_seed(10_000 + cell.seed))
    sums = dict.fromkeys(("x0_error", "x0_excess", "x0_excess_middle", "u_excess", "bayes"), 0.0)
    sampler = make_process("u", None)
    sampler.load_state_dict(process.state_dict())
    for number in range(TIMES_MEASURED):
        at = (number + 0.5) / TIMES_MEASURED
        t = torch.full((HELD_OUT,), at)
        coef = process.coefficients(t)
        x_t = add_noise(x0, coef, NoiseKey(20_000 + cell.seed, number))
        pred = network(x_t, coef.time)
        best = manifold.posterior_mean(x_t, coef.alpha, coef.sigma)
        x0_hat = process.to_x0(pred, x_t, t).double()
        excess = _mean_square(x0_hat - best)
        best_u = (x_t.double() - best) / at  # eps - x0 on the straight path
        sums["x0_error"] += _mean_square(x0_hat - x0)
        sums["x0_excess"] += excess
        sums["x0_excess_middle"] += 2.0 * excess if 0.25 < at < 0.75 else 0.0
        sums["u_excess"] += _mean_square(sampler.to_u(pred, x_t, t).double() - best_u)
        sums["bayes"] += _mean_square(best - x0)
    return {name: total / TIMES_MEASURED for name, total in sums.items()}


@torch.no_grad()
def sample_errors(cell: Cell, manifold: Manifold, network: nn.Module, process: Process) -> dict[str, float]:
    """Heun samples: mean squared distance from the manifold, Frechet distance from the data's mean and covariance."""
    sampler = make_process("u", None)
    sampler.load_state_dict(process.state_dict())
    x = sample(network, sampler, num=SAMPLED, steps=SAMPLER_STEPS, seed=cell.seed, batch_size=SAMPLED)[:, :, 0, 0]
    found = Gaussian(x.double().mean(0), torch.cov(x.double().T))
    known = Gaussian(torch.zeros_like(found.mean), manifold.basis @ manifold.basis.T)
    return {"off_manifold": float(manifold.squared_distance(x).mean()), "frechet": found.distance(known)}


def _mean_square(error: Tensor) -> float:
    return float(error.double().square().sum(1).mean())
