"""Scaled dot-product attention: the one place through which every backbone attends.

B batch, H heads, L queries, M keys, K head width.

    out = softmax(q k^T / sqrt(K)) v

Inputs keep their dtype: the kernels accumulate in float32 by themselves, so a cast of q, k and v to float32
would only cost two more passes over memory and the tensor cores.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_packages import PACKAGES, package_attention, package_reason
from .attention_table import key_bucket, measured_backend, table_head_widths
from .backend import default_of, launcher, resolve_backend
from .fused import FusedOp


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention without mask or dropout, differentiable in q, k and v.

    Args:
        q: (B, H, L, K), floating point; any strides.
        k, v: (B, H, M, K), dtype and device of q.
        backend: a name of ATTENTION_BACKENDS. `auto` takes what the measured table says for this device, dtype,
            length and head width (see attention_table.py), and lets PyTorch choose where it says nothing; `flash`,
            `efficient`, `cudnn` and `math` force one of PyTorch's kernels; `flash_attn2`, `flash_attn3`,
            `flash_attn4` and `xformers` are optional packages; `triton` is kernels/attention.py, for short sequences
            (last dimension contiguous, K up to 128); `reference` is the formula above, with its softmax in float32
            (float64 for float64 inputs).

    Returns:
        (B, H, L, K) in the dtype of q; under autocast, PyTorch's kernels, the packages' and our own compute in, and
        return, the dtype of autocast.

    Raises:
        ValueError: unknown backend, shapes that do not fit, or dtypes that differ.
        RuntimeError: the backend is not installed or cannot serve these tensors; the message says why.
    """
    check_attention_backend(backend)
    same_outer = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not same_outer or k.shape != v.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"attention needs q (B, H, L, K) and k, v (B, H, M, K), not {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention needs q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if backend == "auto":
        return _attention_auto(q, k, v)
    if backend in _LOWERED:
        q, k, v = _autocast(q, k, v)
    # Our own kernel checks when it runs; the tracer cannot follow the others' checks, and they refuse by themselves.
    if backend != "triton" and not torch.compiler.is_compiling():
        _require(backend, q, k, v)
    return ATTENTION_BACKENDS[backend](q, k, v)


def attention_qkv(qkv: Tensor, *, backend: str = "auto") -> Tensor:
    """Self-attention of the packed output of one projection; the `triton` backend writes one packed gradient.

    Given q, k and v apart, autograd stacks their gradients: one more pass that reads and writes as much as attention
    itself reads and writes forward, and a half more.

    Args:
        qkv: (B, L, 3, H, K), last dimension contiguous for `triton`.
        backend: as for `attention`.

    Returns:
        (B, L, H, K): with `flatten(2)`, what the output projection takes, without a copy.

    Raises:
        ValueError, RuntimeError: as `attention`.
    """
    check_attention_backend(backend)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"attention_qkv needs (B, L, 3, H, K), not {tuple(qkv.shape)}")
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    if backend == "auto":
        backend = _choose(q, k)
    if backend != "triton":
        return attention(q, k, v, backend=backend).transpose(1, 2)
    return _packed(*_autocast(qkv))[0]


def check_attention_backend(name: str) -> None:
    """Raise ValueError unless `name` is a key of ATTENTION_BACKENDS."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose from {', '.join(ATTENTION_BACKENDS)}")


def attention_reason(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a backend cannot serve these tensors (a missing package, say); None if it can.

    Raises:
        ValueError: unknown backend.
    """
    check_attention_backend(backend)
    return _reason(backend, q, k, v)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula at the top of this file, written out; autocast does not lower its precision."""
    precise = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits_BHLM = (q.to(precise) @ k.to(precise).transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return (torch.softmax(logits_BHLM, dim=-1) @ v.to(precise)).to(q.dtype)


def _attention_auto(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    name = _choose(q, k)
    if name == "auto":
        return F.scaled_dot_product_attention(q, k, v)
    if name in _LOWERED:
        q, k, v = _autocast(q, k, v)
    if not torch.compiler.is_compiling():
        reason = _reason(name, q, k, v)
        if reason:
            _warn_once(f"the attention table names {name!r} for {q.dtype} of head width {q.shape[3]}, but {reason}")
            return F.scaled_dot_product_attention(q, k, v)
    return ATTENTION_BACKENDS[name](q, k, v)


def _choose(q: Tensor, k: Tensor) -> str:
    """The measured backend, or "auto" where PyTorch shall choose."""
    bucket = key_bucket(k.shape[2])
    if bucket is None or default_of("attention") == "reference":
        return "auto"
    dtype = torch.get_autocast_dtype(q.device.type) if _lowers(q) else q.dtype
    head_width = next((width for width in table_head_widths() if width == q.shape[3]), None)
    training = torch.is_grad_enabled() and q.requires_grad
    return measured_backend(q.device, dtype, bucket, head_width, training) or "auto"


def _lowers(tensor: Tensor) -> bool:
    """Whether autocast lowers this tensor's dtype."""
    return tensor.dtype == torch.float32 and torch.is_autocast_enabled(tensor.device.type)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does for PyTorch's own attention."""
    return tuple(t.to(torch.get_autocast_dtype(t.device.type)) if _lowers(t) else t for t in tensors)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"{message}; PyTorch chooses instead", RuntimeWarning, stacklevel=4)


def _forced(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A backend that runs PyTorch's kernel `kind` or raises, instead of falling back to another."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _require(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    reason = _reason(name, q, k, v)
    if reason:
        what = f"{q.dtype} of shape {tuple(q.shape)} on {q.device.type!r}"
        raise RuntimeError(f"attention backend {name!r} cannot serve {what}: {reason}")


def _reason(name: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why backend `name` cannot serve these tensors; None if it can."""
    if name in PACKAGES:
        return package_reason(name, q)
    if name == "triton":
        return _triton_reason(q, k, v)
    return _sdpa_reason(name, q, k, v)


def _triton_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    try:
        resolve_backend("triton", q.device, q.dtype, op="attention", backends=("reference", "triton"))
    except ValueError as error:
        return str(error)
    if not 1 <= q.shape[3] <= MAX_TRITON_HEAD_WIDTH:
        return f"it takes head widths up to {MAX_TRITON_HEAD_WIDTH}"
    if k.shape[2] == 0:
        return "there are no keys"
    for letter, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[3] > 1 and tensor.stride(3) != 1:
            return f"the last dimension of {letter} is not contiguous (strides {tuple(tensor.stride())})"
    return None


MAX_TRITON_HEAD_WIDTH = 128


def _sdpa_reason(name: str, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """PyTorch's own reasons."""
    if name in ("auto", "math", "reference") or (name == "flash" and q.device.type == "cpu"):
        return None
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, these are on {q.device.type!r}; use 'auto', 'math' or 'reference' there"
    can_use = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }[name]
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if can_use(params):
        return None
    with warnings.catch_warnings(record=True) as caught:  # PyTorch tells its reasons as warnings
        warnings.simplefilter("always")
        can_use(params, debug=True)
    return "; ".join(str(warning.message) for warning in caught) or "PyTorch gives no reason"


def _compute(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, H, L, K), log2 of the sums of exp (B, H, L)) by Triton."""
    _require("triton", q, k, v)
    return launcher("triton", "attention").attention(q, k, v)


def _fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _empty_heads(like: Tensor) -> Tensor:
    B, H, L, K = like.shape
    return like.new_empty((B, L, H, K)).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    _refuse_second_derivatives()
    return _attention_backward(grad, *ctx.saved_tensors)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "backend 'triton' is differentiable once; use backend='reference' for second derivatives"
        )


def _backward_compute(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v in the memory order (B, L, H, K)."""
    grads = _empty_heads(q), _empty_heads(k), _empty_heads(v)
    launcher("triton", "attention").attention_backward(_rows(grad), q, k, v, out, lse, grads)
    return grads


def _rows(grad: Tensor) -> Tensor:
    """With a contiguous last dimension: only an expanded gradient, as that of a sum, is copied."""
    return grad if grad.shape[-1] == 1 or grad.stride(-1) == 1 else grad.contiguous()


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(q), _empty_heads(k), _empty_heads(v)


_attention_backward = FusedOp("attention_backward", _backward_compute, _backward_fake)
_attention_triton = FusedOp("attention", _compute, _fake, setup_context=_setup_context, backward=_backward)


def _heads(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, L, 3, H, K) => three views (B, H, L, K)."""
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    return q, k, v


def _packed_compute(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """(out (B, L, H, K), log2 of the sums of exp (B, H, L)) by Triton."""
    out, lse = _compute(*_heads(qkv))
    return out.transpose(1, 2), lse


def _packed_fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    B, L, _, H, K = qkv.shape
    return qkv.new_empty((B, L, H, K)), qkv.new_empty((B, H, L), dtype=torch.float32)


def _packed_backward(ctx: Any, grad: Tensor | None, _: Any) -> Tensor | None:
    if grad is None:
        return None
    _refuse_second_derivatives()
    return _attention_qkv_backward(grad, *ctx.saved_tensors)


def _packed_backward_compute(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient of qkv, contiguous."""
    dqkv = qkv.new_empty(qkv.shape)
    grad, out = _rows(grad).transpose(1, 2), out.transpose(1, 2)
    launcher("triton", "attention").attention_backward(grad, *_heads(qkv), out, lse, _heads(dqkv))
    return dqkv


def _packed_backward_fake(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape)


_attention_qkv_backward = FusedOp("attention_qkv_backward", _packed_backward_compute, _packed_backward_fake)
_packed = FusedOp(
    "attention_qkv", _packed_compute, _packed_fake, setup_context=_setup_context, backward=_packed_backward
)


ATTENTION_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "auto": _attention_auto,
    "flash": _forced(SDPBackend.FLASH_ATTENTION),
    "efficient": _forced(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _forced(SDPBackend.CUDNN_ATTENTION),
    "math": _forced(SDPBackend.MATH),
    **{name: package_attention(name) for name in PACKAGES},
    "triton": lambda q, k, v: _attention_triton(q, k, v)[0],
    "reference": attention_reference,
}
"""Every value of `backend`."""

_LOWERED = {"triton", *PACKAGES}
"""Backends that do not follow autocast by themselves."""
