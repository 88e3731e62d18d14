"""Calls into the compiled CPU kernels: addresses and sizes of tensors that `make_source` has checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import source
from .backend import load_extension
from .source import Layout

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _extension() -> Any:
    extension = load_extension()
    if isinstance(extension, str):
        raise RuntimeError(extension)
    return extension


POOLED_BYTES = 1 << 20
"""Results from this size on come from a pool that keeps its memory; see csrc/pool.h."""


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None, shape: torch.Size | None = None) -> Tensor:
    """As `source.empty_like`, with the memory of a large result from the pool."""
    dtype, shape = dtype or tensor.dtype, tensor.shape if shape is None else shape
    numel = shape.numel()
    if numel * dtype.itemsize < POOLED_BYTES:
        return source.empty_like(tensor, dtype, shape)
    buffer = _extension().Buffer(numel * dtype.itemsize)  # the tensor holds it; freed, it goes back to the pool
    flat = torch.frombuffer(buffer, dtype=dtype, count=numel)
    layout = source.sample_layout(tensor)
    if layout is None or not layout.pixel:
        return flat.view(shape)
    return flat.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _source(
    x0: Tensor,
    x0_layout: Layout,
    noise: Tensor | None,
    noise_layout: Layout,
    seed: int | Tensor | None,
    stream: int | Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
) -> Any:
    batch, moments = x0.shape[0], moments_scale is not None
    return _extension().Source(
        *(x0.data_ptr(), _DTYPE_CODES[x0.dtype], *x0_layout),
        *(0 if noise is None else noise.data_ptr(), 0 if noise is None else _DTYPE_CODES[noise.dtype], *noise_layout),
        *(x0.shape[2:].numel(), moments, 1.0 if moments_scale is None else moments_scale),
        *(0 if seed is None else int(seed) & (2**64 - 1), 0 if stream is None else int(stream) & (2**32 - 1)),
        0 if sample_ids is None else sample_ids.data_ptr(),
        *(batch, x0.numel() // (2 * batch if moments else batch), torch.get_num_threads()),
    )


def add_noise(
    out: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    seed: int | Tensor | None,
    stream: int | Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    layouts: Sequence[Layout],
) -> None:
    """out = alpha*x0 + sigma*eps; `layouts` are those of x0, noise and out."""
    _extension().add_noise(
        _source(x0, layouts[0], noise, layouts[1], seed, stream, sample_ids, moments_scale),
        *(out.data_ptr(), _DTYPE_CODES[out.dtype], *layouts[2]),
        alpha.data_ptr(),
        sigma.data_ptr(),
    )


def diffusion_loss(
    pred: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    c_x: Tensor,
    c_eps: Tensor,
    w: Tensor,
    seed: int | Tensor | None,
    stream: int | Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    grad_scale: Tensor | None,
    grad: Tensor | None,
    want_sums: bool,
    layouts: Sequence[Layout],
) -> tuple[Tensor | None, Tensor | None]:
    """(loss 0-d, sums (B, 3)) in float32 or (None, None), and the gradient into `grad`; see csrc/diffusion_loss.cpp.

    `layouts` are those of x0, noise, pred and grad."""
    loss, sums = None, None
    if want_sums:
        # The device is said: a default device of the user's may be another.
        loss = torch.empty((), dtype=torch.float32, device="cpu")
        sums = torch.empty((pred.shape[0], 3), dtype=torch.float32, device="cpu")
    _extension().diffusion_loss(
        _source(x0, layouts[0], noise, layouts[1], seed, stream, sample_ids, moments_scale),
        *(pred.data_ptr(), _DTYPE_CODES[pred.dtype], *layouts[2]),
        *(c_x.data_ptr(), c_eps.data_ptr(), w.data_ptr()),
        *((0, 0) if sums is None or loss is None else (sums.data_ptr(), loss.data_ptr())),
        *(0 if grad is None else grad.data_ptr(), *layouts[3]),
        1.0 if grad_scale is None else float(grad_scale),
    )
    return loss, sums


def adamw_ema(
    table: Tensor,
    owner: None,
    grads: Tensor,
    settings: Tensor,
    grad_dtype: torch.dtype,
    emas: int,
    copy_dtype: torch.dtype | None,
    groups: int,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Tensor | None,
    max_norm: float,
) -> None:
    """One step over all tensors of a table (erdfast/ops/tensor_table.py), in place; see csrc/adamw_ema.cpp."""
    _extension().adamw_ema(
        *(table.data_ptr(), table.shape[1], emas),
        *(copy_dtype is not None, _DTYPE_CODES[copy_dtype or torch.bfloat16]),
        *(grads.data_ptr(), _DTYPE_CODES[grad_dtype], settings.data_ptr(), groups),
        *(0 if scalar is None else scalar.data_ptr() for scalar in (grad_scale, found_inf, norm)),
        max_norm,
        torch.get_num_threads(),
    )


def grad_norm(table: Tensor, owner: None, grads: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """The norm of all gradients together, 0-d float32; the first row of the table holds their sizes."""
    norm = torch.empty((), dtype=torch.float32, device="cpu")
    _extension().grad_norm(
        *(norm.data_ptr(), table.data_ptr(), grads.data_ptr(), table.shape[1]),
        _DTYPE_CODES[grad_dtype],
        torch.get_num_threads(),
    )
    return norm
