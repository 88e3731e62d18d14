from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from erdfast.kernels import qk_norm_rope as kernels
from erdfast.kernels.qk_norm_rope import partition, qk_norm_rope, qk_norm_rope_backward
from tests.kernels.inputs import DTYPES, GUARD, ROUNDING, assert_guard_intact, assert_within

EPS = 1e-3
SHAPES = [(1, 1, 1, 2), (2, 5, 3, 64), (1, 17, 2, 72), (2, 3, 1, 80), (1, 9, 2, 128), (3, 33, 1, 8), (1, 2, 1, 256)]
ODD = [(2, 5, 3, 1), (1, 4, 2, 51)]
"""Head widths that only the norm takes."""


class Options(NamedTuple):
    """Without norm or rope None, as the launchers take them."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def make_inputs(shape, dtype, device, *, norm=True, rope=True) -> tuple[Tensor, Options]:
    """cos and sin are of any angles."""
    batch, length, heads, width = shape
    rng = torch.Generator().manual_seed(1000 * length + width)
    qkv = torch.randn(batch, length, 3 * heads * width, generator=rng).to(dtype).to(device)
    weights = [(torch.rand(width, generator=rng) + 0.5).to(device) if norm else None for _ in range(2)]
    angles = 7.0 * torch.rand(length, width // 2, generator=rng)
    tables = [table.to(device) if rope else None for table in (angles.cos(), angles.sin())]
    return qkv, Options(weights[0], weights[1], tables[0], tables[1])


def make_grads(shape, dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = shape
    rng = torch.Generator().manual_seed(width)
    dq, dk, dv = torch.randn(3, batch, heads, length, width, generator=rng).to(dtype).to(device)
    return dq, dk, dv


def reference(qkv, options, heads, grads):
    """[q, k, dqkv, dw] in float64, by autograd from the formula."""
    q_weight, k_weight, cos, sin = (None if t is None else t.cpu().double() for t in options)
    qkv = qkv.cpu().double().requires_grad_()
    weights = [w.requires_grad_() for w in (q_weight, k_weight) if w is not None]
    batch, length, width = qkv.shape
    parts = list(qkv.view(batch, length, 3, heads, width // (3 * heads)).unbind(2))
    for i, weight in enumerate((q_weight, k_weight)):
        if weight is not None:
            parts[i] = weight * parts[i] / (parts[i].square().mean(-1, keepdim=True) + EPS).sqrt()
        if cos is not None and sin is not None:
            even, odd, c, s = parts[i][..., ::2], parts[i][..., 1::2], cos[:, None], sin[:, None]
            parts[i] = torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)
    torch.autograd.backward(parts, [grad.cpu().double().transpose(1, 2) for grad in grads])
    assert qkv.grad is not None
    dw = [w.grad for w in weights if w.grad is not None]
    return [parts[0].detach(), parts[1].detach(), qkv.grad, *([torch.stack(dw)] if dw else [])]


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that the launchers allocate is NaN and lies between guard zones, which `check` looks at."""
    whole = []
    original = torch.Tensor.new_empty

    def new_empty(tensor, shape, *, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return original(tensor, shape, dtype=dtype, device=device)
        numel = torch.Size(shape).numel()
        whole.append(torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype or tensor.dtype, device=tensor.device))
        return whole[-1][GUARD : GUARD + numel].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def check(count):
        assert len(whole) == count
        for tensor in whole:
            assert_guard_intact(tensor)
            assert not tensor[GUARD:-GUARD].isnan().any()

    return check


def check_against_float64(shape, dtype, device, poisoned, *, norm, rope):
    qkv, options = make_inputs(shape, dtype, device, norm=norm, rope=rope)
    grads = make_grads(shape, dtype, device)
    q, k = qk_norm_rope(qkv, shape[2], *options, EPS)
    dqkv, dw = qk_norm_rope_backward(*grads, qkv, shape[2], *options, EPS)
    wanted = reference(qkv, options, shape[2], grads)
    for got, expected in zip((q, k, dqkv), wanted, strict=False):
        assert got.dtype == dtype
        assert_within(got, expected, ROUNDING[dtype] * expected.abs() + 1e-6 * expected.abs().max())
    assert (dw is None) == (not norm)
    if dw is not None:
        assert dw.dtype == torch.float32
        assert_within(dw, wanted[3], 1e-5 * wanted[3].abs().max())
    poisoned(4 if norm else 3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, shape, device, poisoned):
    check_against_float64(shape, DTYPES[dtype], device, poisoned, norm=True, rope=True)


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@pytest.mark.parametrize(("norm", "rope"), [(True, False), (False, True)])
def test_either_half_alone(norm, rope, shape, device, poisoned):
    check_against_float64(shape, torch.bfloat16, device, poisoned, norm=norm, rope=rope)


@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_head_widths(shape, device, poisoned):
    check_against_float64(shape, torch.float32, device, poisoned, norm=True, rope=False)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_heads_are_divided(groups, monkeypatch, device, poisoned):
    """More programs than tokens have blocks: 5 heads in 1, 2 or 5 groups, the last of which may have fewer."""
    shape = (1, 3, 5, 8)
    monkeypatch.setattr(kernels, "MIN_PROGRAMS", groups)
    assert partition(*shape, kernels.TILE).groups == groups
    check_against_float64(shape, torch.float32, device, poisoned, norm=True, rope=True)


def test_partition_covers_every_head():
    for batch, length, heads in ((1, 1, 1), (128, 258, 16), (2, 256, 12), (1, 64, 7), (3, 20, 65)):
        for width in (1, 64, 72, 128):
            part = partition(batch, length, heads, width, kernels.TILE)
            assert part.padded >= width
            assert (part.blocks - 1) * part.rows < length <= part.blocks * part.rows
            assert (part.groups - 1) * part.heads < heads <= part.groups * part.heads


def test_repeats_bit_for_bit_in_any_batch(device):
    """dq, dk and dv of a sample do not depend on the other samples, nor do sums on the run."""
    shape = (3, 17, 2, 72)
    qkv, options = make_inputs(shape, torch.float32, device)
    grads = make_grads(shape, torch.float32, device)
    first, second = (qk_norm_rope_backward(*grads, qkv, 2, *options, EPS) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert first[1] is not None
    assert second[1] is not None
    assert torch.equal(first[1], second[1])
    one = slice(1, 2)
    dq, dk, dv = (grad[one] for grad in grads)
    alone, _ = qk_norm_rope_backward(dq, dk, dv, qkv[one], 2, *options, EPS)
    assert torch.equal(alone, first[0][one])
    assert torch.equal(qk_norm_rope(qkv[one], 2, *options, EPS)[1], qk_norm_rope(qkv, 2, *options, EPS)[1][one])


def test_not_finite_numbers_stay_in_their_head(device):
    qkv, options = make_inputs((2, 3, 2, 8), torch.float32, device)
    qkv.view(2, 3, 3, 2, 8)[1, 2, 1, 0, 5] = float("nan")
    q, k = qk_norm_rope(qkv, 2, *options, EPS)
    assert torch.isfinite(q).all()
    assert (~torch.isfinite(k)).nonzero()[:, :3].unique(dim=0).tolist() == [[1, 2, 0]]


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_without_eps(device):
    """Lanes beyond the last token divide by zero and must not reach the weights' gradients."""
    qkv, options = make_inputs((1, 3, 1, 8), torch.float32, device)
    dq, dk, dv = make_grads((1, 3, 1, 8), torch.float32, device)
    dqkv, dw = qk_norm_rope_backward(dq, dk, dv, qkv, 1, *options, 0.0)
    assert dw is not None
    assert torch.isfinite(dw).all()
    assert torch.isfinite(dqkv).all()


def test_nothing_to_do(device):
    for shape in ((0, 3, 2, 8), (2, 0, 2, 8)):
        qkv, options = make_inputs(shape, torch.float32, device)
        q, _ = qk_norm_rope(qkv, 2, *options, EPS)
        assert q.shape == shape
        dqkv, dw = qk_norm_rope_backward(*make_grads(shape, torch.float32, device), qkv, 2, *options, EPS)
        assert dqkv.shape == qkv.shape
        assert dw is not None
        assert torch.equal(dw.cpu(), torch.zeros(2, 8))
