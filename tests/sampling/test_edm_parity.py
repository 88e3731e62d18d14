"""End points of the EDM sampler against those of the published implementation."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from erdfast.process import Process
from erdfast.sampling.levels import LEVEL_SETS, noise_table, table_levels
from erdfast.sampling.samplers import SAMPLERS
from tests.parity import load_parity

ARRAYS = load_parity("edm_heun")
LATENTS = torch.from_numpy(ARRAYS["latents"])
KEYS = sorted(set(ARRAYS) - {"mu", "s0", "latents", "sigma_of_label"})


def posterior_mean(x: Tensor, sigma: float) -> Tensor:
    """E[x0 | x0 + sigma*eps = x] of the mixture, float64."""
    mu, variance = torch.from_numpy(ARRAYS["mu"]), float(ARRAYS["s0"]) ** 2
    flat = x.double().flatten(1)
    distance = (flat[:, None] - mu).square().sum(-1)
    mode = torch.softmax(-distance / (2.0 * (variance + sigma**2)), dim=1) @ mu
    return ((variance * flat + sigma**2 * mode) / (variance + sigma**2)).reshape(x.shape)


def denoiser(table: np.ndarray, target: str):
    """The mixture's best network of a target, by way of the float32 input that a model receives."""

    def denoise(x: Tensor, label: float) -> Tensor:
        sigma = float(table[int(label)])
        scale = math.sqrt(sigma**2 + 1.0)
        x_in = (x / scale).float()
        x0 = posterior_mean(x_in.double() * scale, sigma)
        if target == "START_X":
            return x0.float()
        eps = ((x_in.double() * scale - x0) / sigma).float()
        return x - sigma * eps.to(x.dtype)

    return denoise


def run(key: str, table: np.ndarray, state_dtype: torch.dtype) -> float:
    """Relative distance of our end points from the published ones."""
    target, solver, level_set, steps = key.split("/")
    assert {target, solver, level_set} <= {"EPSILON", "START_X", "euler", "heun", *LEVEL_SETS}, key
    sampler = SAMPLERS[f"edm_{solver}"]
    levels = table_levels(table, int(steps), level_set)
    ours = sampler(denoiser(table, target), LATENTS, levels, state_dtype=state_dtype)
    assert ours.dtype == state_dtype
    expected = torch.from_numpy(ARRAYS[key])
    return float((ours.double() - expected).norm() / expected.norm())


def test_all_keys_are_there() -> None:
    assert len(KEYS) == 24


@pytest.mark.parametrize("key", KEYS)
def test_end_points(key: str) -> None:
    assert run(key, ARRAYS["sigma_of_label"], torch.float64) < 1e-6


@pytest.mark.parametrize("key", ["EPSILON/heun/edm/50", "START_X/heun/edm/50", "EPSILON/euler/vp/18"])
def test_float32_state(key: str) -> None:
    assert run(key, ARRAYS["sigma_of_label"], torch.float32) < 1e-5


def test_table_of_the_published_sampler() -> None:
    """Theirs is a float32 recursion, which near clean data subtracts 1 from a number close to 1."""
    ours, theirs = noise_table(Process(schedule="cosine")), ARRAYS["sigma_of_label"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
    np.testing.assert_allclose(ours[100:], theirs[100:], rtol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_end_points_on_our_own_table(key: str) -> None:
    """With the exact table of the training schedule the images move by less than their table's rounding."""
    assert run(key, noise_table(Process(schedule="cosine")), torch.float64) < 1e-5
