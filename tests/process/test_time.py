"""Time samplers: distributions, strata, and independence of how the batch is split."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erdfast import philox
from erdfast.process import SCHEDULES, TIME_SAMPLERS, Process
from erdfast.process.time import ContinuousTimes, uniform_numbers

CASES = [(s, t, a) for s in SCHEDULES for t in TIME_SAMPLERS for a in (False, True)]


def uniforms(batch: int, seed: int, step: int) -> torch.Tensor:
    return philox.uniform(seed, step, torch.arange(batch), "time")


@pytest.mark.parametrize(("schedule", "sampler", "as_sampling"), CASES)
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_do_not_depend_on_the_split_over_ranks(schedule, sampler, as_sampling, stratified):
    process = Process(schedule, "v", time_sampler=sampler, as_sampling=as_sampling, stratified=stratified)
    whole = process.sample_time(12, seed=5, step=9, global_batch=12)
    for sizes in ([4, 4, 4], [1, 11], [7, 3, 2]):
        parts, offset = [], 0
        for size in sizes:
            parts.append(process.sample_time(size, seed=5, step=9, rank_offset=offset, global_batch=12))
            offset += size
        assert torch.equal(torch.cat(parts), whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.sampled_from(["cosine", "flow"]))
def test_stratified_draws_cover_every_stratum(count, seed, step, schedule):
    """Under a uniform sampler, u is the time itself: one draw per part of the time axis."""
    steps = 5 * count if schedule == "cosine" else 1000  # several steps per stratum
    process = Process(schedule, weighting="constant", stratified=True, num_timesteps=steps)
    t = process.sample_time(count, seed=seed, step=step, global_batch=count).double()
    unit = (t + 0.5) / steps if process.discrete else t
    lower = torch.arange(count) / count
    within = unit.sort().values - lower
    assert within.min() > -1e-6
    assert within.max() < 1 / count + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.integers(0, 2**31))
def test_stratified_numbers_cover_every_stratum(count, seed, step):
    u = uniform_numbers(seed, step, torch.arange(count), count)
    assert ((u > 0) & (u < 1)).all()
    assert torch.equal((u * count).floor().sort().values, torch.arange(count).double())


def test_a_slot_meets_all_strata_over_the_steps():
    process = Process("flow", weighting="constant", stratified=True)
    first = torch.stack([process.sample_time(1, seed=0, step=s, global_batch=8) for s in range(200)])
    counts = torch.histc(first, bins=8, min=0, max=1)
    assert counts.min() > 8  # 25 expected
    assert counts.max() < 50


def test_uniform_steps_are_the_floor():
    process = Process("cosine", num_timesteps=250)
    t = process.sample_time(5000, seed=11, step=3)
    assert t.dtype == torch.int64
    assert torch.equal(t, (uniforms(5000, 11, 3) * 250).floor().long())
    assert (t.min(), t.max()) == (0, 249)


def test_uniform_real_times_are_the_numbers():
    t = Process("flow").sample_time(100, seed=11, step=3)
    assert torch.equal(t, uniforms(100, 11, 3).float())


def test_logit_normal():
    process = Process("flow", time_sampler="logit_normal", logit_mean=0.8, logit_std=0.8)
    t = process.sample_time(1 << 15, seed=2, step=0).double()
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 0.8) < 4 * 0.8 / 2**7.5
    assert abs(logit.std() - 0.8) < 4 * 0.8 / 2**8
    steps = Process("cosine", time_sampler="logit_normal", logit_mean=0.8, logit_std=0.8)
    edges = torch.arange(1001, dtype=torch.float64) / 1000
    cdf = torch.special.ndtr((torch.log(edges / (1 - edges)) - 0.8) / 0.8)
    torch.testing.assert_close(steps.times.masses, cdf.diff())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_logsnr(schedule):
    process = Process(schedule, weighting="constant", time_sampler="uniform_logsnr")
    logsnr = process.logsnr(process.sample_time(1 << 14, seed=2, step=0))
    if not process.discrete:
        assert logsnr.max() < 10.001
        assert logsnr.min() > -10.001
        assert torch.histc(logsnr, bins=10, min=-10, max=10).min() > (1 << 14) / 10 - 5 * math.sqrt((1 << 14) / 10)
    else:
        table = process.logsnr(torch.arange(1000))
        middle = 0.5 * (table[0] + table[-1])
        torch.testing.assert_close((process.times.masses * table).sum(), middle)  # exact for a uniform density
        assert abs(logsnr.mean() - middle) < 5 * logsnr.std() / 2**7


@pytest.mark.parametrize("schedule", ["flow", "vp", "gvp", "logsnr_uniform"])
@pytest.mark.parametrize("sampler", TIME_SAMPLERS)
@pytest.mark.parametrize("noise_scale", [1.0, 3.0])
def test_quantile_cdf_and_density_agree(schedule, sampler, noise_scale):
    process = Process(schedule, weighting="constant", time_sampler=sampler, noise_scale=noise_scale)
    assert isinstance(process.times, ContinuousTimes)
    rule = process.times.sampler
    u = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    t = rule.quantile(u)
    torch.testing.assert_close(rule.cdf(t), u, rtol=1e-9, atol=1e-9)
    slope = (rule.cdf(t * (1 + 1e-6)) - rule.cdf(t * (1 - 1e-6))) / (2e-6 * t)
    torch.testing.assert_close(rule.density(t), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stratified", [False, True])
def test_seed_and_step_as_tensors(stratified):
    process = Process("vp", stratified=stratified)
    plain = process.sample_time(8, seed=2**63 - 5, step=77, global_batch=8)
    seed, step = torch.tensor(2**63 - 5), torch.tensor(77)
    assert torch.equal(plain, process.sample_time(8, seed=seed, step=step, global_batch=8))
    assert not torch.equal(plain, process.sample_time(8, seed=seed, step=step + 1, global_batch=8))
    assert not torch.equal(plain, process.sample_time(8, seed=seed - 1, step=step, global_batch=8))


def test_bad_sizes_are_refused():
    process = Process("cosine", stratified=True)
    with pytest.raises(ValueError, match="global_batch"):
        process.sample_time(4, seed=0, step=0)
    with pytest.raises(ValueError, match="global_batch=6"):
        process.sample_time(4, seed=0, step=0, rank_offset=3, global_batch=6)
    with pytest.raises(ValueError, match="batch=0"):
        process.sample_time(0, seed=0, step=0)
    with pytest.raises(ValueError, match="rank_offset=-1"):
        process.sample_time(4, seed=0, step=0, rank_offset=-1)
    with pytest.raises(ValueError, match=r"\.to\(\)"):
        process.sample_time(4, seed=0, step=0, global_batch=4, device="meta")
    assert process.sample_time(4, seed=0, step=0, global_batch=4, device="cpu").shape == (4,)


@pytest.mark.parametrize(
    ("seed", "step", "name"),
    [(2**64, 0, "seed"), (-1, 0, "seed"), (1.5, 0, "seed"), (1, 2**32, "step"), (1, -1, "step")],
)
def test_seeds_and_steps_out_of_range_are_refused(seed, step, name):
    with pytest.raises(ValueError, match=f"{name} is "):
        Process().sample_time(2, seed=seed, step=step)


def test_drawn_times_stay_below_1():
    process = Process("flow", "u", "constant", time_sampler="logit_normal", logit_std=5.0, logit_mean=5.0)
    t = process.sample_time(1 << 16, seed=1, step=1)
    assert t.dtype == torch.float32
    assert t.max() == 1.0 - 2.0**-24


DENSITIES = [
    ("cosine", "uniform", False, 1.0),
    ("cosine", "logit_normal", True, 1.0),
    ("ddpm_linear", "uniform_logsnr", False, 2.0),
    ("flow", "uniform", True, 1.0),
    ("flow", "logit_normal", False, 2.0),
    ("vp", "uniform", True, 1.0),
    ("gvp", "uniform_logsnr", True, 1.0),
]


@pytest.mark.parametrize(("schedule", "sampler", "as_sampling", "noise_scale"), DENSITIES)
def test_the_density_over_log_snr_is_that_of_the_draws(schedule, sampler, as_sampling, noise_scale):
    options = {"time_sampler": sampler, "as_sampling": as_sampling, "noise_scale": noise_scale}
    process = Process(schedule, "v", "erd", **options)
    drawn = process.logsnr(process.sample_time(1 << 17, seed=3, step=0))
    if process.discrete:
        steps = torch.arange(1000)
        places, density = process.logsnr(steps), process.logsnr_density(steps)
        widths = torch.gradient(-places)[0]  # half-way to each neighbour
        widths[[0, -1]] *= 0.5
        assert float((density * widths).sum()) == pytest.approx(1.0, abs=1e-9)
        masses, edges = density * widths, torch.linspace(-8.0, 8.0, 17, dtype=torch.float64)
        share = torch.stack([masses[(places > a) & (places <= b)].sum() for a, b in itertools.pairwise(edges)])
    else:
        edges = torch.linspace(-8.0, 8.0, 17, dtype=torch.float64)
        fine = torch.linspace(-8.0, 8.0, 16 * 400 + 1, dtype=torch.float64)
        density = process.logsnr_density(process.schedule.t_from_logsnr(fine))
        cells = 0.5 * (density[1:] + density[:-1]) * fine.diff()
        share = cells.view(16, 400).sum(1)
    found = torch.stack([((drawn > a) & (drawn <= b)).double().mean() for a, b in itertools.pairwise(edges)])
    assert share.sum() > 0.5
    assert (found - share).abs().max() < 5 * math.sqrt(0.25 / (1 << 17))


def test_weight_times_density_is_the_same_drawn_or_multiplied():
    for schedule, times in (("cosine", torch.arange(1000)), ("flow", torch.linspace(0.001, 0.999, 500).double())):
        weighed, drawn = (Process(schedule, "x0", "erd", as_sampling=each) for each in (False, True))
        products = [p.coefficients(times, torch.float64).w * p.logsnr_density(times) for p in (weighed, drawn)]
        torch.testing.assert_close(products[0], products[1], rtol=1e-9, atol=1e-12)
