import math

import pytest
import torch

from erdfast.data import GaussianMixture


def small(**options):
    return GaussianMixture((2, 3, 3), num_classes=3, modes_per_class=2, std=0.5, seed=3, **options)


def log_density(data, x, alpha, sigma, modes):
    """log p(x_t) of one sample, by the definition, for autograd."""
    variance = (alpha * data.std) ** 2 + sigma**2
    squared = (x - alpha * data.means[modes]).square().sum(-1)
    return torch.logsumexp(-squared / (2 * variance), 0)


def test_a_sample_depends_on_seed_and_index_alone():
    data = small(size=100)
    whole = data.gather(torch.arange(100))
    part = data.gather(torch.tensor([70, 3, 3]))
    assert torch.equal(part.x, whole.x[[70, 3, 3]])
    assert torch.equal(part.y, whole.y[[70, 3, 3]])
    assert torch.equal(small(size=5).gather(torch.arange(5)).x, whole.x[:5])
    other = GaussianMixture((2, 3, 3), num_classes=3, modes_per_class=2, std=0.5, seed=4)
    assert not torch.equal(other.gather(torch.arange(5)).x, whole.x[:5])


def test_moments_and_labels():
    data = GaussianMixture((2, 4, 4), num_classes=5, size=20_000)
    batch = data.gather(torch.arange(20_000))
    assert batch.x.dtype == torch.float32
    assert batch.y.dtype == torch.int64
    # 20,000 samples, 20 modes: the standard error of the overall variance is below 0.01.
    assert abs(float(batch.x.double().var()) - 1) < 0.03
    assert abs(float(batch.x.double().mean())) < 0.03
    assert data.means.square().mean() + data.std**2 == pytest.approx(1, abs=1e-12)
    assert float(data.means.mean(0).abs().max()) < 1e-12
    share = torch.bincount(batch.y, minlength=5) / 20_000
    assert float((share - 0.2).abs().max()) < 0.015  # five standard errors
    modes = data.modes(torch.arange(20_000))
    assert torch.equal(data.mode_class[modes], batch.y)
    residual = batch.x.double().flatten(1) - data.means[modes]
    assert float(residual.std()) == pytest.approx(data.std, rel=0.01)


def test_means_are_smooth_and_differ_by_class():
    data = GaussianMixture((1, 32, 32))
    pictures = data.means.view(-1, 32, 32)
    step = (pictures[:, 1:] - pictures[:, :-1]).square().mean() / pictures.square().mean()
    assert float(step) < 0.05  # white noise would give 2
    distance = torch.cdist(data.means, data.means)
    same = data.mode_class[:, None] == data.mode_class[None, :]
    assert float(distance[~same].mean()) > 1.2 * float(distance[same & (distance > 0)].mean())


@pytest.mark.parametrize(("alpha", "sigma"), [(0.99, 0.14), (0.7, 0.7), (0.2, 0.98), (1.0, 3.0)])
@pytest.mark.parametrize("label", [None, 1])
def test_posterior_obeys_tweedie(alpha, sigma, label):
    # E[x0|x_t] = (x_t + sigma^2 grad log p)/alpha, and Cov(x0|x_t) = (sigma^2/alpha) dE[x0|x_t]/dx_t.
    data = small()
    modes = torch.arange(6) if label is None else (data.mode_class == label).nonzero().squeeze(1)
    x0 = data.gather(torch.arange(4)).x.double()
    generator = torch.Generator().manual_seed(0)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    y = None if label is None else torch.full((4,), label)
    found = data.posterior(x_t, alpha, sigma, y)
    for i in range(4):
        x = x_t[i].flatten().requires_grad_()

        def log_p(x):
            return log_density(data, x, alpha, sigma, modes)

        score = torch.autograd.grad(log_p(x), x)[0]
        torch.testing.assert_close(found.x0[i].flatten(), (x + sigma**2 * score) / alpha, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.eps[i].flatten(), -sigma * score, rtol=1e-10, atol=1e-10)
        hessian_trace = torch.autograd.functional.hessian(log_p, x.detach()).trace()
        variance = sigma**2 / alpha**2 * (1 + sigma**2 * hessian_trace / 18)
        torch.testing.assert_close(found.variance[i], variance, rtol=1e-9, atol=1e-12)


def test_target_mean_is_the_published_formula():
    data = small()
    x_t = data.gather(torch.arange(5)).x
    alpha, sigma = torch.rand(5) + 0.1, torch.rand(5) + 0.1
    c_x, c_eps = torch.randn(5), torch.randn(5)
    a, s, cx, ce = (c.double().view(-1, 1, 1, 1) for c in (alpha, sigma, c_x, c_eps))
    q = cx - ce * a / s
    expected = q * data.posterior_mean(x_t, alpha, sigma) + ce / s * x_t.double()
    torch.testing.assert_close(data.target_mean(x_t, alpha, sigma, c_x, c_eps), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_floor_is_the_error_of_the_best_prediction(conditional):
    # The floor draws inner products only; here whole samples are noised and predicted.
    data = GaussianMixture((1, 3, 3), num_classes=2, modes_per_class=2, std=0.5, size=16_000)
    x0, y, _ = data.gather(torch.arange(16_000))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor([0.995, 0.8, 0.4, 0.05])
    sigma = (1 - alpha**2).sqrt()
    for c_x, c_eps in ((torch.zeros(4), torch.ones(4)), (torch.ones(4), torch.zeros(4)), (-sigma, alpha)):
        floor = data.bayes_floor(alpha, sigma, c_x, c_eps, conditional=conditional)
        assert floor.dtype == torch.float64
        for level in range(4):
            x_t = alpha[level] * x0 + sigma[level] * eps
            best = data.target_mean(
                x_t, alpha[level], sigma[level], c_x[level], c_eps[level], y if conditional else None
            )
            error = (best - (c_x[level] * x0 + c_eps[level] * eps)).square().mean()
            assert float(error) == pytest.approx(float(floor[level]), rel=0.04)


def test_knowing_the_label_helps_and_the_null_label_does_not():
    data = small()
    alpha, sigma = torch.tensor([0.4]), torch.tensor([0.9])
    one, zero = torch.ones(1), torch.zeros(1)
    assert data.bayes_floor(alpha, sigma, one, zero, conditional=True) < data.bayes_floor(alpha, sigma, one, zero)
    x_t = data.gather(torch.arange(6)).x
    null = torch.full((6,), data.num_classes)
    assert torch.equal(data.posterior_mean(x_t, 0.4, 0.9, null), data.posterior_mean(x_t, 0.4, 0.9))
    mixed = null.clone()
    mixed[2] = 0
    changed = (data.posterior_mean(x_t, 0.4, 0.9, mixed) != data.posterior_mean(x_t, 0.4, 0.9)).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False, False, False]


def test_ends_of_the_noise_axis():
    data = GaussianMixture((4, 32, 32))  # 4,096 elements, 40 modes
    batch = data.gather(torch.arange(64))
    clean = data.posterior(batch.x, 1.0, 0.0)
    torch.testing.assert_close(clean.x0, batch.x.double(), rtol=1e-12, atol=1e-12)
    assert float(clean.variance.abs().max()) == 0
    pure = data.posterior(batch.x, 0.0, 1.0)
    assert float(pure.x0.abs().max()) < 1e-12  # the mean of all modes
    torch.testing.assert_close(pure.eps, batch.x.double(), rtol=1e-12, atol=1e-12)
    expected = data.std**2 + float(data.means.square().mean())
    torch.testing.assert_close(pure.variance, torch.full((64,), expected, dtype=torch.float64))
    logsnr = torch.linspace(-30, 30, 13, dtype=torch.float64)
    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    floor = data.bayes_floor(alpha, sigma, torch.zeros(13), torch.ones(13), num_samples=80)
    assert bool(torch.isfinite(floor).all())
    assert bool((floor.diff() > 0).all())  # with cleaner input the noise is harder to tell
    within = (alpha * data.std) ** 2 / ((alpha * data.std) ** 2 + sigma**2)
    torch.testing.assert_close(floor[7:], within[7:], rtol=1e-6, atol=0)  # there the mode is certain


def test_pictures_of_latents_have_a_fixed_scale():
    data = small()
    x = data.gather(torch.arange(8)).x
    images = data.to_images(x)
    assert images.shape == (8, 3, 3, 1)  # two channels: a grey picture of the first
    assert (images[:2] == data.to_images(x[:2])).all()
    assert images.std() > 30
    assert GaussianMixture((4, 4, 4)).to_images(torch.zeros(1, 4, 4, 4)).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": 1.0}, "std must lie between 0 and 1.*1.0"),
        ({"size": 0}, "size=0"),
        ({"num_classes": 1, "modes_per_class": 1}, "two modes"),
        ({"shape": (4, 0, 8)}, r"\(4, 0, 8\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**options)


def test_modes_may_be_given():
    """The toy of ERD's appendix F: its variance is 4 + 0.09; the known-posterior code is that of all mixtures."""
    corners = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [2.0, -2.0], [-2.0, -2.0]]).view(4, 2, 1, 1)
    data = GaussianMixture.of_means(corners, std=0.3, size=20_000, seed=5)
    x, y, _ = data.gather(torch.arange(20_000))
    assert x.shape == (20_000, 2, 1, 1)
    assert "variance 4.09 (Gaussian mixture of 4 modes" in data.describe()
    for label in range(4):
        own = x[y == label].double()
        assert own.shape[0] == pytest.approx(5000, rel=0.05)
        torch.testing.assert_close(own.mean(0), corners[label].double(), rtol=0, atol=0.02)
        torch.testing.assert_close(torch.cov(own[:, :, 0, 0].T), 0.09 * torch.eye(2).double(), rtol=0, atol=0.01)
    # Each axis is a mixture of two modes on its own: E[x0 | x_t] by quadrature in one dimension.
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    prior = torch.exp(-((grid - 2) ** 2) / 0.18) + torch.exp(-((grid + 2) ** 2) / 0.18)
    alpha, sigma, seen = 0.5, 0.9, torch.tensor([0.3, -1.4], dtype=torch.float64)
    weight = prior * torch.exp(-((seen[:, None] - alpha * grid) ** 2) / (2 * sigma**2))
    mean = (weight * grid).sum(1) / weight.sum(1)
    variance = (weight * (grid - mean[:, None]) ** 2).sum(1) / weight.sum(1)
    found = data.posterior(seen.view(1, 2, 1, 1), alpha, sigma)
    torch.testing.assert_close(found.x0.flatten(), mean, rtol=1e-8, atol=1e-8)
    assert float(found.variance) == pytest.approx(float(variance.mean()), rel=1e-8)


@pytest.mark.parametrize(
    ("means", "options", "message"),
    [
        (torch.zeros(2, 3), {"std": 0.3}, r"\(J, C, H, W\).*\(2, 3\)"),
        (torch.zeros(1, 2, 1, 1), {"std": 0.3}, "two modes or more"),
        (torch.full((2, 2, 1, 1), math.nan), {"std": 0.3}, "finite"),
        (torch.zeros(2, 2, 1, 1), {"std": 0.0}, "std=0.0"),
        (torch.zeros(2, 2, 1, 1), {"std": 0.3, "size": 0}, "size=0"),
    ],
)
def test_modes_that_cannot_be_are_refused(means, options, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture.of_means(means, **options)


def test_bad_posterior_arguments():
    data = small()
    x = torch.zeros(2, 2, 3, 3)
    with pytest.raises(ValueError, match="both be 0"):
        data.posterior(x, 0.0, 0.0)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        data.posterior(x, 1.0, 1.0, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="x_t must be"):
        data.posterior(x[:, :1], 1.0, 1.0)
    with pytest.raises(ValueError, match="2 labels"):
        data.posterior(x, 1.0, 1.0, torch.tensor([0]))


def test_one_mode_per_class_knows_everything():
    data = GaussianMixture((1, 2, 2), num_classes=4, modes_per_class=1, std=0.3)
    alpha, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    exact = 0.3**2 * 0.64 / (0.36 * 0.09 + 0.64)
    floor = data.bayes_floor(alpha, sigma, torch.ones(1), torch.zeros(1), conditional=True)
    assert float(floor) == pytest.approx(exact, rel=1e-7)
    assert math.isfinite(float(data.bayes_floor(alpha, sigma, torch.ones(1), torch.zeros(1))))


def test_labels_and_counts_that_cannot_be_are_refused():
    data = GaussianMixture((1, 4, 4), num_classes=3)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
        data.bayes_floor(one, one, one, one, num_samples=0)
    x = torch.zeros(2, 1, 4, 4)
    for y in (torch.tensor([0.0, 1.0]), torch.tensor([True, False]), torch.zeros(0, dtype=torch.int64)):
        with pytest.raises(ValueError, match="y must hold 2 integer labels"):
            data.posterior(x, 1.0, 1.0, y)
    with pytest.raises(ValueError, match="y must hold 0 integer labels"):
        data.posterior(x[:0], 1.0, 1.0, torch.zeros(0, dtype=torch.int64))
