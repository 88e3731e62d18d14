"""qk_norm_rope: q, k, v and every gradient of each back end against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erdfast.ops.attention import attention
from erdfast.ops.qk_norm_rope import _qk_norm_rope, _qk_norm_rope_backward, qk_norm_rope, rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative error of a stored number: a whole unit in the last place, since the interpreter truncates bf16."""

GRIDS = {7: (2, 3), 16: (4, 4), 1: (1, 1), 21: (4, 5)}
"""Tokens and the grid behind them; what a grid lacks are extra tokens."""
SHAPES = ((2, 7, 3, 72), (1, 16, 2, 64), (3, 1, 1, 8), (1, 21, 5, 80), (1, 7, 1, 128), (2, 3, 2, 4))
NAMES = ("q", "k", "v", "dqkv", "dq_weight", "dk_weight")


def make_inputs(shape, dtype, *, norm=True, rope=True) -> tuple[Tensor, dict]:
    """(qkv, options); the weights are float32."""
    batch, length, heads, width = shape
    qkv = torch.randn(batch, length, 3 * heads * width, device=DEVICE).to(dtype)
    options: dict = {"eps": 1e-3}
    if norm:
        options["q_weight"], options["k_weight"] = (torch.rand(width, device=DEVICE) + 0.5 for _ in range(2))
    if rope:
        rows, columns = GRIDS.get(length, (1, length))
        options["rope"] = rope_tables((rows, columns), width, extra_tokens=length - rows * columns, device=DEVICE)
    return qkv, options


def double(options: dict) -> dict:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}


def run(qkv: Tensor, heads: int, grads, backend: str, function=qk_norm_rope, **options) -> list[Tensor | None]:
    """q, k, v and the gradients of qkv and the weights, for given gradients of q, k and v."""
    qkv = qkv.detach().clone().requires_grad_()
    weights = [
        options.pop(name).detach().clone().requires_grad_() for name in ("q_weight", "k_weight") if name in options
    ]
    named = dict(zip(("q_weight", "k_weight"), weights, strict=False))
    q, k, v = function(qkv, heads, **named, **options, backend=backend)
    torch.autograd.backward([q, k, v], [grad.to(q.dtype) for grad in grads])
    return [q.detach(), k.detach(), v.detach(), qkv.grad, *[weight.grad for weight in weights]]


def make_grads(shape, dtype) -> list[Tensor]:
    batch, length, heads, width = shape
    return [torch.randn(batch, heads, length, width, device=DEVICE).to(dtype) for _ in range(3)]


def compare(got, wanted, dtype) -> None:
    for name, a, b in zip(NAMES, got, wanted, strict=False):
        tolerance = 1e-5 if "weight" in name else 2 * ROUNDING[dtype]
        error = float((a.double() - b).abs().max())
        assert error <= tolerance * float(b.abs().max()), f"{name}: {error}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, backend) -> None:
    qkv, options = make_inputs(shape, dtype)
    grads = make_grads(shape, dtype)
    wanted = run(qkv.double(), shape[2], grads, "reference", **double(options))
    got = run(qkv, shape[2], grads, backend, **options)
    compare(got, wanted, dtype)
    assert [tensor.dtype for tensor in got if tensor is not None] == [dtype] * 4 + [torch.float32] * 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "rope"), [(True, False), (False, True), (False, False)])
def test_either_half_alone(norm, rope, backend) -> None:
    shape = (2, 7, 3, 12)
    qkv, options = make_inputs(shape, torch.float32, norm=norm, rope=rope)
    grads = make_grads(shape, torch.float32)
    wanted = run(qkv.double(), 3, grads, "reference", **double(options))
    compare(run(qkv, 3, grads, backend, **options), wanted, torch.float32)


def test_the_definition_written_out() -> None:
    """Norm as a formula, rotation as a product of complex numbers: independent of the reference."""
    rows, columns, width = 2, 3, 8
    qkv = torch.randn(1, 7, 3 * width, dtype=torch.float64)
    weights = [torch.rand(width, dtype=torch.float64) for _ in range(2)]
    rope = rope_tables((rows, columns), width, extra_tokens=1)
    q, k, v = qk_norm_rope(qkv, 1, q_weight=weights[0], k_weight=weights[1], eps=0.1, rope=rope)
    for got, x, weight in zip((q, k), qkv.chunk(3, dim=2), weights, strict=False):
        y = x * weight / (x.square().mean(2, keepdim=True) + 0.1).sqrt()
        for token in range(7):
            row, column = divmod(token - 1, columns)
            angles = [row, row * 0.01, column, column * 0.01] if token else [0.0] * 4
            turned = torch.view_as_complex(y[0, token].view(4, 2)) * torch.exp(1j * torch.tensor(angles).double())
            torch.testing.assert_close(got[0, 0, token], torch.view_as_real(turned).flatten(), atol=1e-6, rtol=1e-6)
    assert torch.equal(v[0, 0], qkv[0, :, 2 * width :])


def test_attention_depends_on_relative_positions_alone() -> None:
    """Equal vectors at every token: their products are a function of the distance in rows and columns."""
    cos_sin = rope_tables((4, 5), 16)
    qkv = torch.randn(48, dtype=torch.float64).expand(1, 20, 48).contiguous()
    q, k, _ = qk_norm_rope(qkv, 1, rope=cos_sin)
    products = (q[0, 0] @ k[0, 0].T).view(4, 5, 4, 5)
    torch.testing.assert_close(products[1, 1, 2, 3], products[2, 2, 3, 4], atol=1e-6, rtol=0)
    assert not torch.allclose(products[1, 1, 2, 3], products[1, 1, 3, 2], atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_needs_no_copy(backend) -> None:
    """Its output is (B, L, D) in memory for the next Linear, v a view, and the gradient of qkv one tensor."""
    qkv, options = make_inputs((2, 16, 3, 8), torch.float32)
    qkv.requires_grad_()
    q, k, v = qk_norm_rope(qkv, 3, **options, backend=backend)
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    out = attention(q, k, v).transpose(1, 2)
    assert out.is_contiguous()
    out.square().sum().backward()
    assert qkv.grad is not None
    assert qkv.grad.is_contiguous()


def test_gradients_of_any_strides() -> None:
    """(B, L, H, K) in memory, (B, H, L, K) in memory, slices of something larger, and broadcast scalars."""
    shape = (2, 7, 3, 72)
    qkv, options = make_inputs(shape, torch.float32)
    dense = make_grads(shape, torch.float32)
    token_major = dense[0].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(2, 3, 9, 75, device=DEVICE)[:, :, 1:8, 2:74]
    scalar = torch.ones((), device=DEVICE).expand(2, 3, 7, 72)
    for grads in ([token_major, wide, scalar], [wide, scalar, token_major], [scalar, dense[0], wide]):
        wanted = run(qkv, 3, [grad.contiguous() for grad in grads], "triton", **options)
        for a, b in zip(run(qkv, 3, grads, "triton", **options), wanted, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # other vector widths add in another order


def test_only_some_gradients_are_wanted() -> None:
    qkv, options = make_inputs((2, 7, 3, 8), torch.float32)
    with torch.no_grad():
        q, _, _ = qk_norm_rope(qkv.requires_grad_(), 3, **options, backend="triton")
    assert not q.requires_grad
    q, _, _ = qk_norm_rope(qkv, 3, **options, backend="triton")
    (only_q,) = torch.autograd.grad(q.sum(), qkv)
    assert bool((only_q.view(2, 7, 3, 24)[:, :, 1:] == 0).all())
    options["q_weight"].requires_grad_()
    _, _, v = qk_norm_rope(qkv.detach(), 3, **options, backend="triton")
    q, _, _ = qk_norm_rope(qkv.detach(), 3, **options, backend="triton")
    assert torch.autograd.grad(q.sum(), options["q_weight"])[0].shape == (8,)
    assert v.shape == (2, 3, 7, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_low_precision(dtype) -> None:
    qkv, options = make_inputs((2, 7, 3, 8), dtype)
    options = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
    grads = make_grads((2, 7, 3, 8), dtype)
    wanted = run(qkv.double(), 3, grads, "reference", **double(options))
    got = run(qkv, 3, grads, "triton", **options)
    for a, b in zip(got[4:], wanted[4:], strict=True):
        assert a is not None
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=0.05, rtol=2**-7)


def test_reference_passes_gradcheck() -> None:
    cos, sin = rope_tables((1, 2), 4)
    weights = [torch.rand(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    qkv = torch.randn(2, 2, 24, dtype=torch.float64, requires_grad=True)

    def embed(qkv, q_weight, k_weight):
        return qk_norm_rope(qkv, 2, q_weight=q_weight, k_weight=k_weight, rope=(cos, sin))

    assert torch.autograd.gradcheck(embed, (qkv, *weights))


@pytest.mark.parametrize(("norm", "rope"), [(True, True), (True, False), (False, True)])
def test_opcheck(norm, rope) -> None:
    qkv, options = make_inputs((2, 7, 3, 8), torch.float32, norm=norm, rope=rope)
    cos, sin = options.get("rope", (None, None))
    common = (qkv, 3, options.get("q_weight"), options.get("k_weight"), cos, sin, 1e-6, "triton")
    torch.library.opcheck(_qk_norm_rope.op, common)
    torch.library.opcheck(_qk_norm_rope_backward.op, (*make_grads((2, 7, 3, 8), torch.float32), *common))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("norm", "rope"), [(True, True), (False, True)])
def test_compiles_whole(norm, rope, backend) -> None:
    shape = (2, 7, 3, 8)
    qkv, options = make_inputs(shape, torch.float32, norm=norm, rope=rope)
    grads = make_grads(shape, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(qk_norm_rope, fullgraph=True, backend="aot_eager")
    wanted = run(qkv, 3, grads, backend, **options)
    for a, b in zip(run(qkv, 3, grads, backend, function=compiled, **options), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_compiles_inside_a_layer() -> None:
    """Between the two Linears of an attention layer, where v's gradient must not take a way of its own."""
    options = make_inputs((2, 7, 3, 8), torch.float32)[1]
    weight = torch.randn(72, 24, device=DEVICE, requires_grad=True)
    x = torch.randn(2, 7, 24, device=DEVICE)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        q, k, v = qk_norm_rope(F.linear(x, weight), 3, **options, backend="triton")
        return attention(q, k, v).transpose(1, 2).reshape(2, 7, 24)

    torch._dynamo.reset()
    (wanted,) = torch.autograd.grad(layer(x, weight).square().sum(), weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(x, weight).square().sum(), weight)
    torch.testing.assert_close(got, wanted)


def test_second_derivatives_are_refused_not_wrong() -> None:
    qkv, options = make_inputs((1, 7, 1, 8), torch.float32)
    q, _, _ = qk_norm_rope(qkv.requires_grad_(), 1, **options, backend="triton")
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(q.sum(), qkv, create_graph=True)


def test_empty_batch() -> None:
    for backend in BACKENDS:
        qkv, options = make_inputs((0, 7, 2, 8), torch.float32)
        got = run(qkv, 2, make_grads((0, 7, 2, 8), torch.float32), backend, **options)
        assert [tuple(tensor.shape) for tensor in got if tensor is not None][3:] == [(0, 7, 48), (8,), (8,)]
        assert got[4] is not None
        assert bool((got[4] == 0).all())


def test_tables_of_a_grid() -> None:
    """Frequencies 1/theta^(2i/(K/2)), i < K/4, for the row, then for the column; extra tokens first, not turned."""
    cos, sin = rope_tables((3, 4), 72, theta=100.0, extra_tokens=2)
    assert cos.shape == sin.shape == (14, 36)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.equal(cos[:2], torch.ones(2, 36))
    assert torch.equal(sin[:2], torch.zeros(2, 36))
    frequencies = 1.0 / 100.0 ** (torch.arange(0, 36, 2).double() / 36)
    angles = torch.cat([1 * frequencies, 3 * frequencies])  # row 1, column 3
    torch.testing.assert_close(cos[2 + 4 + 3].double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin[2 + 4 + 3].double(), angles.sin(), atol=1e-7, rtol=0)


def test_bad_input_is_named() -> None:
    qkv, options = make_inputs((2, 7, 3, 8), torch.float32)
    cos, sin = options["rope"]
    weight = options["q_weight"]
    cases = [
        (lambda: qk_norm_rope(qkv, 5), r"\(2, 7, 72\).*num_heads = 5"),
        (lambda: qk_norm_rope(qkv, 0), "at least 1, not 0"),
        (lambda: qk_norm_rope(qkv.transpose(0, 1), 3), "not contiguous"),
        (lambda: qk_norm_rope(qkv.long(), 3), "int64"),
        (lambda: qk_norm_rope(qkv, 3, q_weight=weight), "both be given"),
        (lambda: qk_norm_rope(qkv, 3, q_weight=weight, k_weight=weight[:4]), r"k_weight has shape \(4,\)"),
        (lambda: qk_norm_rope(qkv, 3, rope=(cos, sin[:3])), r"sin has shape \(3, 4\)"),
        (lambda: qk_norm_rope(qkv, 3, rope=(cos.double(), sin)), "cos is torch.float64"),
        (lambda: qk_norm_rope(qkv, 3, rope=(cos.clone().requires_grad_(), sin), backend="triton"), "gradients for cos"),
        (lambda: qk_norm_rope(torch.zeros(1, 7, 18, device=DEVICE), 1, rope=(cos, sin)), "multiple of 4, not 6"),
        (lambda: qk_norm_rope(torch.zeros(1, 7, 21, device=DEVICE), 1, rope=(cos, sin)), "multiple of 4, not 7"),
        (lambda: qk_norm_rope(qkv, 3, rope=(cos, sin), backend="cpu"), "choose from reference, triton"),
        (lambda: qk_norm_rope(qkv.double(), 3, rope=(cos, sin), backend="triton"), "float64 is not among"),
        (lambda: rope_tables((2, 2), 6), "multiple of 4, not 6"),
        (lambda: rope_tables((0, 2), 8), "grid 0 x 2"),
        (lambda: rope_tables((1, 2), 8, extra_tokens=-1), "-1 extra tokens"),
        (lambda: rope_tables((1, 2), 8, theta=0.0), "theta"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3.0}, r"num_heads must be an integer of at least 1, not 3\.0"),
        ({"rope": 2}, r"rope must be a pair of tensors \(cos, sin\), not 2"),
        ({"rope": (1, 2)}, r"rope must be a pair of tensors \(cos, sin\), not \(1, 2\)"),
        ({"rope": (1, 2, 3)}, r"rope must be a pair of tensors \(cos, sin\), not \(1, 2, 3\)"),
    ],
)
def test_other_types_are_named(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**{"qkv": torch.zeros(2, 7, 72, device=DEVICE), "num_heads": 3, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (2.5, 2)}, r"grid must be two integers \(rows, columns\), not \(2\.5, 2\)"),
        ({"grid": (1, 2, 3)}, r"grid must be two integers \(rows, columns\), not \(1, 2, 3\)"),
        ({"grid": 4}, r"grid must be two integers \(rows, columns\), not 4"),
        ({"head_width": 8.0}, r"multiple of 4, not 8\.0"),
        ({"extra_tokens": 0.5}, r"extra_tokens must be an integer, not 0\.5"),
    ],
)
def test_other_types_of_sizes_are_named(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        rope_tables(**{"grid": (2, 2), "head_width": 8, **changes})
