"""The effective rank against its definition in plain Python, and where it is known."""

from __future__ import annotations

import math

import pytest
import torch

from erdfast.diagnostics.effective_rank import effective_rank, effective_rank_of_features


def by_definition(values: list[float]) -> float:
    total = math.fsum(values)
    return math.exp(-math.fsum(v / total * math.log(v / total) for v in values if v > 0))


def test_it_is_the_exponential_of_the_entropy():
    values = [[5.0, 1.0, 0.25, 1e-9], [1e200, 3e200, 0.0, 2e200], [1e-200, 0.0, 0.0, 3e-200]]
    found = effective_rank(torch.tensor(values, dtype=torch.float64))
    assert found.dtype == torch.float64
    wanted = [by_definition(values[0]), by_definition([1.0, 3.0, 2.0]), by_definition([1.0, 3.0])]
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("values", "rank"), [([3.0] * 7, 7.0), ([0.0, 2.0, 0.0], 1.0), ([0.0, 0.0], 0.0), ([4.0, 4.0, -1e-10], 2.0)]
)
def test_known_ranks(values, rank):
    assert float(effective_rank(torch.tensor(values, dtype=torch.float64))) == pytest.approx(rank, abs=1e-9)
    assert float(effective_rank(torch.tensor(values, dtype=torch.float64) * 1e-3)) == pytest.approx(rank, abs=1e-9)


def test_features_have_the_rank_of_their_singular_values():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 6, generator=generator) * torch.tensor([9.0, 4.0, 1.0, 0.3, 0.1, 0.0]) + 5.0
    for centered in (False, True):
        x = features.double() - (features.double().mean(0) if centered else 0.0)
        singular = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
        wanted = by_definition(singular[singular > 1e-6 * singular.max()].tolist())
        found = effective_rank_of_features(features, centered=centered)
        assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert effective_rank_of_features(features + 500.0, centered=False) < 1.1  # the common part is all one sees


def test_equal_rows_have_no_rank_once_centred():
    rows = torch.full((300, 8), 0.1)
    assert float(effective_rank_of_features(rows)) == 0.0
    assert float(effective_rank_of_features(rows, centered=False)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, float("inf")], [1.0, -0.1]])
def test_what_is_no_spectrum_is_refused(values):
    with pytest.raises(ValueError, match="effective rank needs"):
        effective_rank(torch.tensor(values))


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"\(N, D\).*\(3,\)"):
        effective_rank_of_features(torch.ones(3))
    with pytest.raises(ValueError, match="finite"):
        effective_rank_of_features(torch.full((2, 2), float("nan")))
