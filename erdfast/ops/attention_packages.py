"""Attention by optional packages: flash-attn (2, 3 and 4) and xformers, which load at first use.

They want (B, L, H, K), which is how the projections around attention lay memory out: (B, H, L, K) goes in and comes out
as transposed views, without copies. flash-attn 2 and 3 and xformers are custom ops of PyTorch themselves, so that
torch.compile traces through them; flash-attn 4 becomes one here.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_table import constant_when_traced
from .fused import FusedOp


class Package(NamedTuple):
    """What a back end needs."""

    module: str
    function: str
    install: str
    """How to get it."""
    dtypes: tuple[torch.dtype, ...]
    capability: int
    """The least compute capability, 80 for A100."""
    width_multiple: int = 1
    max_width: int = 256


_HALF = (torch.bfloat16, torch.float16)

PACKAGES = {
    "flash_attn2": Package(
        "flash_attn", "flash_attn_func", "pip install 'erdfast[attention]' (flash-attn)", _HALF, capability=80
    ),
    "flash_attn3": Package(
        "flash_attn_interface",
        "flash_attn_func",
        "the folder hopper of github.com/Dao-AILab/flash-attention",
        _HALF,
        capability=80,
        width_multiple=8,
    ),
    "flash_attn4": Package(
        "flash_attn.cute", "flash_attn_func", "pip install --pre flash-attn-4", _HALF, capability=90, width_multiple=8
    ),
    "xformers": Package(
        "xformers.ops",
        "memory_efficient_attention",
        "pip install xformers (of the release for your torch)",
        (*_HALF, torch.float32),
        capability=70,
        width_multiple=8,
    ),
}
"""By back end. flash-attn 2 pads odd head widths by itself; 4 has no backward for A100 (sm_80)."""


@functools.cache
def _load(name: str) -> Callable[..., Any] | str:
    """The package's function, or why there is none."""
    package = PACKAGES[name]
    try:
        return getattr(importlib.import_module(package.module), package.function)
    except (ImportError, OSError, AttributeError) as error:  # OSError: a library of CUDA that is not there
        return f"{package.module}.{package.function} cannot be imported ({error}); {package.install} provides it"


def package_reason(name: str, q: Tensor) -> str | None:
    """Why a package cannot serve q (B, H, L, K); None if it can."""
    package = PACKAGES[name]
    loaded = _load(name)
    if isinstance(loaded, str):
        return loaded
    if q.device.type != "cuda":
        return f"it needs CUDA tensors, these are on {q.device.type!r}"
    if q.dtype not in package.dtypes:
        return f"it takes {' and '.join(str(d).removeprefix('torch.') for d in package.dtypes)}, not {q.dtype}"
    width = q.shape[3]
    if width > package.max_width or width % package.width_multiple:
        multiple = package.width_multiple
        return f"it takes head widths that are multiples of {multiple} up to {package.max_width}, not {width}"
    major, minor = torch.cuda.get_device_capability(q.device)
    if 10 * major + minor < package.capability:
        return f"it needs compute capability {package.capability / 10}, this GPU has {major}.{minor}"
    return None


def package_attention(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The back end `name`: three times (B, H, L, K) => (B, H, L, K)."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _ensure_loaded(name)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        if name == "flash_attn4" and torch.compiler.is_compiling():
            return _flash_attn4(q, k, v)[0].transpose(1, 2)
        out = _FUNCTIONS[name](q, k, v)
        # flash-attn 4, and 3 before its version 3.0, return the log-sum-exp too.
        return (out if isinstance(out, Tensor) else out[0]).transpose(1, 2)

    return run


_FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What was loaded: a tracer can follow a look-up here, though not an import."""


@constant_when_traced
def _ensure_loaded(name: str) -> None:
    loaded = _load(name)
    if isinstance(loaded, str):
        raise RuntimeError(f"attention backend {name!r}: {loaded}")
    _FUNCTIONS[name] = loaded


def _flash_attn4_compute(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    return tuple(interface._flash_attn_fwd(q, k, v, return_lse=True)[:2])  # pyright: ignore[reportReturnType]


def _flash_attn4_fake(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, L, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, L), dtype=torch.float32)


def _flash_attn4_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _flash_attn4_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _flash_attn4_grad(grad, *ctx.saved_tensors)


def _flash_attn4_grad_compute(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.cute.interface")
    return tuple(interface._flash_attn_bwd(q, k, v, out, grad, lse))


def _flash_attn4_grad_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_flash_attn4_grad = FusedOp("attention_flash_attn4_backward", _flash_attn4_grad_compute, _flash_attn4_grad_fake)
_flash_attn4 = FusedOp(
    "attention_flash_attn4",
    _flash_attn4_compute,
    _flash_attn4_fake,
    setup_context=_flash_attn4_setup,
    backward=_flash_attn4_backward,
)
