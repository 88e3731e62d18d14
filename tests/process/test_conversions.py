"""Conversions between predictions, and `kappa`, which relates their errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erdfast.process import SCHEDULES, TARGETS, Coefficients, Process, convert, kappa
from erdfast.process.coefficients import CONVERSIONS, SPACES

NAMES = ["x0", "eps", "v", "u", "score"]
schedules = st.sampled_from(sorted(SCHEDULES))
targets = st.sampled_from(sorted(TARGETS))
noise_scales = st.sampled_from([1.0, 0.5, 3.0])


def draw_times(process: Process, fractions: list[float]) -> torch.Tensor:
    unit = torch.tensor(fractions, dtype=torch.float64)
    last = process.schedule.num_timesteps
    return (unit * (last - 1)).long() if last is not None else 0.02 + 0.96 * unit


def batch(process: Process, fractions: list[float]) -> tuple[torch.Tensor, ...]:
    """Times, x0, eps, x_t and the exact target, float64, with a width equal to the batch size."""
    t = draw_times(process, fractions)
    count = len(fractions)
    x0, eps = torch.randn(2, count, 3, count, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    c = process.coefficients(t, dtype=torch.float64)
    alpha, sigma, c_x, c_eps = (value.detach().reshape(-1, 1, 1) for value in c[:4])
    return t, x0, eps, alpha * x0 + sigma * eps, c_x * x0 + c_eps * eps


@settings(max_examples=60, deadline=None)
@given(schedules, targets, noise_scales, st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_exact_predictions_give_back_everything(name, target, noise_scale, fractions):
    process = Process(name, target, "constant", noise_scale=noise_scale)
    t, x0, eps, x_t, y = batch(process, fractions)
    alpha, sigma = (value.reshape(-1, 1, 1) for value in process.schedule.alpha_sigma(t))
    d_alpha, d_sigma = (value.reshape(-1, 1, 1) for value in process.schedule.d_alpha_sigma(t))
    expected = {
        "x0": x0,
        "eps": eps,
        "v": alpha * noise_scale * eps - sigma / noise_scale * x0,
        "u": d_alpha * x0 + d_sigma * eps,
        "score": -eps / sigma,
    }
    for to, want in expected.items():
        got = process.convert(y, x_t, t, to).detach()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@settings(max_examples=60, deadline=None)
@given(schedules, st.sampled_from(NAMES), st.sampled_from(NAMES), noise_scales)
def test_conversions_round_trip(name, first, second, noise_scale):
    """An arbitrary prediction survives a conversion to another target and back."""
    a = Process(name, first, "constant", noise_scale=noise_scale)
    b = Process(name, second, "constant", noise_scale=noise_scale)
    t, _, _, x_t, _ = batch(a, [0.1, 0.4, 0.8])
    pred = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    there = a.convert(pred, x_t, t, second)
    if second == "eps":
        there = there * noise_scale  # the target is the scaled noise, a conversion gives the unit noise
    back = b.convert(there, x_t, t, first)
    if first == "eps":
        back = back * noise_scale
    torch.testing.assert_close(back, pred, rtol=1e-8, atol=1e-8)


@settings(max_examples=60, deadline=None)
@given(schedules, targets, st.sampled_from(["x0", "eps", "v", "u"]), noise_scales)
def test_kappa_relates_losses(name, target, space, noise_scale):
    """The weighted loss equals the plain squared error in the other space, for any prediction."""
    options = {"loss_space": space, "noise_scale": noise_scale}
    process = Process(name, target, "constant", **options)
    t, _, _, x_t, y = batch(process, [0.05, 0.5, 0.9])
    pred = y + torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = process.coefficients(t, dtype=torch.float64).w.detach()
    loss = w * (pred - y).square().mean(dim=(1, 2))
    unit = noise_scale if space == "eps" else 1.0
    there = unit * (process.convert(pred, x_t, t, space) - process.convert(y, x_t, t, space)).detach()
    torch.testing.assert_close(loss, there.square().mean(dim=(1, 2)), rtol=1e-7, atol=1e-9)


def test_kappa_has_the_sign_of_the_error():
    alpha, sigma = torch.tensor([0.8]), torch.tensor([0.6])
    one, zero = torch.ones(1), torch.zeros(1)
    got = kappa(alpha, sigma, (zero, one), (one, zero))  # x0 = (x_t - sigma*eps)/alpha
    torch.testing.assert_close(got, -sigma / alpha)


def test_kappa_clip_floors_the_denominator_and_stops_its_gradient():
    t = torch.tensor([0.01, 0.5], dtype=torch.float64)
    process = Process("flow", "k", "constant", loss_space="u", kappa_clip=0.05, k_init=0.999).double()
    w = process.coefficients(t, dtype=torch.float64).w
    k = torch.tensor(0.999, dtype=torch.float64)
    d = k * t + (1 - k) * (1 - t)
    torch.testing.assert_close(w.detach(), 1 / d.clamp(min=0.05) ** 2, rtol=1e-6, atol=0.0)
    (w_k,) = process.parameters()
    (below,) = torch.autograd.grad(w[0], w_k, retain_graph=True)
    (above,) = torch.autograd.grad(w[1], w_k)
    assert below == 0
    want = -2 / d[1] ** 3 * (t[1] - (1 - t[1])) * k * (1 - k)
    torch.testing.assert_close(above, want, rtol=1e-6, atol=1e-9)


def test_clip_of_the_noise_scaled_process_is_stated_without_the_scale():
    t = torch.tensor([0.01])
    for scale in (1.0, 2.0):
        process = Process("flow", "x0", "constant", loss_space="u", kappa_clip=0.05, noise_scale=scale)
        torch.testing.assert_close(process.coefficients(t).w, torch.tensor([400.0]))


def test_velocity_of_a_data_prediction_is_clamped_as_in_training():
    """JiT and k-Diff's algorithm 2: (x_t - x0)/max(t, 0.05); the data prediction itself is not touched."""
    process = Process("flow", "x0", "constant", loss_space="u", kappa_clip=0.05)
    t = torch.tensor([0.01, 0.5], dtype=torch.float64)
    pred, x_t = torch.randn(2, 2, 5, dtype=torch.float64)
    want = (x_t - pred) / t.clamp(min=0.05)[:, None]
    torch.testing.assert_close(process.to_u(pred, x_t, t), want)
    torch.testing.assert_close(process.to_x0(pred, x_t, t), pred)


def test_free_conversion_agrees_with_the_process():
    process = Process("vp", "v", "constant", noise_scale=1.5)
    t, _, _, x_t, _ = batch(process, [0.2, 0.6])
    pred = torch.randn(x_t.shape, dtype=torch.float64)
    c = process.coefficients(t, dtype=torch.float64)
    d_alpha, d_sigma = process.schedule.d_alpha_sigma(t)
    for to in CONVERSIONS:
        got = convert(pred, x_t, c, to, d_alpha=d_alpha, d_sigma=d_sigma, noise_scale=1.5)
        torch.testing.assert_close(got, process.convert(pred, x_t, t, to), rtol=1e-9, atol=1e-9)
        assert torch.equal(got, convert(pred, x_t, c[:4], to, d_alpha=d_alpha, d_sigma=d_sigma, noise_scale=1.5))


def test_a_batch_as_large_as_the_width_broadcasts_over_samples():
    """Velocity conversions of other codes broadcast (B,) over the last dimension when B equals W."""
    process = Process("flow", "u", "constant")
    t = torch.tensor([0.1, 0.9])
    pred, x_t = torch.randn(2, 2, 1, 2, 2)
    both = process.to_x0(pred, x_t, t)
    for i in range(2):
        alone = process.to_x0(pred[i : i + 1], x_t[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(both[i : i + 1], alone)
        torch.testing.assert_close(alone, x_t[i : i + 1] - t[i] * pred[i : i + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_result_dtype(dtype):
    process = Process("cosine", "v")
    pred, x_t = torch.randn(2, 3, 4).to(dtype)
    got = process.to_eps(pred, x_t, torch.tensor(500))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for t in (torch.tensor([500]), torch.tensor([500, 500, 500])):
        assert torch.equal(got, process.to_eps(pred, x_t, t))


@pytest.mark.parametrize("name", ["flow", "vp", "gvp", "logsnr_uniform"])
@pytest.mark.parametrize("target", TARGETS)
def test_conversions_are_finite_at_the_ends(name, target):
    process = Process(name, target, "constant")
    t = torch.tensor([0.0, 1.0])
    pred, x_t = torch.randn(2, 2, 5)
    for to in CONVERSIONS:
        assert process.convert(pred, x_t, t, to).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_own_prediction_is_returned_at_the_ends_too(name):
    process = Process("flow", name, "constant")
    pred, x_t = torch.randn(2, 2, 5)
    assert torch.equal(process.convert(pred, x_t, torch.tensor([0.0, 1.0]), name), pred)


def test_bad_conversions_are_refused():
    process = Process("flow", "u", "constant")
    pred = torch.randn(2, 3)
    t = torch.tensor([0.1, 0.9])
    c = process.coefficients(t)
    with pytest.raises(ValueError, match="x0, eps, v, u, score"):
        process.convert(pred, pred, t, "x")
    with pytest.raises(ValueError, match="d_alpha"):
        convert(pred, pred, c, "u")
    with pytest.raises(ValueError, match="differ in shape"):
        convert(pred, pred[:, :1], c, "x0")
    with pytest.raises(ValueError, match="do not fit 3 samples"):
        convert(torch.randn(3, 2), torch.randn(3, 2), c, "x0")


def test_spaces_and_coefficients_agree():
    assert list(SPACES) == NAMES
    assert Coefficients._fields == ("alpha", "sigma", "c_x", "c_eps", "w", "time", "logsnr")
