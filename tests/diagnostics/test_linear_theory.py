"""The linear theory against the optimal layer found by least squares and by training, and against its closed forms."""

from __future__ import annotations

import pytest
import torch

from erdfast.diagnostics.linear_theory import (
    averages,
    averages_of,
    best_k,
    k_star,
    layer_loss,
    optimal_gains,
    optimal_k,
    optimal_loss,
    subspace_variances,
    train_layer,
)
from erdfast.process import Process
from tests.runs import single_thread

LOSSES = {
    "target": {"loss_space": "target"},
    "u": {"loss_space": "u", "kappa_clip": 0.05},
    "u_unclipped": {"loss_space": "u"},
    "logit_normal": {"time_sampler": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8},
    "jit": {"loss_space": "u", "kappa_clip": 0.05, "time_sampler": "logit_normal", "logit_mean": 0.8, "logit_std": 0.8},
    "scaled": {"noise_scale": 2.0},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def learnable(k: float, weighting: str = "constant", schedule: str = "flow", **options) -> Process:
    return Process(schedule, "k", weighting, k_init=k, **options)


def loss_at(k: float, variances: torch.Tensor, **options) -> float:
    """Delta* with k as it is written, not as a float32 parameter holds it."""
    process = learnable(k, **options).double()
    with torch.no_grad():
        next(process.parameters()).copy_(torch.logit(torch.tensor(k, dtype=torch.float64)))
        return float(optimal_loss(averages_of(process), variances))


def golden_section(function, low: float, high: float) -> float:
    """Where a function with one minimum has it, from values alone."""
    ratio = (5**0.5 - 1) / 2
    while high - low > 1e-9:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if function(left) < function(right) else (left, high)
    return (low + high) / 2


def random_spectrum(size: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(3)).double().square() * 4


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize(("ambient", "intrinsic"), [(64, 1), (64, 16), (64, 64), (10, 3)])
def test_the_special_case_has_the_papers_optimum(ambient, intrinsic):
    """Eq. 14 from eq. 12: uniform times on `flow`, error in the target."""
    variances = subspace_variances(ambient, intrinsic)
    assert k_star(ambient, intrinsic) == ambient / (ambient + intrinsic)
    assert best_k(learnable(0.5), variances) == pytest.approx(k_star(ambient, intrinsic), abs=1e-6)
    process = learnable(0.5)
    c = process.coefficients(process.times.nodes, dtype=torch.float64)
    found = optimal_k(c.alpha, c.sigma, process.times.masses, variances)
    assert float(found) == pytest.approx(k_star(ambient, intrinsic), abs=1e-6)


@pytest.mark.parametrize("k", [0.1, 0.5, 0.9])
def test_the_special_case_in_closed_form(k):
    """Eq. 54d: [2(D+d)k^2 - 4Dk + 2D + 3d]/16."""
    for ambient, intrinsic in ((64, 4), (7, 7)):
        wanted = (2 * (ambient + intrinsic) * k**2 - 4 * ambient * k + 2 * ambient + 3 * intrinsic) / 16
        assert loss_at(k, subspace_variances(ambient, intrinsic)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variances", [subspace_variances(8, 2), random_spectrum(8)], ids=["subspace", "spectrum"])
def test_the_best_k_is_that_of_numerical_optimisation(loss, variances):
    """By golden section, which knows no gradient and no closed form."""
    wanted = golden_section(lambda k: loss_at(k, variances, **LOSSES[loss]), 1e-7, 1 - 1e-7)
    found = best_k(learnable(0.5, **LOSSES[loss]), variances)
    assert found == pytest.approx(wanted, abs=1e-6)
    reached, least = (loss_at(k, variances, **LOSSES[loss]) for k in (found, wanted))
    assert reached == pytest.approx(least, rel=1e-6)


@pytest.mark.parametrize("weighting", ["erd", "min_snr"])
@pytest.mark.parametrize("schedule", ["gvp", "cosine"])
def test_the_best_k_where_weights_depend_on_it(weighting, schedule):
    variances, options = subspace_variances(12, 3), {"weighting": weighting, "schedule": schedule}
    found = best_k(learnable(0.5, **options), variances)
    grid = [loss_at(k, variances, **options) for k in torch.linspace(0.001, 0.999, 200).tolist()]
    assert loss_at(found, variances, **options) <= min(grid) + 1e-12


@pytest.mark.parametrize("loss", ["target", "logit_normal", "scaled"])
def test_the_vertex_of_the_parabola(loss):
    """The closed form for a measure that does not depend on k, for any spectrum."""
    process, variances = learnable(0.5, **LOSSES[loss]), random_spectrum(9)
    c = process.coefficients(process.times.nodes, dtype=torch.float64)
    found = optimal_k(c.alpha, c.sigma, c.w * process.times.masses, variances, process.noise_scale)
    assert best_k(process, variances) == pytest.approx(float(found), abs=1e-9)


def test_the_vertex_may_lie_beyond_the_ends():
    """Without noise, x0 is read off x_t by one factor for all data: k = 1; k above 1 is no target."""
    alpha, sigma, measure = (
        torch.tensor(value, dtype=torch.float64) for value in ([1.0, 1.0], [0.0, 1e-3], [0.5, 0.5])
    )
    assert float(optimal_k(alpha, sigma, measure, torch.ones(3).double())) == pytest.approx(1.0, abs=1e-3)
    found = optimal_k(alpha, torch.tensor([1.0, 3.0]).double(), measure, torch.full((3,), 1e-9).double())
    assert 0.0 <= float(found) <= 1.0


@pytest.mark.parametrize("loss", ["target", "u"])
def test_against_the_layer_that_least_squares_finds(loss):
    """W minimises a quadratic form; its minimum is written out with matrices, without the modes of the theory."""
    ambient, intrinsic = 6, 2
    process = learnable(0.7, **LOSSES[loss])
    with torch.no_grad():
        c = process.coefficients(process.times.nodes, dtype=torch.float64)
        found = averages_of(process)
    basis = rotation(ambient)
    data, one = basis[:, :intrinsic] @ basis[:, :intrinsic].T, torch.eye(ambient, dtype=torch.float64)
    measure = c.w * process.times.masses

    def mean(of_data: torch.Tensor, of_noise: torch.Tensor) -> torch.Tensor:
        return (measure * of_data).sum() * data + (measure * of_noise).sum() * one

    zz, uz = mean(c.alpha**2, c.sigma**2), mean(c.c_x * c.alpha, c.c_eps * c.sigma)
    layer = torch.linalg.solve(zz, uz.T).T
    wanted = 0.5 * (mean(c.c_x**2, c.c_eps**2) - layer @ uz.T).trace()
    variances = subspace_variances(ambient, intrinsic)
    assert float(optimal_loss(found, variances)) == pytest.approx(float(wanted), rel=1e-9)
    torch.testing.assert_close(basis @ torch.diag(optimal_gains(found, variances)) @ basis.T, layer)
    assert float(layer_loss(found, layer, data)) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize("loss", ["target", "u"])
def test_the_loss_is_the_mean_squared_error_of_samples(loss):
    """Delta* of eq. 4 by Monte Carlo: samples, noise and times are drawn and the best layer is applied to them."""
    ambient, intrinsic, num = 5, 2, 200_000
    process, basis = learnable(0.7, **LOSSES[loss]), rotation(ambient)
    with torch.no_grad():
        found = averages_of(process)
        c = process.coefficients(process.sample_time(num, seed=0, step=0), dtype=torch.float64)
    variances, generator = subspace_variances(ambient, intrinsic), torch.Generator().manual_seed(1)
    x0 = torch.randn(num, intrinsic, generator=generator, dtype=torch.float64) @ basis[:, :intrinsic].T
    noise = torch.randn(num, ambient, generator=generator, dtype=torch.float64)
    layer = basis @ torch.diag(optimal_gains(found, variances)) @ basis.T
    noisy = c.alpha[:, None] * x0 + c.sigma[:, None] * noise
    target = c.c_x[:, None] * x0 + c.c_eps[:, None] * noise
    errors = 0.5 * c.w * (noisy @ layer.T - target).square().sum(1)
    standard_error = float(errors.std()) / num**0.5
    assert abs(float(errors.mean()) - float(optimal_loss(found, variances))) < 4 * standard_error


@pytest.mark.parametrize("loss", ["target", "jit"])
def test_a_trained_layer_reaches_the_theory(loss):
    """k learnt along with the layer: k*, W* and the least of all losses."""
    ambient, intrinsic = 6, 2
    basis, variances = rotation(ambient), subspace_variances(ambient, intrinsic)
    root, process = basis[:, :intrinsic], learnable(0.5, **LOSSES[loss])
    trained, best = train_layer(process, root, learn_k=True), best_k(process, variances)
    assert trained.k == pytest.approx(best, abs=0.01)
    with torch.no_grad():
        found = averages_of(process)
    wanted = basis @ torch.diag(optimal_gains(found, variances)) @ basis.T
    assert float((trained.layer - wanted).norm() / wanted.norm()) < 0.03
    reached = float(layer_loss(found, trained.layer, root @ root.T))
    assert reached == pytest.approx(loss_at(best, variances, **LOSSES[loss]), rel=1e-3)


def test_a_trained_layer_of_a_fixed_target():
    """k stays where it is, and other seeds give other noise."""
    root, process = rotation(3)[:, :1], learnable(0.3)
    one, same, other = (train_layer(process, root, learn_k=False, steps=3, seed=seed) for seed in (1, 1, 2))
    assert one.k == pytest.approx(0.3)
    assert torch.equal(one.layer, same.layer)
    assert not torch.equal(one.layer, other.layer)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_any_symmetric_times_give_the_papers_optimum(std):
    """Theorem 3.2 is stated for uniform times; its proof needs <alpha> = <sigma> and <alpha^2> = <sigma^2> alone."""
    process = learnable(0.5, time_sampler="logit_normal", logit_std=std)
    assert best_k(process, subspace_variances(20, 5)) == pytest.approx(0.8, abs=1e-6)


def test_the_velocity_loss_has_another_optimum():
    """The loss of algorithm 1, with the floor of pixels, is least for x0 prediction wherever there is codimension."""
    process, variances = learnable(0.5, **LOSSES["u"]), subspace_variances(64, 16)
    assert best_k(process, variances) > 0.999
    assert loss_at(0.999, variances, **LOSSES["u"]) < 0.9 * loss_at(k_star(64, 16), variances, **LOSSES["u"])


def test_no_layer_is_better():
    """Perturbing W* in any direction raises the loss."""
    with torch.no_grad():
        found = averages_of(learnable(0.6))
    variances = random_spectrum(4)
    best, generator = torch.diag(optimal_gains(found, variances)), torch.Generator().manual_seed(0)
    for _ in range(5):
        other = best + 0.1 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
        assert layer_loss(found, other, torch.diag(variances)) > optimal_loss(found, variances)


def test_without_codimension_data_and_noise_are_alike():
    """d = D is symmetric in k and 1 - k."""
    left, right = (loss_at(k, subspace_variances(5, 5)) for k in (0.2, 0.8))
    assert left == pytest.approx(right)


def test_x0_prediction_has_no_loss_across():
    """psi = 0 (the paper's fourth remark): the loss does not depend on D."""
    t = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    one = torch.ones_like(t)
    found = averages(1 - t, t, one, 0 * one, one / 64)
    losses = [float(optimal_loss(found, subspace_variances(ambient, 3))) for ambient in (3, 50)]
    assert losses[0] == pytest.approx(losses[1])


def test_the_process_is_left_as_it_was():
    process = learnable(0.3)
    before = [p.detach().clone() for p in process.parameters()]
    best_k(process, subspace_variances(8, 2))
    assert all(torch.equal(p, b) for p, b in zip(process.parameters(), before, strict=True))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="target 'k', not 'eps'"):
        best_k(Process("flow", "eps", "constant"), subspace_variances(8, 2))
    for intrinsic in (0, 9):
        with pytest.raises(ValueError, match=f"intrinsic dimension {intrinsic} must lie between 1 and .* 8"):
            subspace_variances(8, intrinsic)
