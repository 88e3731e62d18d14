"""The weighted squared error of any linear target against noise that is never stored: value, gradient, statistics.

    L = 1/B sum_b w_b/n sum_i (pred_bi - y_bi)^2,   y = c_x*x0 + c_eps*eps            (ERD, eq. 2)

One pass over pred and x0 rebuilds eps, forms the residual r = pred - y, sums r^2, r*x0 and r*eps for each sample and
writes dL/dpred = 2*w_b/(B*n) * r. The sums give the gradients for w, c_x and c_eps (learnable targets) and the loss
per noise level. Backward multiplies by the incoming scalar, and does nothing at all when that is 1.

In float16 the gradient of a large batch lies below the smallest number (2^-24) until a loss scale lifts it. There the
forward pass writes no gradient; backward makes it in a second pass, with the incoming scale applied before rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import cpu
from .backend import in_plain_eager, launcher
from .source import (
    CoefficientsLike,
    Moments,
    NoiseKey,
    Source,
    column,
    compute_dtype,
    empty_like,
    make_source,
    read_coefficients,
    reference_x0_eps,
    refuse_gradients,
    sample_layouts,
)


@overload
def diffusion_loss(
    pred: Tensor,
    x0: Tensor | Moments,
    coef: CoefficientsLike,
    key: NoiseKey | None = ...,
    *,
    noise: Tensor | None = ...,
    per_sample: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def diffusion_loss(
    pred: Tensor,
    x0: Tensor | Moments,
    coef: CoefficientsLike,
    key: NoiseKey | None = ...,
    *,
    noise: Tensor | None = ...,
    per_sample: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def diffusion_loss(
    pred: Tensor,
    x0: Tensor | Moments,
    coef: CoefficientsLike,
    key: NoiseKey | None = None,
    *,
    noise: Tensor | None = None,
    per_sample: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """mean_b w_b * mean_i (pred_bi - y_bi)^2 with y = c_x*x0 + c_eps*eps.

    Args:
        pred: (B, ...) the network's output; float32, bfloat16 or float16 (float64 for the reference).
            Samples are contiguous or channels-last, any distance apart: half of the channels is fine.
        x0: clean data of the same shape, any of these dtypes; or Moments to draw it from.
        coef: anything with `c_x`, `c_eps`, `w`, (B,) float32, such as `Process.coefficients(t)`.
        key: the key that `add_noise` was given.
        noise: an explicit eps in place of a key.
        per_sample: also return each sample's unweighted mean squared error, (B,) float32, detached.
        backend: "reference", "cpu" or "triton"; by default the fastest of the device.

    Returns:
        The loss, 0-d float32 (float64 by the reference if an input is), differentiable once in pred, c_x, c_eps and w.
        NaN and infinity in pred reach it.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit, or the back end cannot run; the message says which.
    """
    source = make_source(x0, key, noise, backend, extra=pred)
    c_x, c_eps, w = read_coefficients(source, coef, "c_x", "c_eps", "w")
    if source.backend == "reference":
        loss, mse = _reference(pred, source, c_x, c_eps, w)
        return (loss, mse.detach()) if per_sample else loss
    refuse_gradients(x0=source.x0, noise=noise)
    loss, sums, _ = _run(pred, source, (c_x, c_eps, w))
    return (loss, sums[:, 0].detach() / source.numel) if per_sample else loss


def _run(pred: Tensor, source: Source, numbers: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    write_grad = torch.is_grad_enabled() and pred.requires_grad and pred.dtype != torch.float16
    options = (source.moments_scale, write_grad, source.backend)
    if not in_plain_eager(pred):
        return _diffusion_loss(pred, source.x0, *numbers, source.noise, *source.key_tensors(), *options)
    key: tuple[Any, Any, Any] = (source.seed, source.stream, source.sample_ids)
    if source.backend != "cpu" or pred.requires_grad > write_grad:  # the latter: backward asks for tensors
        key = source.key_tensors()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (pred, *numbers)):
        return _Direct.apply(pred, *numbers, (source.x0, source.noise, *key, *options))
    return _compute(pred, source.x0, *numbers, source.noise, *key, *options)


def _reference(pred: Tensor, source: Source, c_x: Tensor, c_eps: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(pred, source.x0, source.noise, w, c_x, c_eps)
    x0, eps = reference_x0_eps(source, compute)
    y = column(c_x, x0) * x0 + column(c_eps, x0) * eps
    mse = (pred.to(compute) - y).square().flatten(1).mean(1)
    return (w * mse).mean(), mse


def _compute(
    pred: Tensor,
    x0: Tensor,
    c_x: Tensor,
    c_eps: Tensor,
    w: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    write_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss 0-d, sums (B, 3), gradient like pred or empty)."""
    grad = _empty_like(pred, backend) if write_grad else None
    loss, sums = _launch(
        pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, None, grad, True, backend
    )
    assert loss is not None
    assert sums is not None
    return loss, sums, pred.new_empty(0) if grad is None else grad


def _empty_like(pred: Tensor, backend: str) -> Tensor:
    return (cpu.empty_like if backend == "cpu" else empty_like)(pred)


def _launch(
    pred: Tensor,
    x0: Tensor,
    c_x: Tensor,
    c_eps: Tensor,
    w: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    grad_scale: Tensor | None,
    grad: Tensor | None,
    want_sums: bool,
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    layouts = sample_layouts(x0, noise, pred, grad, drawn=noise is None or moments_scale is not None)
    numbers = (c_x.contiguous(), c_eps.contiguous(), w.contiguous())
    return launcher(backend, "diffusion_loss").diffusion_loss(
        pred, x0, noise, *numbers, seed, stream, sample_ids, moments_scale, grad_scale, grad, want_sums, layouts
    )


_diffusion_loss = torch.library.custom_op("erdfast::diffusion_loss", _compute, mutates_args=())


@_diffusion_loss.register_fake
def _(pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, write_grad, backend):
    loss, sums = w.new_empty(()), w.new_empty((pred.shape[0], 3))
    return loss, sums, empty_like(pred) if write_grad else pred.new_empty(0)


@torch.library.custom_op("erdfast::diffusion_loss_grad", mutates_args=())
def _diffusion_loss_grad(
    pred: Tensor,
    x0: Tensor,
    c_x: Tensor,
    c_eps: Tensor,
    w: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    grad_loss: Tensor,
    backend: str,
) -> Tensor:
    """grad_loss * dL/dpred, rounded once."""
    grad, scale = _empty_like(pred, backend), grad_loss.float()
    _launch(pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, scale, grad, False, backend)
    return grad


@_diffusion_loss_grad.register_fake
def _(pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, grad_loss, backend):
    return empty_like(pred)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, write_grad, backend = inputs
    _, sums, grad = output
    ctx.mark_non_differentiable(sums, grad)
    ctx.set_materialize_grads(False)
    ctx.write_grad, ctx.numel, ctx.options = write_grad, pred.numel(), (moments_scale, backend)
    if write_grad or not ctx.needs_input_grad[0]:
        ctx.save_for_backward(w, sums, grad)
    else:
        ctx.save_for_backward(w, sums, pred, x0, c_x, c_eps, noise, seed, stream, sample_ids)


def _backward(ctx: Any, grad_loss: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients for pred, c_x, c_eps and w, where needed."""
    if grad_loss is None:
        return None, None, None, None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "diffusion_loss is differentiable once; use backend='reference' for second derivatives"
        )
    saved = ctx.saved_tensors  # unpacked once: activation checkpointing allows no more
    w, sums = saved[:2]
    grad_pred = _pred_gradient(ctx, saved, grad_loss) if needs[0] else None
    if not any(needs[1:]):  # a fixed target: the usual case
        return grad_pred, None, None, None
    scale = 2.0 * grad_loss / ctx.numel
    return (
        grad_pred,
        -scale * w * sums[:, 1] if needs[1] else None,
        -scale * w * sums[:, 2] if needs[2] else None,
        0.5 * scale * sums[:, 0] if needs[3] else None,
    )


def _pred_gradient(ctx: Any, saved: tuple[Tensor, ...], grad_loss: Tensor) -> Tensor:
    moments_scale, backend = ctx.options
    if not ctx.write_grad:
        w, _, pred, x0, c_x, c_eps, *key = saved
        return _diffusion_loss_grad(pred, x0, c_x, c_eps, w, *key, moments_scale, grad_loss, backend)
    grad = saved[2]
    if type(grad_loss) is not Tensor or _keeps_graph():
        # A tracer fuses the product with what follows. Where the graph is kept, a second backward pass must find the
        # gradient untouched, also by whoever received the first.
        return (grad * grad_loss).to(grad.dtype)
    if backend == "triton":  # reads the scalar on the device, where 1 costs nothing; the host does not wait
        return launcher(backend, "diffusion_loss").scale_(grad, grad_loss.float())
    return grad if float(grad_loss) == 1.0 else (grad * grad_loss).to(grad.dtype)


def _keeps_graph() -> bool:
    """Whether this backward pass runs with retain_graph=True."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def _op_backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    pred, *numbers = _backward(ctx, grad_loss, (needs[0], *needs[2:5]))
    return pred, None, *numbers, *[None] * 7


_diffusion_loss.register_autograd(_op_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same op past the dispatcher; see `in_plain_eager`. `rest` are the inputs without gradients, as one object:
    every input of its own would cost a microsecond."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, c_x: Tensor, c_eps: Tensor, w: Tensor, rest: tuple) -> tuple[Tensor, ...]:
        inputs = (pred, rest[0], c_x, c_eps, w, *rest[1:])
        output = _compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return *_backward(ctx, grad_loss, ctx.needs_input_grad), None
