"""Schedules against their definitions, derivatives against differences, inverses, and what is refused."""

import math

import pytest
import torch

from erdfast.process import SCHEDULES, Process
from erdfast.process.schedule import SdLinear

DISCRETE = ["cosine", "ddpm_linear", "sd_linear", "logsnr_linear"]
CONTINUOUS = ["flow", "vp", "gvp", "logsnr_uniform"]


def schedule(name: str, **options):
    return Process(name, weighting="constant", **options).schedule


def interior(count: int = 101) -> torch.Tensor:
    return torch.linspace(0.002, 0.998, count, dtype=torch.float64)


def test_every_schedule_is_covered_here():
    assert {*DISCRETE, *CONTINUOUS} == set(SCHEDULES)


@pytest.mark.parametrize("name", CONTINUOUS)
@pytest.mark.parametrize("noise_scale", [1.0, 2.5])
def test_continuous_derivatives_and_inverse(name: str, noise_scale: float):
    s = schedule(name, noise_scale=noise_scale)
    t = interior().requires_grad_()
    alpha, sigma = s.alpha_sigma(t)
    (slope_alpha,) = torch.autograd.grad(alpha.sum(), t, retain_graph=True)
    (slope_sigma,) = torch.autograd.grad(sigma.sum(), t)
    (slope_logsnr,) = torch.autograd.grad(s.logsnr(t).sum(), t)
    t = t.detach()
    torch.testing.assert_close(s.d_alpha(t), slope_alpha, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s.d_sigma(t), slope_sigma, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s.d_logsnr(t), slope_logsnr, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(s.logsnr(t), 2 * torch.log(alpha / sigma).detach(), rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(s.t_from_logsnr(s.logsnr(t)), t, rtol=1e-9, atol=1e-12)


def test_continuous_formulas():
    t = interior()
    expected = {
        "flow": (1 - t, t),
        "vp": (torch.exp(-(t**2) * 19.9 / 4 - 0.1 * t / 2), None),
        "gvp": (torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)),
        "logsnr_uniform": (torch.sigmoid(10 - 20 * t).sqrt(), torch.sigmoid(20 * t - 10).sqrt()),
    }
    for name, (alpha, sigma) in expected.items():
        got_alpha, got_sigma = schedule(name).alpha_sigma(t)
        sigma = (1 - alpha**2).sqrt() if sigma is None else sigma
        torch.testing.assert_close(got_alpha, alpha, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got_sigma, sigma, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["flow", "gvp"])
def test_ends_are_exact(name: str):
    alpha, sigma = schedule(name).alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha[1] == 0
    assert sigma[0] == 0
    torch.testing.assert_close(torch.stack([alpha[0], sigma[1]]), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULES)
def test_ends_are_finite(name: str):
    s = schedule(name)
    t = torch.tensor([0, 999]) if s.discrete else torch.tensor([0.0, 1e-30, 1.0 - 6e-8, 1.0])
    for values in (s.logsnr(t), s.d_logsnr(t), s.d_alpha(t), s.d_sigma(t), *s.alpha_sigma(t)):
        assert values.dtype == torch.float64
        assert values.isfinite().all()


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("num_timesteps", [21, 250, 1000])
def test_discrete_tables(name: str, num_timesteps: int):
    s = schedule(name, num_timesteps=num_timesteps)
    t = torch.arange(num_timesteps)
    alpha, sigma = s.alpha_sigma(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(num_timesteps, dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    assert torch.equal(s.t_from_logsnr(s.logsnr(t)), t)
    assert torch.equal(s.network_time(t), t.double() * (1000 / num_timesteps))
    torch.testing.assert_close(s.d_logsnr(t), 2 * (s.d_alpha(t) / alpha - s.d_sigma(t) / sigma))


def test_discrete_slope_approaches_the_closed_form():
    s = schedule("cosine", num_timesteps=4000)
    t = torch.arange(200, 3800)
    angle = (s.unit_time(t) + 0.008) / 1.008 * math.pi / 2
    torch.testing.assert_close(
        s.d_alpha(t), -torch.sin(angle) * (math.pi / 2 / 1.008) / math.cos(0.008 / 1.008 * math.pi / 2),
        rtol=1e-3, atol=0.0,
    )  # fmt: skip


def test_noise_scale_enters_sigma_and_logsnr():
    t = torch.arange(10, 990)
    plain, scaled = schedule("cosine"), schedule("cosine", noise_scale=2.0)
    torch.testing.assert_close(scaled.alpha_sigma(t)[0], plain.alpha_sigma(t)[0])
    torch.testing.assert_close(scaled.alpha_sigma(t)[1], 2 * plain.alpha_sigma(t)[1])
    torch.testing.assert_close(scaled.logsnr(t), plain.logsnr(t) - math.log(4.0))
    torch.testing.assert_close(scaled.d_alpha(t), plain.d_alpha(t))
    torch.testing.assert_close(scaled.d_sigma(t), 2 * plain.d_sigma(t))
    assert torch.equal(scaled.t_from_logsnr(scaled.logsnr(t)), t)


def test_times_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="int64"):
        Process("cosine").coefficients(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Process("flow").coefficients(torch.tensor([1]))


@pytest.mark.parametrize("cast", [torch.nn.Module.half, torch.nn.Module.float, torch.nn.Module.bfloat16])
@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_tables_survive_casts(name: str, cast):
    options = {"schedule": name, "target": "v", "weighting": "erd", "as_sampling": True}
    before, after = Process(**options), cast(Process(**options))
    t = before.sample_time(64, seed=1, step=2)
    assert all(b.dtype in (torch.float64, torch.int64) for b in after.buffers())
    for a, b in zip(before.coefficients(t), after.coefficients(t), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(t, after.sample_time(64, seed=1, step=2))


def test_tables_do_not_follow_the_default_device():
    with torch.device("meta"):
        process = Process("cosine", "v", "erd", as_sampling=True)
    assert {b.device.type for b in process.buffers()} == {"cpu"}


def test_stable_diffusions_betas() -> None:
    """The first and the last of its thousand, and alpha_bar at the end."""
    betas = SdLinear.betas(1000)
    assert betas[0].item() == pytest.approx(0.00085, rel=1e-12)
    assert betas[-1].item() == pytest.approx(0.012, rel=1e-12)
    assert betas[500].sqrt().item() == pytest.approx(
        math.sqrt(0.00085) + 500 / 999 * (math.sqrt(0.012) - math.sqrt(0.00085)), rel=1e-12
    )
    with pytest.raises(ValueError, match="use 13 or more"):
        SdLinear.betas(12)
