"""skip_linear: both ways of computing it against the joined input in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from erdfast.ops.skip_linear import METHODS, _skip_linear, _skip_linear_grad, skip_linear
from tests.ops.conftest import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5 if DEVICE == "cpu" else 2e-3, torch.bfloat16: 2**-6, torch.float16: 2**-9}


def make(dtype=torch.float32, leading=(2, 3), D=5, E=7, M=4):
    shapes = ((*leading, D), (*leading, E), (M, D + E), (M,))
    return tuple(torch.randn(shape, device=DEVICE).to(dtype).requires_grad_() for shape in shapes)


def exact(inputs):
    """The definition on float64 copies: (output, copies)."""
    x, skip, weight, bias = copies = tuple(t.detach().double().requires_grad_() for t in inputs)
    return F.linear(torch.cat([x, skip], dim=-1), weight, bias), copies


def compare(out, inputs, dtype) -> None:
    wanted, copies = exact(inputs)
    assert out.dtype == dtype
    grad = torch.randn(out.shape, device=DEVICE).to(dtype)
    got = torch.autograd.grad(out, inputs, grad)
    true = torch.autograd.grad(wanted, copies, grad.double())
    for name, a, b in zip(("out", "x", "skip", "weight", "bias"), (out, *got), (wanted, *true), strict=True):
        assert float((a - b).detach().abs().max()) <= TOLERANCE[dtype] * float(b.detach().abs().max()), name
    assert [t.dtype for t in got] == [t.dtype for t in inputs]


@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, method) -> None:
    inputs = make(dtype)
    compare(skip_linear(*inputs, method=method), inputs, dtype)


@pytest.mark.parametrize("leading", [(), (6,), (2, 0)], ids=str)
def test_any_leading_dimensions(leading) -> None:
    inputs = make(leading=leading)
    out = skip_linear(*inputs, method="products")
    assert out.shape == (*leading, 4)
    torch.testing.assert_close(out, skip_linear(*inputs, method="joined"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_and_a_skip_of_another_dtype(method) -> None:
    """The second half of a U-ViT: a bf16 stream joins a float32 skip, weights are float32."""
    x, skip, weight, bias = make()
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = skip_linear(low, skip, weight, bias, method=method)
    compare(out, (low, skip, weight, bias), torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_without_bias(method) -> None:
    x, skip, weight, _ = make()
    wanted = F.linear(torch.cat([x, skip], dim=-1), weight)
    torch.testing.assert_close(skip_linear(x, skip, weight, method=method), wanted, rtol=1e-3, atol=1e-3)


def test_frozen_weights_and_inputs() -> None:
    x, skip, weight, bias = make()
    for kept in range(4):
        inputs = [t.detach().requires_grad_(i == kept) for i, t in enumerate((x, skip, weight, bias))]
        (got,) = torch.autograd.grad(skip_linear(*inputs, method="products").square().sum(), inputs[kept])
        (wanted,) = torch.autograd.grad(skip_linear(*inputs, method="joined").square().sum(), inputs[kept])
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method) -> None:
    inputs = make(torch.float64)
    assert torch.autograd.gradcheck(lambda *t: skip_linear(*t, method=method), inputs)


def test_opcheck() -> None:
    x, skip, weight, bias = make(leading=(6,))
    torch.library.opcheck(_skip_linear.op, (x, skip, weight, bias))
    torch.library.opcheck(_skip_linear.op, (x, skip, weight, None))
    fixed = [t.detach() for t in (torch.randn(6, 4, device=DEVICE), x, skip, weight)]
    torch.library.opcheck(_skip_linear_grad.op, (*fixed, [True, False, True, True]))


@pytest.mark.parametrize("method", METHODS)
def test_compiles_whole_and_recomputes(method) -> None:
    inputs = make()

    def loss(*inputs):
        with torch.autocast(DEVICE, torch.bfloat16):
            return skip_linear(*inputs, method=method).float().square().sum()

    wanted = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, true in zip(torch.autograd.grad(compiled(*inputs), inputs), wanted, strict=True):
        torch.testing.assert_close(got, true, rtol=0.02, atol=0.02)
    again = checkpoint(loss, *inputs, use_reentrant=False)
    for got, true in zip(torch.autograd.grad(again, inputs), wanted, strict=True):
        torch.testing.assert_close(got, true)


def test_nothing_is_joined() -> None:
    """The backward pass keeps x, skip and the weight alone, and its gradients are no slices of a joined one."""
    x, skip, weight, bias = make()
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = skip_linear(x, skip, weight, bias, method="products")
    assert all(grad.is_contiguous() for grad in torch.autograd.grad(out.square().sum(), (x, skip, weight)))
    assert sorted(kept) == sorted([x.numel(), skip.numel(), weight.numel()])


def test_second_derivatives_are_refused_not_wrong() -> None:
    inputs = make()
    with pytest.raises(NotImplementedError, match="joined"):
        torch.autograd.grad(skip_linear(*inputs, method="products").sum(), inputs, create_graph=True)


def test_bad_input_is_named() -> None:
    x, skip, weight, bias = make()
    with pytest.raises(ValueError, match="unknown method 'cat'; choose from joined, products"):
        skip_linear(x, skip, weight, bias, method="cat")
    with pytest.raises(ValueError, match=r"not \(2, 3, 5\), \(2, 3, 7\) and \(4, 11\)"):
        skip_linear(x, skip, weight[:, 1:], bias)
    with pytest.raises(ValueError, match="skip_linear needs x"):
        skip_linear(x[:1], skip, weight, bias)


@pytest.mark.parametrize("method", METHODS)
def test_both_methods_refuse_the_same(method) -> None:
    x, skip, weight, bias = (t.detach() for t in make())
    scalar = torch.tensor(1.0, device=DEVICE)
    cases = [
        ((scalar, scalar, weight, bias), r"not \(\), \(\) and \(4, 12\)"),
        ((x.long(), skip, weight, bias), "x is torch.int64; it must be floating point"),
        ((x, skip.long(), weight, bias), "skip is torch.int64; it must be floating point"),
        ((x.bfloat16(), skip, weight, bias), "weight is torch.float32, but x torch.bfloat16"),
        ((x, skip, weight, bias.double()), "bias is torch.float64, but x torch.float32"),
        ((x, skip, weight, bias[:1]), r"bias has shape \(1,\); weight \(4, 12\) needs \(4,\)"),
        ((x, skip, weight, bias.expand(3, 4)), r"bias has shape \(3, 4\)"),
        ((x, skip, weight.to("meta"), bias), "weight is on meta, but x on"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            skip_linear(*inputs, method=method)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match=r"weight is torch\.float64"):
        skip_linear(x, skip, weight.double(), bias, method=method)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match=r"weight is torch\.float32"):
        skip_linear(x.double(), skip, weight, bias, method=method)
