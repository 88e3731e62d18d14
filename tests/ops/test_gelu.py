"""gelu and linear_gelu: values and gradients of each back end against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from erdfast.ops.gelu import _epilogue_fits, _gelu, _gelu_grad, gelu, linear_gelu
from tests.ops.conftest import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, approximate, backend) -> None:
    x = (2 * torch.randn(3, 5, 33, device=DEVICE)).to(dtype).requires_grad_()
    exact, grad = x.detach().double().requires_grad_(), torch.randn(3, 5, 33, device=DEVICE).to(dtype)
    y, wanted = gelu(x, approximate, backend=backend), gelu(exact, approximate, backend="reference")
    assert y.dtype == dtype
    (got,) = torch.autograd.grad(y, x, grad)
    (true,) = torch.autograd.grad(wanted, exact, grad.double())
    for a, b in ((y, wanted), (got, true)):
        assert float((a - b).detach().abs().max()) <= TOLERANCE[dtype] * float(b.detach().abs().max())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_reference_is_the_formula_and_passes_gradcheck(approximate) -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    inner = {"none": torch.erf(x / 2**0.5), "tanh": torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))}
    torch.testing.assert_close(gelu(x, approximate), x / 2 * (1 + inner[approximate]))
    assert torch.autograd.gradcheck(lambda x: gelu(x, approximate), (x,))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_linear_gelu(approximate, backend) -> None:
    x, weight, bias = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((2, 3, 8), (16, 8), (16,)))
    wanted = F.gelu(F.linear(x, weight, bias), approximate=approximate)
    out = linear_gelu(x, weight, bias, approximate, backend=backend)
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    for got, true in zip(*(torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # on CUDA the product's epilogue
        torch.testing.assert_close(
            linear_gelu(x, weight, bias, approximate, backend=backend), wanted, rtol=1e-3, atol=1e-3
        )
    no_bias = linear_gelu(x, weight, None, approximate, backend=backend)
    torch.testing.assert_close(no_bias, F.gelu(F.linear(x, weight), approximate=approximate), rtol=1e-3, atol=1e-3)


def test_linear_gelu_under_autocast() -> None:
    x, weight, bias = (
        torch.randn(2, 3, 8, device=DEVICE),
        torch.randn(16, 8, device=DEVICE),
        torch.randn(16, device=DEVICE),
    )
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        out = linear_gelu(x, weight, bias, "tanh")
        wanted = F.gelu(F.linear(x, weight, bias), approximate="tanh")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.05)


def test_the_epilogue_needs_cuda_and_no_gradient() -> None:
    weight, bias = torch.randn(4, 4, device=DEVICE), torch.randn(4, device=DEVICE)
    on_cuda = DEVICE == "cuda"
    assert _epilogue_fits(torch.randn(2, 4, device=DEVICE), weight, bias) == on_cuda
    assert not _epilogue_fits(torch.randn(2, 4, device=DEVICE), weight.clone().requires_grad_(), bias)
    with torch.no_grad():
        assert _epilogue_fits(torch.randn(2, 4, device=DEVICE), weight.requires_grad_(), bias) == on_cuda


def test_opcheck() -> None:
    x = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    torch.library.opcheck(_gelu.op, (x, "tanh", "triton"))
    torch.library.opcheck(_gelu_grad.op, (torch.randn(3, 7, device=DEVICE), x.detach(), "none", "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_recomputes(backend) -> None:
    x, weight = torch.randn(2, 3, 8, device=DEVICE), torch.randn(16, 8, device=DEVICE, requires_grad=True)

    def loss(weight):
        return linear_gelu(x, weight, None, "tanh", backend=backend).square().sum()

    (wanted,) = torch.autograd.grad(loss(weight), weight)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(weight), weight)
    torch.testing.assert_close(got, wanted)
    (got,) = torch.autograd.grad(checkpoint(loss, weight, use_reentrant=False), weight)
    torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = torch.randn(4, device=DEVICE, requires_grad=True)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(gelu(x, backend="triton").sum(), x, create_graph=True)


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 6, device=DEVICE)
    cases = [
        (lambda: gelu(x, "erf"), "unknown approximation 'erf'; choose from none, tanh"),
        (lambda: linear_gelu(x, x, None, "erf"), "unknown approximation 'erf'"),
        (lambda: gelu(x, backend="cpu"), "unknown backend 'cpu'; choose from reference, triton"),
        (lambda: gelu(x.double(), backend="triton"), "float64 is not among"),
        (lambda: gelu(x.t(), backend="triton"), "not contiguous"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
