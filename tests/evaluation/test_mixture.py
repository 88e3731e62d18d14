"""Distance to a mixture in closed form: against samples, against the distance of all numbers, against brute force."""

import pytest
import torch
from torch import Tensor

from erdfast.data import GaussianMixture
from erdfast.evaluation.frechet import FeatureStatistics
from erdfast.evaluation.mixture import KnownMixture

SHAPE = (4, 8, 8)
MIXTURE = GaussianMixture(SHAPE, num_classes=10, seed=0)
KNOWN = KnownMixture(MIXTURE)


def draw(std: float, num: int = 8000, scale: float = 1.0) -> Tensor:
    """Samples of the mixture, but for their noise and their means' size; every mode equally often."""
    generator = torch.Generator().manual_seed(1)
    means = MIXTURE.means[torch.arange(num) % len(MIXTURE.means)]
    noise = torch.randn(num, means.shape[1], dtype=torch.float64, generator=generator)
    return (scale * means + std * noise).view(-1, *SHAPE)


def distance(x: Tensor) -> float:
    return FeatureStatistics.of(KNOWN.features(x)).gaussian().distance(KNOWN.gaussian)


def whole_distance(std: float, scale: float) -> float:
    """Of all numbers of endlessly many such samples: the covariances have the same eigenvectors."""
    values = torch.linalg.svdvals(MIXTURE.means).square() / len(MIXTURE.means)
    values = torch.cat([values, values.new_zeros(MIXTURE.means.shape[1] - len(values))])
    ours, theirs = (scale**2 * values + std**2).sqrt(), (values + MIXTURE.std**2).sqrt()
    return float((ours - theirs).square().sum())


def test_samples_of_the_mixture_are_near():
    assert distance(draw(MIXTURE.std)) < 0.05  # of a total variance of 256
    assert distance(MIXTURE.gather(torch.arange(8000)).x) < 0.3  # modes by chance


@pytest.mark.parametrize(("std", "scale"), [(0.3, 1.0), (0.55, 1.0), (0.4, 0.8), (0.5, 1.2)])
def test_it_is_the_distance_of_all_numbers(std, scale):
    assert distance(draw(std, scale=scale)) == pytest.approx(whole_distance(std, scale), rel=0.03)


def test_the_last_feature_has_the_law_of_a_norm():
    lengths = KNOWN.features(draw(MIXTURE.std))[:, -1]
    assert KNOWN.gaussian.mean[-1] == pytest.approx(float(lengths.mean()), rel=1e-3)
    assert KNOWN.gaussian.covariance[-1, -1] == pytest.approx(float(lengths.var()), rel=0.06)  # 4 standard errors
    assert float(KNOWN.gaussian.covariance[-1, :-1].abs().max()) == 0.0


def test_few_directions_hold_all_means():
    for shape, classes in ((SHAPE, 10), ((4, 16, 16), 100), ((1, 1, 2), 3)):
        mixture = GaussianMixture(shape, num_classes=classes)
        known = KnownMixture(mixture)
        rank = int(torch.linalg.matrix_rank(mixture.means))
        rest = mixture.means.shape[1] - rank
        assert known.gaussian.mean.shape == (rank + bool(rest),)
        features = known.features(mixture.means.view(-1, *shape))
        norms = features[:, :rank].norm(dim=1)
        torch.testing.assert_close(norms, mixture.means.norm(dim=1), rtol=1e-9, atol=1e-9)  # nothing is left outside


def test_labels_are_recognised():
    batch = MIXTURE.gather(torch.arange(300))
    assert KNOWN.num_recognised(batch.x, batch.y) == 300
    assert KNOWN.num_recognised(batch.x, (batch.y + 1) % 10) == 0


def test_the_most_likely_label_of_modes_that_overlap():
    mixture = GaussianMixture((1, 2, 2), num_classes=3, modes_per_class=5, std=0.8)
    x = mixture.gather(torch.arange(500)).x
    squares = (x.double().flatten(1)[:, None] - mixture.means).square().sum(-1)
    density = torch.exp(-squares / (2 * mixture.std**2))
    classes = torch.stack([density[:, mixture.mode_class == label].sum(1) for label in range(3)], dim=1).argmax(1)
    nearest = mixture.mode_class[squares.argmin(1)]
    assert not torch.equal(classes, nearest)  # several modes together outweigh the nearest one
    assert KnownMixture(mixture).num_recognised(x, classes) == 500


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    KnownMixture(MIXTURE)
    assert torch.equal(torch.get_rng_state(), before)
