"""Gradient statistics: against single gradients computed one by one, and against known distributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from erdfast.diagnostics import gradients as module
from erdfast.diagnostics.gradients import (
    Folding,
    LevelGradients,
    cosines,
    group_sizes,
    measure_gradients,
    moments,
    moments_with_errors,
    whole_gradient,
)
from erdfast.diagnostics.subject import NOISE_STREAM, draw_images, levels_of, shared_logsnr
from erdfast.ops import NoiseKey, add_noise
from erdfast.process import Process
from tests.diagnostics.networks import Known, mixture, subject
from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


class Tiny(Known):
    """tanh of x_t times one matrix over channels, plus a vector that the time is multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.tensor([[0.5, -0.2], [0.1, 0.8]]))
        self.drift = nn.Parameter(torch.tensor([0.3, -0.1]))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)

    def answer(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        mixed = torch.einsum("dc,bchw->bdhw", self.matrix, x).contiguous()
        return torch.tanh(mixed + time.view(-1, 1, 1, 1) * self.drift.view(1, 2, 1, 1))


def measured(of, num: int, num_levels: int = 3, seed: int = 0, batch_size: int = 64) -> LevelGradients:
    levels = levels_of(of.process, shared_logsnr([of.process], num_levels))
    return measure_gradients(of, levels, num=num, seed=seed, batch_size=batch_size, advance=lambda: None)


def one_by_one(of, num: int, level: int, num_levels: int) -> Tensor:
    """(num, P) float64 gradients of the samples that `measure_gradients` looks at, by an ordinary loss."""
    levels = levels_of(of.process, shared_logsnr([of.process], num_levels))
    images = draw_images(of.dataset, num, 0, module._IMAGES + level * num)
    c = of.process.coefficients(levels.time[level].expand(num))
    key = NoiseKey(0, NOISE_STREAM + (1 << 20) + level, torch.arange(num))
    x_t = add_noise(images.x, c, key)
    eps = add_noise(torch.zeros_like(images.x), c._replace(sigma=torch.ones(num)), key)
    wanted = (c.c_x.view(-1, 1, 1, 1) * images.x + c.c_eps.view(-1, 1, 1, 1) * eps).detach()
    network = of.model.double()
    parameters = [p for p in network.parameters() if p.requires_grad]
    rows = []
    for i in range(num):
        part = slice(i, i + 1)
        error = (network(x_t[part].double(), c.time[part], images.y[part]) - wanted[part]).square().mean()
        found = torch.autograd.grad(error, parameters, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    network.float()
    return torch.stack(rows)


@pytest.mark.parametrize("target", ["eps", "k"])
def test_statistics_are_those_of_single_gradients(target):
    """Of 16 samples every one is a group."""
    of = subject(Tiny(), Process("flow", target, "constant"))
    found = measured(of, num=16)
    assert (found.parameters, found.kept) == (10, 10)
    means = []
    for level in range(3):
        g = one_by_one(of, 16, level, 3)
        mean, trace = g.mean(0), float(g.var(0).sum())
        squared = float(mean.square().sum()) - trace / 16
        assert float(found.trace[level]) == pytest.approx(trace, rel=1e-4)
        assert float(found.squared_norm[level]) == pytest.approx(squared, rel=1e-3, abs=1e-4 * trace)
        assert float(found.snr[level]) == pytest.approx(squared / trace, rel=1e-3, abs=1e-4)
        means.append(mean)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert float(found.products[i, j]) == pytest.approx(float(means[i] @ means[j]), rel=1e-3, abs=1e-6)
    assert torch.equal(found.products.diagonal(), found.squared_norm)


def test_groups_of_several_samples_are_means():
    of = subject(Tiny(), Process("flow", "eps"))
    found = measured(of, num=64, num_levels=2)
    g = one_by_one(of, 64, 1, 2).view(16, 4, -1).mean(1)
    spread = float(g.var(0).sum())
    assert float(found.trace[1]) == pytest.approx(4 * spread, rel=1e-4)
    assert float(found.squared_norm[1]) == pytest.approx(float(g.mean(0).square().sum()) - spread / 16, rel=1e-3)


def test_a_group_may_take_several_calls():
    of = subject(Tiny(), Process("flow", "eps"))
    calls = []
    of.model.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    whole, parts = measured(of, num=112, num_levels=2), measured(of, num=112, num_levels=2, batch_size=3)
    assert calls == [7] * 32 + [3, 3, 1] * 32
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_groups_are_equally_large():
    assert [group_sizes(num) for num in (2, 6, 16, 31, 64)] == [(2, 1), (6, 1), (16, 1), (16, 1), (16, 4)]


def test_the_weight_changes_nothing():
    plain, weighed = (measured(subject(Tiny(), Process("cosine", "v", w)), 16) for w in ("constant", "erd"))
    for one, other in zip(plain, weighed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def test_it_is_a_function_of_the_seed():
    of = subject(Tiny(), Process("flow", "u"))
    assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(measured(of, 8), measured(of, 8), strict=True))
    assert not torch.allclose(measured(of, 8).trace, measured(of, 8, seed=1).trace, rtol=1e-3)


def draws(count: int, groups: int, per_group: int, width: int, signal: float, seed: int) -> Tensor:
    """(count, groups, width) group means of samples with mean of that length and covariance 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, groups, width, generator=generator, dtype=torch.float64) / per_group**0.5
    noise[..., 0] += signal
    return noise


@pytest.mark.parametrize(("signal", "too_large"), [(0.5, 1.5), (20.0, 1.15)])
def test_estimates_have_no_bias_and_errors_are_right(signal, too_large):
    """tr Cov = 20; |A|^2 alone would be larger by 20/48. Where noise prevails, a jackknife's errors are too large."""
    rows = draws(1000, 12, 4, 20, signal, 0)
    found = torch.tensor([moments_with_errors(r @ r.T, 4) for r in rows], dtype=torch.float64)
    mean, spread = found.mean(0), found.std(0)
    for column, wanted in enumerate((signal**2, 20.0, signal**2 / 20.0)):
        slack = 0.02 * wanted if column == 2 else 0.0  # the mean of a ratio is not the ratio of means
        assert float(mean[column]) == pytest.approx(wanted, abs=4 * float(spread[column]) / 1000**0.5 + slack)
        ratio = float(found[:, 3 + column].square().mean().sqrt() / spread[column])
        assert 0.9 < ratio < (too_large if column != 1 else 1.1)
    assert bool((found[:, 0] < 0).any()) == (signal < 1)  # which is how it can have none


def test_two_groups_have_no_error():
    rows = draws(1, 2, 1, 4, 1.0, 0)[0]
    found = moments_with_errors(rows @ rows.T, 1)
    assert found[:3] == moments(rows @ rows.T, 1)
    assert all(value != value for value in found[3:])


def test_folding_keeps_products():
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 40), (7,), (), (50, 100)]
    a, b = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    b = [x + 0.5 * y for x, y in zip(a, b, strict=True)]
    whole = Folding(a, 10**6, seed=0)
    assert whole.parameters == whole.kept == 17_008
    assert torch.equal(whole(a), torch.cat([x.flatten() for x in a]))
    exact = float(whole(a) @ whole(b))
    lengths = float(whole(a).norm() * whole(b).norm())
    folded = []
    for seed in range(30):
        fold = Folding(a, 1000, seed)
        assert (fold.parameters, fold.kept) == (17_008, 1000)
        assert torch.equal(fold(a), fold(a))
        folded.append(float(fold(a) @ fold(b)))
    folded = torch.tensor(folded)
    bound = lengths / 1000**0.5
    assert float(folded.mean()) == pytest.approx(exact, abs=4 * bound * 1.5 / 30**0.5)
    assert 0.3 * bound < float(folded.std()) < 2.0 * bound


def test_large_networks_are_folded(monkeypatch):
    of = subject(Tiny(), Process("flow", "u"))
    exact = measured(of, 16)
    monkeypatch.setattr(module, "MOST_NUMBERS", 16 * 6)
    folded = measured(of, 16)
    assert (folded.parameters, folded.kept) == (10, 6)
    assert not torch.equal(folded.trace, exact.trace)


def statistics(means: Tensor, traces: list[float], error: float) -> LevelGradients:
    """Of levels with these mean gradients (L, P)."""
    products = means @ means.T
    squared, trace = products.diagonal().clone(), torch.tensor(traces, dtype=torch.float64)
    return LevelGradients(squared, torch.full_like(squared, error), trace, squared / trace, trace, products, 2, 2)


def test_cosines():
    means = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    found = cosines(statistics(means, [1.0] * 4, error=0.1))
    root = 0.5**0.5
    assert found[:3, :3].flatten().tolist() == pytest.approx([1, root, -1, root, 1, -root, -1, -root, 1])
    assert found[3].isnan().all() and found[:, 3].isnan().all()  # noqa: PT018  # 0.01 is not clear of 0
    assert not cosines(statistics(means, [1.0] * 4, error=torch.nan)).isnan().any()


def test_the_whole_gradient_is_that_of_drawn_and_weighed_levels():
    generator = torch.Generator().manual_seed(0)
    means = torch.tensor([[1.0, 0.5, 0.0], [-0.4, 1.0, 2.0]], dtype=torch.float64)
    widths = torch.tensor([0.5, 2.0], dtype=torch.float64)
    chance, weight = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.tensor([2.0, 0.5], dtype=torch.float64)
    level = torch.multinomial(chance, 200_000, replacement=True, generator=generator)
    noise = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    g = weight[level, None] * (means[level] + widths[level, None] * noise)
    found = whole_gradient(statistics(means, (3 * widths**2).tolist(), 0.0), chance, weight)
    assert found.squared_norm == pytest.approx(float(g.mean(0).square().sum()), rel=0.02)
    assert found.trace == pytest.approx(float(g.var(0).sum()), rel=0.02)
    assert found.noise_scale == found.trace / found.squared_norm
    lost = statistics(means, [1.0, 1.0], 0.0)._replace(products=-torch.eye(2, dtype=torch.float64))
    assert whole_gradient(lost, chance, weight).noise_scale != whole_gradient(lost, chance, weight).noise_scale


def test_a_gradient_that_is_not_finite_is_named():
    model = Tiny()
    with torch.no_grad():
        model.matrix[0, 0] = torch.nan
    with pytest.raises(ArithmeticError, match=r"known: a gradient at log-SNR -10\.00 is not finite"):
        measured(subject(model, Process("flow", "u"), mixture()), 4)
