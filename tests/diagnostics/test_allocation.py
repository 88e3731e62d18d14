"""The allocation over noise levels: against times that are really drawn, and against ERD's principle."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from erdfast.diagnostics.allocation import allocate
from erdfast.process import Process

CASES: list[dict[str, Any]] = [
    {"schedule": "cosine", "target": "eps", "weighting": "erd"},
    {"schedule": "cosine", "target": "x0", "weighting": "min_snr", "time_sampler": "logit_normal", "logit_mean": -0.5},
    {"schedule": "ddpm_linear", "target": "v", "weighting": "erd", "as_sampling": True, "num_timesteps": 200},
    {"schedule": "flow", "target": "u", "weighting": "erd", "time_sampler": "logit_normal", "as_sampling": True},
    {"schedule": "flow", "target": "k", "weighting": "constant", "loss_space": "u", "kappa_clip": 0.05},
    {"schedule": "vp", "target": "v", "weighting": "sigmoid", "noise_scale": 2.0},
    {"schedule": "gvp", "target": "eps", "weighting": "erd", "allocation": "logsnr"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_it_is_the_weight_of_the_times_that_are_drawn(options):
    process = Process(**options)
    found = allocate(process)
    assert float((found.share * found.spacing).sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((found.density * found.spacing).sum()) == pytest.approx(1.0, abs=1e-12)
    inside = found.logsnr.abs() <= 10.0
    within = float((found.share * found.spacing)[inside].sum())
    assert float((found.omega * found.spacing)[inside].sum()) == pytest.approx(within, abs=1e-12)
    assert bool((found.logsnr.diff() > 0).all())
    t = process.sample_time(1 << 17, seed=1, step=0)
    with torch.no_grad():
        drawn = process.coefficients(t, torch.float64)
    assert found.mean_weight == pytest.approx(float(drawn.w.mean()), rel=0.02)
    edges = torch.tensor([-8.0, -6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0], dtype=torch.float64)

    def share_of(logsnr, masses):
        return torch.zeros(14, dtype=torch.float64).index_add_(0, torch.bucketize(logsnr, edges), masses)

    by_drawing = share_of(drawn.logsnr, drawn.w / drawn.w.sum())
    half_a_cell = float((found.share * found.spacing).max()) if process.discrete else 0.0
    assert (share_of(found.logsnr, found.share * found.spacing) - by_drawing).abs().max() < 0.01 + half_a_cell
    # Half of M lies on either side of the median.
    assert float(drawn.w[drawn.logsnr < found.median()].sum() / drawn.w.sum()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("target", ["eps", "x0", "v", "u", "k"])
@pytest.mark.parametrize("schedule", ["cosine", "sd_linear", "flow", "logsnr_uniform"])
@pytest.mark.parametrize("sampler", ["uniform", "logit_normal"])
def test_erd_with_the_allocation_logsnr_follows_omega(schedule, target, sampler):
    """Where its factor is not capped, and within the log-SNR that it is meant for."""
    process = Process(schedule, target, "erd", allocation="logsnr", time_sampler=sampler)
    found = allocate(process)
    inside = found.logsnr.abs() < (9.99 if sampler == "uniform" else 3.0)
    ratio = (found.share / found.omega)[inside]
    assert len(ratio) > 100
    if sampler == "uniform":  # nothing is capped: one curve in the figure
        assert float(ratio.mean()) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-6, atol=0)
    plain = allocate(Process(schedule, target, "erd", time_sampler=sampler))
    if (schedule, sampler) != ("logsnr_uniform", "uniform"):  # where the allocations are the same
        assert (plain.share - found.share).abs().max() > 0.005
    assert plain.mean_weight == pytest.approx(1.0, abs=2e-3)


def test_drawing_by_weight_allocates_as_weighing_does():
    weighed, drawn = (allocate(Process("flow", "eps", "erd", as_sampling=each)) for each in (False, True))
    torch.testing.assert_close(weighed.share, drawn.share, rtol=2e-3, atol=1e-6)
    assert drawn.weight.std() < 0.01 < weighed.weight.std()
    assert (drawn.density - weighed.density).abs().max() > 0.02


def test_means_over_drawn_times():
    process = Process("flow", "v", "erd")
    found = allocate(process)
    levels = torch.linspace(-10.0, 10.0, 41, dtype=torch.float64)
    assert found.average(levels, torch.full_like(levels, 3.0)) == pytest.approx(3.0)
    t = process.sample_time(1 << 17, seed=1, step=0)
    c = process.coefficients(t, torch.float64)
    bent = levels.clamp(-2.0, 5.0)  # linear between levels, constant beyond: nothing is lost
    wanted = c.logsnr.clamp(-2.0, 5.0)
    assert found.average(levels, bent) == pytest.approx(float(wanted.mean()), abs=0.02)
    assert found.average(levels, bent, weighted=True) == pytest.approx(float((c.w * wanted).mean()), abs=0.02)
    chance = found.probability(levels)
    nearest = (c.logsnr[:, None] - levels).abs().argmin(1)
    assert float(chance.sum()) == pytest.approx(1.0)
    assert (chance - torch.bincount(nearest, minlength=41) / len(t)).abs().max() < 0.005
