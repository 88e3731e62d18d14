"""What is measured on a network of the toy: errors against the closed form, features, kernels and predictions.

Each function gives plain numbers, lists of them and mappings, as they go to a file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .effective_rank import effective_rank, effective_rank_of_features
from .ntk import cosines, coupling, eigenvalues, ntk_of_linear_layers, traced
from .toy_data import CORNERS, Task, bayes_floor, held_out
from .toy_training import ToyNetwork

BINS = 5
LEVELS = tuple((number + 0.5) / 40 for number in range(40))
"""Times at which errors are measured: eight in each bin."""
FEATURE_TIMES = (0.1, 0.4, 0.7, 0.9)
PREDICTION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
PHASE_TIMES = (0.02, *(number / 10 for number in range(1, 10)), 0.98)
GRAM_TIMES = (0.05, 0.95)
KERNEL_TIMES = (0.01, *(number / 20 for number in range(1, 20)), 0.99)
COUPLING_TIMES = tuple((number + 0.5) / 20 for number in range(20))
SHOWN = 40
"""Points of each mode in a cloud."""
RIDGE = 1e-4
"""Of the linear probe, as a share of the features' mean square."""


def bin_interval(number: int | None) -> tuple[float, float]:
    """The times of a bin, or all."""
    return (0.0, 1.0) if number is None else (number / BINS, (number + 1) / BINS)


@torch.no_grad()
def errors(
    network: ToyNetwork, task: Task, interval: tuple[float, float], per_mode: int, seed: int
) -> dict[str, list[float]]:
    """At each of LEVELS in an interval: the mean squared error, and how far the prediction is from the best one.

    The latter, mean |f - E[y|x_t]|^2 / 2, is what the error exceeds the floor by in expectation, without the noise of
    the difference.
    """
    found: dict[str, list[float]] = {"time": [], "loss": [], "excess": []}
    for at in LEVELS:
        if interval[0] < at < interval[1]:
            points = held_out(task, at, per_mode, seed)
            pred = network(points.x_t, points.time).double()
            found["time"].append(at)
            found["loss"].append(float((pred - points.y).square().mean()))
            found["excess"].append(float((pred - points.best).square().mean()))
    return found


def floors(task: Task, seed: int) -> list[float]:
    """The Bayes floor at LEVELS."""
    return bayes_floor(task, torch.tensor(LEVELS, dtype=torch.float64), seed).tolist()


def phases(task: Task, per_mode: int, seed: int) -> list[dict[str, Any]]:
    """What of the target can be known from x_t and what cannot, by time: norms of E[y|x_t] and of y - E[y|x_t].

    Root mean squares of both, the share of samples whose noise is the longer of the two, and the norms of some. No
    network is involved.
    """
    found = []
    for at in PHASE_TIMES:
        points = held_out(task, at, per_mode, seed)
        signal, noise = (part.double().flatten(1).norm(dim=1) for part in (points.best, points.y - points.best))
        shown = _some_of_each(points.mode, SHOWN // 2)
        found.append(
            {
                "time": at,
                "signal": float(signal.square().mean().sqrt()),
                "noise": float(noise.square().mean().sqrt()),
                "contaminated": float((noise > signal).double().mean()),
                "signals": signal[shown].tolist(),
                "noises": noise[shown].tolist(),
            }
        )
    return found


@torch.no_grad()
def features(network: ToyNetwork, task: Task, per_mode: int, seed: int) -> list[dict[str, Any]]:
    """What the readout sees at FEATURE_TIMES, in the plane of the first two principal components of the first of them.

    spread: root mean square distance from the mean, as a share of that at the first time. between: share of the
    variance that lies between the modes' means. probe: how often a linear probe finds the mode of samples that it was
    not fitted to; best: how often it can be found from x_t at all.
    """
    sets = {at: held_out(task, at, per_mode, seed) for at in FEATURE_TIMES}
    hidden = {at: network.hidden(points.x_t, points.time).double() for at, points in sets.items()}
    first = hidden[FEATURE_TIMES[0]]
    center = first.mean(0)
    axes = torch.linalg.svd(first - center, full_matrices=False).Vh[:2]
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # one sign on every machine
    found = []
    for at, h in hidden.items():
        mode = sets[at].mode
        shown = _some_of_each(mode, SHOWN)
        found.append(
            {
                "time": at,
                "spread": float(_spread(h) / _spread(first)),
                "between": _between(h, mode),
                "rank": float(effective_rank_of_features(h)),
                "probe": _probe(h, mode),
                "best": _nearest(sets[at].x_t, mode),
                "x": ((h[shown] - center) @ axes.T).T.tolist(),
                "mode": mode[shown].tolist(),
            }
        )
    return found


def kernels(
    network: ToyNetwork, start: ToyNetwork, task: Task, per_mode: int, seed: int, gram_per_mode: int
) -> dict[str, Any]:
    """The tangent kernel by time: its three largest eigenvalues and effective rank, for the network as trained and as
    it was at the start, on the same points; Gram matrices ordered by mode; and the coupling of times.

    Outputs are kept for eigenvalues, ranks and coupling (2N x 2N), and summed over for Gram matrices (N x N).
    """
    found: dict[str, Any] = {"time": list(KERNEL_TIMES), "grams": []}
    for name, measured in (("trained", network), ("start", start)):
        spectra = [eigenvalues(_kernel(measured, task, at, per_mode, seed)) for at in KERNEL_TIMES]
        found[name] = {
            "top": [spectrum[:3].tolist() for spectrum in spectra],
            "rank": [float(effective_rank(spectrum)) for spectrum in spectra],
        }
    for at in GRAM_TIMES:
        gram = cosines(traced(_kernel(network, task, at, gram_per_mode, seed)).double())
        mode = torch.arange(4).repeat_interleave(gram_per_mode)
        same = mode[:, None] == mode[None, :]
        within = same & ~torch.eye(len(mode), dtype=torch.bool)
        parts = {"within": float(gram[within].mean()), "between": float(gram[~same].mean())}
        found["grams"].append({"time": at, **parts, "gram": gram.round(decimals=3).tolist()})
    sets = [held_out(task, at, gram_per_mode, seed) for at in COUPLING_TIMES]
    inputs = [torch.cat(parts) for parts in zip(*((points.x_t, points.time) for points in sets), strict=True)]
    joint = coupling(ntk_of_linear_layers(network, inputs), len(sets))
    found["coupling"] = {"time": list(COUPLING_TIMES), "cosine": joint.tolist()}
    return found


@torch.no_grad()
def predictions(network: ToyNetwork, task: Task, seed: int) -> list[dict[str, Any]]:
    """Some predictions at PREDICTION_TIMES beside the best ones, E[y|x_t]: two lists of coordinates each, and the mode
    that each point comes from; `distance` is the root mean square one between the two."""
    found = []
    for at in PREDICTION_TIMES:
        points = held_out(task, at, SHOWN, seed)
        pred, best = network(points.x_t, points.time).double().flatten(1), points.best.flatten(1)
        distance = float((pred - best).square().sum(1).mean().sqrt())
        clouds = {"network": pred.T.tolist(), "best": best.T.tolist(), "mode": points.mode.tolist()}
        found.append({"time": at, "distance": distance, **clouds})
    return found


def _kernel(network: ToyNetwork, task: Task, at: float, per_mode: int, seed: int) -> Tensor:
    points = held_out(task, at, per_mode, seed)
    return ntk_of_linear_layers(network, (points.x_t, points.time))


def _some_of_each(mode: Tensor, count: int) -> Tensor:
    """Indices of the first few of each mode."""
    return torch.cat([(mode == number).nonzero()[:count, 0] for number in range(4)])


def _spread(h: Tensor) -> Tensor:
    return (h - h.mean(0)).square().sum(1).mean().sqrt()


def _between(h: Tensor, mode: Tensor) -> float:
    centers = torch.stack([h[mode == number].mean(0) for number in range(4)])[mode]
    return float((centers - h.mean(0)).square().sum() / (h - h.mean(0)).square().sum())


def _probe(h: Tensor, mode: Tensor) -> float:
    """Fitted by least squares on every second sample, tested on the others."""
    inputs = torch.cat([h - h.mean(0), torch.ones(len(h), 1, dtype=h.dtype)], dim=1)
    wanted = torch.nn.functional.one_hot(mode, 4).to(h.dtype)
    fit, test = inputs[::2], inputs[1::2]
    gram = fit.T @ fit
    gram.diagonal().add_(RIDGE * gram.diagonal()[:-1].mean())
    weights = torch.linalg.solve(gram, fit.T @ wanted[::2])
    return float(((test @ weights).argmax(1) == mode[1::2]).double().mean())


def _nearest(x_t: Tensor, mode: Tensor) -> float:
    """The mode with the nearest mean is the likeliest one: all are equally far from the origin and equally wide."""
    corners = torch.tensor(CORNERS, dtype=x_t.dtype)
    return float(((x_t.flatten(1) @ corners.T).argmax(1) == mode)[1::2].double().mean())
