"""The weighted squared error of any linear target against noise that is never stored: value, gradient, statistics.

    L = 1/B sum_b w_b/n sum_i (pred_bi - y_bi)^2,   y = c_x*x0 + c_eps*eps            (ERD, eq. 2)

One pass over pred and x0 rebuilds eps, forms the residual r = pred - y, sums r^2, r*x0 and r*eps for each sample and
writes dL/dpred = 2*w_b/(B*n) * r. The sums give the gradients for w, c_x and c_eps (learnable targets) and the loss
per noise level. Backward multiplies by the incoming scalar, and does nothing at all when that is 1.

In float16 the gradient of a large batch lies below the smallest number (2^-24) until a loss scale lifts it. There the
forward pass writes no gradient; backward makes it in a second pass, with the incoming scale applied before rounding.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .backend import in_plain_eager, launcher
from .source import (
    CoefficientsLike,
    Moments,
    NoiseKey,
    Source,
    check_coefficients,
    column,
    compute_dtype,
    make_source,
    reference_x0_eps,
    refuse_gradients,
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
        pred: (B, ...) the network's output; float32, bfloat16 or float16 (float64 for the reference), contiguous.
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
    check_coefficients(source, c_x=coef.c_x, c_eps=coef.c_eps, w=coef.w)
    if source.backend == "reference":
        loss, mse = _reference(pred, source, coef)
        return (loss, mse.detach()) if per_sample else loss
    refuse_gradients(x0=source.x0, noise=noise)
    write_grad = torch.is_grad_enabled() and pred.requires_grad and pred.dtype != torch.float16
    op = _Direct.apply if in_plain_eager(pred) else _diffusion_loss
    loss, sums, _ = op(
        pred,
        source.x0,
        coef.c_x,
        coef.c_eps,
        coef.w,
        source.noise,
        source.seed,
        source.stream,
        source.sample_ids,
        source.moments_scale,
        write_grad,
        source.backend,
    )
    return (loss, sums[:, 0].detach() / source.numel) if per_sample else loss


def _reference(pred: Tensor, source: Source, coef: CoefficientsLike) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(pred, source.x0, source.noise, coef.w, coef.c_x, coef.c_eps)
    x0, eps = reference_x0_eps(source, compute)
    y = column(coef.c_x, x0) * x0 + column(coef.c_eps, x0) * eps
    mse = (pred.to(compute) - y).square().flatten(1).mean(1)
    return (coef.w * mse).mean(), mse


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
    want_sums: bool,
    want_grad: bool,
    backend: str,
) -> tuple[Any, Any]:
    """Run a compiled back end, which knows samples of so many elements, not their shape."""
    sums, grad = launcher(backend, "diffusion_loss").diffusion_loss(
        pred.flatten(1),
        x0.flatten(1),
        None if noise is None else noise.flatten(1),
        c_x.contiguous(),
        c_eps.contiguous(),
        w.contiguous(),
        seed,
        stream,
        sample_ids,
        moments_scale,
        grad_scale,
        want_sums,
        want_grad,
    )
    return sums, None if grad is None else grad.view_as(pred)


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
    sums, grad = _launch(
        pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, None, True, write_grad, backend
    )
    batch = pred.shape[0]
    loss = torch.dot(w, sums[:, 0] / (pred.numel() // batch)) / batch  # means first: sums times weights may overflow
    return loss, sums, pred.new_empty(0) if grad is None else grad


_diffusion_loss = torch.library.custom_op("erdfast::diffusion_loss", _compute, mutates_args=())


@_diffusion_loss.register_fake
def _(pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, write_grad, backend):
    loss, sums = w.new_empty(()), w.new_empty((pred.shape[0], 3))
    return loss, sums, torch.empty_like(pred) if write_grad else pred.new_empty(0)


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
    scale = grad_loss.float()
    _, grad = _launch(
        pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, scale, False, True, backend
    )
    return grad


@_diffusion_loss_grad.register_fake
def _(pred, x0, c_x, c_eps, w, noise, seed, stream, sample_ids, moments_scale, grad_loss, backend):
    return torch.empty_like(pred)


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


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 12
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise NotImplementedError(
            "diffusion_loss is differentiable once; use backend='reference' for second derivatives"
        )
    needs, saved = ctx.needs_input_grad, ctx.saved_tensors  # unpacked once: activation checkpointing allows no more
    w, sums = saved[:2]
    grad_pred = _pred_gradient(ctx, saved, grad_loss) if needs[0] else None
    if not any(needs[2:5]):  # a fixed target: the usual case
        return (grad_pred, *[None] * 11)
    scale = 2.0 * grad_loss / ctx.numel
    return (
        grad_pred,
        None,
        -scale * w * sums[:, 1] if needs[2] else None,
        -scale * w * sums[:, 2] if needs[3] else None,
        0.5 * scale * sums[:, 0] if needs[4] else None,
        *[None] * 7,
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


_diffusion_loss.register_autograd(_backward, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The same op past the dispatcher; see `in_plain_eager`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = _compute(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)
