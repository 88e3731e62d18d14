"""One update of an Euler or Heun sampler: guidance, conversion, step and the network's next input in one pass.

    pred  = uncond + cfg_scale * (cond - uncond)        (or the only prediction there is)
    slope = pred_factor * pred + state_factor * y       y: the state that the network saw
    x_new = x + step * slope                            predictor, and Euler: y = x
    x_new = (x + y)/2 + step/2 * slope                  corrector: y is what the predictor made of x
    input = input_scale * x_new                         in the network's dtype, once or twice

The corrector is Heun's x + step * (first + second)/2 with first = (y - x)/step put in: no slope is ever stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import KERNEL_DTYPES, in_plain_eager, launcher, resolve_backend
from .fused import FusedOp
from .source import refuse_gradients


class HeunRow(NamedTuple):
    """The numbers of one update, in the order of its row: `torch.tensor(rows)` of a list of these is their table."""

    cfg_scale: float
    """Ignored where there is one prediction."""
    pred_factor: float
    state_factor: float
    """slope = pred_factor * pred + state_factor * state: every prediction's slope is affine in it."""
    step: float
    """Of the whole step, in the corrector too; negative if the variable descends."""
    input_scale: float
    """Of the network's next input: alpha at its time where the state is x_t/alpha (EDM), 1 where it is x_t."""


def heun_step(
    pred: Tensor,
    x: Tensor,
    row: Tensor,
    *,
    x_in: Tensor | None = None,
    input_copies: int = 1,
    input_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    out_input: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The next state of a sampler and what the network reads next.

    With `out` and `out_input` results go into the caller's own tensors, the fixed ones of a CUDA graph: `out` may be x
    or x_in itself (each element is read before it is written). A captured sampler keeps three tensors: x, x_in and the
    network's input; the predictor has out=x_in, the corrector out=x, both write the same input, and before a replay
    the caller copies a row of its table to `row`. Nothing waits for the device.

    Args:
        pred: (B, P, ...) or, guided, (2B, P, ...) with P >= C: the network's output, conditional samples first; of its
            channels the first C count. float32, bfloat16 or float16; each sample contiguous.
        x: (B, C, ...) float32 (float64 for the reference), contiguous: the state at the step's start.
        row: (5,) float32 (float64 for the reference) contiguous, on x's device: a HeunRow.
        x_in: None for the predictor and for Euler; for the corrector the state that the network saw, like x.
        input_copies: 1, 2 (conditional and unconditional half of a guided call) or 0 (no call follows).
        input_dtype: of the network's input; that of pred by default.
        out: where the new state goes, like x; shares no memory with other tensors but x or x_in as a whole.
        out_input: where the network's input goes, (input_copies * B, C, ...), contiguous; shares no memory with others.
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        (x_new, network_input): (B, C, ...) in x's dtype and (input_copies * B, C, ...), or None without copies. The
        Triton back end has no gradients; the reference is differentiable where no tensor to write to is given.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit, or the back end cannot run; the message says which.
    """
    _check(pred, x, row, x_in, out)
    dtype = _check_input(pred, x, input_copies, input_dtype, out_input)
    backend = resolve_backend(backend, x.device, x.dtype, op="heun_step", backends=("reference", "triton"))
    if backend == "reference" and out is None and out_input is None:
        return _reference(pred, x, row, x_in, input_copies, dtype)
    refuse_gradients(pred=pred, x=x, row=row, x_in=x_in)
    if out is None and out_input is None:
        x_new, network_input = _heun_step(pred, x, row, x_in, input_copies, dtype, backend)
        return x_new, network_input if input_copies else None
    if out is None:
        out = torch.empty_like(x)
    if out_input is None and input_copies:
        out_input = x.new_empty((input_copies * x.shape[0], *x.shape[1:]), dtype=dtype)
    given = (out, out_input, pred, x, row, x_in)
    if not all(in_plain_eager(tensor) for tensor in given if tensor is not None):
        _heun_step_into(out, out_input, pred, x, row, x_in, backend)
        return out, out_input
    _into(out, out_input, pred, x, row, x_in, backend)
    for written in (out, out_input):  # a kernel tells autograd nothing; the custom op does
        if written is not None and not written.is_inference():
            torch.autograd.graph.increment_version(written)
    return out, out_input


def _check(pred: Tensor, x: Tensor, row: Tensor, x_in: Tensor | None, out: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.dim() < 2 or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)} and strides {x.stride()}; "
            "it must be torch.float32 (torch.float64 for the reference), (B, C, ...), contiguous"
        )
    if not isinstance(row, Tensor):
        raise ValueError(f"row is {row!r}; it must be a tensor: torch.tensor(row, device=x.device)")
    if row.shape != (5,) or row.dtype not in (torch.float32, x.dtype) or not row.is_contiguous():
        raise ValueError(f"row has shape {tuple(row.shape)} and is {row.dtype}; it must be (5,) torch.float32")
    for name, tensor in (("x_in", x_in), ("out", out)):
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)} and strides {tensor.stride()}; "
                f"it must be {x.dtype} {tuple(x.shape)}, contiguous, as x is"
            )
    batches, channels = (x.shape[0], 2 * x.shape[0]), x.shape[1]
    if (
        pred.dim() != x.dim()
        or pred.shape[0] not in batches
        or pred.shape[1] < channels
        or pred.shape[2:] != x.shape[2:]
    ):
        raise ValueError(
            f"pred has shape {tuple(pred.shape)}; for x {tuple(x.shape)} it must have {batches[0]} samples, or "
            f"{batches[1]} for guidance, of at least {channels} channels"
        )
    if pred.dtype not in (*KERNEL_DTYPES, x.dtype):
        raise ValueError(f"pred is {pred.dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))}")
    if pred.numel() and not pred[:1].is_contiguous():
        raise ValueError(f"a sample of pred is not contiguous: strides {pred.stride()} of shape {tuple(pred.shape)}")
    for name, tensor in (("pred", pred), ("row", row), ("x_in", x_in), ("out", out)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; they must share a device")


def _check_input(
    pred: Tensor, x: Tensor, copies: int, dtype: torch.dtype | None, out_input: Tensor | None
) -> torch.dtype:
    """The dtype of the network's input."""
    if copies not in (0, 1, 2):
        raise ValueError(f"input_copies must be 0, 1 or 2, not {copies}")
    if dtype is None:
        dtype = pred.dtype if out_input is None else out_input.dtype
    if dtype not in (*KERNEL_DTYPES, x.dtype):
        raise ValueError(f"input_dtype is {dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))}")
    if out_input is None:
        return dtype
    shape = (copies * x.shape[0], *x.shape[1:])
    fits = out_input.shape == shape and out_input.dtype == dtype and out_input.is_contiguous()
    if not (copies and fits and out_input.device == x.device):
        raise ValueError(
            f"out_input is {out_input.dtype} of shape {tuple(out_input.shape)} and strides {out_input.stride()} on "
            f"{out_input.device}; for input_copies {copies} it must be {dtype} {shape}, contiguous, on {x.device}"
        )
    return dtype


def _reference(
    pred: Tensor, x: Tensor, row: Tensor, x_in: Tensor | None, input_copies: int, input_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    cfg_scale, pred_factor, state_factor, step, input_scale = row.to(x.dtype).unbind()
    pred = pred[:, : x.shape[1]].to(x.dtype)
    if pred.shape[0] != x.shape[0]:
        cond, uncond = pred.chunk(2)
        pred = uncond + cfg_scale * (cond - uncond)
    if x_in is None:
        x_new = x + step * (pred_factor * pred + state_factor * x)
    else:
        x_new = 0.5 * (x + x_in) + 0.5 * step * (pred_factor * pred + state_factor * x_in)
    if not input_copies:
        return x_new, None
    network_input = (input_scale * x_new).to(input_dtype)
    return x_new, network_input if input_copies == 1 else torch.cat([network_input, network_input])


def _compute(
    pred: Tensor,
    x: Tensor,
    row: Tensor,
    x_in: Tensor | None,
    input_copies: int,
    input_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(x_new, network_input); the latter has no samples without copies."""
    x_new, network_input = _fake(pred, x, row, x_in, input_copies, input_dtype, backend)
    _into(x_new, network_input if input_copies else None, pred, x, row, x_in, backend)
    return x_new, network_input


def _fake(pred, x, row, x_in, input_copies, input_dtype, backend):
    shape = (input_copies * x.shape[0], *x.shape[1:])
    return torch.empty_like(x), x.new_empty(shape, dtype=input_dtype)


_heun_step = FusedOp("heun_step", _compute, _fake)


def _into(
    out: Tensor,
    out_input: Tensor | None,
    pred: Tensor,
    x: Tensor,
    row: Tensor,
    x_in: Tensor | None,
    backend: str,
) -> None:
    if backend == "reference":
        copies, dtype = (
            (0, x.dtype) if out_input is None else (out_input.shape[0] // max(x.shape[0], 1), out_input.dtype)
        )
        x_new, network_input = _reference(pred, x, row, x_in, copies, dtype)
        out.copy_(x_new)
        if out_input is not None and network_input is not None:
            out_input.copy_(network_input)
        return
    launcher(backend, "heun_step").heun_step(
        out.flatten(1),  # views: the kernel knows samples of so many elements, not their shape
        None if out_input is None else out_input.flatten(1),
        pred.flatten(1),
        x.flatten(1),
        None if x_in is None else x_in.flatten(1),
        row,
    )


_heun_step_into = torch.library.custom_op("erdfast::heun_step_into", _into, mutates_args=("out", "out_input"))


@_heun_step_into.register_fake
def _(out, out_input, pred, x, row, x_in, backend):
    return None
