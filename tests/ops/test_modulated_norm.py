"""modulated_norm, residual_norm, gated_residual: values and every gradient of each back end against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from erdfast.ops.modulated_norm import (
    MAX_WIDTH,
    _norm,
    _norm_grad,
    gated_residual,
    modulated_norm,
    residual_norm,
)
from tests.ops.conftest import DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""Of the largest number: a few roundings; in the interpreter those to bf16 truncate."""

NAMES = ("x", "branch", "gate", "shift", "scale", "weight", "bias")


def make(shape=(2, 5, 24), stream=torch.float32, other=torch.float32, requires_grad=True) -> dict[str, Tensor]:
    """Leaves x, branch, weight and bias, and the (B, 3D) of which gate, shift and scale are chunks."""
    B, _, D = shape
    shapes = {"x": shape, "branch": shape, "modulation": (B, 3 * D), "weight": (D,), "bias": (D,)}
    dtypes = {"x": stream, "branch": other, "modulation": other, "weight": torch.float32, "bias": torch.float32}
    return {n: torch.randn(s, device=DEVICE).to(dtypes[n]).requires_grad_(requires_grad) for n, s in shapes.items()}


def everything(leaves: dict[str, Tensor], backend, norm="layer", dtype=None) -> tuple[Tensor, ...]:
    """(r, y) of residual_norm, and y of modulated_norm."""
    gate, shift, scale = leaves["modulation"].chunk(3, dim=1)
    options: dict[str, Any] = {"norm": norm, "dtype": dtype, "backend": backend}
    weight, bias = leaves["weight"], leaves["bias"]
    r, y = residual_norm(leaves["x"], leaves["branch"], gate, shift, scale, weight=weight, bias=bias, **options)
    return r, y, modulated_norm(leaves["x"], shift, scale, **options)


def compare(run, leaves: dict[str, Tensor], tolerance: float) -> None:
    """Values and gradients of `run(leaves)` against the reference in float64."""
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    outputs, wanted = run(leaves), run(exact)
    grads = [torch.randn(output.shape, device=DEVICE).to(output.dtype) for output in outputs]
    used = [name for name, leaf in leaves.items() if leaf.requires_grad]
    got = torch.autograd.grad(outputs, [leaves[n] for n in used], grads, allow_unused=True)
    true = torch.autograd.grad(wanted, [exact[n] for n in used], [g.double() for g in grads], allow_unused=True)
    for name, a, b in zip([*map(str, range(len(outputs))), *used], [*outputs, *got], [*wanted, *true], strict=True):
        if a is None or b is None:
            assert a is b is None, name
            continue
        assert a.dtype == (leaves[name].dtype if name in leaves else a.dtype)
        assert float((a - b).detach().abs().max()) <= tolerance * float(b.detach().abs().max()), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype, norm, backend) -> None:
    leaves = make((2, 5, 24), dtype, dtype)

    def run(t):
        return everything(t, backend if t["x"].dtype == dtype else "reference", norm)

    compare(run, leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 17, 37), (2, 33, 8)], ids=str)
def test_a_float32_stream_with_bf16_branches(shape, backend) -> None:
    leaves = make(shape, torch.float32, torch.bfloat16)

    def run(t):
        if t["x"].dtype == torch.float64:
            return everything(t, "reference")
        return everything(t, backend, dtype=torch.bfloat16)

    compare(run, leaves, 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gate_or_modulation(backend) -> None:
    """The block of a U-ViT; x and branch have one dtype or two."""

    def run(t):
        kind = "reference" if t["x"].dtype == torch.float64 else backend
        r, y = residual_norm(t["x"], t["branch"], weight=t["weight"], bias=t["bias"], eps=1e-5, backend=kind)
        return r, y, modulated_norm(t["x"][:, 2:], weight=t["weight"], bias=t["bias"], backend=kind)

    compare(run, make(), 4e-6)
    compare(run, make(other=torch.bfloat16), 2**-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_or_shift_alone(backend) -> None:
    def run(t):
        kind = "reference" if t["x"].dtype == torch.float64 else backend
        _, shift, scale = t["modulation"].chunk(3, dim=1)
        return modulated_norm(t["x"], scale=scale, backend=kind), modulated_norm(t["x"], shift, backend=kind)

    compare(run, make(), 4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_gated_residual(other, backend) -> None:
    def run(t):
        kind = "reference" if t["x"].dtype == torch.float64 else backend
        return (gated_residual(t["x"], t["modulation"].chunk(3, dim=1)[1], t["branch"], backend=kind),)

    compare(run, make(other=other), TOLERANCE[other])


def test_the_reference_is_layer_norm_and_modulation() -> None:
    t = make(requires_grad=False)
    gate, shift, scale = t["modulation"].chunk(3, dim=1)
    r, y = residual_norm(t["x"], t["branch"], gate, shift, scale, backend="reference")
    wanted = t["x"] + gate[:, None] * t["branch"]
    torch.testing.assert_close(r, wanted)
    torch.testing.assert_close(y, F.layer_norm(wanted, (24,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None])
    rms = modulated_norm(t["x"], weight=t["weight"], bias=t["bias"], norm="rms", eps=0.1, backend="reference")
    wanted = t["x"] / (t["x"].square().mean(2, keepdim=True) + 0.1).sqrt() * t["weight"] + t["bias"]
    torch.testing.assert_close(rms, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_through_one_result_alone(backend) -> None:
    for index in (0, 1):

        def run(t, index=index):
            return (everything(t, "reference" if t["x"].dtype == torch.float64 else backend)[index],)

        compare(run, make(), 4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_tensors_get_no_gradient(backend) -> None:
    leaves = make()
    leaves["weight"].requires_grad_(False)
    leaves["modulation"].requires_grad_(False)
    r, y, _ = everything(leaves, backend)
    (r.sum() + y.square().sum()).backward()
    assert leaves["weight"].grad is None
    assert leaves["modulation"].grad is None
    assert all(leaves[name].grad is not None for name in ("x", "branch", "bias"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_chooses_the_dtype_of_y(backend) -> None:
    t = make(other=torch.bfloat16, requires_grad=False)
    _, shift, scale = t["modulation"].chunk(3, dim=1)
    assert modulated_norm(t["x"], shift, scale, backend=backend).dtype == torch.float32
    with torch.autocast(DEVICE, torch.bfloat16):
        r, y = residual_norm(t["x"], t["branch"], None, shift, scale, backend=backend)
        assert (r.dtype, y.dtype) == (torch.float32, torch.bfloat16)
        assert modulated_norm(t["x"], dtype=torch.float32, backend=backend).dtype == torch.float32
        assert gated_residual(t["x"], shift, t["branch"], backend=backend).dtype == torch.float32


@pytest.mark.parametrize("stream", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("other", [*DTYPES, torch.float64], ids=str)
def test_the_reference_takes_any_mixture(stream, other) -> None:
    x, weight, bias = torch.randn(2, 3, 8).to(stream), torch.randn(8).to(other), torch.randn(8).to(other)
    wanted = F.layer_norm(x.double(), (8,), weight.double(), bias.double(), eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        lowered = modulated_norm(x, weight=weight, bias=bias, backend="reference").dtype
    assert lowered == (torch.float64 if stream == torch.float64 else torch.bfloat16)
    y = modulated_norm(x, weight=weight, bias=bias, backend="reference")
    assert y.dtype == stream
    assert float((y - wanted).abs().max()) < 3 * TOLERANCE.get(stream, 4e-6)


def test_reference_passes_gradcheck() -> None:
    leaves = {name: t.detach().double().requires_grad_() for name, t in make((2, 3, 5)).items()}

    def function(*tensors):
        return everything(dict(zip(leaves, tensors, strict=True)), "reference")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("kind", ["everything", "norm alone", "gated residual"])
def test_opcheck(kind) -> None:
    t = make((2, 3, 8), torch.float32, torch.bfloat16)
    gate, shift, scale = (chunk.detach().requires_grad_() for chunk in t["modulation"].chunk(3, dim=1))
    none = [None] * 4
    inputs = {
        "everything": (t["x"], t["branch"], gate, shift, scale, t["weight"], t["bias"], "layer", 1e-6),
        "norm alone": (t["x"], None, None, *none, "rms", 1e-6),
        "gated residual": (t["x"], t["branch"], gate, *none, "none", 0.0),
    }[kind]
    torch.library.opcheck(_norm.op, (*inputs, torch.bfloat16, "triton"))


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_opcheck_of_the_gradient(norm) -> None:
    t = make((2, 3, 8), torch.float32, torch.bfloat16, requires_grad=False)
    gate, shift, scale = t["modulation"].chunk(3, dim=1)
    if norm == "none":
        none = torch.zeros(0, device=DEVICE)
        inputs = (t["x"], None, None, none, t["branch"], gate, None, None, None, None)
        want = [True, False, False, False, False]
    else:
        stats = torch.rand(2, 2, 3, device=DEVICE)
        inputs = (None, t["branch"], t["x"], stats, t["branch"], gate, shift, scale, t["weight"], t["bias"])
        want = [True, False, True, True, False]
    torch.library.opcheck(_norm_grad.op, (*inputs, norm, torch.bfloat16, want, "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    leaves = make(other=torch.bfloat16)

    def step(*tensors):
        t = dict(zip(leaves, tensors, strict=True))
        with torch.autocast(DEVICE, torch.bfloat16):
            r, y, other = everything(t, backend)
            out = gated_residual(r, t["modulation"].chunk(3, dim=1)[0], y, backend=backend)
        return out.square().sum() + other.float().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    inputs = tuple(leaves.values())
    for got, wanted in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(step(*inputs), inputs), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend) -> None:
    leaves = make()

    def loss(x):
        r, y, other = everything(leaves | {"x": x * 2}, backend)
        return (r * y * other).sum()

    (wanted,) = torch.autograd.grad(loss(leaves["x"]), leaves["x"])
    (got,) = torch.autograd.grad(checkpoint(loss, leaves["x"], use_reentrant=False), leaves["x"])
    torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_refused_not_wrong() -> None:
    t = make()
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(modulated_norm(t["x"], backend="triton").sum(), t["x"], create_graph=True)


def test_the_widest_row() -> None:
    from erdfast.kernels import modulated_norm as kernels

    assert kernels.MAX_WIDTH == MAX_WIDTH
    x = torch.randn(1, 2, MAX_WIDTH, device=DEVICE)
    torch.testing.assert_close(modulated_norm(x, backend="triton"), modulated_norm(x, backend="reference"))


def test_bad_input_is_named() -> None:
    t = make(requires_grad=False)
    x, branch, weight = t["x"], t["branch"], t["weight"]
    gate, shift, scale = t["modulation"].chunk(3, dim=1)
    cases = [
        (lambda: modulated_norm(x[0]), r"x must be \(B, L, D\)"),
        (lambda: modulated_norm(x.long()), "floating point, not .* torch.int64"),
        (lambda: modulated_norm(x, norm="batch"), "unknown norm 'batch'; choose from layer, rms"),
        (lambda: residual_norm(x, branch, norm="none"), "unknown norm 'none'; choose from layer, rms"),
        (lambda: modulated_norm(x, backend="cpu"), "unknown backend 'cpu'; choose from reference, triton"),
        (lambda: modulated_norm(x, shift[:1]), r"shift has shape \(1, 24\), but x \(2, 5, 24\) needs \(2, 24\)"),
        (lambda: residual_norm(x, branch[:, 1:], gate), r"branch has shape \(2, 4, 24\)"),
        (lambda: modulated_norm(x, weight=weight[1:]), r"weight has shape \(23,\)"),
        (lambda: modulated_norm(x, scale=scale.to("meta")), "scale is on meta, but x on"),
        (lambda: modulated_norm(x, dtype=torch.int8), "dtype is torch.int8; choose from torch.float32"),
        (lambda: modulated_norm(x, shift.double(), backend="triton"), "shift is torch.float64; choose from"),
        (lambda: modulated_norm(x, shift.long(), backend="triton"), "shift is torch.int64; choose from"),
        (
            lambda: modulated_norm(x, shift.long(), backend="reference"),
            "int64; choose .*, torch.float64",
        ),
        (lambda: residual_norm(x, branch.long(), backend="reference"), "branch is torch.int64; choose from"),
        (lambda: gated_residual(x, gate.bool(), branch, backend="reference"), "gate is torch.bool; choose from"),
        (lambda: modulated_norm(x, weight=weight.int(), backend="reference"), "weight is torch.int32; choose from"),
        (lambda: modulated_norm(x.double(), backend="triton"), "float64 is not among"),
        (lambda: modulated_norm(x.mT.contiguous().mT, backend="triton"), "its channels must be neighbours"),
        (lambda: modulated_norm(x.new_zeros(1, 1, MAX_WIDTH + 1), backend="triton"), "4096 channels"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
