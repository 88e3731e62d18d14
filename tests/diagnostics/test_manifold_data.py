"""Manifolds of known dimension: their moments, their distance and their posterior mean against brute force."""

from __future__ import annotations

import pytest
import torch

from erdfast.diagnostics.manifold_data import MANIFOLDS


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_moments_are_those_of_the_theory(name):
    manifold = MANIFOLDS[name](12, 2, 5)
    x = manifold.draw(200_000, generator()).double()
    assert x.mean(0).abs().max() < 0.02
    torch.testing.assert_close(torch.cov(x.T), manifold.basis @ manifold.basis.T, rtol=0, atol=0.02)
    torch.testing.assert_close(manifold.basis.T @ manifold.basis, torch.eye(manifold.rank, dtype=torch.float64))


@pytest.mark.parametrize("name", MANIFOLDS)
def test_the_embedding_is_the_seeds(name):
    one, same, other = (MANIFOLDS[name](8, 2, seed) for seed in (1, 1, 2))
    assert torch.equal(one.draw(3, generator()), same.draw(3, generator()))
    assert not torch.equal(one.basis, other.basis)


@pytest.mark.parametrize("name", MANIFOLDS)
def test_distance_of_what_lies_on_it_and_off_it(name):
    manifold = MANIFOLDS[name](12, 2, 0)
    x = manifold.draw(50, generator()).double()
    assert manifold.squared_distance(x).max() < 2 * 2e-3
    across = torch.linalg.qr(torch.cat([manifold.basis, torch.randn(12, 12, generator=generator()).double()], 1)).Q
    step = 0.5 * across[:, manifold.rank]
    torch.testing.assert_close(
        manifold.squared_distance(x + step), torch.full((50,), 0.25, dtype=torch.float64), rtol=0, atol=4e-3
    )


def test_distance_within_the_span_of_a_torus():
    """Towards the centre of its circles; a subspace has no such direction."""
    torus, subspace = (MANIFOLDS[name](12, 2, 0) for name in ("torus", "subspace"))
    origin = torch.zeros(1, 12)
    # The points of a circle are 2 from the centre, and no other is nearer: squared, of each of two circles.
    assert float(torus.squared_distance(origin)) == pytest.approx(8.0)
    assert float(subspace.squared_distance(origin)) == 0.0


@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("level", [0.2, 0.6, 0.95])
def test_posterior_mean_against_importance_sampling(name, level):
    manifold = MANIFOLDS[name](6, 1, 3)
    alpha, sigma = 1.0 - level, level
    x0 = manifold.draw(4, generator(1)).double()
    x_t = alpha * x0 + sigma * torch.randn(4, 6, generator=generator(2)).double()
    draws = manifold.draw(400_000, generator(3)).double()
    weights = torch.softmax(-torch.cdist(x_t, alpha * draws).square() / (2 * sigma**2), dim=1)
    found = manifold.posterior_mean(x_t, torch.full((4,), alpha), torch.full((4,), sigma))
    torch.testing.assert_close(found, weights @ draws, rtol=0, atol=0.02)


def test_a_rank_above_the_space_is_refused():
    with pytest.raises(ValueError, match="Torus of dimension 4 has rank 16, more than 15"):
        MANIFOLDS["torus"](15, 4, 0)
    with pytest.raises(ValueError, match="Subspace of dimension 0 has rank 0"):
        MANIFOLDS["subspace"](15, 0, 0)
