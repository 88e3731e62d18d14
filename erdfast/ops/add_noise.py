"""x_t = alpha*x0 + sigma*eps in one pass, with eps computed from a key: one read and one write an element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cpu
from .backend import KERNEL_DTYPES, in_plain_eager, launcher
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


def add_noise(
    x0: Tensor | Moments,
    coef: CoefficientsLike,
    key: NoiseKey | None = None,
    *,
    noise: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Noised data x_t = alpha*x0 + sigma*eps (ERD, sec. 2.1).

    Args:
        x0: (B, ...) float32, bfloat16 or float16 (float64 for the reference); or Moments to draw it from. Samples are
            contiguous or channels-last, any distance apart.
        coef: anything with `alpha` and `sigma`, (B,) float32, such as `Process.coefficients(t)`.
        key: where the noise comes from; `diffusion_loss` with the same key sees the same noise.
        noise: an explicit eps of x0's shape in place of a key.
        dtype: of the result; x0's by default.
        backend: "reference", "cpu" or "triton"; by default the fastest of the device.

    Returns:
        x_t with the shape of x0. Differentiable in x0 (and, by the reference, in alpha, sigma and noise).

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit, or the back end cannot run; the message says which.
    """
    source = make_source(x0, key, noise, backend)
    alpha, sigma = read_coefficients(source, coef, "alpha", "sigma")
    out_dtype = source.x0.dtype if dtype is None else dtype
    if not isinstance(out_dtype, torch.dtype):
        raise ValueError(f"dtype is {out_dtype!r}; choose from {', '.join(map(str, KERNEL_DTYPES))}")
    if not out_dtype.is_floating_point or (source.backend != "reference" and out_dtype not in KERNEL_DTYPES):
        raise ValueError(f"dtype is {out_dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))}")
    if source.backend == "reference":
        return _reference(source, alpha, sigma, out_dtype)
    refuse_gradients(alpha=alpha, sigma=sigma, noise=noise)
    if source.moments_scale is not None:
        refuse_gradients(moments=source.x0)
    options = (source.moments_scale, out_dtype, source.backend)
    if not in_plain_eager(source.x0) or source.x0.requires_grad:
        return _add_noise(source.x0, alpha, sigma, source.noise, *source.key_tensors(), *options)
    drawn: tuple[Any, Any, Any] = (source.seed, source.stream, source.sample_ids)
    if source.backend != "cpu":
        drawn = source.key_tensors()
    return _compute(source.x0, alpha, sigma, source.noise, *drawn, *options)


def _reference(source: Source, alpha: Tensor, sigma: Tensor, out_dtype: torch.dtype) -> Tensor:
    compute = compute_dtype(source.x0, source.noise, alpha, sigma)
    x0, eps = reference_x0_eps(source, compute)
    return (column(alpha, x0) * x0 + column(sigma, x0) * eps).to(out_dtype)


def _out_shape(x0: Tensor, moments_scale: float | None) -> torch.Size:
    if moments_scale is None:
        return x0.shape
    return torch.Size((x0.shape[0], x0.shape[1] // 2, *x0.shape[2:]))


def _compute(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    out = (cpu.empty_like if backend == "cpu" else empty_like)(x0, dtype, _out_shape(x0, moments_scale))
    layouts = sample_layouts(x0, noise, out, drawn=noise is None or moments_scale is not None)
    launcher(backend, "add_noise").add_noise(
        out,
        x0,
        noise,
        alpha.contiguous(),
        sigma.contiguous(),
        seed,
        stream,
        sample_ids,
        moments_scale,
        layouts,
    )
    return out


_add_noise = torch.library.custom_op("erdfast::add_noise", _compute, mutates_args=())


@_add_noise.register_fake
def _(x0, alpha, sigma, noise, seed, stream, sample_ids, moments_scale, dtype, backend):
    return empty_like(x0, dtype, _out_shape(x0, moments_scale))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.x0_dtype = inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (alpha,) = ctx.saved_tensors
    grad_x0 = (column(alpha, grad) * grad).to(ctx.x0_dtype) if ctx.needs_input_grad[0] else None
    return (grad_x0, *[None] * 9)


_add_noise.register_autograd(_backward, setup_context=_setup_context)
