"""Optional packages behind the attention op: stand-ins with their signatures, which compute by PyTorch."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from erdfast.ops import attention_packages
from erdfast.ops.attention import attention, attention_reason
from erdfast.ops.attention_packages import PACKAGES

SHAPE = (2, 3, 9, 16)


def sdpa(q, k, v):
    """(B, L, H, K) => (B, L, H, K)."""
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def heads():
    """(B, H, L, K) as backbones make it."""
    B, H, L, K = SHAPE
    return [torch.randn(B, L, H, K).transpose(1, 2).requires_grad_() for _ in range(3)]


def compiled(name, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(lambda q, k, v: attention(q, k, v, backend=name), fullgraph=True, backend=backend)


@pytest.fixture
def stand_in(monkeypatch):
    """Make a package importable, and its checks of the device pass."""
    attention_packages._load.cache_clear()

    def install(name, function, **more):
        parts = PACKAGES[name].module.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
        setattr(sys.modules[PACKAGES[name].module], PACKAGES[name].function, function)
        for path, content in more.items():
            full = f"{PACKAGES[name].module}.{path}"
            monkeypatch.setitem(sys.modules, full, content)
        monkeypatch.setattr(sys.modules["erdfast.ops.attention"], "package_reason", lambda name, q: None)

    yield install
    attention_packages._load.cache_clear()


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("returns_lse", [False, True])
def test_layout_without_copies(name, returns_lse, stand_in):
    seen = []

    def function(q, k, v):
        seen.extend([q, k, v])
        out = sdpa(q, k, v)
        return (out, None) if returns_lse else out

    stand_in(name, function)
    inputs = heads()
    out = attention(*inputs, backend=name)
    for given, taken in zip(inputs, seen, strict=True):
        assert taken.shape == (2, 9, 3, 16)
        assert taken.data_ptr() == given.data_ptr()
    torch.testing.assert_close(out, attention(*inputs, backend="math"))
    assert torch.autograd.grad(out.sum(), inputs)[0].shape == SHAPE


@pytest.mark.parametrize("name", ["flash_attn2", "flash_attn3", "xformers"])
def test_packages_that_trace_are_traced(name, stand_in):
    stand_in(name, sdpa)
    inputs = heads()
    torch.testing.assert_close(compiled(name)(*inputs), attention(*inputs, backend="math"))


def test_flash_attn4_is_a_custom_op_under_compile(stand_in):
    """It compiles its kernels while it runs, which a tracer cannot follow."""
    interface, calls = types.ModuleType("flash_attn.cute.interface"), []

    def forward(q, k, v, return_lse):
        assert return_lse
        calls.append("forward")
        logits = torch.einsum("blhk,bmhk->bhlm", q, k) / q.shape[-1] ** 0.5
        return sdpa(q, k, v).contiguous(), logits.logsumexp(-1), None, None

    def backward(q, k, v, out, dout, lse):
        calls.append("backward")
        scale = q.shape[-1] ** -0.5
        p = torch.exp(scale * torch.einsum("blhk,bmhk->bhlm", q, k) - lse[..., None])
        delta = (out * dout).sum(-1).transpose(1, 2)[..., None]
        ds = scale * p * (torch.einsum("blhk,bmhk->bhlm", dout, v) - delta)
        products = ("bhlm,bmhk->blhk", ds, k), ("bhlm,blhk->bmhk", ds, q), ("bhlm,blhk->bmhk", p, dout)
        return tuple(torch.einsum(*operands).contiguous() for operands in products)

    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward  # pyright: ignore[reportAttributeAccessIssue]
    stand_in("flash_attn4", sdpa, interface=interface)
    inputs = heads()
    out, wanted = compiled("flash_attn4")(*inputs), attention(*inputs, backend="math")
    torch.testing.assert_close(out, wanted)
    upstream = torch.randn(SHAPE)
    for a, b in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (out, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_how_to_get_it(name):
    if importlib.util.find_spec(PACKAGES[name].module.split(".")[0]):
        pytest.skip("it is installed")
    with pytest.raises(RuntimeError) as caught:
        attention(*heads(), backend=name)
    message = str(caught.value)
    assert f"backend '{name}'" in message
    assert PACKAGES[name].module in message
    assert PACKAGES[name].install in message
    with pytest.raises(Exception, match=PACKAGES[name].module):
        compiled(name, "eager")(*heads())


def test_the_extra_has_the_package():
    assert "erdfast[attention]" in PACKAGES["flash_attn2"].install


def test_what_a_package_cannot_serve(monkeypatch):
    monkeypatch.setattr(attention_packages, "_load", lambda name: sdpa)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    on_cpu = torch.zeros(1, 1, 1, 72, dtype=torch.bfloat16)
    assert "needs CUDA tensors" in str(attention_reason("flash_attn2", on_cpu, on_cpu, on_cpu))

    class OnCuda:
        """Stands for a tensor on a GPU."""

        device = torch.device("cuda")

        def __init__(self, dtype, width):
            self.dtype, self.shape = dtype, (1, 1, 1, width)

    def reason(name, dtype=torch.bfloat16, width=72):
        return attention_packages.package_reason(name, OnCuda(dtype, width))  # pyright: ignore[reportArgumentType]

    assert reason("flash_attn2") is None
    assert reason("flash_attn2", width=5) is None
    assert "bfloat16 and float16, not torch.float32" in str(reason("flash_attn2", torch.float32))
    assert reason("xformers", torch.float32) is None
    assert "multiples of 8 up to 256, not 260" in str(reason("flash_attn3", width=260))
    assert "multiples of 8 up to 256, not 5" in str(reason("xformers", width=5))
    assert "needs compute capability 9.0, this GPU has 8.0" in str(reason("flash_attn4"))
