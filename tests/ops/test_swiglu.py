"""swiglu: values and gradients of each back end against float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from erdfast.ops.swiglu import _swiglu, _swiglu_grad, swiglu
from tests.ops.conftest import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2,), (5, 6), (2, 3, 514)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, shape, backend) -> None:
    x = (2 * torch.randn(shape, device=DEVICE)).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, wanted = swiglu(x, backend=backend), swiglu(exact, backend="reference")
    assert y.dtype == dtype
    assert y.shape == (*shape[:-1], shape[-1] // 2)
    grad = torch.randn(y.shape, device=DEVICE).to(dtype)
    (got,) = torch.autograd.grad(y, x, grad)
    (true,) = torch.autograd.grad(wanted, exact, grad.double())
    for a, b in ((y, wanted), (got, true)):
        assert float((a - b).detach().abs().max()) <= TOLERANCE[dtype] * float(b.detach().abs().max())


def test_reference_is_the_formula_and_passes_gradcheck() -> None:
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :5]) * x[:, 5:])
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_opcheck() -> None:
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(_swiglu.op, (x, "triton"))
    torch.library.opcheck(_swiglu_grad.op, (torch.randn(3, 4, device=DEVICE), x.detach(), "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_recomputes(backend) -> None:
    x = torch.randn(2, 3, 8, device=DEVICE, requires_grad=True)

    def loss(x):
        return swiglu(2 * x, backend=backend).square().sum()

    (wanted,) = torch.autograd.grad(loss(x), x)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(got, wanted)
    (got,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_refused_not_wrong() -> None:
    x = torch.randn(4, device=DEVICE, requires_grad=True)
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(swiglu(x, backend="triton").sum(), x, create_graph=True)


def test_bad_input_is_named() -> None:
    x = torch.randn(4, 6, device=DEVICE)
    cases = [
        (lambda: swiglu(x[:, :5]), r"x has shape \(4, 5\); its last dimension must be two halves"),
        (lambda: swiglu(x[0, 0]), r"x has shape \(\)"),
        (lambda: swiglu(x.long()), "x is torch.int64; choose from torch.float32"),
        (lambda: swiglu(x, backend="cpu"), "unknown backend 'cpu'; choose from reference, triton"),
        (lambda: swiglu(x.double(), backend="triton"), "float64 is not among"),
        (lambda: swiglu(x.t(), backend="triton"), "not contiguous"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
