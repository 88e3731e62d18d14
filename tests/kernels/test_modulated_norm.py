"""The launchers of modulated_norm and its gradient against float64, with poison around everything they allocate."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from erdfast.kernels import modulated_norm as kernels
from tests.kernels.inputs import DTYPES, GUARD, ROUNDING, assert_guard_intact, assert_within

EPS = 1e-6


class Case(NamedTuple):
    shape: tuple[int, int, int] = (2, 7, 40)
    stream: str = "fp32"
    other: str = "bf16"
    norm: str = "layer"
    branch: bool = True
    gate: bool = True
    modulated: bool = True
    affine: bool = False
    incoming: bool = True
    """Whether r has a gradient of its own."""


CASES = {
    "autocast": Case(),
    "fp32": Case(other="fp32", affine=True),
    "bf16": Case(stream="bf16"),
    "fp16": Case(stream="fp16", other="fp16"),
    "odd": Case((3, 33, 37), other="fp32"),
    "two programs": Case((2, 33, 16), other="fp32", affine=True),
    "one row, one channel": Case((1, 1, 1), other="fp32", norm="rms"),
    "wider than a block": Case((2, 3, 300), other="fp32"),
    "no parameters": Case(branch=False, gate=False, modulated=False),
    "norm alone": Case(branch=False, gate=False, other="fp32"),
    "plain residual": Case(gate=False, modulated=False, affine=True),
    "plain residual, fp32": Case(gate=False, modulated=False, affine=True, other="fp32"),
    "rms": Case(norm="rms", affine=True, other="fp32"),
    "no norm": Case(norm="none", modulated=False, other="fp32"),
    "no norm, autocast": Case(norm="none", modulated=False),
    "gradient of y alone": Case(incoming=False, other="fp32"),
}


def make(case: Case, device) -> dict[str, Any]:
    """Tensors in the layouts that the launcher accepts: x and branch slices, gate, shift and scale chunks."""
    B, L, D = case.shape
    rng = torch.Generator().manual_seed(B * 10007 + L * 101 + D)

    def draw(*shape, dtype):
        return torch.randn(shape, generator=rng).to(DTYPES[dtype]).to(device)

    chunks = draw(B, 3 * D, dtype=case.other).chunk(3, dim=1)
    has_norm = case.norm != "none"
    affine = case.affine and has_norm
    return {
        "x": draw(B, L + 2, D, dtype=case.stream)[:, 2:] + 0.5,
        "branch": draw(B, L, 2 * D, dtype=case.other)[:, :, :D] if case.branch else None,
        "gate": chunks[0] if case.gate else None,
        "shift": chunks[1] if case.modulated else None,
        "scale": chunks[2] if case.modulated else None,
        "weight": draw(D, dtype="fp32") if affine else None,
        "bias": draw(D, dtype="fp32") if affine else None,
        "grad_r": draw(B, L, D, dtype=case.stream) if case.branch and (case.incoming or not has_norm) else None,
        "grad_y": draw(B, L, D, dtype=case.other) if has_norm else None,
    }


NAMES = ("x", "branch", "gate", "shift", "scale", "weight", "bias")


def forward64(t: dict[str, Any], case: Case, r: Tensor | None) -> tuple[Any, Any]:
    """(r, y) in float64; with `r` given, y is that of its values, as the launcher normalises what it has rounded."""
    out = t["x"]
    if t["branch"] is not None:
        out = out + (t["branch"] if t["gate"] is None else t["gate"][:, None] * t["branch"])
    stream = out if r is None else r
    if case.norm == "none":
        return out, None
    centred = stream - stream.mean(2, keepdim=True) if case.norm == "layer" else stream
    y = centred * (centred.square().mean(2, keepdim=True) + EPS).rsqrt()
    y = y if t["weight"] is None else y * t["weight"] + t["bias"]
    return out, y if t["scale"] is None else y * (1 + t["scale"][:, None]) + t["shift"][:, None]


def gradients64(t: dict[str, Any], case: Case, r: Tensor | None) -> dict[str, Tensor]:
    """Of every tensor, at the values of r that were stored."""
    leaves: dict[str, Any] = {
        n: None if v is None else v.detach().cpu().double().requires_grad_() for n, v in t.items()
    }
    total, y = forward64(leaves, case, None)
    if r is not None:  # straight through the rounding
        total, y = forward64(leaves | {"x": leaves["x"] + (r.cpu().double() - total.detach())}, case, None)
    pairs = [(total, leaves["grad_r"]), (y, leaves["grad_y"])]
    loss = torch.stack([(v * g).sum() for v, g in pairs if v is not None and g is not None]).sum()
    names = [name for name in NAMES if leaves[name] is not None]
    return dict(zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True))


@pytest.fixture
def poisoned(monkeypatch):
    """What the launchers allocate is NaN and lies between guard zones, which the returned function looks at."""
    whole = []

    class Torch:
        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, shape, *, dtype, device):
            numel = torch.Size(shape).numel()
            whole.append(torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=device))
            return whole[-1][GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(kernels, "torch", Torch())

    def check():
        assert whole
        for tensor in whole:
            assert_guard_intact(tensor)

    return check


def run(case: Case, t: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Results of both launchers, by name."""
    inputs: list[Any] = [t[name] for name in NAMES]
    r, y, stats = kernels.modulated_norm(*inputs, norm=case.norm, eps=EPS, dtype=DTYPES[case.other])
    stream = None if case.norm == "none" else t["x"] if r is None else r
    copied = case.branch and (case.gate or case.stream != case.other)
    want = kernels.Wanted(*(t[name] is not None for name in NAMES[2:]))
    grads = kernels.modulated_norm_grad(
        t["grad_r"],
        t["grad_y"],
        stream,
        stats,
        t["branch"] if case.gate else None,
        *inputs[2:],
        norm=case.norm,
        branch_dtype=DTYPES[case.other] if copied else None,
        want=want,
    )
    return r, y, dict(zip(NAMES, grads, strict=True))


def allowed(actual: Tensor, expected: Tensor) -> Tensor | float:
    """One rounding of the result, and float32 errors in proportion to the largest."""
    return ROUNDING[actual.dtype] * expected.abs() + 4e-6 * float(expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name, device, poisoned):
    case = CASES[name]
    t = make(case, device)
    r, y, grads = run(case, t)
    poisoned()
    exact = {n: None if v is None else v.cpu().double() for n, v in t.items()}
    r64, y64 = forward64(exact, case, None if r is None else r.cpu().double())
    assert (r is None) == (not case.branch)
    assert (y is None) == (case.norm == "none")
    for actual, expected in ((r, r64), (y, y64)):
        if actual is not None:
            assert actual.shape == case.shape
            assert actual.is_contiguous()
            assert_within(actual, expected, allowed(actual, expected))
    if r is not None:
        assert r.dtype == DTYPES[case.stream]
    expected = gradients64(t, case, r)
    if case.norm == "none":
        assert grads.pop("x") is None
    if not (case.gate or case.stream != case.other):
        assert grads.pop("branch") is None
    for tensor, grad in grads.items():
        if t[tensor] is None:
            assert grad is None
            continue
        assert grad.dtype == t[tensor].dtype
        assert grad.shape == t[tensor].shape
        assert_within(grad, expected[tensor], allowed(grad, expected[tensor]))


@pytest.mark.parametrize("name", ["fp32", "two programs", "plain residual"])
def test_repeats_and_does_not_depend_on_the_batch(name, device):
    case = CASES[name]
    t = make(case, device)
    r, y, grads = run(case, t)
    again = run(case, t)
    assert torch.equal(again[0], r)
    assert torch.equal(again[1], y)
    assert all(torch.equal(again[2][n], g) for n, g in grads.items() if g is not None)
    one = {n: v if v is None or n in ("weight", "bias") else v[1:2] for n, v in t.items()}
    r1, y1, grads1 = run(case, one)
    assert torch.equal(r1, r[1:2])
    assert torch.equal(y1, y[1:2])
    for n in ("x", "branch", "gate", "shift", "scale"):
        if grads[n] is not None:
            assert torch.equal(grads1[n], grads[n][1:2]), n


def test_only_the_gradients_wanted(device):
    case = CASES["fp32"]
    t = make(case, device)
    inputs: list[Any] = [t[name] for name in NAMES]
    r, _, stats = kernels.modulated_norm(*inputs, norm=case.norm, eps=EPS, dtype=torch.float32)
    _, _, everything = run(case, t)
    for name in NAMES[2:]:
        want = kernels.Wanted(**{name: True})
        options = {"norm": case.norm, "branch_dtype": torch.float32, "want": want}
        grads = kernels.modulated_norm_grad(t["grad_r"], t["grad_y"], r, stats, t["branch"], *inputs[2:], **options)
        for other, grad in zip(NAMES, grads, strict=True):
            assert (grad is not None) == (other in ("x", "branch", name))
            assert grad is None or torch.equal(grad, everything[other])


def test_a_mean_far_from_zero(device):
    """The variance is that of centred numbers: with E[x^2] - E[x]^2 nothing would be left of it."""
    x = 1000 + torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    y: Any
    _, y, _ = kernels.modulated_norm(x.to(device), *[None] * 6, norm="layer", eps=EPS, dtype=torch.float32)
    expected = torch.nn.functional.layer_norm(x.double(), (64,), eps=EPS)
    assert_within(y, expected, 1e-4)


def test_not_finite_numbers_stay_in_their_row(device):
    case = CASES["autocast"]
    t = make(case, device)
    t["branch"] = t["branch"].clone()
    t["branch"][1, 3, 5] = float("nan")
    _, y, grads = run(case, t)
    bad = torch.zeros(case.shape[:2], dtype=torch.bool)
    bad[1, 3] = True
    assert torch.equal(y.isnan().all(2).cpu(), bad)
    assert torch.equal(y.isnan().any(2).cpu(), bad)
    assert torch.equal(grads["x"].isnan().any(2).cpu(), bad)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=str)
def test_empty(shape, device):
    case = Case(shape, affine=True, other="fp32")
    t = make(case, device)
    r, y, grads = run(case, t)
    assert r.shape == y.shape == shape
    for name, grad in grads.items():
        assert grad.shape == t[name].shape
        assert not grad.any()


def test_many_chunks_and_samples(device, monkeypatch):
    """Several steps of both second stages."""
    from erdfast.kernels import norm_sums

    monkeypatch.setattr(kernels, "GRAD_ROWS", 1)
    monkeypatch.setattr(norm_sums, "SUM_CHUNKS", 4)
    monkeypatch.setattr(norm_sums, "CHANNEL_ROWS", 8)
    case = Case((3, 11, 20), other="fp32", affine=True)
    t = make(case, device)
    r, _, grads = run(case, t)
    for name, expected in gradients64(t, case, r).items():
        assert_within(grads[name], expected, allowed(grads[name], expected))


def test_rows_are_divided_evenly():
    for length in (1, 2, 18, 32, 33, 256, 258, 1024, 4097):
        rows, chunks = kernels.grad_split(length)
        assert (chunks - 1) * rows < length <= chunks * rows
        assert rows <= kernels.GRAD_ROWS
    assert kernels.grad_split(258) == (29, 9)
