"""Frechet distance: against the published number, closed forms, scipy's matrix root, and hard covariances."""

import numpy as np
import pytest
import scipy.linalg
import torch

from erdfast.evaluation.frechet import FeatureStatistics, Gaussian, covariance_factor, frechet_distance
from tests.parity import load_parity


def random_covariance(size: int, rank: int, seed: int) -> np.ndarray:
    factor = np.random.RandomState(seed).randn(size, rank)
    return factor @ factor.T / rank


def test_published_distance() -> None:
    arrays = load_parity("metrics")
    samples, reference = (FeatureStatistics.of(arrays[name], chunk=97) for name in ("samples", "reference"))
    assert samples.distance(reference) == pytest.approx(float(arrays["fid"]), rel=1e-9)
    assert reference.distance(samples) == pytest.approx(float(arrays["fid"]), rel=1e-9)


def test_matrix_root_definition() -> None:
    c1, c2 = random_covariance(12, 30, 0), random_covariance(12, 30, 1)
    m1, m2 = np.random.RandomState(2).randn(2, 12)
    root = np.real(scipy.linalg.sqrtm(c1 @ c2))
    expected = np.sum((m1 - m2) ** 2) + np.trace(c1 + c2 - 2.0 * root)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-10)


def test_diagonal_closed_form() -> None:
    v1, v2 = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.25])
    expected = np.sum((np.sqrt(v1) - np.sqrt(v2)) ** 2) + 3.0
    assert frechet_distance(np.zeros(3), np.diag(v1), np.ones(3), np.diag(v2)) == pytest.approx(expected, rel=1e-12)


def test_small_distances_keep_their_digits() -> None:
    """Through eigenvalues of C1 C2 the null space alone would add about 1e-7 here."""
    cov = random_covariance(80, 10, 3)
    mean = np.zeros(80)
    assert frechet_distance(mean, cov, mean, cov) < 1e-12
    scaled = frechet_distance(mean, cov, mean, cov * 1.001**2)
    assert scaled == pytest.approx(1e-6 * np.trace(cov), rel=1e-6)


def test_rank_deficient_and_zero_covariances() -> None:
    v = np.zeros((3, 3))
    v[0, 0] = 4.0
    assert frechet_distance(np.zeros(3), v, np.zeros(3), np.zeros((3, 3))) == pytest.approx(4.0)
    few = FeatureStatistics.of(torch.randn(5, 40, generator=torch.Generator().manual_seed(0)))
    more = FeatureStatistics.of(torch.randn(9, 40, generator=torch.Generator().manual_seed(1)))
    assert np.isfinite(few.distance(more))


def test_statistics_match_numpy_far_from_zero() -> None:
    data = np.random.RandomState(0).randn(1003, 7) * [1, 2, 3, 4, 5, 6, 0] + 1e6
    for chunk in (1, 10, 4096):
        statistics = FeatureStatistics.of(data, chunk=chunk)
        np.testing.assert_allclose(statistics.mean, data.mean(0), rtol=1e-14)
        np.testing.assert_allclose(statistics.covariance, np.cov(data.T), rtol=1e-8, atol=1e-8)


def test_merge_is_the_same_as_one_pass() -> None:
    data = torch.randn(300, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [FeatureStatistics.of(part) for part in data.split([10, 1, 289])]
    total = FeatureStatistics(6)
    for part in (*parts, FeatureStatistics(6)):
        total.merge(part)
    whole = FeatureStatistics.of(data)
    assert total.count == 300
    torch.testing.assert_close(total.mean, whole.mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(total.covariance, whole.covariance, rtol=1e-12, atol=1e-14)


def test_processes_join() -> None:
    """All-reduce by hand: what each sends is summed, then what each makes of the sums is compared with the whole."""
    data = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100.0
    parts = [FeatureStatistics.of(part) for part in data.split([10, 1, 289])] + [FeatureStatistics(4)]
    count, mean = 300, data.mean(0)
    scatters = [p.scatter + torch.outer(p.mean - mean, p.mean - mean) * p.count for p in parts]
    scatter = torch.stack(scatters).sum(0)
    for part in parts:
        sums = iter([torch.tensor(count), mean * count, scatter])
        part.join_processes(lambda _own, sums=sums: next(sums))
        whole = FeatureStatistics.of(data)
        assert part.count == 300
        torch.testing.assert_close(part.mean, whole.mean, rtol=1e-13, atol=0.0)
        torch.testing.assert_close(part.covariance, whole.covariance, rtol=1e-10, atol=1e-12)


def test_factor_is_a_square_root() -> None:
    for rank in (3, 12, 40):
        covariance = torch.from_numpy(random_covariance(12, rank, rank))
        factor = covariance_factor(covariance)
        assert factor.shape == (12, min(rank, 12))
        torch.testing.assert_close(factor @ factor.T, covariance, rtol=0.0, atol=1e-13)
    assert covariance_factor(torch.zeros(3, 3)).shape == (3, 0)
    stored_in_float32 = torch.from_numpy(random_covariance(50, 10, 0)).float()
    factor = covariance_factor(stored_in_float32)
    torch.testing.assert_close(factor @ factor.T, stored_in_float32.double(), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("wrong", [-np.eye(3), np.diag([1.0, 1.0, -0.01]), np.array([[1.0, 0.5], [0.0, 1.0]])])
def test_matrices_that_are_no_covariances(wrong) -> None:
    with pytest.raises(ValueError, match=r"no covariance: its square root is wrong by .*eigenvalues are"):
        covariance_factor(torch.from_numpy(wrong))
    with pytest.raises(ValueError, match="no covariance"):
        frechet_distance(np.zeros(len(wrong)), wrong, np.zeros(len(wrong)), np.eye(len(wrong)))


def test_too_few_samples_are_said() -> None:
    few, enough = FeatureStatistics.of(torch.randn(8, 8)), FeatureStatistics.of(torch.randn(9, 8))
    assert "8 samples for 8 features" in str(few.gaussian().warning)
    assert enough.gaussian().warning is None
    assert Gaussian(torch.zeros(2), torch.eye(2)).warning is None


def test_float32_features_are_summed_in_float64() -> None:
    features = torch.full((20000, 1), 0.1)
    assert float(FeatureStatistics.of(features, chunk=64).mean) == pytest.approx(float(torch.tensor(0.1)), rel=1e-13)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        FeatureStatistics(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics(1).update(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics.of(torch.zeros(1, 3)).covariance
    with pytest.raises(ValueError, match="merge"):
        FeatureStatistics(3).merge(FeatureStatistics(4))
    with pytest.raises(ValueError, match="shapes"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.inf))
    with pytest.raises(ValueError, match="at least 1"):
        FeatureStatistics(0)
    with pytest.raises(ValueError, match="2 features cannot be compared with 3"):
        Gaussian(torch.zeros(2), torch.eye(2)).distance(Gaussian(torch.zeros(3), torch.eye(3)))


def test_features_without_a_second_dimension_are_refused() -> None:
    with pytest.raises(ValueError, match=r"features must be \(N, \.\.\.\).*\(5,\)"):
        FeatureStatistics.of(torch.zeros(5))
