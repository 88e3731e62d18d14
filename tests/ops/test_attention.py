"""The attention op against the formula in float64, at the head widths of the presets and at odd sizes."""

import math

import pytest
import torch

from erdfast.ops.attention import ATTENTION_BACKENDS, attention

# What PyTorch offers on a CPU; the others are for CUDA.
CPU_BACKENDS = ["auto", "flash", "math", "reference"]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


def random_qkv(shape, keys=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, H, L, K = shape
    sizes = [(B, H, L, K), (B, H, keys or L, K), (B, H, keys or L, K)]
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def formula(q, k, v):
    q, k, v = q.double(), k.double(), v.double()
    weights = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_width", [64, 72, 12])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_values_and_gradients(backend, head_width, dtype):
    inputs = [x.requires_grad_() for x in random_qkv((2, 3, 18, head_width), dtype=dtype)]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    out, exact = attention(*inputs, backend=backend), formula(*exact_inputs)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < TOLERANCE[dtype]
    upstream = torch.linspace(-1, 1, exact.numel(), dtype=torch.float64).reshape(exact.shape).to(dtype)
    gradients = torch.autograd.grad(out, inputs, upstream)
    for found, wanted in zip(gradients, torch.autograd.grad(exact, exact_inputs, upstream.double()), strict=True):
        assert (found - wanted).abs().max() < 2 * TOLERANCE[dtype] * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("shape", "keys"), [((1, 1, 1, 72), None), ((2, 2, 3, 8), 7), ((1, 3, 257, 5), None)])
def test_odd_shapes(backend, shape, keys):
    q, k, v = random_qkv(shape, keys, torch.float32)
    assert (attention(q, k, v, backend=backend) - formula(q, k, v)).abs().max() < 2e-6


def test_strided_heads_as_the_backbones_make_them():
    qkv = torch.randn(2, 9, 3, 4, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    assert not q.is_contiguous()
    for backend in CPU_BACKENDS:
        assert (attention(q, k, v, backend=backend) - formula(q, k, v)).abs().max() < 2e-6


def test_reference_keeps_its_precision_under_autocast():
    q, k, v = random_qkv((1, 2, 9, 64), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, backend="reference")
    assert (out - formula(q, k, v)).abs().max() < 2e-6


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_cuda_backends_refuse_cpu_tensors(backend):
    with pytest.raises(RuntimeError, match=f"'{backend}' needs CUDA tensors, these are on 'cpu'"):
        attention(*random_qkv((1, 1, 4, 8)), backend=backend)


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
