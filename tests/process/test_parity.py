"""Every number of losses.npz (the ERD authors' code) and kdiff.npz (learnable target), key by key."""

import re

import numpy as np
import pytest
import torch

from erdfast.process import Process
from tests.parity import load_parity

LOSSES = load_parity("losses")
KDIFF = load_parity("kdiff")
INPUTS = {"x0", "noise", "pred", "t_discrete", "t_continuous"}

SCHEDULES = {
    "ddpm/linear": "ddpm_linear",
    "ddpm/cosine": "cosine",
    "ddpm/linear_logsnr": "logsnr_linear",
    "flow/linear": "flow",
    "flow/cosine": "gvp",
}
TARGETS = {"START_X": "x0", "EPSILON": "eps", "VELOCITY": "v", "VECTOR": "u"}
WEIGHTINGS = {
    "constant": {"weighting": "constant"},
    "lambda": {"weighting": "erd_repo"},
    "min_snr_5": {"weighting": "min_snr", "gamma": 5.0},
    "max_snr_1": {"weighting": "max_snr", "gamma": 1.0},
    "snr": {"weighting": "snr"},
    "trunc_snr": {"weighting": "trunc_snr"},
    "debias": {"weighting": "debias"},
    "p2": {"weighting": "p2"},
    "min_debias": {"weighting": "min_debias"},
    "max_debias": {"weighting": "max_debias"},
}


def published_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x0, noise, pred = (torch.from_numpy(LOSSES[name]).double() for name in ("x0", "noise", "pred"))
    return x0, noise, pred


def times(process: Process) -> torch.Tensor:
    return torch.from_numpy(LOSSES["t_discrete" if process.discrete else "t_continuous"])


def per_image(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize("key", sorted(set(LOSSES) - INPUTS))
def test_losses(key: str):
    path, last = key.rsplit("/", 1)
    if last in ("alpha_bar", "x_t"):
        process = Process(SCHEDULES[path], weighting="constant")
    else:
        path, target = path.rsplit("/", 1)
        process = Process(SCHEDULES[path], TARGETS[target], **WEIGHTINGS[last])
    c = process.coefficients(times(process))
    x0, noise, pred = published_inputs()
    if last == "alpha_bar":
        alpha, sigma = process.schedule.alpha_sigma(torch.arange(1000))
        np.testing.assert_allclose(alpha.square().numpy(), LOSSES[key], rtol=1e-13)
        np.testing.assert_allclose(sigma.square().numpy(), 1.0 - LOSSES[key], rtol=1e-9)
    elif last == "x_t":
        x_t = per_image(c.alpha) * x0 + per_image(c.sigma) * noise
        np.testing.assert_allclose(x_t.numpy(), LOSSES[key], rtol=2e-5, atol=1e-6)
    else:
        error = pred - per_image(c.c_x) * x0 - per_image(c.c_eps) * noise
        loss = c.w * error.square().mean(dim=(1, 2, 3))
        np.testing.assert_allclose(loss.numpy(), LOSSES[key], rtol=2e-5)


def test_every_schedule_target_and_weighting_occurs():
    text = " ".join(LOSSES)
    for name in (*SCHEDULES, *TARGETS, *WEIGHTINGS):
        assert name in text


def kdiff_process(w_k: float, clip: float) -> Process:
    """The learnable target with its loss on the straight path, float64 parameters."""
    process = Process("flow", "k", "constant", loss_space="u", kappa_clip=clip).double()
    with torch.no_grad():
        next(process.parameters()).fill_(w_k)
    return process


@pytest.mark.parametrize("key", sorted(set(KDIFF) - {"x0", "noise", "pred", "t"}))
def test_kdiff(key: str):
    match = re.fullmatch(r"wk=(-?[\d.]+)/clip=([\d.]+)/(loss|grad_pred|grad_wk)", key)
    assert match, key
    process = kdiff_process(float(match[1]), float(match[2]))
    x0, noise, pred, their_t = (torch.from_numpy(KDIFF[name]) for name in ("x0", "noise", "pred", "t"))
    pred = pred.clone().requires_grad_()
    c = process.coefficients(1.0 - their_t, dtype=torch.float64)
    error = pred - per_image(c.c_x) * x0 - per_image(c.c_eps) * noise
    loss = (c.w * error.square().mean(dim=(1, 2, 3))).mean()
    loss.backward()
    (w_k,) = process.parameters()
    assert pred.grad is not None
    assert w_k.grad is not None
    got = {"loss": loss.detach(), "grad_pred": pred.grad, "grad_wk": w_k.grad}[match[3]]
    np.testing.assert_allclose(got.numpy(), KDIFF[key], rtol=1e-9, atol=1e-14)
