"""Learnable targets: gradients through c_x, c_eps and w in every loss space, by every way there is; and the ends."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from erdfast.ops import NoiseKey, diffusion_loss
from erdfast.process import Process
from erdfast.process.process import LOSS_SPACES
from tests.parity import load_parity

LEARNABLE = ("k", "k2", "k(t)")
SCHEDULES = ("flow", "cosine")
KDIFF = load_parity("kdiff")


def learnable(target: str, schedule: str, loss_space: str, weighting: str = "erd", **options: Any) -> Process:
    own: dict[str, Any] = {} if loss_space == "target" else {"kappa_clip": 0.01}
    bins: dict[str, Any] = {"k_bins": 3} if target == "k(t)" else {}
    return Process(schedule, target, weighting, loss_space=loss_space, k_init=0.6, **(own | bins | options))


def some_times(process: Process) -> torch.Tensor:
    return torch.tensor([30, 400, 970]) if process.discrete else torch.tensor([0.03, 0.4, 0.93])


def some_data(dtype: torch.dtype) -> torch.Tensor:
    """x0, noise and prediction, (3, 3, 8)."""
    return torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def w_k_of(process: Process) -> torch.nn.Parameter:
    (w_k,) = process.parameters()
    return w_k


@pytest.mark.parametrize("weighting", ["erd", "constant"])
@pytest.mark.parametrize(
    ("target", "schedule", "loss_space"), list(itertools.product(LEARNABLE, SCHEDULES, LOSS_SPACES))
)
def test_gradients_against_differences(target, schedule, loss_space, weighting):
    """In float64; `erd` has the normaliser too, which follows k."""
    process = learnable(target, schedule, loss_space, weighting).double()
    ((name, w_k),) = process.named_parameters()
    x0, noise, pred = some_data(torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        coef = torch.func.functional_call(process, {name: values}, (some_times(process), torch.float64))
        return diffusion_loss(pred, x0, coef, noise=noise, backend="reference")

    spread = 0.3 * torch.randn(w_k.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values = (w_k.detach() + spread).requires_grad_()
    assert torch.autograd.gradcheck(loss, values)
    (gradient,) = torch.autograd.grad(loss(values), values)
    assert gradient.abs().min() > 1e-6  # there is something to be checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("target", "loss_space"), list(itertools.product(LEARNABLE, LOSS_SPACES)))
def test_the_op_of_the_device_gives_the_same_gradient(target, loss_space, dtype):
    """From its per-sample sums: for a prediction in any dtype of the network, w_k's gradient is float32's."""
    process = learnable(target, "flow", loss_space)
    x0, noise, pred = some_data(torch.float32)
    pred = pred.to(dtype)

    def gradient(backend: str | None, *numbers: torch.Tensor) -> torch.Tensor:
        x0, noise, pred = numbers
        process.zero_grad()
        coef = process.coefficients(some_times(process), dtype=torch.float64 if backend else torch.float32)
        diffusion_loss(pred.detach().requires_grad_(), x0, coef, noise=noise, backend=backend).backward()
        found = w_k_of(process).grad
        assert found is not None
        assert found.dtype == torch.float32
        return found.clone()

    exact = gradient("reference", x0.double(), noise.double(), pred.double())
    torch.testing.assert_close(gradient(None, x0, noise, pred), exact, rtol=2e-5, atol=1e-6)


def keys_of_kdiff() -> list[str]:
    return sorted({key.rpartition("/")[0] for key in KDIFF if "/" in key})


@pytest.mark.parametrize("key", keys_of_kdiff())
def test_parity_by_the_op_itself(key):
    """kdiff.npz through the process in float32 and the op of this device; tests/process/test_parity.py has float64."""
    match = re.fullmatch(r"wk=(-?[\d.]+)/clip=([\d.]+)", key)
    assert match
    process = Process("flow", "k", "constant", loss_space="u", kappa_clip=float(match[2]))
    with torch.no_grad():
        w_k_of(process).fill_(float(match[1]))
    x0, noise, pred, their_t = (torch.from_numpy(KDIFF[name]) for name in ("x0", "noise", "pred", "t"))
    pred = pred.float().requires_grad_()
    loss = diffusion_loss(pred, x0.float(), process.coefficients(1.0 - their_t.double()), noise=noise.float())
    loss.backward()
    assert pred.grad is not None
    got = {"loss": loss.detach(), "grad_pred": pred.grad, "grad_wk": w_k_of(process).grad}
    for name, value in got.items():
        assert value is not None
        wanted = KDIFF[f"{key}/{name}"]
        np.testing.assert_allclose(value.numpy(), wanted, rtol=2e-4, atol=1e-4 * float(np.abs(wanted).max()))


# ---------------------------------------------------------------------- the ends


def every_time(process: Process) -> torch.Tensor:
    return torch.arange(1000) if process.discrete else torch.linspace(0, 1, 301)


@pytest.mark.parametrize("w", [-40.0, 40.0, -200.0, 200.0])
@pytest.mark.parametrize(
    ("target", "schedule", "loss_space"), list(itertools.product(LEARNABLE, SCHEDULES, LOSS_SPACES))
)
def test_a_saturated_sigmoid_stays_finite(target, schedule, loss_space, w):
    """k is 0 or 1 to the last bit, and D, which errors are divided by, vanishes at an end of the times."""
    process = learnable(target, schedule, loss_space)
    with torch.no_grad():
        w_k_of(process).fill_(w)
    t = every_time(process)
    coef = process.coefficients(t)
    x0 = torch.randn(len(t), 6, generator=torch.Generator().manual_seed(0))
    pred = torch.zeros_like(x0, requires_grad=True)
    loss = diffusion_loss(pred, x0, coef, NoiseKey(1))
    loss.backward()
    values = [loss, pred.grad, w_k_of(process).grad, *coef, process.to_x0(pred, x0, t), process.to_eps(pred, x0, t)]
    assert all(value is not None and bool(value.isfinite().all()) for value in values)


@pytest.mark.parametrize("target", LEARNABLE)
def test_a_target_at_its_end_can_be_left_again(target):
    """At w_k = +-12 the sigmoid is flat but not dead: its gradient is above what float32 can hold."""
    for w in (-12.0, 12.0):
        process = learnable(target, "flow", "u", "constant")
        with torch.no_grad():
            w_k_of(process).fill_(w)
        x0, noise, pred = some_data(torch.float32)
        diffusion_loss(pred, x0, process.coefficients(some_times(process)), noise=noise).backward()
        found = w_k_of(process).grad
        assert found is not None
        assert bool((found != 0).all())


def test_two_numbers_collapse_in_their_own_space():
    """Why k2 wants a fixed loss space: halving both halves a perfect network's error in the target, and changes none in
    the velocity."""
    x0, noise, _ = some_data(torch.float32)

    def loss(loss_space: str, k: float) -> float:
        process = Process("flow", "k2", "constant", loss_space=loss_space, k_init=k)
        coef = process.coefficients(some_times(process))
        pred = coef.c_x.detach()[:, None] * (x0 + 1.0) + coef.c_eps.detach()[:, None] * noise
        return float(diffusion_loss(pred, x0, coef, noise=noise).detach())

    assert loss("target", 0.25) == pytest.approx(loss("target", 0.5) / 4)
    assert loss("u", 0.25) == pytest.approx(loss("u", 0.5))


def test_values_for_a_log():
    process = Process("flow", "k(t)", k_bins=4)
    with torch.no_grad():
        w_k_of(process).copy_(torch.logit(torch.tensor([0.1, 0.2, 0.6, 0.3, 0.5])))
    values = process.target_values()
    torch.testing.assert_close(values["k"], torch.tensor([0.1, 0.2, 0.6, 0.3, 0.5]))
    assert [float(values[name]) for name in ("k_min", "k_max")] == pytest.approx([0.1, 0.6])
    assert Process("flow", "k2").target_values().keys() == {"k0", "k1"}
    assert Process("flow", "k").target_values().keys() == {"k"}
