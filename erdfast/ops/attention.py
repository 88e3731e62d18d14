"""Scaled dot-product attention: the one place through which every backbone attends.

B batch, H heads, L queries, M keys, K head width.

    out = softmax(q k^T / sqrt(K)) v

Inputs keep their dtype: the kernels accumulate in float32 by themselves, so a cast of q, k and v to float32
would only cost two more passes over memory and the tensor cores.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Attention without mask or dropout, differentiable in q, k and v.

    Args:
        q: (B, H, L, K), floating point; any strides.
        k, v: (B, H, M, K), dtype and device of q.
        backend: a name of ATTENTION_BACKENDS. `auto` lets PyTorch choose among its kernels (but see
            SHORT_CPU_KEYS); `flash`, `efficient`, `cudnn` and `math` force one of
            PyTorch's; `reference` is the formula above, with its softmax in float32 (float64 for float64
            inputs).

    Returns:
        (B, H, L, K) in the dtype of q.

    Raises:
        ValueError: unknown backend, shapes that do not fit, or dtypes that differ.
        RuntimeError: the backend exists but cannot serve these tensors; the message says why.
    """
    check_attention_backend(backend)
    same_outer = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not same_outer or k.shape != v.shape:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"attention needs q (B, H, L, K) and k, v (B, H, M, K), not {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention needs q, k and v of one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    return ATTENTION_BACKENDS[backend](q, k, v)


def check_attention_backend(name: str) -> None:
    """Raise ValueError unless `name` is a key of ATTENTION_BACKENDS."""
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; choose from {', '.join(ATTENTION_BACKENDS)}")


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula at the top of this file, written out; autocast does not lower its precision."""
    precise = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        logits_BHLM = (q.to(precise) @ k.to(precise).transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return (torch.softmax(logits_BHLM, dim=-1) @ v.to(precise)).to(q.dtype)


SHORT_CPU_KEYS = 64
"""Up to here the plain products beat PyTorch's flash kernel for bf16 on a CPU: forward and backward of (128, 4, 18, 32)
take 2.9 ms against 18.3 ms on two AVX-512 cores (torch 2.13); at (8, 16, 258, 72) flash leads, 97 against 142 ms."""


def _attention_auto(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= SHORT_CPU_KEYS:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _forced(name: str, kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A backend that runs PyTorch's kernel `kind` or raises, instead of falling back to another."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kind):
            # The tracer cannot follow the check, and PyTorch itself refuses a kernel that does not fit.
            if not torch.compiler.is_compiling():
                _require(name, q, k, v)
            return F.scaled_dot_product_attention(q, k, v)

    return run


def _require(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise RuntimeError with PyTorch's own reasons unless backend `name` can serve these tensors."""
    if name == "math" or (name == "flash" and q.device.type == "cpu"):
        return
    if q.device.type != "cuda":
        raise RuntimeError(
            f"attention backend {name!r} needs CUDA tensors, these are on {q.device.type!r}; use 'auto', "
            "'math' or 'reference' there"
        )
    can_use = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
    }[name]
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    if can_use(params):
        return
    with warnings.catch_warnings(record=True) as caught:  # PyTorch tells its reasons as warnings
        warnings.simplefilter("always")
        can_use(params, debug=True)
    reasons = "; ".join(str(warning.message) for warning in caught) or "PyTorch gives no reason"
    raise RuntimeError(f"attention backend {name!r} cannot serve {q.dtype} of shape {tuple(q.shape)}: {reasons}")


ATTENTION_BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "auto": _attention_auto,
    "flash": _forced("flash", SDPBackend.FLASH_ATTENTION),
    "efficient": _forced("efficient", SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": _forced("cudnn", SDPBackend.CUDNN_ATTENTION),
    "math": _forced("math", SDPBackend.MATH),
    "reference": attention_reference,
}
"""Every value of `backend`."""
