"""Which implementation runs an op: `reference`, `cpu` (C++) or `triton`; chosen by device, overridable, never silently.

Back ends load at first use, so that importing `erdfast.ops` needs PyTorch alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

BACKENDS = ("reference", "cpu", "triton")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the compiled back ends take; the reference takes float64 too."""
OPS = (
    "adamw_ema",
    "attention",
    "diffusion_loss",
    "dropout",
    "gelu",
    "heun_step",
    "modulated_norm",
    "qk_norm_rope",
    "swiglu",
)
"""Ops with back ends; add_noise goes with diffusion_loss, as both must draw the same noise."""


_FASTEST = {"cpu": "cpu", "cuda": "triton"}
_default: str | None = None
_default_of: dict[str, str | None] = {}


@contextlib.contextmanager
def default_backend(name: str | None, *ops: str) -> Iterator[None]:
    """Within it, ops called without a back end run `name` if they have it: `with default_backend("reference"): ...`.

    For comparisons: models call their ops without a back end. One setting for the whole process, not one per thread;
    torch.compile notices it and compiles anew. For attention `reference` means that PyTorch chooses.

    Args:
        name: of BACKENDS; None: the fastest, as usual.
        ops: of OPS, where it is not for all of them; goes before what is said for all.

    Raises:
        ValueError: an unknown name.
    """
    global _default, _default_of
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if unknown := [op for op in ops if op not in OPS]:
        raise ValueError(f"no op is called {unknown[0]!r}; choose from {', '.join(OPS)}")
    before = _default, _default_of
    if ops:
        _default_of = _default_of | dict.fromkeys(ops, name)
    else:
        _default = name
    try:
        yield
    finally:
        _default, _default_of = before


def default_of(op: str) -> str | None:
    """What `default_backend` says for an op; None where it says nothing."""
    return _default_of.get(op, _default)


@functools.cache
def load_extension() -> ModuleType | str:
    """The compiled extension, or the reason why there is none."""
    try:
        return importlib.import_module("erdfast._C")
    except ImportError as error:
        return f"the extension erdfast._C cannot be imported ({error}); `pip install .` builds it"


@functools.cache
def load_kernels(name: str) -> ModuleType | str:
    """A module of Triton kernels, or the reason why there is none."""
    try:
        return importlib.import_module(f"erdfast.kernels.{name}")
    except ImportError as error:
        return f"the Triton kernels cannot be imported ({error}); `pip install triton` provides Triton"


@functools.cache
def launcher(backend: str, op: str) -> ModuleType:
    """The module whose function `op` runs the op on a compiled back end.

    Raises:
        RuntimeError: it cannot be loaded; the message says why.
    """
    if backend == "cpu":
        return importlib.import_module("erdfast.ops.cpu")
    kernels = load_kernels(op)
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    return kernels


def in_plain_eager(tensor: torch.Tensor) -> bool:
    """Whether an op may be called past PyTorch's dispatcher: no tracer or tensor subclass is listening.

    The dispatcher's Python layers cost 0.1 ms a call, on a GPU as on a CPU: a tenth of the fused loss on latents.
    """
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    )


def in_transform() -> bool:
    """Whether this runs under torch.func or forward-mode differentiation (while tracing: as if not)."""
    if torch.compiler.is_compiling():
        return False
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]
    return transformed or torch.autograd.forward_ad._current_level >= 0


def _refuse_transforms(backend: str) -> None:
    """Compiled code knows ordinary backward passes alone; other derivatives of it would silently be 0."""
    if in_transform():
        raise NotImplementedError(
            f"the {backend} back end knows neither torch.func nor forward-mode derivatives; use backend='reference', "
            'or around a network `with erdfast.ops.backend.default_backend("reference"):`'
        )


def _unavailable(backend: str, device: torch.device, dtype: torch.dtype, op: str) -> str | None:
    """Why `backend` cannot run an op on this device and dtype; None when it can."""
    if backend == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"{dtype} is not among its dtypes (float32, bfloat16, float16)"
    if backend == "cpu":
        if device.type != "cpu":
            return f"the data is on {device}"
        loaded = load_extension()
    else:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            return f"the data is on {device} and Triton needs a GPU (or TRITON_INTERPRET=1)"
        loaded = load_kernels(op)
    return loaded if isinstance(loaded, str) else None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def resolve_backend(
    requested: str | None,
    device: torch.device,
    dtype: torch.dtype,
    *,
    op: str = "diffusion_loss",
    backends: tuple[str, ...] = BACKENDS,
) -> str:
    """The back end to run: `requested`, or the fastest for the device and dtype.

    float64 always takes the reference, and so does a device for which the op has no compiled back end. Where a back
    end that the op has is missing, the reference takes over with one warning.

    Args:
        requested: a name, or None to choose.
        device, dtype: of the data.
        op: which kernels are meant.
        backends: those that the op has.

    Raises:
        ValueError: `requested` is unknown or cannot run here; the message says why.
        NotImplementedError: under torch.func or forward-mode differentiation, unless the reference runs.
    """
    if torch.compiler.is_compiling():  # imports cannot be traced: what is missing is then said when the op runs
        return _choose(requested, default_of(op), device.type, dtype, backends)
    chosen = _resolve(requested, default_of(op), device, dtype, op, backends)
    if chosen != "reference":
        _refuse_transforms(chosen)
    return chosen


def _choose(
    requested: str | None, default: str | None, device_type: str, dtype: torch.dtype, backends: tuple[str, ...]
) -> str:
    if requested is not None and requested not in backends:
        raise ValueError(f"unknown backend {requested!r}; choose from {', '.join(backends)}")
    fastest = _FASTEST.get(device_type, "reference")
    if dtype == torch.float64 or fastest not in backends:
        fastest = "reference"
    if default is not None and default in backends and dtype != torch.float64:
        fastest = default
    return requested or fastest


@functools.cache  # a fifth of what the host does for a call, otherwise
def _resolve(
    requested: str | None,
    default: str | None,
    device: torch.device,
    dtype: torch.dtype,
    op: str,
    backends: tuple[str, ...],
) -> str:
    chosen = _choose(requested, default, device.type, dtype, backends)
    reason = _unavailable(chosen, device, dtype, op)
    if reason and chosen in (requested, default):
        raise ValueError(f"backend {chosen!r} is not available here: {reason}")
    if reason:
        _warn_once(f"erdfast runs its slow reference on {device.type}: {reason}")
        return "reference"
    return chosen
