"""Precision and recall: published numbers, cases by hand, tiles, processes."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from erdfast.evaluation.precision_recall import neighbour_radii, precision_recall, squared_distances
from tests.parity import load_parity

TILES = [(30, 50), (57, 13), (64, 2), (5000, 5000)]


def by_definition(samples: np.ndarray, reference: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Whole matrices in float64."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(-1))

    def radii(a: np.ndarray) -> np.ndarray:
        return np.sort(distances(a, a), axis=1)[:, k]  # the first is the feature itself

    between = distances(samples, reference)
    precise, recalled = between <= radii(reference), between <= radii(samples)[:, None]
    return float(precise.any(1).mean()), float(recalled.any(0).mean())


def clouds(dtype=torch.float32) -> tuple[Tensor, Tensor]:
    random = np.random.RandomState(0)
    samples, reference = random.randn(150, 5), random.randn(110, 5) * 0.8 + 0.6
    return torch.from_numpy(samples).to(dtype), torch.from_numpy(reference).to(dtype)


@pytest.mark.parametrize("tile", [(100, 170), (2048, 8192)])
def test_published_numbers(tile):
    arrays = load_parity("metrics")
    samples, reference = torch.from_numpy(arrays["samples"]), torch.from_numpy(arrays["reference"])
    found = precision_recall(samples, reference, tile=tile)
    assert found.precision == pytest.approx(float(arrays["precision"]), abs=1e-9)
    assert found.recall == pytest.approx(float(arrays["recall"]), abs=1e-9)
    single = precision_recall(samples.float(), reference.float(), tile=tile)
    assert single == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_definition(k):
    samples, reference = clouds()
    expected = by_definition(samples.numpy(), reference.numpy(), k)
    assert 0.1 < min(expected) < max(expected) < 1.0
    assert precision_recall(samples, reference, neighbours=k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tile", TILES)
def test_tiles_are_the_whole(tile):
    samples, reference = clouds(torch.float64)
    assert precision_recall(samples, reference, tile=tile) == precision_recall(samples, reference)
    torch.testing.assert_close(neighbour_radii(samples, 3, tile=tile), neighbour_radii(samples, 3))


def test_by_hand():
    """On a line, k = 1: reference 0, 1, 10 have radii 1, 1, 9; samples 0.5, 20, 30 have 19.5, 10, 10."""
    reference, samples = torch.tensor([[0.0], [1.0], [10.0]]).double(), torch.tensor([[0.5], [20.0], [30.0]])
    assert neighbour_radii(reference, 1).sqrt().tolist() == pytest.approx([1.0, 1.0, 9.0])
    assert precision_recall(samples, reference, neighbours=1) == pytest.approx((1 / 3, 1.0))


def test_repeated_features_are_neighbours():
    assert neighbour_radii(torch.zeros(5, 2), 3).tolist() == [0.0] * 5
    assert precision_recall(torch.zeros(5, 2), torch.zeros(5, 2)) == (1.0, 1.0)
    assert precision_recall(torch.ones(5, 2), torch.zeros(5, 2)) == (0.0, 0.0)


def test_a_common_offset_costs_no_digits():
    u, v = clouds(torch.float64)
    expected = squared_distances(u, v)
    found = squared_distances((u + 256.0).float(), (v + 256.0).float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@dataclass
class Part:
    """One of several processes, run one after the other; what they send is added up afterwards."""

    rank: int
    size: int
    sent: list[Tensor]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self.sent.append(tensor.clone())
        return tensor


def test_processes_share_the_rows():
    samples, _ = clouds(torch.float64)
    sent: list[Tensor] = []
    for rank in range(3):
        neighbour_radii(samples, 3, tile=(16, 16), group=Part(rank, 3, sent))
    assert all(bool((part == 0.0).any()) for part in sent)
    assert torch.equal(torch.stack(sent).sum(0), neighbour_radii(samples, 3, tile=(16, 16)))


def test_bad_input():
    samples, reference = clouds()
    with pytest.raises(ValueError, match="more than 3 samples, got 3"):
        precision_recall(samples[:3], reference)
    with pytest.raises(ValueError, match="more than 3 reference, got 2"):
        precision_recall(samples, reference[:2])
    with pytest.raises(ValueError, match=r"\(150, 5\) and \(110, 4\)"):
        precision_recall(samples, reference[:, :4])
    with pytest.raises(ValueError, match="those of the reference are not"):
        precision_recall(samples, reference * float("nan"))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        precision_recall(samples, reference, neighbours=0)
