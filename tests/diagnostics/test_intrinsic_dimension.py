"""Estimators of the dimension: formulas on constructed distances, and points whose dimension is known."""

from __future__ import annotations

import math

import pytest
import torch

from erdfast.diagnostics.data_sample import distinct_rows, draw_sample, row_groups
from erdfast.diagnostics.intrinsic_dimension import (
    ESTIMATORS,
    PARTS,
    components_for,
    estimate_once,
    estimates_by_size,
    least_points,
    levina_bickel,
    neighbour_distances,
    participation_ratio,
    spectrum,
    two_nn_fit,
    two_nn_mle,
)
from erdfast.diagnostics.manifold_data import MANIFOLDS
from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def normal(num: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed))


def pareto(dim: float, num: int) -> torch.Tensor:
    """(num, 2) distances whose ratios have exactly the law of two-NN: P(mu > m) = m^-dim."""
    uniform = torch.rand(num, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.stack([torch.ones(num).double(), uniform.pow(-1.0 / dim)], dim=1)


def poisson_ball(dim: float, num: int, neighbours: int) -> torch.Tensor:
    """(num, neighbours) distances in a Poisson process of constant density: volumes are sums of exponentials."""
    generator = torch.Generator().manual_seed(2)
    steps = torch.empty(num, neighbours, dtype=torch.float64).exponential_(generator=generator)
    return steps.cumsum(1).pow(1.0 / dim)


@pytest.mark.parametrize("discard", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("estimator", [two_nn_fit, two_nn_mle])
@pytest.mark.parametrize("dim", [1.0, 7.5])
def test_two_nn_on_the_law_it_supposes(dim, estimator, discard):
    """The MLE's relative error is that of a mean of as many exponential variables as are kept; the fit's is larger."""
    num = 20_000
    error = 1.0 / math.sqrt((1.0 - discard) * num)
    assert estimator(pareto(dim, num), discard) == pytest.approx(
        dim, rel=(5 if estimator is two_nn_mle else 10) * error
    )


def test_the_fits_slope_is_least_squares():
    """Through the origin, over the ratios that are kept."""
    distances = pareto(3.0, 40)
    logs = (distances[:, 1] / distances[:, 0]).log().sort().values[:36]
    heights = -torch.log(1.0 - torch.arange(1, 37).double() / 40)
    wanted = torch.linalg.lstsq(logs[:, None], heights[:, None]).solution
    assert two_nn_fit(distances, 0.1) == pytest.approx(float(wanted))


@pytest.mark.parametrize("dim", [2.0, 9.0])
def test_levina_bickel_on_the_law_it_supposes(dim):
    found = levina_bickel(poisson_ball(dim, 4000, 12))
    assert found.shape == (12,)
    for k in (2, 5, 12):  # a sum of 4000 (k - 1) exponential variables
        assert float(found[k - 1]) == pytest.approx(dim, rel=5 / math.sqrt(4000 * (k - 1)))


def test_levina_bickel_by_its_definition():
    distances = poisson_ball(3.0, 5, 6)
    for k in range(2, 7):
        sums = [(distances[:, k - 1] / distances[:, j]).log() for j in range(k - 1)]
        assert float(levina_bickel(distances)[k - 1]) == pytest.approx(1.0 / float(torch.stack(sums).mean()))
    assert bool(levina_bickel(distances)[0].isnan())


def test_neighbours_against_all_distances():
    x = normal(60, 3)
    apart = torch.cdist(x.double(), x.double()).fill_diagonal_(math.inf).sort(1).values
    torch.testing.assert_close(neighbour_distances(x, 5), apart[:, :5], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "dim"), [("subspace", 1), ("subspace", 3), ("subspace", 6), ("torus", 1), ("torus", 2)]
)
def test_points_of_known_dimension(kind, dim):
    """In 20 dimensions; the curvature of a torus is felt by no more than a tenth at this density."""
    x = MANIFOLDS[kind](20, dim, 0).draw(2000, torch.Generator().manual_seed(1))
    found = estimates_by_size(x, (10, 20))[2000]
    for name in ESTIMATORS:
        value, error = found[name]
        assert abs(value - dim) < 0.12 * dim + 2 * error, name


def test_many_dimensions_are_underestimated():
    """What the page says of itself."""
    found = estimate_once(normal(1000, 40), (10, 20))
    assert max(found.values()) < 32
    assert participation_ratio(spectrum(normal(1000, 40))) > 36


def test_scale_and_rotation_change_nothing():
    x = normal(300, 5)
    turn = torch.linalg.qr(normal(5, 5, seed=3)).Q
    one, other = (estimate_once(points, (4, 8)) for points in (x, 100.0 * x @ turn + 3.0))
    assert other == pytest.approx(one, rel=1e-3)


def test_standard_errors_are_those_of_repetitions():
    """Of 24 independent sets of points, against the mean of what each says of itself."""
    found = [estimates_by_size(normal(800, 3, seed=seed), (4, 8))[800] for seed in range(24)]
    for name in ESTIMATORS:
        spread = float(torch.tensor([one[name].value for one in found]).std())
        said = float(torch.tensor([one[name].error for one in found]).square().mean().sqrt())
        assert 0.6 < said / spread < 1.7, name


def test_sizes_are_halved_down_to_the_parts():
    x = normal(1000, 2)
    assert list(estimates_by_size(x, (4, 8))) == [125, 250, 500, 1000]
    assert PARTS == 8
    few = estimates_by_size(x[: least_points(8)], (4, 8))
    assert list(few) == [18, 36]
    again = estimates_by_size(x, (4, 8), seed=1)
    assert again[1000]["two-NN MLE"].value == pytest.approx(estimates_by_size(x, (4, 8))[1000]["two-NN MLE"].value)
    assert again[125] != estimates_by_size(x, (4, 8))[125]


def test_the_spectrum_is_the_covariances():
    for x in (normal(50, 7) * torch.arange(1, 8), normal(5, 9)):
        wanted = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
        found = spectrum(x)
        assert found.shape == (min(x.shape[0] - 1, x.shape[1]),)
        torch.testing.assert_close(found, wanted[: found.shape[0]])


def test_how_many_directions():
    assert participation_ratio(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3.0)
    assert participation_ratio(torch.tensor([3.0, 1.0])) == pytest.approx(1.6)
    shares = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [components_for(shares, share) for share in (0.4, 0.5, 0.51, 0.85, 0.95)] == [1, 1, 2, 3, 4]


def test_identical_rows_are_counted_once():
    x = torch.tensor([[1.0, 0.0], [2.0, 2.0], [1.0, -0.0], [3.0, 1.0], [2.0, 2.0]])
    assert row_groups(x).tolist() == [0, 1, 0, 2, 1]
    assert distinct_rows(x).tolist() == [[1.0, 0.0], [2.0, 2.0], [3.0, 1.0]]


def test_a_sample_is_drawn_without_repeats():
    one, same, other = (draw_sample("digits", 100, seed=seed) for seed in (0, 0, 1))
    assert one.x.shape == (100, 64)
    assert torch.equal(one.x, same.x)
    assert not torch.equal(one.x, other.x)
    assert draw_sample("digits", 10**6, seed=0).described.startswith("1,797 of 1,797 images")
    with pytest.raises(ValueError, match="data digits: 5 samples are too few, estimates need 84 or more"):
        draw_sample("digits", 5, seed=0, at_least=84)


def test_what_cannot_be_is_refused():
    x = normal(50, 2)
    with pytest.raises(ValueError, match="50 points have no 50 nearest neighbours"):
        neighbour_distances(x, 50)
    with pytest.raises(ValueError, match="some points coincide"):
        neighbour_distances(torch.cat([x, x[:1]]), 3)
    with pytest.raises(ValueError, match="35 distinct samples are too few for neighbours up to 8: 36 or more"):
        estimates_by_size(x[:35], (4, 8))
    with pytest.raises(ValueError, match=r"discard=1.0 must be at least 0 and below 1"):
        two_nn_fit(pareto(2.0, 10), 1.0)
    grid = torch.cartesian_prod(*[torch.arange(6.0)] * 2)
    with pytest.raises(ValueError, match="equally far: two-NN has no answer"):
        estimate_once(grid, (2, 4))
