"""The attention op against the formula in float64, at the head widths of the presets and at odd sizes."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from erdfast.ops.attention import (
    ATTENTION_BACKENDS,
    _attention_triton,
    _packed,
    attention,
    attention_qkv,
    attention_reason,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a CPU has; the others are for CUDA. Triton is interpreted there.
CPU_BACKENDS = ["auto", "flash", "math", "reference", "triton"]
BACKENDS = CPU_BACKENDS if DEVICE == "cpu" else list(ATTENTION_BACKENDS)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


def random_qkv(shape, keys=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, H, L, K = shape
    sizes = [(B, H, L, K), (B, H, keys or L, K), (B, H, keys or L, K)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE) for size in sizes]


def skip_unless_served(backend, *inputs):
    if backend != "auto" and (reason := attention_reason(backend, *inputs)):
        assert DEVICE == "cuda", reason
        pytest.skip(reason)  # of this GPU or its packages; on a CPU the line above fails


def formula(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    weights = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_width", [64, 72, 12])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients(backend, head_width, dtype):
    inputs = [x.requires_grad_() for x in random_qkv((2, 3, 18, head_width), dtype=dtype)]
    skip_unless_served(backend, *inputs)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = attention(*inputs, backend=backend), formula(*exact_inputs)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < TOLERANCE[dtype]
    upstream = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64, device=DEVICE).reshape(exact.shape).to(dtype)
    gradients = torch.autograd.grad(out, inputs, upstream)
    for found, wanted in zip(gradients, torch.autograd.grad(exact, exact_inputs, upstream.double()), strict=True):
        assert (found - wanted).abs().max() < 2 * TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "keys"), [((1, 1, 1, 72), None), ((2, 2, 3, 8), 7), ((1, 1, 257, 5), None)])
def test_odd_shapes(backend, shape, keys):
    q, k, v = random_qkv(shape, keys, torch.float32)
    skip_unless_served(backend, q, k, v)
    assert (attention(q, k, v, backend=backend) - formula(q, k, v)).abs().max() < 2e-6


def test_strided_heads_as_the_backbones_make_them():
    qkv = torch.randn(2, 9, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    assert not q.is_contiguous()
    for backend in ("auto", "math", "reference", "triton"):
        assert (attention(q, k, v, backend=backend) - formula(q, k, v)).abs().max() < 2e-6


def test_reference_keeps_its_precision_under_autocast():
    q, k, v = random_qkv((1, 2, 9, 64), dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(q, k, v, backend="reference")
    assert (out - formula(q, k, v)).abs().max() < 2e-6


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_cuda_backends_refuse_cpu_tensors(backend):
    inputs = [x.cpu() for x in random_qkv((1, 1, 4, 8))]
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot serve .* needs CUDA tensors, these are on 'cpu'"):
        attention(*inputs, backend=backend)


def test_triton_says_what_it_cannot_serve():
    q, k, v = random_qkv((1, 2, 4, 8), dtype=torch.float32)
    last_strided = q.transpose(2, 3).contiguous().transpose(2, 3)
    wide = random_qkv((1, 1, 4, 136), dtype=torch.float32)
    cases = [
        ((q.double(), k.double(), v.double()), "float64 is not among its dtypes"),
        ((last_strided, k, v), r"last dimension of q is not contiguous \(strides .*\)"),
        ((q, k[:, :, :0], v[:, :, :0]), "there are no keys"),
        (tuple(wide), "head widths up to 128"),
    ]
    for inputs, message in cases:
        with pytest.raises(RuntimeError, match=f"'triton' cannot serve torch.float.*{message}"):
            attention(*inputs, backend="triton")


@pytest.mark.parametrize("backend", ["auto", "triton", "math"])
def test_packed_projections(backend):
    qkv = torch.randn(2, 9, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    exact_qkv = qkv.detach().double().requires_grad_()
    exact = formula(*(part.transpose(1, 2) for part in exact_qkv.unbind(2))).transpose(1, 2)
    out = attention_qkv(qkv, backend=backend)
    assert out.shape == (2, 9, 4, 16)
    assert (out - exact).abs().max() < 2e-6
    upstream = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64, device=DEVICE).reshape(exact.shape)
    (found,) = torch.autograd.grad(out, qkv, upstream.float())
    (wanted,) = torch.autograd.grad(exact, exact_qkv, upstream)
    assert found.is_contiguous()
    assert (found - wanted).abs().max() < 4e-6


def test_packed_projections_of_another_shape_are_refused():
    for shape in [(2, 9, 4, 3, 16), (2, 9, 192)]:
        with pytest.raises(ValueError, match=r"attention_qkv needs \(B, L, 3, H, K\)"):
            attention_qkv(torch.zeros(shape))


def test_triton_lays_memory_out_as_the_projections_want_it():
    inputs = [x.requires_grad_() for x in random_qkv((2, 3, 5, 8), keys=7, dtype=torch.float32)]
    out = attention(*inputs, backend="triton")
    for tensor in (out, *torch.autograd.grad(out, inputs, torch.randn_like(out))):
        assert tensor.transpose(1, 2).is_contiguous()


def test_triton_takes_any_gradient():
    """That of a sum is one number, expanded; an output that nobody uses has none."""
    inputs = [x.requires_grad_() for x in random_qkv((1, 2, 5, 8), dtype=torch.float32)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(formula(*exact_inputs).sum(), exact_inputs)
    for found, wanted in zip(
        torch.autograd.grad(attention(*inputs, backend="triton").sum(), inputs), exact, strict=True
    ):
        assert (found - wanted).abs().max() < 2e-6
    only_v = attention(inputs[0].detach(), inputs[1].detach(), inputs[2], backend="triton")
    (found,) = torch.autograd.grad(only_v.sum(), inputs[2])
    assert (found - exact[2]).abs().max() < 2e-6


def test_triton_follows_autocast_as_pytorch_does():
    q, k, v = random_qkv((1, 2, 9, 64), dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(q, k, v, backend="triton")
        assert out.dtype == attention(q, k, v, backend="math").dtype == torch.bfloat16
    assert (out - formula(q, k, v)).abs().max() < 2e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_passes_opcheck(dtype):
    inputs = [x.requires_grad_() for x in random_qkv((2, 2, 5, 8), keys=3, dtype=dtype)]
    torch.library.opcheck(_attention_triton.op, tuple(inputs))
    qkv = torch.randn(2, 5, 3, 2, 8).to(dtype).to(DEVICE).requires_grad_()
    torch.library.opcheck(_packed.op, (qkv,))


@pytest.mark.parametrize("dynamic", [False, True])
def test_triton_compiles_whole_with_gradients(dynamic):
    def loss(q, k, v):
        return attention(q * 2, k, v, backend="triton").square().sum()

    def packed_loss(qkv):
        return attention_qkv(qkv * 2, backend="triton").square().sum()

    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in random_qkv((1, 2, 5, 8), dtype=torch.float32)]
    qkv = torch.randn(2, 5, 3, 2, 8).to(DEVICE).requires_grad_()
    for function, arguments in ((loss, inputs), (packed_loss, [qkv])):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        wanted = torch.autograd.grad(function(*arguments), arguments)
        for a, b in zip(torch.autograd.grad(compiled(*arguments), arguments), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_triton_under_activation_checkpointing():
    inputs = [x.requires_grad_() for x in random_qkv((1, 2, 5, 8), dtype=torch.float32)]
    wanted = torch.autograd.grad(attention(*inputs, backend="triton").square().sum(), inputs)
    out = checkpoint(lambda *x: attention(*x, backend="triton"), *inputs, use_reentrant=False)
    assert isinstance(out, torch.Tensor)
    for a, b in zip(torch.autograd.grad(out.square().sum(), inputs), wanted, strict=True):
        assert torch.equal(a, b)


def test_triton_refuses_second_derivatives():
    inputs = [x.requires_grad_() for x in random_qkv((1, 1, 3, 8), dtype=torch.float32)]
    out = attention(*inputs, backend="triton")
    with pytest.raises(NotImplementedError, match="reference"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


def test_reference_passes_gradcheck():
    inputs = [x.requires_grad_() for x in random_qkv((1, 2, 3, 5), keys=4)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, backend="reference"), inputs)


def test_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'flsh'; choose from " + ", ".join(ATTENTION_BACKENDS)):
        attention(*random_qkv((1, 1, 4, 8)), backend="flsh")


@pytest.mark.parametrize("change", ["rank", "heads", "width", "values", "dtype"])
def test_bad_inputs_are_refused(change):
    q, k, v = random_qkv((2, 3, 4, 8))
    q, k, v = {
        "rank": lambda: (q[0], k[0], v[0]),
        "heads": lambda: (q[:, :1], k, v),
        "width": lambda: (q[..., :4], k, v),
        "values": lambda: (q, k, v[:, :, :2]),
        "dtype": lambda: (q, k, v.float()),
    }[change]()
    with pytest.raises(ValueError, match="attention needs q"):
        attention(q, k, v)


@pytest.mark.parametrize("backend", ["auto", "math"])
def test_compiles_without_graph_breaks(backend):
    q, k, v = random_qkv((1, 2, 5, 8), dtype=torch.float32)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, backend=backend), fullgraph=True, backend="aot_eager")
    assert (compiled(q, k, v) - formula(q, k, v)).abs().max() < 2e-6
