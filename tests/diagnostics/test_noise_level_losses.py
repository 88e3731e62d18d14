"""Losses, excess and ranks at single noise levels, of networks for which they are known."""

from __future__ import annotations

import pytest
import torch

from erdfast.data import Dataset
from erdfast.data.dataset import Batch
from erdfast.diagnostics.noise_level_losses import LevelMeasures, measure_levels, v_factor
from erdfast.diagnostics.subject import Subject, draw_images, levels_of, shared_logsnr
from erdfast.models import Backbone
from erdfast.process import Process
from tests.diagnostics.networks import SHAPE, Best, Flat, Known, Zero, mixture, subject
from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def measured(of: Subject, num_levels: int = 5, num: int = 200, seed: int = 0, batch_size: int = 64) -> LevelMeasures:
    levels = levels_of(of.process, shared_logsnr([of.process], num_levels))
    calls = []
    options = {"seed": seed, "batch_size": batch_size, "advance": lambda: calls.append(1)}
    found = measure_levels(of, levels, draw_images(of.dataset, num, seed), **options)
    assert len(calls) == len(levels.logsnr) == len(found.loss)
    return found


PROCESSES = [
    ("cosine", "eps", 1.0), ("cosine", "v", 1.0), ("flow", "u", 1.0), ("flow", "k", 1.0), ("vp", "x0", 1.0),
    ("flow", "u", 3.0),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "target", "noise_scale"), PROCESSES)
@pytest.mark.parametrize("knows_labels", [True, False])
def test_the_posterior_mean_has_no_excess(schedule, target, noise_scale, knows_labels):
    process, data = Process(schedule, target, "constant", noise_scale=noise_scale), mixture()
    found = measured(subject(Best(data, process, knows_labels=knows_labels), process, data))
    levels = levels_of(process, shared_logsnr([process], 5))
    assert found.excess.max() < 1e-5 * (1.0 + found.loss.max())
    assert ((found.loss - found.floor).abs() < 5 * found.loss_error).all()
    c = levels.coef
    wanted = data.bayes_floor(c.alpha, c.sigma, c.c_x, c.c_eps, conditional=knows_labels)
    torch.testing.assert_close(found.floor, wanted, rtol=0.08, atol=1e-9)
    torch.testing.assert_close(found.rank_outputs, found.rank_best, rtol=0.05, atol=0.05)
    other = measured(subject(Best(data, process, knows_labels=knows_labels, off=0.3), process, data))
    torch.testing.assert_close(other.excess, torch.full_like(other.excess, 0.09), rtol=1e-2, atol=0)


def test_labels_that_a_network_does_not_know_are_not_held_against_it():
    process, data = Process("cosine", "eps"), mixture()
    told = measured(subject(Best(data, process), process, data))
    untold = measured(subject(Best(data, process), process, data, ignores_labels=True))
    assert (untold.floor >= told.floor * (1 - 1e-6)).all()
    assert untold.floor[1] > 1.2 * told.floor[1]
    assert untold.excess.max() < 1e-5


def test_loss_is_floor_and_excess():
    process, data = Process("flow", "v"), mixture()
    found = measured(subject(Flat(20), process, data), num=1000)
    assert (found.excess > 0.05).all()
    assert ((found.loss - found.floor - found.excess).abs() < 4 * found.loss_error).all()


class Scaled(Dataset):
    """Latents as moments: mean 1, standard deviation 2 everywhere, times 0.5; no labels."""

    shape, num_classes = SHAPE, 0

    def __len__(self) -> int:
        return 50

    def gather(self, indices, flips=None) -> Batch:
        ones = torch.ones(len(indices), *SHAPE)
        return Batch(torch.cat([ones, 2 * ones], dim=1), torch.zeros(len(indices), dtype=torch.int64), 0.5)

    def describe(self) -> str:
        return "ones"


def test_moments_are_drawn_and_standard_errors_are_those_of_repeats():
    """A network that says nothing has the second moment of y: c_x^2 (0.5^2 + 1) + c_eps^2."""
    process = Process("flow", "u")
    of = subject(Zero(num_classes=0), process, Scaled())
    found = measured(of, num=400)
    assert ((found.loss - 2.25).abs() < 4 * found.loss_error).all()
    assert found.excess.isnan().all() and found.floor.isnan().all() and found.rank_best.isnan().all()  # noqa: PT018
    assert found.rank_outputs.tolist() == [0.0] * 5
    repeats = torch.stack([measured(of, num=50, seed=seed).loss for seed in range(20)])
    errors = measured(of, num=50).loss_error
    assert float(repeats.std(0).mean() / errors.mean()) == pytest.approx(1.0, abs=0.3)


def test_a_conditional_network_is_told_the_null_class_where_there_are_no_labels():
    told = []

    class Listening(Zero):
        def answer(self, x, time, y):
            told.append(y)
            return super().answer(x, time, y)

    measured(subject(Listening(3), Process("flow", "u"), Scaled()), num_levels=2, num=4)
    assert {int(label) for labels in told for label in labels} == {3}


def test_images_noise_and_levels_are_the_same_for_all():
    """Also for other batches; another seed is other noise."""
    flow, steps = Process("flow", "u", "constant"), Process("logsnr_uniform", "u", "erd")
    seen: list[torch.Tensor] = []

    class Listening(Zero):
        def answer(self, x, time, y):
            seen.append(x.clone())
            return super().answer(x, time, y)

    first = measured(subject(Listening(), flow), num_levels=3, num=10)
    noisy = torch.cat(seen)
    seen.clear()
    again = measured(subject(Listening(), flow), num_levels=3, num=10, batch_size=7)
    torch.testing.assert_close(torch.cat(seen), noisy, rtol=0, atol=0)
    torch.testing.assert_close(again.loss, first.loss, rtol=1e-6, atol=0)
    seen.clear()
    measured(subject(Listening(), steps), num_levels=3, num=10)
    at = [levels_of(p, shared_logsnr([flow, steps], 3)).coef for p in (flow, steps)]
    scale = (at[1].alpha / at[0].alpha).float().repeat_interleave(10).view(-1, 1, 1, 1)
    torch.testing.assert_close(torch.cat(seen), scale * noisy, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(measured(subject(Listening(), flow), 3, 10, seed=1).loss, first.loss, rtol=1e-3)


@pytest.mark.parametrize(("schedule", "target", "noise_scale"), [*PROCESSES, ("logsnr_linear", "score", 1.0)])
def test_errors_of_v_do_not_depend_on_target_and_schedule(schedule, target, noise_scale):
    """By converting predictions to x0, and x0 to v on a variance-preserving process of the same log-SNR."""
    process = Process(schedule, target, "constant", noise_scale=noise_scale)
    levels = levels_of(process, shared_logsnr([process], 7))
    c = levels.coef
    count = len(c.logsnr)
    pred, truth = torch.randn(count, 6, dtype=torch.float64), torch.randn(count, 6, dtype=torch.float64)
    x_t = torch.randn(count, 6, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(c.logsnr).sqrt()[:, None], torch.sigmoid(-c.logsnr).sqrt()[:, None]
    on_vp = x_t * alpha / c.alpha[:, None]
    as_v = [
        alpha * (on_vp - alpha * x0) / sigma - sigma * x0
        for x0 in (process.to_x0(p, x_t, levels.time) for p in (pred, truth))
    ]
    wanted = (as_v[0] - as_v[1]).square().mean(1) / (pred - truth).square().mean(1)
    torch.testing.assert_close(v_factor(c), wanted, rtol=1e-6, atol=0)
    if (schedule, target) == ("cosine", "v"):
        torch.testing.assert_close(v_factor(c), torch.ones_like(wanted))


def test_ranks():
    """32 numbers of x_t at the noisy end: independent, of equal variance."""
    process = Process("flow", "u")
    for directions in (1, 4, 32):
        found = measured(subject(Flat(directions), process), num=1000)
        assert found.rank_outputs[0] == pytest.approx(directions, rel=0.01)
        assert (found.rank_outputs <= directions + 1e-9).all()
    # The features are (B, 2, 4, 4): 16 places of width 2, of which the first channel is all that is left of 16.
    found = measured(subject(Flat(16), process), num=1000)
    assert found.rank_tokens[0] == pytest.approx(1.0)
    assert found.rank_pooled[0] == pytest.approx(1.0)
    found = measured(subject(Flat(32), process), num=1000)
    assert found.rank_tokens[0] == pytest.approx(2.0, rel=0.01)
    assert found.rank_pooled[0] == pytest.approx(2.0, rel=0.01)


def test_levels_reach_as_far_as_all_schedules_do():
    cosine, flow, vp = (Process(name, "v") for name in ("cosine", "flow", "vp"))
    assert shared_logsnr([flow], 3).tolist() == [-10.0, 0.0, 10.0]
    low, _, high = shared_logsnr([flow, vp, cosine], 3).tolist()
    assert low == max(-10.0, float(vp.logsnr(torch.ones(()))))
    assert high == min(10.0, float(cosine.logsnr(torch.tensor(0))))
    for process in (cosine, flow, vp):
        found = levels_of(process, shared_logsnr([process], 9))
        assert bool((found.logsnr.diff() > 0).all())
        torch.testing.assert_close(process.logsnr(found.time), found.logsnr)
    few = levels_of(Process("cosine", num_timesteps=6), shared_logsnr([cosine], 24))
    assert few.time.tolist() == sorted({*few.time.tolist()}, reverse=True)
    far = Process("logsnr_linear", "v", noise_scale=0.02)
    with pytest.raises(ValueError, match=r"no noise level in common.*-10\.0\.\.10\.0.*-?\d+\.\d\.\.\d+\.\d"):
        shared_logsnr([Process("logsnr_uniform", "v"), Process("logsnr_linear", "v", noise_scale=30000.0), far], 3)


def test_what_is_not_finite_is_named():
    class Broken(Known):
        def answer(self, x, time, y):
            return torch.where(time[:, None, None, None] > 0.99, torch.nan, x)

    model: Backbone = Broken()
    with pytest.raises(ArithmeticError, match=r"known: predictions at log-SNR -10\.00 are not finite"):
        measured(subject(model, Process("flow", "u")))
