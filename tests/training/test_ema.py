"""Averages of the weights against float64, whatever their decays; power functions against their integrals."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from erdfast.config import EmaConfig, OptimizerConfig
from erdfast.training.ema import Ema
from erdfast.training.optimizer import build_optimizer
from erdfast.training.power import coefficients, gamma_of_std, inner_products, std_of_gamma

STEPS = 50


def make(config: EmaConfig):
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(2))}
    ema = Ema(parameters, config)
    return parameters, ema, build_optimizer(parameters, OptimizerConfig(lr=0.1), ema)


@pytest.mark.parametrize(
    "config",
    [
        EmaConfig(ema_decay=(0.0,)),
        EmaConfig(ema_decay=(0.9996, 0.9)),
        EmaConfig(ema_decay=(0.9, 0.99, 0.9999), ema_warmup=True),
        EmaConfig(ema_std=(0.05, 0.1)),
    ],
)
def test_against_float64(config):
    parameters, ema, optimizer = make(config)
    expected = [[value.detach().double() for value in parameters.values()] for _ in ema.names]
    for step in range(STEPS):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.set_ema_decays(ema.decays(step))
        optimizer.step()
        for averages, decay in zip(expected, ema.decays(step), strict=True):
            for number, value in enumerate(parameters.values()):
                averages[number] = decay * averages[number] + (1 - decay) * value.detach().double()
    for found, wanted in zip(ema.averages, expected, strict=True):
        for average, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(average.double(), value, rtol=1e-5, atol=1e-5)


def test_names_and_the_one_that_is_published():
    _, ema, _ = make(EmaConfig(ema_decay=(0.9996, 0.9999)))
    assert (ema.names, ema.primary) == (["0.9996", "0.9999"], 1)
    assert list(ema.tensors()) == ["0.9996/a", "0.9996/b", "0.9999/a", "0.9999/b"]
    assert ema.tensors()["0.9999/b"] is ema.averages[1][1]
    assert make(EmaConfig(ema_std=(0.05, 0.1)))[1].names == ["std0.050", "std0.100"]


def test_warm_up_forgets_the_first_weights():
    _, ema, _ = make(EmaConfig(ema_decay=(0.9999,), ema_warmup=True))
    assert ema.decays(0) == [0.1]
    assert ema.decays(90) == [0.91]
    assert ema.decays(10**6) == [0.9999]


def test_averages_share_no_memory_with_the_parameters():
    parameters, ema, _ = make(EmaConfig())
    with torch.no_grad():
        parameters["a"].add_(1.0)
    assert not torch.equal(parameters["a"], ema.averages[0][0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ema_decay": (0.9, 1.0)}, "ema_decay is 1.0; it must be in [0, 1)"),
        ({"ema_decay": ()}, "ema_decay is empty; name at least one"),
        ({"ema_std": (0.3,)}, "ema_std is 0.3; it must be in [0.01, 0.25]"),
        ({"ema_std": (0.1,), "ema_warmup": True}, "ema_warmup is for ema_decay"),
        ({"ema_snapshot_every": -1}, "ema_snapshot_every is -1"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        EmaConfig(**options).validate()


# ---------------------------------------------------------------------------- power functions


def integral(values: np.ndarray, at: np.ndarray) -> float:
    return float((0.5 * (values[1:] + values[:-1]) * np.diff(at)).sum())


def profile(t: float, gamma: float, tau: np.ndarray) -> np.ndarray:
    return np.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.25])
def test_exponents_have_their_width(std):
    gamma = gamma_of_std(std)
    assert std_of_gamma(gamma) == pytest.approx(std, rel=1e-9)
    tau = np.linspace(0, 1, 2_000_001)
    weights = profile(1.0, gamma, tau)
    mean = integral(weights * tau, tau)
    assert integral(weights, tau) == pytest.approx(1, abs=1e-5)
    assert np.sqrt(integral(weights * (tau - mean) ** 2, tau)) == pytest.approx(std, rel=1e-4)


def test_inner_products_are_integrals():
    times, gammas = np.array([1.0, 2.0, 3.5]), np.array([6.94, 16.97, 0.5])
    tau = np.linspace(0, 4, 4_000_001)
    found = inner_products(times, gammas, times[::-1], gammas)
    for i in range(3):
        for j in range(3):
            product = profile(times[i], gammas[i], tau) * profile(times[::-1][j], gammas[j], tau)
            assert found[i, j] == pytest.approx(integral(product, tau), rel=1e-4)


@pytest.mark.parametrize("std", [0.0, 0.3, -1.0, float("nan")])
def test_widths_that_no_profile_has(std):
    with pytest.raises(ValueError, match="is out of range: choose one in"):
        gamma_of_std(std)


@pytest.mark.parametrize(("std", "error"), [(0.05, 1e-9), (0.1, 1e-9), (0.07, 0.02), (0.15, 0.03), (0.2, 0.1)])
def test_an_average_that_was_not_kept_is_made_of_those_that_were(std, error):
    """Of a random walk, from snapshots of two widths at sixteen moments."""
    generator = np.random.default_rng(0)
    steps, kept = 4096, (0.05, 0.1)
    walk = np.cumsum(generator.standard_normal((steps, 32)) / np.sqrt(steps), axis=0)
    averages = {value: np.zeros(32) for value in {*kept, std}}
    snapshots, times, stds = [], [], []
    for step in range(steps):
        for value in averages:
            decay = (1 - 1 / (step + 1)) ** (gamma_of_std(value) + 1)
            averages[value] = decay * averages[value] + (1 - decay) * walk[step]
        if (step + 1) % 256 == 0:
            for value in kept:
                snapshots.append(averages[value].copy())
                times.append(step + 1)
                stds.append(value)
    weights = coefficients(times, stds, steps, std)
    made = weights @ np.stack(snapshots)
    assert np.linalg.norm(made - averages[std]) < error * np.linalg.norm(averages[std])
    assert weights.sum() == pytest.approx(1, abs=0.02)
