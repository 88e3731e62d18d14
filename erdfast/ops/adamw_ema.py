"""AdamW, averages of the weights, loss scale and clipping in one pass over all parameters; the norm of all gradients.

    g = factor * grad                                factor = min(1, max_norm / (norm + 1e-6)) / grad_scale
    m = lerp(m, g, 1 - beta1)                        v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    ema = lerp(ema, p, 1 - decay)                    copy = p, rounded

36 bytes per parameter, where torch's AdamW moves 80 (foreach) or 28 (fused) and an average of its own 12 more.
`AdamWEma` (optimizer.py) is the optimiser; `adamw_ema` and `grad_norm` are for trainers that keep their state
themselves.

A step that `found_inf` forbids leaves parameters, moments and step counters as they are, as in torch; the averages move
on towards the unchanged parameters, as they do in a trainer that averages after `scaler.step(optimizer)`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import in_plain_eager, resolve_backend
from .fused import FusedOp
from .tensor_table import (
    StepOptions,
    StepTensors,
    TensorTable,
    check_lengths,
    checked_grads,
    checked_scalar,
    companions,
    is_dense,
)

Averages = Sequence[tuple[Iterable[Tensor], float]]
"""(tensors, decay) of each average: the tensors in the order of the parameters, float32."""


def grad_norm(grads: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
    """The Euclidean norm of all tensors together, without waiting for the device.

    One pass in two stages, the same bits every time; partial sums in float64 by the C++ back end, in float32 by Triton.

    Args:
        grads: of one device and dtype: float32, bfloat16 or float16 (float64 for the reference); contiguous, or dense
            in any order.
        backend: "reference", "cpu" or "triton"; by default the fastest of the device.

    Returns:
        0-d float32 (float64 of float64); 0 on the CPU of no tensors. NaN and infinities show. Not differentiable.

    Raises:
        ValueError: dtypes, devices or layouts do not fit, or the back end cannot run.
    """
    if not grads:
        return torch.zeros((), device="cpu")
    for t, grad in enumerate(grads):
        if not isinstance(grad, Tensor) or grad.layout is not torch.strided:
            kind = grad.layout if isinstance(grad, Tensor) else type(grad).__name__
            raise ValueError(f"gradient {t} is {kind}; it must be a dense tensor (leave out what has no gradient)")
    first = grads[0]
    backend = resolve_backend(backend, first.device, first.dtype, op="adamw_ema")
    for t, grad in enumerate(grads):
        if grad.dtype != first.dtype or grad.device != first.device:
            raise ValueError(
                f"gradients must be of one dtype and device: number {t} is {grad.dtype} on {grad.device}, "
                f"the first {first.dtype} on {first.device}"
            )
        if backend != "reference" and not is_dense(grad):
            raise ValueError(f"gradient {t} has gaps or overlaps: shape {tuple(grad.shape)}, strides {grad.stride()}")
    with torch.no_grad():
        return (_grad_norm.compute if all(map(in_plain_eager, grads)) else _grad_norm.op)(list(grads), backend)


def adamw_ema(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    emas: Averages = (),
    copies: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    norm: Tensor | None = None,
    max_norm: float = math.inf,
    backend: str | None = None,
) -> None:
    """One step of AdamW and of the averages, in place.

    Args:
        params: float32 (any float dtype for the reference), dense, on one device.
        grads: of the parameters' shapes and strides; all float32, all bfloat16 or all float16. Not changed.
        exp_avgs, exp_avg_sqs: the moments, like the parameters.
        steps: 0-d float32, how many steps each parameter has had; counted up.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        emas: any number of averages, each of all parameters.
        copies: bfloat16 or float16 tensors like the parameters that receive the new ones; none or all.
        grad_scale: 0-d on the device, of any floating dtype like the next two: gradients are divided by it first.
        found_inf: 0-d on the device: unless 0, only averages and copies are written.
        norm: 0-d on the device, the norm of the gradients after that division; needed to clip.
        max_norm: gradients of a larger norm are scaled down to it.
        backend: "reference", "cpu" or "triton"; by default the fastest of the device.

    Raises:
        ValueError: numbers are out of range, lists, dtypes, devices or layouts do not fit, or the back end cannot
            run; the message says which.
    """
    emas = [(list(tensors), decay) for tensors, decay in emas]
    averages = [tensors for tensors, _ in emas]
    check_numbers(lr, betas, eps, weight_decay)
    check_decays([decay for _, decay in emas])
    check_max_norm(max_norm)
    if norm is None and max_norm < math.inf:
        raise ValueError(f"max_norm is {max_norm} and norm is None: clipping needs the gradients' norm (`grad_norm`)")
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
    check_lengths(len(params), lists | companions(averages, copies))
    if not params:
        return
    check_real(params)
    grad_scale = checked_scalar("grad_scale", grad_scale, params[0])
    found_inf = checked_scalar("found_inf", found_inf, params[0])
    norm = checked_scalar("norm", norm, params[0])
    backend = resolve_backend(backend, params[0].device, params[0].dtype, op="adamw_ema")
    op = _compute_step if in_plain_eager(params[0]) else _adamw_ema
    with torch.no_grad():
        op(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(steps),
            [tensor for tensors in averages for tensor in tensors],
            list(copies),
            [float(lr), *map(float, betas), float(eps), float(weight_decay)],
            [1.0 - float(decay) for _, decay in emas],
            grad_scale,
            found_inf,
            norm if max_norm < math.inf else None,
            float(max_norm),
            backend,
        )


def check_numbers(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Raise ValueError unless AdamW can go by these; a rate that lives on an accelerator is not read."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; it must be one number")
        fits = lr.device.type != "cpu" or float(lr) >= 0.0
    else:
        fits = _is_number(lr) and lr >= 0.0
    if not fits:
        raise ValueError(f"lr is {lr!r}; it must be at least 0")
    pair = betas if isinstance(betas, Sequence) else ()
    if len(pair) != 2 or not all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in pair):
        raise ValueError(f"betas are {betas!r}; they must be two numbers in [0, 1)")
    for name, value in (("eps", eps), ("weight_decay", weight_decay)):
        if not _is_number(value) or not value >= 0.0:
            raise ValueError(f"{name} is {value!r}; it must be at least 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def check_decays(decays: Sequence[Any]) -> None:
    """Raise ValueError unless averages can go by these."""
    for k, decay in enumerate(decays):
        if not _is_number(decay) or not 0.0 <= decay <= 1.0:
            raise ValueError(f"the decay of average {k} is {decay!r}; it must be in [0, 1]")


def check_max_norm(max_norm: float) -> None:
    """Raise ValueError unless a norm can be clipped to it."""
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be above 0")


def check_real(params: Iterable[Tensor]) -> None:
    """Raise ValueError if a parameter is complex, which AdamW would have to take for two real ones."""
    for t, param in enumerate(params):
        if param.is_complex():
            raise ValueError(f"parameter {t} is {param.dtype}; complex parameters are not supported")


# ---------------------------------------------------------------------- reference


def reference_norm(grads: Sequence[Tensor]) -> Tensor:
    compute = _norm_dtype(grads[0])
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad, dtype=compute) for grad in grads]))


def _reference(tensors: StepTensors, options: StepOptions) -> None:
    groups, ema_weights, lrs, grad_scale, found_inf, norm, max_norm = options
    forbidden = found_inf is not None and bool(found_inf)  # waits for the device, as the compiled back ends do not
    for t, (p, grad) in enumerate(zip(tensors.params, tensors.grads, strict=True)):
        m, v, step = tensors.exp_avgs[t], tensors.exp_avg_sqs[t], tensors.steps[t]
        if grad is not None and not forbidden:
            assert m is not None
            assert v is not None
            assert step is not None
            _, beta1, beta2, eps, weight_decay = groups[tensors.groups[t]]
            lr = lrs[tensors.groups[t]]
            lr = groups[tensors.groups[t]][0] if lr is None else lr
            g = grad.to(p.dtype)
            if grad_scale is not None:
                g = g / grad_scale
            if norm is not None:
                g = g * (max_norm / (norm + 1e-6)).clamp(max=1.0)
            step += 1
            correction1, correction2 = (1.0 - beta ** step.double() for beta in (beta1, beta2))
            m.lerp_(g, 1.0 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
            p.mul_(1.0 - lr * weight_decay)
            p.sub_(m / (v.sqrt() / correction2.sqrt() + eps) * (lr / correction1))
        for averages, weight in zip(tensors.emas, ema_weights, strict=True):
            averages[t].lerp_(p, weight)
        if tensors.copies:
            tensors.copies[t].copy_(p)


# ---------------------------------------------------------------------- custom ops


def _norm_dtype(grad: Tensor) -> torch.dtype:
    return torch.promote_types(grad.dtype, torch.float32)


def _compute_norm(grads: list[Tensor], backend: str) -> Tensor:
    if backend == "reference":
        return reference_norm(grads)
    return TensorTable().grad_norm(grads, [grad.numel() for grad in grads], backend)


_grad_norm = FusedOp(
    "grad_norm", _compute_norm, lambda grads, backend: grads[0].new_empty((), dtype=_norm_dtype(grads[0]))
)


def _compute_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    emas: list[Tensor],
    copies: list[Tensor],
    group: list[float],
    ema_weights: list[float],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float,
    backend: str,
) -> None:
    """`emas` holds one average after the other, `group` lr, beta1, beta2, eps and weight_decay."""
    count = len(params)
    averages = [emas[count * k : count * (k + 1)] for k in range(len(ema_weights))]
    tensors = StepTensors(
        params, checked_grads(grads, params), exp_avgs, exp_avg_sqs, steps, [0] * count, averages, copies
    )
    options = StepOptions([group], ema_weights, [None], grad_scale, found_inf, norm, max_norm)
    run_step(TensorTable(), backend, tensors, options)


_adamw_ema: Callable[..., None] = torch.library.custom_op(
    "erdfast::adamw_ema",
    _compute_step,
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "emas", "copies"),
)
_adamw_ema.register_fake(lambda *_: None)  # pyright: ignore[reportFunctionMemberAccess]  # a CustomOpDef


def run_step(table: TensorTable, backend: str, tensors: StepTensors, options: StepOptions) -> None:
    """A step by any back end."""
    if backend == "reference":
        _reference(tensors, options)
    else:
        table.step(backend, tensors, options)
