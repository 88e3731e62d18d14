"""Weights against their formulas, averages under their samplers, and expected gradients under `as_sampling`."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erdfast.process import SCHEDULES, TARGETS, TIME_SAMPLERS, WEIGHTINGS, Process
from erdfast.process.coefficients import SPACES
from erdfast.process.time import MAX_DENSITY_RATIO, DiscreteTimes

EPS_SPACE = [name for name, row in WEIGHTINGS.items() if row.space == "eps"]
schedules = st.sampled_from(sorted(SCHEDULES))
samplers = st.sampled_from(sorted(TIME_SAMPLERS))


def legal_times(process: Process) -> torch.Tensor:
    steps = process.schedule.num_timesteps
    if steps is not None:
        return torch.arange(steps)
    ends = torch.tensor([0.0, 1e-30, 1e-9, 1e-6, 1.0 - 6e-8, 1.0], dtype=torch.float64)
    return torch.cat([ends, torch.linspace(0.001, 0.999, 200, dtype=torch.float64)])


def drawn(process: Process, count: int) -> torch.Tensor:
    """Times at the midpoints of `count` equal parts of u: an average over them is one over the sampler."""
    return process.times.draw((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def formula(name: str, snr: torch.Tensor) -> torch.Tensor:
    """w_eps of the method's table, with the default options."""
    return {
        "min_snr": lambda: torch.minimum(snr, torch.tensor(5.0)) / snr,
        "max_snr": lambda: torch.maximum(snr, torch.tensor(1.0)) / snr,
        "p2": lambda: 1 / (1 + snr),
        "debias": lambda: 1 / snr.sqrt(),
        "min_debias": lambda: (1 / snr.sqrt()).minimum(torch.tensor(1.0)),
        "max_debias": lambda: (1 / snr.sqrt()).maximum(torch.tensor(1.0)),
        "snr": lambda: torch.ones_like(snr),
        "trunc_snr": lambda: torch.maximum(snr, torch.tensor(1.0)) / snr,
        "sigmoid": lambda: 1 / (1 + snr),
        "edm": lambda: (1 / snr + 0.25) / (0.25 / snr) / snr,
    }[name]()


@pytest.mark.parametrize("name", EPS_SPACE)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("schedule", ["cosine", "flow"])
def test_eps_space_weightings(name, target, schedule):
    process = Process(schedule, target, name)
    t = torch.arange(5, 990, 7) if process.discrete else torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    c = process.coefficients(t, dtype=torch.float64)
    snr = (c.alpha / c.sigma).square()
    d = c.c_x * c.sigma - c.c_eps * c.alpha
    torch.testing.assert_close(c.w, formula(name, snr) * (c.alpha / d).square(), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("name", EPS_SPACE)
def test_the_same_error_weighs_the_same_for_every_target(name):
    """w * (error in the target)^2 is one number, for an error of fixed size in x0."""
    t = torch.arange(5, 990, 31)
    values = []
    for target in TARGETS:
        c = Process("cosine", target, name).coefficients(t, dtype=torch.float64)
        error = c.c_x - c.c_eps * c.alpha / c.sigma  # of x0 by 1, of eps by -alpha/sigma
        values.append((c.w * error.square()).detach())
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-8, atol=0.0)


def test_options_of_the_weightings():
    t = torch.arange(5, 990, 31)
    c = Process("cosine").coefficients(t, dtype=torch.float64)
    snr = (c.alpha / c.sigma).square()

    def w(name, **options):
        return Process("cosine", "eps", name, **options).coefficients(t, dtype=torch.float64).w

    torch.testing.assert_close(w("min_snr", gamma=2), snr.clamp(max=2) / snr)
    torch.testing.assert_close(w("max_snr", gamma=2), snr.clamp(min=2) / snr)
    torch.testing.assert_close(w("p2", gamma=0.5, p2_k=3.0), (3 + snr) ** -0.5)
    torch.testing.assert_close(w("sigmoid", sigmoid_bias=2.0), torch.sigmoid(2.0 - snr.log()))


def test_erd_is_the_recoverability_score():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    alpha, sigma = 1 - t, t
    k = torch.tensor(0.3, dtype=torch.float64)
    expected = {
        "x0": alpha,
        "eps": sigma,
        "u": (alpha**2 + sigma**2).sqrt(),
        "v": alpha * sigma,
        "score": torch.ones_like(t),
        "k": ((k * alpha) ** 2 + ((1 - k) * sigma) ** 2).sqrt(),
    }
    for target, omega in expected.items():
        options: dict[str, Any] = {"k_init": 0.3} if target == "k" else {}
        w = Process("flow", target, "erd", **options).coefficients(t, dtype=torch.float64).w
        torch.testing.assert_close(w / w[20], omega / omega[20], rtol=1e-6, atol=0.0)


def test_erd_repo_is_not_normalised():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    expected = {"x0": 1 - t, "eps": t, "v": t * (1 - t), "u": torch.ones_like(t)}
    for target, want in expected.items():
        w = Process("flow", target, "erd_repo").coefficients(t, dtype=torch.float64).w
        torch.testing.assert_close(w, want, rtol=1e-12, atol=0.0)


@settings(max_examples=80, deadline=None)
@given(schedules, st.sampled_from(sorted(TARGETS)), samplers, st.sampled_from(["time", "logsnr"]))
def test_erd_weights_average_1_under_their_sampler(schedule, target, sampler, allocation):
    process = Process(schedule, target, "erd", time_sampler=sampler, allocation=allocation)
    steps = process.schedule.num_timesteps
    if steps is not None:  # exactly, by the probability of each step
        w = process.coefficients(torch.arange(steps), dtype=torch.float64).w
        mean = (process.times.masses * w).sum()
    else:
        mean = process.coefficients(drawn(process, 1 << 16), dtype=torch.float64).w.mean()
    torch.testing.assert_close(mean.detach(), torch.ones((), dtype=torch.float64), rtol=2e-4, atol=0.0)


def test_average_by_drawn_times():
    process = Process("cosine", "eps", "erd", time_sampler="logit_normal")
    w = torch.cat([process.coefficients(process.sample_time(1 << 14, seed=3, step=s)).w for s in range(4)])
    assert abs(w.double().mean() - 1) < 4 * w.double().std() / math.sqrt(len(w))


def test_logsnr_allocation_is_proportional_to_omega():
    """w(t) p(t) |dt/dlambda| over omega is one number wherever the cap does not act."""
    t = torch.linspace(0.1, 0.9, 33, dtype=torch.float64)
    process = Process("flow", "eps", "erd", time_sampler="logit_normal", logit_std=1.5, allocation="logsnr")
    w = process.coefficients(t, dtype=torch.float64).w
    logit = torch.log(t / (1 - t))
    p = torch.exp(-0.5 * (logit / 1.5) ** 2) / (1.5 * math.sqrt(2 * math.pi) * t * (1 - t))
    allocation = w * p / (2 / (t * (1 - t)))
    torch.testing.assert_close(allocation / t, (allocation / t)[:1].expand_as(t), rtol=1e-9, atol=0.0)


def test_logsnr_allocation_is_that_of_time_where_the_derivation_is_exact():
    t = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    a, b = (Process("logsnr_uniform", "v", "erd", allocation=name).coefficients(t).w for name in ("time", "logsnr"))
    torch.testing.assert_close(a, b)


def test_logsnr_allocation_is_capped():
    process = Process("flow", "x0", "erd", time_sampler="logit_normal", logit_std=0.3, allocation="logsnr")
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    assert float(process.times.density_ratio(t).max()) == MAX_DENSITY_RATIO


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_finite_for_every_target(schedule, weighting):
    for target in TARGETS:
        for options in ({}, {"noise_scale": 4.0}, {"normalize": True}):
            extra: dict[str, Any] = options
            process = Process(schedule, target, weighting, **extra)
            for values in process.coefficients(legal_times(process)):
                assert values.isfinite().all()
                assert values.dtype == torch.float32
            assert (process.coefficients(legal_times(process)).w >= 0).all()


@pytest.mark.parametrize("space", ["x0", "eps", "v", "u"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_in_other_spaces_are_finite(schedule, space):
    for target in TARGETS:
        process = Process(schedule, target, "erd", loss_space=space)
        assert all(values.isfinite().all() for values in process.coefficients(legal_times(process)))


@pytest.mark.parametrize("schedule", ["flow", "vp", "gvp", "logsnr_uniform"])
def test_weights_do_not_jump_at_the_ends(schedule):
    """Held at their value for |log-SNR| = 20, which `flow` reaches at 1 - 5e-5."""
    near = torch.tensor([0.0, 1e-12, 1.0 - 1e-12, 1.0], dtype=torch.float64)
    for name in WEIGHTINGS:
        for target in TARGETS:
            for as_sampling in (False, True) if target in SPACES else (False,):
                process = Process(schedule, target, name, as_sampling=as_sampling)
                w = process.coefficients(near, dtype=torch.float64).w.detach()
                torch.testing.assert_close(w[[0, 3]], w[[1, 2]], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("sampler", TIME_SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logsnr_allocation_is_finite_at_the_ends(schedule, sampler):
    for target in TARGETS:
        for as_sampling in (False, True) if target in SPACES else (False,):
            process = Process(
                schedule, target, "erd", allocation="logsnr", time_sampler=sampler, as_sampling=as_sampling
            )
            ends = torch.tensor([0, 999] if process.discrete else [0.0, 1.0])
            assert all(values.isfinite().all() for values in process.coefficients(ends))


def test_erd_in_another_space_keeps_the_networks_omega():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    plain = Process("flow", "eps", "erd").coefficients(t, dtype=torch.float64).w
    there = Process("flow", "eps", "erd", loss_space="x0").coefficients(t, dtype=torch.float64).w
    torch.testing.assert_close(there, plain * (t / (1 - t)) ** 2)


def expectation(process: Process, value) -> torch.Tensor:
    """E[w(t) * value(t)] over the times that the process draws."""
    steps = process.schedule.num_timesteps
    if steps is not None:
        t = torch.arange(steps)
        assert isinstance(process.times, DiscreteTimes)
        probability = torch.cat([process.times.cdf[:1], process.times.cdf.diff()])
        return (probability * process.coefficients(t, dtype=torch.float64).w * value(process, t)).sum()
    t = drawn(process, 1 << 15)
    return (process.coefficients(t, dtype=torch.float64).w * value(process, t)).mean()


@settings(max_examples=30, deadline=None)
@given(schedules, st.sampled_from(["eps", "v", "u"]), st.sampled_from(["erd", "min_snr", "p2"]), samplers)
def test_as_sampling_has_the_same_expected_gradient(schedule, target, weighting, sampler):
    """E[w*g] for gradients g(t) of several shapes; w itself is about constant."""
    plain = Process(schedule, target, weighting, time_sampler=sampler)
    tilted = Process(schedule, target, weighting, time_sampler=sampler, as_sampling=True)
    for value in (
        lambda p, t: torch.ones_like(p.schedule.unit_time(t)),
        lambda p, t: p.schedule.unit_time(t),
        lambda p, t: torch.cos(7 * p.schedule.unit_time(t)),
        lambda p, t: torch.tanh(p.logsnr(t)),
    ):
        torch.testing.assert_close(expectation(plain, value), expectation(tilted, value), rtol=1e-3, atol=1e-4)
    w = tilted.coefficients(drawn(tilted, 4096), dtype=torch.float64).w
    assert w.std() < 0.01 * w.mean()


def test_as_sampling_draws_from_the_tilted_density():
    process = Process("flow", "eps", "erd", as_sampling=True)  # density 2t
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(process.times.draw(u), u.sqrt(), rtol=1e-3, atol=1e-3)
    discrete = Process("cosine", "v", "erd", as_sampling=True)
    counts = np.zeros(1000)
    np.add.at(counts, discrete.sample_time(1 << 16, seed=1, step=1).numpy(), 1)
    omega = Process("cosine", "v", "erd_repo").coefficients(torch.arange(1000), dtype=torch.float64).w.numpy()
    expected = (1 << 16) * omega / omega.sum()
    groups = counts.reshape(20, 50).sum(1), expected.reshape(20, 50).sum(1)
    assert np.all(np.abs(groups[0] - groups[1]) < 5 * np.sqrt(groups[1] + 1))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_as_sampling_weights_are_bounded_at_all_times(schedule):
    """Also at times that are next to never drawn, where the drawn density is small too."""
    for target, weighting in (("x0", "erd"), ("eps", "erd"), ("v", "min_snr"), ("eps", "p2")):
        for sampler in TIME_SAMPLERS:
            process = Process(schedule, target, weighting, time_sampler=sampler, as_sampling=True)
            w = process.coefficients(legal_times(process)).w
            assert w.max() < 1.1 * process.coefficients(drawn(process, 1001)).w.mean().clamp(min=1)


def test_as_sampling_lowers_the_variance():
    """The point of it: constant errors, ERD weights."""
    plain = Process("cosine", "eps", "erd").coefficients(torch.arange(1000)).w
    tilted = Process("cosine", "eps", "erd", as_sampling=True)
    assert tilted.coefficients(tilted.sample_time(4096, seed=1, step=1)).w.std() < 1e-5 < plain.std()


def test_normalised_weights_follow_a_learnable_target():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    process = Process("flow", "k", "erd")
    (w_k,) = process.parameters()
    for value in (-4.0, 0.0, 4.0):
        with torch.no_grad():
            w_k.fill_(value)
        mean = process.coefficients(drawn(process, 1 << 14), dtype=torch.float64).w.mean()
        torch.testing.assert_close(mean.detach(), torch.ones((), dtype=torch.float64), rtol=1e-5, atol=0.0)
    c = process.coefficients(t)
    (through_w,) = torch.autograd.grad(c.w[0], w_k, retain_graph=True)
    (through_mean,) = torch.autograd.grad(process.coefficients(drawn(process, 1 << 14)).w.mean(), w_k)
    assert abs(through_w) > 1e-3
    assert abs(through_mean) < 1e-5


@pytest.mark.parametrize("weighting", ["erd", "min_snr"])
def test_recoverability_is_omega_whatever_the_weighting(weighting):
    t = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    wanted = {"x0": 1 - t, "eps": t, "u": ((1 - t) ** 2 + t**2).sqrt(), "score": torch.ones(3, dtype=torch.float64)}
    for target, omega in wanted.items():
        torch.testing.assert_close(Process("flow", target, weighting).recoverability(t), omega)
    with pytest.raises(ValueError, match="continuous schedule"):
        Process("flow").recoverability(torch.tensor([3]))
