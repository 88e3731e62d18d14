"""The attention kernels against the formula in float64."""

import math

import pytest
import torch

from erdfast.kernels import attention as kernels
from erdfast.kernels.attention import Config, attention, attention_backward, config, head_tiles, tail
from tests.kernels.inputs import DTYPES, GUARD, assert_guard_intact, assert_within

SHAPES = [
    (1, 1, 1, 1, 8),
    (1, 1, 3, 5, 5),
    (2, 2, 18, 18, 72),
    (1, 1, 33, 100, 24),
    (1, 2, 40, 70, 128),
    (1, 1, 66, 64, 40),
]
"""B, H, L, M, K: less than a tile, tails alone, full tiles with and without a tail, one and two tiles of a head."""

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Relative to the largest value: P and dS are rounded to the dtype too."""


def make(shape, dtype, device, scale=1.0):
    """q, k, v and the gradient of the output, as backbones make them: (B, L, H, K) in memory."""
    B, H, L, M, K = shape
    rng = torch.Generator().manual_seed(L + 1000 * M)
    sizes = [(B, L, H, K), (B, M, H, K), (B, M, H, K), (B, L, H, K)]
    made = [torch.randn(size, generator=rng).transpose(1, 2) for size in sizes]
    return [(x * factor).to(dtype).to(device) for x, factor in zip(made, (scale, scale, 1.0, 1.0), strict=True)]


def formula(q, k, v, dout):
    """(out, log2 of the sums of exp, dq, dk, dv) in float64."""
    q, k, v = (x.detach().double().cpu().requires_grad_() for x in (q, k, v))
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    out = torch.softmax(logits, dim=-1) @ v
    lse = torch.logsumexp(logits, dim=-1) / math.log(2)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.double().cpu())


def run(q, k, v, dout, tiles=None, grads=None):
    out, lse = attention(q, k, v, tiles)
    if grads is None:
        grads = kernels.empty_heads(q), kernels.empty_heads(k), kernels.empty_heads(v)
    attention_backward(dout, q, k, v, out, lse, grads, tiles)
    return out, lse, *grads


def compare(found, wanted, dtype):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        tolerance = 1e-6 if name == "lse" else TOLERANCE[dtype]
        assert a.shape == b.shape
        bound = tolerance * max(float(b.abs().max()), 0.5)  # a single key has no gradient: what is left is rounding
        assert torch.isfinite(a).all(), name
        assert_within(a, b, torch.full_like(b, bound))


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that the launchers allocate is NaN between guard zones, which `check` looks at."""
    whole = []

    def allocate(shape, dtype, device):
        numel = torch.Size(shape).numel()
        whole.append(torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=device))
        return whole[-1][GUARD : GUARD + numel].view(shape)

    original = torch.Tensor.new_empty

    def new_empty(tensor, shape, *, dtype=None, device=None):
        if device is not None:  # the interpreter's own, which becomes a view of a launch's argument
            return original(tensor, shape, dtype=dtype, device=device)
        return allocate(shape, dtype or tensor.dtype, tensor.device)

    monkeypatch.setattr(torch, "empty_like", lambda t: allocate(t.shape, t.dtype, t.device))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def check(count):
        assert len(whole) == count
        for tensor in whole:
            assert_guard_intact(tensor)

    return check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, shape, device, poisoned):
    inputs = make(shape, DTYPES[dtype], device)
    found = run(*inputs)
    assert found[0].dtype == DTYPES[dtype]
    assert found[1].dtype == torch.float32
    assert found[0].transpose(1, 2).is_contiguous()
    poisoned(6)  # out, lse, delta, dq, dk, dv
    compare(found, formula(*inputs), DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_tokens_and_head_width_of_uvit_h(dtype, device):
    inputs = make((1, 1, 258, 258, 72), DTYPES[dtype], device)
    compare(run(*inputs), formula(*inputs), DTYPES[dtype])


@pytest.mark.parametrize(
    "tiles", [Config(64, 64, 4), Config(128, 32, 8), Config(32, 64, 4), Config(16, 16, 4)], ids=str
)
def test_the_cut_does_not_matter(tiles, device):
    inputs = make((1, 1, 134, 162, 72), torch.float16, device)  # two full tiles: see safe_config
    compare(run(*inputs, tiles=tiles), formula(*inputs), torch.float16)


def test_what_the_compiler_gets_wrong_is_cut_otherwise():
    dtype = torch.bfloat16
    for queries, keys in ((66, 64), (70, 300), (300, 98)):
        assert kernels.safe_config(72, dtype, 90, queries, keys).rows == 32
    assert kernels.safe_config(64, dtype, 90, 66, 64) == config(64, dtype, 90)
    assert kernels.safe_config(72, dtype, 90, 258, 258) == config(72, dtype, 90)
    assert kernels.safe_config(72, dtype, 90, 18, 18) == config(72, dtype, 90)


@pytest.mark.parametrize("width", [24, 5], ids=["units of 16 bytes", "odd"])
def test_views_of_one_qkv_and_gradients_written_into_one(width, device):
    B, L, H = 2, 19, 3
    rng = torch.Generator().manual_seed(0)
    qkv = torch.randn(B, L, 3, H, width, generator=rng).to(device)
    dout = torch.randn(B, H, L, width, generator=rng).to(device)
    dqkv = torch.full_like(qkv, float("nan"))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    dq, dk, dv = (part.transpose(1, 2) for part in dqkv.unbind(2))
    compare(run(q, k, v, dout, grads=(dq, dk, dv)), formula(q, k, v, dout), torch.float32)
    assert torch.isfinite(dqkv).all()


def test_strides_that_are_no_multiple_of_anything(device):
    inputs = [torch.nn.functional.pad(x, (2, 1))[..., 2:-1] for x in make((2, 2, 7, 9, 24), torch.float32, device)]
    assert all(x.stride(2) == 27 for x in inputs)
    compare(run(*inputs), formula(*inputs), torch.float32)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # NumPy's, in rows that are not stored
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_large_logits(sign, device):
    """Near +-3000 in base 2: exponentials overflow unless the largest logit, or lse, is subtracted first."""
    q, k, v, dout = make((1, 1, 18, 37, 16), torch.float32, device)
    q, k = 30 + 0.01 * q, sign * (18 + 0.01 * k)
    wanted = formula(q, k, v, dout)
    assert (wanted[1].abs() > 2500).all()
    for a, b in zip(run(q, k, v, dout), wanted, strict=True):
        assert torch.isfinite(a).all()
        assert_within(a, b, torch.full_like(b, 1e-3 * float(b.abs().max())))  # a logit of 2000 is known to 1e-4


def test_nan_stays_in_its_head(device):
    inputs = make((2, 2, 18, 18, 8), torch.float32, device)
    inputs[1][1, 0, 17, 7] = float("nan")
    for tensor in run(*inputs):
        finite = torch.isfinite(tensor.flatten(2)).all(dim=2)
        assert finite.tolist() == [[True, True], [False, True]]


def test_repeats_and_does_not_depend_on_the_batch(device):
    inputs = make((3, 1, 70, 35, 24), torch.float16, device)
    first, second = run(*inputs), run(*inputs)
    alone = run(*[x[1:2] for x in inputs])
    for a, b, c in zip(first, second, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[1:2], c)


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 8), (2, 2, 0, 5, 8)], ids=["batch", "queries"])
def test_nothing_to_do(shape, device):
    inputs = make(shape, torch.float32, device)
    out, lse, dq, dk, dv = run(*inputs)
    assert (out.numel(), lse.numel(), dq.numel()) == (0, 0, 0)
    assert not dk.any()
    assert not dv.any()


def test_tiles():
    assert {w: head_tiles(w) for w in (1, 8, 16, 24, 40, 48, 64, 72, 80, 96, 104, 128)} == {
        1: (16, 0),
        8: (16, 0),
        16: (16, 0),
        24: (32, 0),
        40: (32, 16),
        48: (32, 16),
        64: (64, 0),
        72: (64, 16),
        80: (64, 16),
        96: (64, 32),
        104: (128, 0),
        128: (128, 0),
    }
    assert [tail(n, 64) for n in (256, 258, 273, 300)] == [0, 16, 32, 64]
    assert tail(258, 16) == 0
    for width in range(1, 129):
        main, rest = head_tiles(width)
        assert main >= 16
        assert width <= main + rest < 2 * max(width, 16)
        for dtype in DTYPES.values():
            assert config(width, dtype, 80).tile <= config(width, dtype, 90).tile
