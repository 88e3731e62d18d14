"""What stands between the matrix products of a transformer block: residual, norm and modulation.

    r = x + gate * branch
    n = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias       RMSNorm: r / sqrt(mean(r^2) + eps) * weight
    y = n * (1 + scale) + shift                                  (DiT, sec. 3.2: adaLN)

B batch, L tokens, D width. One kernel computes any part of it (`gated_residual` stops after the first line,
`modulated_norm` starts at the second), another all gradients. Sums are float32; each tensor keeps its own dtype, so
that under autocast a float32 stream, its bf16 branch and the bf16 input of the next Linear meet without a cast.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import KERNEL_DTYPES, launcher, resolve_backend
from .fused import FusedOp

NORMS = {"layer": 2, "rms": 1}
"""How many statistics each keeps of a row: 1/deviation, and the mean."""

MAX_WIDTH = 4096
"""Channels that the kernels take: they hold a whole row in registers."""


def modulated_norm(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """`norm(x) * (1 + scale) + shift` with one shift and scale per sample; without them a plain norm.

    Args:
        x: (B, L, D) float32, bfloat16 or float16 (float64 for the reference). Kernels take samples and rows of any
            stride, such as x[:, 2:], and channels of stride 1; D at most MAX_WIDTH.
        shift, scale: (B, D), rows of any stride, such as chunks of one Linear's output.
        weight, bias: (D,), of the norm.
        norm: "layer" or "rms".
        eps: added to the variance, or to the mean square.
        dtype: of the result. By default the dtype of autocast where it is on, because a Linear follows; else x's.
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        (B, L, D) contiguous. Differentiable once in every tensor (any number of times by the reference).

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit, or the back end cannot run; the message says which.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    backend = _check(x, backend, None, {"shift": shift, "scale": scale}, {"weight": weight, "bias": bias})
    dtype = _result_dtype(x, dtype, backend)
    if backend == "reference":
        return _reference_norm(x, shift, scale, weight, bias, norm, eps, dtype)
    return _norm(x, None, None, shift, scale, weight, bias, norm, eps, dtype, backend)[1]


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """(r, y): r = x + gate * branch goes on as the residual stream, y = norm(r) * (1 + scale) + shift feeds a branch.

    Args:
        x: (B, L, D), the residual stream; see `modulated_norm`.
        branch: (B, L, D), what attention or MLP made of it, of any of these dtypes.
        gate: (B, D), rows of any stride; None for 1.
        shift, scale, weight, bias, norm, eps, dtype, backend: see `modulated_norm`.

    Returns:
        r in x's dtype and y; both contiguous, (B, L, D). y is the norm of r as rounded.

    Raises:
        ValueError: as `modulated_norm`.
    """
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}; choose from {', '.join(NORMS)}")
    per_sample, per_channel = {"gate": gate, "shift": shift, "scale": scale}, {"weight": weight, "bias": bias}
    backend = _check(x, backend, branch, per_sample, per_channel)
    dtype = _result_dtype(x, dtype, backend)
    if backend == "reference":
        r = _reference_residual(x, branch, gate)
        return r, _reference_norm(r, shift, scale, weight, bias, norm, eps, dtype)
    return _norm(x, branch, gate, shift, scale, weight, bias, norm, eps, dtype, backend)[:2]


def gated_residual(x: Tensor, gate: Tensor, branch: Tensor, *, backend: str | None = None) -> Tensor:
    """`x + gate * branch` with one gate per sample and channel: the end of a block, where no norm follows.

    Args:
        x: (B, L, D), the residual stream; see `modulated_norm`.
        gate: (B, D), rows of any stride.
        branch: (B, L, D), of any of these dtypes.
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        (B, L, D) contiguous, in x's dtype.

    Raises:
        ValueError: as `modulated_norm`.
    """
    backend = _check(x, backend, branch, {"gate": gate}, {})
    if backend == "reference":
        return _reference_residual(x, branch, gate)
    return _norm(x, branch, gate, None, None, None, None, "none", 0.0, x.dtype, backend)[0]


def _check(
    x: Tensor,
    backend: str | None,
    branch: Tensor | None,
    per_sample: dict[str, Tensor | None],
    per_channel: dict[str, Tensor | None],
) -> str:
    """The back end to run, after a look at every tensor."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be (B, L, D) and floating point, not {tuple(x.shape)} {x.dtype}")
    backend = resolve_backend(backend, x.device, x.dtype, op="modulated_norm", backends=("reference", "triton"))
    B, _, D = x.shape
    expected = [("x", x, x.shape), ("branch", branch, x.shape)]
    expected += [(name, tensor, (B, D)) for name, tensor in per_sample.items()]
    expected += [(name, tensor, (D,)) for name, tensor in per_channel.items()]
    for name, tensor, shape in expected:
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but x {tuple(x.shape)} needs {tuple(shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}")
        _check_dtype(name, tensor.dtype, backend)
        if backend != "reference":
            _check_for_kernels(name, tensor)
    return backend


def _check_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    valid = KERNEL_DTYPES if backend != "reference" else (*KERNEL_DTYPES, torch.float64)
    if dtype not in valid:
        raise ValueError(f"{name} is {dtype}; choose from {', '.join(map(str, valid))}")


def _check_for_kernels(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has strides {tensor.stride()}: its channels must be neighbours; call .contiguous()")
    if tensor.dim() == 3 and (tensor.shape[2] > MAX_WIDTH or tensor.shape[1] * tensor.stride(1) >= 2**31):
        raise ValueError(
            f"{name} {tuple(tensor.shape)} with strides {tensor.stride()} is too large for the kernels: {MAX_WIDTH} "
            "channels and 2^31 elements of a sample at most; use backend='reference'"
        )


def _result_dtype(x: Tensor, dtype: torch.dtype | None, backend: str) -> torch.dtype:
    if dtype is None:
        kind = x.device.type
        lowered = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone
        return torch.get_autocast_dtype(kind) if lowered else x.dtype
    _check_dtype("dtype", dtype, backend)
    return dtype


def _reference_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    if gate is not None:  # in their own dtype: two casts to float32 cost a CPU half as much again (128x16x96, bf16)
        branch = gate.unsqueeze(1) * branch
    return (x + branch).to(x.dtype)


def _reference_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    if norm == "layer" and shift is None and scale is None and dtype == x.dtype and x.device.type == "cpu":
        dtypes = {t.dtype for t in (weight, bias) if t is not None}
        if dtypes <= {x.dtype} or (dtypes == {torch.float32} and x.dtype != torch.float64):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)  # on a CPU it computes in float32 by itself
    precise = torch.promote_types(x.dtype, torch.float32)
    shift, scale, weight, bias = (None if t is None else t.to(precise) for t in (shift, scale, weight, bias))
    x = x.to(precise)
    if norm == "layer":
        y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    else:
        y = F.rms_norm(x, x.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    if scale is not None:
        y = y * (1 + scale.unsqueeze(1))
    if shift is not None:
        y = y + shift.unsqueeze(1)
    return y.to(dtype)


def _present(tensor: Tensor | None, like: Tensor) -> Tensor:
    """Custom ops return tensors: an empty one for what does not exist."""
    return like.new_empty(0) if tensor is None else tensor


def _compute(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(r, y, statistics of the rows), empty where they do not exist."""
    kernels = launcher(backend, "modulated_norm")
    results = kernels.modulated_norm(x, branch, gate, shift, scale, weight, bias, norm, eps, dtype)
    r, y, stats = (_present(result, x) for result in results)
    return r, y, stats


def _fake(x, branch, gate, shift, scale, weight, bias, norm, eps, dtype, backend):
    none = x.new_empty(0)
    r = none if branch is None else x.new_empty(x.shape)
    if norm == "none":
        return r, none, none.clone()
    return r, x.new_empty(x.shape, dtype=dtype), x.new_empty((NORMS[norm], *x.shape[:2]), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, branch, gate, shift, scale, weight, bias, norm, *_ = inputs
    r, y, stats = output
    ctx.mark_non_differentiable(stats, *([r] if branch is None else []), *([y] if norm == "none" else []))
    ctx.set_materialize_grads(False)
    ctx.norm, ctx.backend, ctx.has_branch = norm, inputs[-1], branch is not None
    # Without gate the branch's gradient is that of x, unless it has another dtype.
    ctx.branch_dtype = None
    if branch is not None and (gate is not None or branch.dtype != x.dtype):
        ctx.branch_dtype = branch.dtype
    # Without norm nothing of the stream is needed; without gate nothing of the branch.
    stream = None if norm == "none" else x if branch is None else r
    ctx.save_for_backward(stream, stats, None if gate is None else branch, gate, shift, scale, weight, bias)


def _backward(ctx: Any, grad_r: Tensor | None, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_r is None and grad_y is None:
        return (None,) * 11
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "modulated_norm is differentiable once; use backend='reference' for second derivatives"
        )
    stream, stats, branch, gate, shift, scale, weight, bias = ctx.saved_tensors
    norm, want = ctx.norm, list(ctx.needs_input_grad[2:7])
    if grad_y is None:  # there is no norm, or nobody has used y
        norm, stream, want = "none", None, [want[0], False, False, False, False]
    # Products, norms and slices deliver contiguous gradients; an expanded scalar or a part of a joined one is copied.
    grad_r, grad_y = (None if grad is None else grad.contiguous() for grad in (grad_r, grad_y))
    grads = _norm_grad(
        grad_r,
        grad_y,
        stream,
        stats,
        branch,
        gate,
        shift,
        scale,
        weight,
        bias,
        norm,
        ctx.branch_dtype,
        want,
        ctx.backend,
    )
    grad_x, grad_branch, *rest = grads
    if norm == "none":
        grad_x = grad_r
    if ctx.branch_dtype is None:
        grad_branch = grad_x if ctx.has_branch else None
    rest = [grad if wanted else None for grad, wanted in zip(rest, want, strict=True)]
    return (grad_x, grad_branch, *rest, None, None, None, None)


def _compute_grad(
    grad_r: Tensor | None,
    grad_y: Tensor | None,
    r: Tensor | None,
    stats: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    branch_dtype: torch.dtype | None,
    want: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, branch, gate, shift, scale, weight and bias, empty where they are not wanted."""
    kernels = launcher(backend, "modulated_norm")
    grads = kernels.modulated_norm_grad(
        grad_r,
        grad_y,
        r,
        stats if norm != "none" else None,
        branch,
        gate,
        shift,
        scale,
        weight,
        bias,
        norm,
        branch_dtype,
        kernels.Wanted(*want),
    )
    return [_present(grad, stats) for grad in grads]


def _fake_grad(grad_r, grad_y, r, stats, branch, gate, shift, scale, weight, bias, norm, branch_dtype, want, backend):
    full = grad_r if grad_y is None else grad_y
    x = stats.new_empty(0) if norm == "none" else full.new_empty(full.shape, dtype=r.dtype)
    other = stats.new_empty(0) if branch_dtype is None else full.new_empty(full.shape, dtype=branch_dtype)
    tensors = (gate, shift, scale, weight, bias)
    sums = [t.new_empty(t.shape) if wanted else stats.new_empty(0) for t, wanted in zip(tensors, want, strict=True)]
    return [x, other, *sums]


_norm = FusedOp("modulated_norm", _compute, _fake, setup_context=_setup_context, backward=_backward)
_norm_grad = FusedOp("modulated_norm_grad", _compute_grad, _fake_grad)
