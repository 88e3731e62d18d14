"""diffusion_loss: value, sums and every gradient of each back end against the definition in float64."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from erdfast.ops import Coefficients as Velocity
from erdfast.ops import Moments, NoiseKey, add_noise, diffusion_loss
from erdfast.ops.diffusion_loss import _diffusion_loss
from tests.ops.conftest import DTYPES, EPSILON, SHAPES, Coefficients, make_coefficients, make_key


def run(pred, x0, coef: Coefficients, key, backend, scale=1.0, noise=None) -> tuple[Any, ...]:
    """(loss, mse, gradients of pred, c_x, c_eps, w)."""
    pred, coef = pred.detach().clone().requires_grad_(), coef.with_grad()
    loss, mse = diffusion_loss(pred, x0, coef, key, noise=noise, per_sample=True, backend=backend)
    (loss * scale).backward()
    return loss.detach(), mse, pred.grad, coef.c_x.grad, coef.c_eps.grad, coef.w.grad


def compare(got, wanted, dtype) -> None:
    for name, a, b in zip(("loss", "mse", "pred", "c_x", "c_eps", "w"), got, wanted, strict=True):
        tolerance = EPSILON[dtype] if name == "pred" else 5e-6
        scale = max(float(b.abs().max()), 1e-30)
        assert float((a.double() - b).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(device_backend, shape, dtype) -> None:
    device, backend = device_backend
    pred, x0 = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    coef, key = make_coefficients(shape[0], device), make_key(shape[0], device)
    wanted = run(pred.double(), x0.double(), coef.double(), key, "reference")
    compare(run(pred, x0, coef, key, backend), wanted, dtype)


@pytest.mark.parametrize("pred_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x0_dtype", DTYPES, ids=str)
def test_mixed_dtypes_and_explicit_noise(device_backend, pred_dtype, x0_dtype) -> None:
    device, backend = device_backend
    pred = torch.randn(3, 3, 9, 11, device=device).to(pred_dtype)
    x0, eps = torch.randn(3, 3, 9, 11, device=device).to(x0_dtype), torch.randn(3, 3, 9, 11, device=device)
    coef = make_coefficients(3, device)
    wanted = run(pred.double(), x0.double(), coef.double(), None, "reference", noise=eps.double())
    compare(run(pred, x0, coef, None, backend, noise=eps), wanted, pred_dtype)


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (2, 3, 17, 19), (2, 3, 5, 7, 9), (2, 1, 8, 8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["key", "noise"])
def test_channels_last_is_the_same_numbers(device_backend, shape, dtype, given) -> None:
    device, backend = device_backend
    last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    pred, x0, eps = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    coef = make_coefficients(shape[0], device)
    key, noise = (None, eps) if given else (make_key(shape[0], device), None)
    wanted = run(pred, x0, coef, key, backend, noise=noise)
    for pred_last, x0_last in ((True, True), (True, False), (False, True)):
        mixed_pred = pred.contiguous(memory_format=last) if pred_last else pred
        mixed_x0 = x0.contiguous(memory_format=last) if x0_last else x0
        got = run(mixed_pred, mixed_x0, coef, key, backend, noise=noise)
        compare(got, [value.double() for value in wanted], dtype)
        assert got[2].stride() == mixed_pred.stride()
        x_t = add_noise(mixed_x0, coef, key, noise=noise, backend=backend)
        assert torch.equal(x_t, add_noise(x0, coef, key, noise=noise, backend=backend))
        assert x_t.stride() == mixed_x0.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["key", "noise"])
def test_samples_may_lie_apart(device_backend, dtype, given) -> None:
    """Half of a network's channels and every other sample, in both memory formats; results have no gaps."""
    device, backend = device_backend
    wide, every = torch.randn(3, 6, 5, 7, device=device).to(dtype), torch.randn(6, 3, 5, 7, device=device).to(dtype)
    coef, key = make_coefficients(3, device), None if given else make_key(3, device)
    noise = torch.randn(3, 3, 5, 7, device=device) if given else None
    wanted = run(wide[:, :3].contiguous(), every[::2].contiguous(), coef, key, backend, noise=noise)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x0 = every.contiguous(memory_format=memory_format)[::2]
        whole = wide.clone(memory_format=memory_format).requires_grad_()
        loss, mse = diffusion_loss(whole[:, :3], x0, coef, key, noise=noise, per_sample=True, backend=backend)
        loss.backward()
        assert whole.grad is not None
        compare((loss.detach(), mse, whole.grad[:, :3], *wanted[3:]), [value.double() for value in wanted], dtype)
        assert (whole.grad[:, 3:] == 0).all()
        x_t = add_noise(x0, coef, key, noise=noise, backend=backend)
        assert x_t.is_contiguous(memory_format=memory_format)
        assert torch.equal(x_t, add_noise(x0.contiguous(), coef, key, noise=noise, backend=backend))


@pytest.mark.parametrize("given", [False, True], ids=["key", "noise"])
def test_large_gradients_are_written_past_the_caches(given) -> None:
    """The same numbers as for the samples one by one, whose gradients are small."""
    shape = (5, 4, 512, 512)
    pred, x0 = torch.randn(shape), torch.randn(shape)
    coef, key = make_coefficients(5), None if given else make_key(5)
    noise = torch.randn(shape) if given else None
    ids = make_key(5).sample_ids
    assert ids is not None
    *_, grad, _, _, _ = run(pred, x0, coef, key, "cpu", noise=noise)
    for b in range(5):
        row = slice(b, b + 1)
        alone = Coefficients(*[value[row] for value in coef])
        one = None if given else NoiseKey(*make_key(5)[:2], ids[row])
        given_row = None if noise is None else noise[row]
        *_, expected, _, _, _ = run(pred[row], x0[row], alone, one, "cpu", noise=given_row)
        torch.testing.assert_close(grad[row], expected / 5, rtol=1e-6, atol=0)


def test_numbers_stand_for_all_samples(device_backend) -> None:
    device, backend = device_backend
    pred, x0, t = torch.randn(3, 5, device=device), torch.randn(3, 5, device=device), torch.rand(3, device=device)
    ones, key = torch.ones(3, device=device), make_key(3, device)
    short, long = Velocity(1 - t, t, -1.0, 1.0), Velocity(1 - t, t, -ones, ones, ones)
    assert torch.equal(
        diffusion_loss(pred, x0, short, key, backend=backend), diffusion_loss(pred, x0, long, key, backend=backend)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_moments(device_backend, dtype) -> None:
    device, backend = device_backend
    pred, moments = torch.randn(3, 4, 5, 7, device=device).to(dtype), torch.rand(3, 8, 5, 7, device=device).to(dtype)
    coef, key = make_coefficients(3, device), make_key(3, device)
    wanted = run(pred, Moments(moments, 0.18215), coef, key, backend)
    last = moments.contiguous(memory_format=torch.channels_last)
    compare(run(pred, Moments(last, 0.18215), coef, key, backend), [value.double() for value in wanted], dtype)
    x_t = add_noise(Moments(last, 0.18215), coef, key, backend=backend)
    assert torch.equal(x_t, add_noise(Moments(moments, 0.18215), coef, key, backend=backend))
    assert x_t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(device_backend, dtype) -> None:
    device, backend = device_backend
    pred, moments = (
        torch.randn(3, 4, 5, 7, device=device).to(dtype),
        torch.rand(3, 8, 5, 7, device=device).to(dtype),
    )
    coef, key = make_coefficients(3, device), make_key(3, device)
    wanted = run(pred.double(), Moments(moments.double(), 0.18215), coef.double(), key, "reference")
    compare(run(pred, Moments(moments, 0.18215), coef, key, backend), wanted, dtype)


def test_a_perfect_prediction_has_no_loss() -> None:
    """pred made by add_noise from the target's own coefficients: both ops draw the same noise."""
    x0, key, coef = torch.randn(4, 3, 33, 35), make_key(4), make_coefficients(4)
    pred = add_noise(x0, coef._replace(alpha=coef.c_x, sigma=coef.c_eps), key)
    assert float(diffusion_loss(pred, x0, coef, key)) < 1e-12


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_float16_gradients_survive_the_loss_scale(backend) -> None:
    """25 million elements: unscaled gradients are near 8e-8, where float16 has one bit; scaled, they are exact."""
    shape, scale = (32, 3, 512, 512), 65536.0
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(shape, generator=generator).half()
    pred = torch.randn(shape, generator=generator).half().requires_grad_()
    coef = make_coefficients(32)
    eps = x0.flip(0).contiguous()
    (diffusion_loss(pred, x0, coef, noise=eps, backend=backend) * scale).backward()
    assert pred.grad is not None
    view = (-1, 1, 1, 1)
    residual = pred.detach().float() - coef.c_x.view(view) * x0.float() - coef.c_eps.view(view) * eps.float()
    wanted = scale * 2 / residual.numel() * coef.w.view(view) * residual
    error = (pred.grad.float() - wanted).abs()
    assert float((error / wanted.abs().clamp_min(2.0**-14)).max()) < 2**-10
    assert float((pred.grad == 0).float().mean()) < 1e-4


def test_incoming_gradients_scale_and_accumulate() -> None:
    pred, x0 = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    coef, key = make_coefficients(3), make_key(3)
    (once,) = torch.autograd.grad(diffusion_loss(pred, x0, coef, key), pred)
    loss = diffusion_loss(pred, x0, coef, key)
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    (second,) = torch.autograd.grad(loss, pred, torch.tensor(3.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(first, once)
    torch.testing.assert_close(second, 3 * once)
    torch.testing.assert_close(third, once)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_predictions_show(device_backend, dtype, bad) -> None:
    device, backend = device_backend
    pred = torch.zeros(2, 3, 31, device=device, dtype=dtype)
    pred[1, 2, 30] = bad
    x0, coef, key = torch.zeros_like(pred), make_coefficients(2, device), make_key(2, device)
    loss, mse = diffusion_loss(pred, x0, coef, key, per_sample=True, backend=backend)
    assert not torch.isfinite(loss)
    assert torch.isfinite(mse).tolist() == [True, False]


def test_reference_passes_gradcheck() -> None:
    x0, coef, key = (
        torch.randn(3, 2, 5, dtype=torch.float64),
        make_coefficients(3).double().with_grad(),
        make_key(3),
    )
    pred = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)

    def loss(pred, c_x, c_eps, w):
        return diffusion_loss(pred, x0, coef._replace(c_x=c_x, c_eps=c_eps, w=w), key)

    assert torch.autograd.gradcheck(loss, (pred, coef.c_x, coef.c_eps, coef.w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(dtype) -> None:
    coef, ids, scalar = make_coefficients(3).with_grad(), torch.arange(3), torch.tensor(5)
    pred = torch.randn(3, 2, 5).to(dtype).requires_grad_()
    arguments = (
        pred,
        torch.randn(3, 2, 5),
        *coef[2:],
        None,
        scalar,
        scalar,
        ids,
        None,
        dtype == torch.float32,
        "cpu",
    )
    torch.library.opcheck(_diffusion_loss, arguments)


def test_compiles_whole_without_recompilation() -> None:
    x0, coef, ids = torch.randn(4, 3, 8, 8), make_coefficients(4), torch.arange(4)
    weight = torch.randn(8, 8, requires_grad=True)

    def step(weight, seed, stream):
        key = NoiseKey(seed, stream, ids)
        return diffusion_loss(add_noise(x0, coef, key) @ weight, x0, coef, key)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(4):
            arguments = (weight, torch.tensor(11), torch.tensor(i))
            (wanted,) = torch.autograd.grad(step(*arguments), weight)
            (got,) = torch.autograd.grad(compiled(*arguments), weight)
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_checkpointing(dtype) -> None:
    x0, coef, key = torch.randn(3, 8).to(dtype), make_coefficients(3), make_key(3)
    pred = torch.randn(3, 8).to(dtype).requires_grad_()

    def loss(a: torch.Tensor) -> torch.Tensor:
        return diffusion_loss(a * 2, x0, coef, key)

    (wanted,) = torch.autograd.grad(loss(pred), pred)
    checkpoint(loss, pred, use_reentrant=False).backward()
    assert pred.grad is not None
    torch.testing.assert_close(pred.grad, wanted)


def test_a_kept_graph_does_not_share_its_gradient() -> None:
    pred, x0, coef, key = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8), make_coefficients(3), make_key(3)
    loss = diffusion_loss(pred, x0, coef, key)
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    wanted = first.clone()
    first.zero_()
    (second,) = torch.autograd.grad(loss, pred)
    assert torch.equal(second, wanted)


def test_large_weights_do_not_overflow() -> None:
    pred, x0 = torch.full((1, 40_000), 3.0), torch.zeros(1, 40_000)
    coef = make_coefficients(1)._replace(w=torch.full((1,), 1e34), c_x=torch.zeros(1), c_eps=torch.zeros(1))
    assert float(diffusion_loss(pred, x0, coef, make_key(1))) == pytest.approx(9e34)


def test_gradients_that_nobody_wants_are_no_obstacle() -> None:
    x0 = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        assert torch.isfinite(diffusion_loss(torch.randn(3, 8), x0, make_coefficients(3), make_key(3)))


def test_float64_noise_makes_a_float64_loss() -> None:
    pred, x0, noise = torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8, dtype=torch.float64)
    assert diffusion_loss(pred, x0, make_coefficients(3), noise=noise).dtype == torch.float64


def test_second_derivatives_are_refused_not_wrong() -> None:
    pred, x0 = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    loss = diffusion_loss(pred, x0, make_coefficients(2), make_key(2), backend="cpu")
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(loss, pred, create_graph=True)


def test_no_gradient_is_written_when_none_is_wanted() -> None:
    pred, x0, coef, key = torch.randn(2, 8), torch.randn(2, 8), make_coefficients(2), make_key(2)
    assert not diffusion_loss(pred, x0, coef, key).requires_grad
    with torch.no_grad():
        assert not diffusion_loss(pred.requires_grad_(), x0, coef, key).requires_grad


def test_bad_input_is_named() -> None:
    x0, coef, key = torch.zeros(2, 3, 4), make_coefficients(2), make_key(2)
    pred = torch.zeros(2, 3, 4)
    cases = [
        (lambda: diffusion_loss(torch.zeros(2, 3, 5), x0, coef, key), r"pred has shape \(2, 3, 5\)"),
        (
            lambda: diffusion_loss(pred[:, :, ::2], x0[:, :, ::2].contiguous(), coef, key),
            "neither contiguous nor channels-last",
        ),
        (lambda: diffusion_loss(pred, x0, coef._replace(w=torch.zeros(1)), key), r"w has shape \(1,\)"),
        (lambda: diffusion_loss(pred, x0.clone().requires_grad_(), coef, key), "gradients for x0"),
        (lambda: diffusion_loss(pred, x0, coef), "neither"),
        (lambda: diffusion_loss(pred.double(), x0, coef, key, backend="cpu"), "float64 is not among"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_importing_the_ops_needs_torch_alone() -> None:
    """Other people's trainers import the loss: nothing but PyTorch may load, and no kernels before they are used."""
    code = (
        "import sys; import torch; before = set(sys.modules); from erdfast.ops import diffusion_loss; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names); "
        "print(sorted(new)); print('erdfast._C' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["['erdfast']", "False"]
