"""fp8_linear against float64: exactly what its rounding says, and as close to F.linear as that rounding allows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from erdfast.ops import fp8_linear
from erdfast.ops.fp8_linear import fp8_reason

CPU = torch.device("cpu")
E4M3, E5M2 = (4, 3), (5, 2)
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
HALF_STEP = {E4M3: 2.0**-4, E5M2: 2.0**-3}
"""Largest relative error of rounding a normal number: half of the last bit of the significand."""
LEADING = [(1,), (16,), (17,), (3, 5), (2, 3, 7)]


def numbers(format: tuple[int, int]) -> Tensor:
    """All finite numbers of a float8 format, by its definition, in order."""
    exponents, bits = format
    bias = 2 ** (exponents - 1) - 1
    values = {
        (fraction / 2**bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias)
        for exponent, fraction in itertools.product(range(2**exponents), range(2**bits))
    }
    positive = sorted(value for value in values if value <= LARGEST[format])
    return torch.tensor([-value for value in positive[:0:-1]] + positive, dtype=torch.float64)


def rounded(tensor: Tensor, format: tuple[int, int]) -> Tensor:
    """The nearest numbers of the format, scaled by the largest element, in float64."""
    tensor = tensor.double()
    scale = tensor.abs().max() / LARGEST[format]
    grid = numbers(format)
    below = torch.searchsorted(grid, tensor / scale, right=True).sub(1).clamp(0, len(grid) - 2)
    low, high = grid[below], grid[below + 1]
    return torch.where(tensor / scale - low < high - tensor / scale, low, high) * scale


def inputs(leading: tuple[int, ...], dtype: torch.dtype = torch.float32, inner: int = 64, out: int = 48):
    generator = torch.Generator().manual_seed(math.prod(leading))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x, weight, bias = draw(*leading, inner), draw(out, inner) / 8, draw(out)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), draw(*leading, out)


def results(leading: tuple[int, ...], backend: str) -> list[Tensor]:
    """Output and the three gradients, in float64."""
    x, weight, bias, grad = inputs(leading)
    out = fp8_linear(x, weight, bias, backend=backend)
    grads = torch.autograd.grad(out, (x, weight, bias), grad.to(out.dtype))
    return [tensor.detach().double() for tensor in (out, *grads)]


def products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> list[Tensor]:
    """The formulas in float64, of whatever is given as x, weight and gradient."""
    rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
    return [x @ weight.T + bias, grad @ weight, grads.T @ rows]


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_the_formats_are_what_they_are_said_to_be(format):
    dtype = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}[format]
    grid = numbers(format)
    assert torch.equal(grid.to(dtype).double(), grid)
    assert torch.finfo(dtype).max == grid[-1] == LARGEST[format]
    normal = grid[grid >= torch.finfo(dtype).smallest_normal]
    assert ((normal[1:] - normal[:-1]) / (normal[1:] + normal[:-1])).max() <= HALF_STEP[format]


@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
@pytest.mark.parametrize("leading", LEADING)
def test_products_of_rounded_numbers_against_float64(backend, leading):
    x, weight, bias, grad = (t.detach() for t in inputs(leading))
    expected = products(rounded(x, E4M3), rounded(weight, E4M3), bias.double(), rounded(grad, E5M2))
    expected.append(grad.double().flatten(0, -2).sum(0))
    for got, wanted in zip(results(leading, backend), expected, strict=True):
        # A tie may fall to the other side: the scale is a float32. One element in a sum then is a step off.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
@pytest.mark.parametrize("leading", LEADING)
def test_errors_are_those_of_rounding(backend, leading):
    x, weight, bias, grad = (t.detach() for t in inputs(leading))
    exact = products(x.double(), weight.double(), bias.double(), grad.double())
    sizes = products(x.double().abs(), weight.double().abs(), torch.zeros(()), grad.double().abs())
    left, right = HALF_STEP[E4M3], HALF_STEP[E5M2]
    bounds = [(1 + left) ** 2 - 1, *[(1 + left) * (1 + right) - 1] * 2]
    for got, wanted, size, bound in zip(results(leading, backend), exact, sizes, bounds, strict=False):
        # Subnormal numbers err by a share of the largest number instead, 2^-10 / 448.
        assert ((got - wanted).abs() <= bound * size + 1e-5 * size.max()).all()
        assert (got - wanted).norm() <= bound * wanted.norm()  # and much less in the mean
        assert (got - wanted).norm() > 1e-3 * wanted.norm()  # it was float8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
def test_dtypes(backend, dtype):
    x, weight, bias, _ = inputs((3, 5), dtype)
    out = fp8_linear(x, weight, bias, backend=backend)
    grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert {t.dtype for t in (out, *grads)} == {dtype}
    assert fp8_linear(x, weight, backend=backend).shape == (3, 5, 48)


@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
def test_autocast_chooses_the_output_alone(backend):
    x, weight, bias, grad = inputs((3, 5))
    with torch.autocast("cpu", torch.bfloat16):
        out = fp8_linear(x, weight, bias, backend=backend)
    assert out.dtype == torch.bfloat16
    full = fp8_linear(x, weight, bias, backend=backend)
    # The bias is rounded too, as by autocast's own Linear, and on a CPU the product before it is added.
    bound = 2**-8 * (bias.detach().abs().max() + full.detach().abs().max()).item()
    torch.testing.assert_close(out.float(), full, rtol=2**-8, atol=bound)
    grads = torch.autograd.grad(out, (x, weight, bias), grad.bfloat16())
    assert {g.dtype for g in grads} == {torch.float32}  # not rounded on the way


@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
def test_zeros(backend):
    x, weight, bias, grad = inputs((3, 5))
    for zeros in ((torch.zeros_like(x), weight), (x, torch.zeros_like(weight))):
        assert torch.equal(fp8_linear(*zeros, bias, backend=backend), bias.expand(3, 5, 48))
    out = fp8_linear(x, weight, bias, backend=backend)
    assert not any(t.any() for t in torch.autograd.grad(out, (x, weight, bias), torch.zeros_like(grad)))


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 1e36])
def test_the_scale_follows_the_input(size):
    x, weight, _, _ = (t.detach() for t in inputs((3, 5)))
    usual = fp8_linear(x, weight, backend="reference")
    scaled = fp8_linear(x * size, weight, backend="reference").double() / size
    # float32 itself has few bits left at 1e-38, and there the scale is the smallest that it may be.
    assert (scaled - usual).norm() <= (0.1 if size < 1e-37 else 0.01) * usual.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["reference", "scaled_mm"])
def test_what_is_not_finite_is_seen(backend, value):
    x, weight, bias, _ = inputs((3, 5))
    with torch.no_grad():
        x[1, 2, 3] = value
    assert fp8_linear(x, weight, bias, backend=backend).isnan().all()


def test_only_wanted_gradients_are_made():
    x, weight, bias, grad = inputs((4,))
    fp8_linear(x, weight.detach(), backend="reference").backward(grad)
    assert x.grad is not None
    fp8_linear(x.detach(), weight, bias.detach(), backend="reference").backward(grad)
    assert weight.grad is not None
    assert bias.grad is None


def test_second_derivatives_are_refused():
    x, weight, _, _ = inputs((4,))
    with pytest.raises(NotImplementedError, match=r"differentiable once; use F\.linear"):
        torch.autograd.grad(fp8_linear(x, weight, backend="reference").sum(), x, create_graph=True)


@pytest.mark.parametrize("leading", [(16,), (3, 5)])
def test_compiled_whole(leading):
    torch._dynamo.reset()
    counters.clear()

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.silu(fp8_linear(x, weight, bias, backend="reference"))

    compiled = torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")
    x, weight, bias, grad = inputs(leading)
    for got, wanted in zip(
        torch.autograd.grad(compiled(x, weight, bias), (x, weight, bias), grad.bfloat16()),
        torch.autograd.grad(layer(x, weight, bias), (x, weight, bias), grad.bfloat16()),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "triton"}, "unknown backend 'triton'; choose from reference, scaled_mm"),
        ({"backend": None}, r"compute capability 8\.9 .*not a CPU; backend='reference' emulates it"),
        ({"x": torch.zeros(0, 64)}, r"at least one row .*\(0, 64\)"),
        ({"x": torch.zeros(3, 32)}, r"\(3, 32\) and \(48, 64\)"),
        ({"weight": torch.zeros(40, 64)}, r"\(40, 64\); float8 needs multiples of 16"),
        ({"x": torch.zeros(3, 24), "weight": torch.zeros(48, 24)}, "multiples of 16"),
        ({"bias": torch.zeros(40)}, r"bias has shape \(40,\)"),
        ({"x": torch.zeros(3, 64, dtype=torch.float64)}, "x is torch.float64; fp8_linear takes"),
        ({"weight": torch.zeros(48, 64, device="meta")}, "weight is on meta, but x on cpu"),
    ],
)
def test_bad_input(change, words):
    given = {"x": torch.zeros(3, 64), "weight": torch.zeros(48, 64), "bias": torch.zeros(48), "backend": "reference"}
    given |= change
    with pytest.raises(ValueError, match=words):
        fp8_linear(given["x"], given["weight"], given["bias"], backend=given["backend"])


@pytest.mark.parametrize(
    ("capability", "words"), [((8, 0), "this one has 8.0"), ((8, 9), None), ((9, 0), None), ((10, 0), None)]
)
def test_which_gpus(monkeypatch, capability, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = fp8_reason(torch.device("cuda"))
    assert (reason is None) if words is None else (reason is not None and words in reason)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in str(fp8_reason(torch.device("cuda")))
