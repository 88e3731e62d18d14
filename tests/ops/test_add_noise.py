"""add_noise: every back end against the definition in float64."""

import numpy as np
import pytest
import torch

from erdfast import _C, philox  # pyright: ignore[reportAttributeAccessIssue]  # compiled, so without annotations
from erdfast.ops import Moments, NoiseKey, add_noise
from erdfast.ops.add_noise import _add_noise
from tests.ops.conftest import DTYPES, EPSILON, SHAPES, make_coefficients, make_key


def expected(x0: torch.Tensor, coef, eps: torch.Tensor) -> torch.Tensor:
    view = (-1, *[1] * (x0.dim() - 1))
    return coef.alpha.double().view(view) * x0.double() + coef.sigma.double().view(view) * eps.double()


def noise_of(key: NoiseKey, shape: tuple[int, ...], domain: str = "noise") -> torch.Tensor:
    assert key.sample_ids is not None
    numel = torch.Size(shape[1:]).numel()
    return philox.normal(key.seed, key.stream, key.sample_ids, numel, domain).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(device_backend, shape, dtype) -> None:
    device, backend = device_backend
    x0 = torch.randn(shape, device=device).to(dtype)
    coef, key = make_coefficients(shape[0], device), make_key(shape[0], device)
    x_t = add_noise(x0, coef, key, backend=backend)
    wanted = expected(x0, coef, noise_of(key, shape))
    assert x_t.dtype == dtype
    assert x_t.shape == x0.shape
    torch.testing.assert_close(x_t.double(), wanted, rtol=EPSILON[dtype], atol=EPSILON[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_explicit_noise(device_backend, dtype) -> None:
    device, backend = device_backend
    x0, eps = (torch.randn(3, 3, 17, 19, device=device).to(dtype) for _ in range(2))
    coef = make_coefficients(3, device)
    x_t = add_noise(x0, coef, noise=eps, backend=backend)
    torch.testing.assert_close(x_t.double(), expected(x0, coef, eps), rtol=EPSILON[dtype], atol=EPSILON[dtype])


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_are_sampled_inside(device_backend, dtype, explicit) -> None:
    device, backend = device_backend
    moments = torch.rand(3, 8, 5, 7, device=device).to(dtype)
    coef, key = make_coefficients(3, device), make_key(3, device)
    mean, std = moments.double().chunk(2, dim=1)
    x0 = 0.18215 * (mean + std * noise_of(key, (3, 4, 5, 7), "posterior"))
    eps = torch.randn(3, 4, 5, 7, device=device) if explicit else noise_of(key, (3, 4, 5, 7))
    x_t = add_noise(Moments(moments, 0.18215), coef, key, noise=eps if explicit else None, backend=backend)
    assert x_t.shape == (3, 4, 5, 7)
    torch.testing.assert_close(x_t.double(), expected(x0, coef, eps), rtol=EPSILON[dtype], atol=EPSILON[dtype])


def test_noise_does_not_depend_on_the_batch(device_backend) -> None:
    device, backend = device_backend
    x0, coef, key = torch.randn(4, 3, 9, 9, device=device), make_coefficients(4, device), make_key(4, device)
    assert key.sample_ids is not None
    whole = add_noise(x0, coef, key, backend=backend)
    part = add_noise(
        x0[2:],
        type(coef)(*[c[2:] for c in coef]),
        key._replace(sample_ids=key.sample_ids[2:]),
        backend=backend,
    )
    assert torch.equal(whole[2:], part)


def test_large_samples_do_not_depend_on_the_number_of_threads() -> None:
    x0, coef, key = torch.randn(2, 3, 64, 64), make_coefficients(2), make_key(2)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(add_noise(x0, coef, key, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(monkeypatch, isa, dtype) -> None:
    monkeypatch.setenv("ERDFAST_CPU_ISA", isa)
    x0, coef, key = torch.randn(2, 1, 65, 67).to(dtype), make_coefficients(2), make_key(2)
    x_t = add_noise(x0, coef, key, backend="cpu")
    wanted = expected(x0, coef, noise_of(key, tuple(x0.shape)))
    torch.testing.assert_close(x_t.double(), wanted, rtol=EPSILON[dtype], atol=EPSILON[dtype])


def test_an_unknown_instruction_set_is_named(monkeypatch) -> None:
    monkeypatch.setenv("ERDFAST_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match=r"'mmx' is not available.*baseline"):
        add_noise(torch.zeros(1, 4), make_coefficients(1), make_key(1), backend="cpu")


def test_cpu_noise_agrees_with_float64_in_the_tails() -> None:
    zero, one = torch.zeros(2000), torch.ones(2000)
    coef = make_coefficients(2000)._replace(alpha=zero, sigma=one)
    key = make_key(2000)
    eps = add_noise(torch.zeros(2000, 1001), coef, key, backend="cpu")
    wanted = noise_of(key, (2000, 1001))
    assert float(wanted.abs().max()) > 4.9
    assert float((eps.double() - wanted).abs().max()) < 1.2e-6


@pytest.mark.parametrize("value", [0.0, 6e-8, -3e-5, 1.0, 65504.0, 7e4, -2e5, float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions_round_as_pytorch_does(dtype, value) -> None:
    x0 = torch.full((1, 40), value)
    coef = make_coefficients(1)._replace(alpha=torch.ones(1), sigma=torch.zeros(1))
    x_t = add_noise(x0, coef, make_key(1), dtype=dtype, backend="cpu")
    torch.testing.assert_close(x_t, x0.to(dtype), rtol=0, atol=0, equal_nan=True)
    back = add_noise(x0.to(dtype), coef, make_key(1), dtype=torch.float32, backend="cpu")
    torch.testing.assert_close(back, x0.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_numpy_integers_are_seeds() -> None:
    x0, coef = torch.randn(2, 5), make_coefficients(2)
    assert torch.equal(add_noise(x0, coef, NoiseKey(np.uint64(3))), add_noise(x0, coef, NoiseKey(3)))  # pyright: ignore[reportArgumentType]


def test_gradient_in_x0(device_backend) -> None:
    device, backend = device_backend
    x0 = torch.randn(3, 2, 5, device=device, requires_grad=True)
    coef = make_coefficients(3, device)
    cotangent = torch.randn(3, 2, 5, device=device)
    add_noise(x0, coef, make_key(3, device), backend=backend).backward(cotangent)
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, coef.alpha.view(3, 1, 1) * cotangent)


def test_opcheck() -> None:
    coef, ids, scalar = make_coefficients(3), torch.arange(3), torch.tensor(5)
    x0 = torch.randn(3, 2, 5, requires_grad=True)
    arguments = (x0, coef.alpha, coef.sigma, None, scalar, scalar, ids, None, torch.float32, "cpu")
    torch.library.opcheck(_add_noise, arguments)


def test_bad_input_is_named() -> None:
    x0, coef, key = torch.zeros(2, 3, 4), make_coefficients(2), make_key(2)
    cases = [
        (lambda: add_noise(x0, coef), "neither"),
        (lambda: add_noise(x0, coef, key, noise=x0), "both"),
        (lambda: add_noise(x0.int(), coef, key), "int32"),
        (lambda: add_noise(torch.zeros(0, 3), coef, key), r"\(0, 3\)"),
        (lambda: add_noise(x0[:, :, ::2], coef, key), "neither contiguous nor channels-last"),
        (lambda: add_noise(x0, make_coefficients(3), key), r"alpha has shape \(3,\)"),
        (lambda: add_noise(x0, coef.double(), key), "float32 coefficients"),
        (lambda: add_noise(x0, coef, key, backend="cuda"), "choose from reference, cpu, triton"),
        (lambda: add_noise(x0.double(), coef, key, backend="cpu"), "float64 is not among"),
        (lambda: add_noise(x0, coef, key, dtype=torch.int8), "int8"),
        (lambda: add_noise(x0, coef, NoiseKey(-1)), "seed is -1"),
        (lambda: add_noise(x0, coef, NoiseKey(1, 2**32)), "stream is 4294967296"),
        (lambda: add_noise(x0, coef, NoiseKey(1.5)), "seed is 1.5"),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise(x0, coef, NoiseKey(1, 2, torch.arange(3))), "sample_ids"),
        (lambda: add_noise(x0, coef, noise=torch.zeros(2, 3)), "noise has shape"),
        (lambda: add_noise(x0, coef, x0), "key is a Tensor.*noise="),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise(x0, coef, NoiseKey(1, 2, [0, 1])), "sample_ids is a list"),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise([0.0], coef, key), "x0 is a list"),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise(x0, coef._replace(alpha="1"), key), "has a str as alpha"),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise(x0, {"alpha": 1.0}, key), "a dict, has no alpha; it needs alpha, sigma"),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise(x0, coef, key, dtype="float16"), "dtype is 'float16'"),  # pyright: ignore[reportArgumentType]
        (lambda: add_noise(x0, coef, noise=x0.clone().requires_grad_()), "gradients for noise"),
        (lambda: add_noise(Moments(torch.zeros(2, 3, 4)), coef, key), "must be even"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
