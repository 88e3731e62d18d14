"""Calls into the compiled CPU kernels: addresses and sizes of tensors that `make_source` has checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backend import cpu_isa, load_extension

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _extension() -> Any:
    extension = load_extension()
    if isinstance(extension, str):
        raise RuntimeError(extension)
    return extension


POOLED_BYTES = 1 << 20
"""Results from this size on come from a pool that keeps its memory; see csrc/pool.h."""


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None, shape: torch.Size | None = None) -> Tensor:
    """An uninitialised contiguous tensor for a result of this back end."""
    dtype, shape = dtype or tensor.dtype, tensor.shape if shape is None else shape
    numel = shape.numel()
    if numel * dtype.itemsize < POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    buffer = _extension().Buffer(numel * dtype.itemsize)  # the tensor holds it; freed, it goes back to the pool
    return torch.frombuffer(buffer, dtype=dtype, count=numel).view(shape)


def _source(
    x0: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
) -> Any:
    batch, moments = x0.shape[0], moments_scale is not None
    numel = x0.numel() // batch // (2 if moments else 1)
    return _extension().Source(
        x0=x0.data_ptr(),
        x0_dtype=_DTYPE_CODES[x0.dtype],
        noise=0 if noise is None else noise.data_ptr(),
        noise_dtype=0 if noise is None else _DTYPE_CODES[noise.dtype],
        moments=moments,
        moments_scale=1.0 if moments_scale is None else moments_scale,
        seed=0 if seed is None else int(seed) & (2**64 - 1),
        stream=0 if stream is None else int(stream) & (2**32 - 1),
        sample_ids=0 if sample_ids is None else sample_ids.data_ptr(),
        batch=batch,
        numel=numel,
        threads=torch.get_num_threads(),
    )


def add_noise(
    out: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
) -> None:
    """out = alpha*x0 + sigma*eps."""
    _extension().add_noise(
        _source(x0, noise, seed, stream, sample_ids, moments_scale),
        out=out.data_ptr(),
        out_dtype=_DTYPE_CODES[out.dtype],
        alpha=alpha.data_ptr(),
        sigma=sigma.data_ptr(),
        isa=cpu_isa(),
    )


def diffusion_loss(
    pred: Tensor,
    x0: Tensor,
    noise: Tensor | None,
    c_x: Tensor,
    c_eps: Tensor,
    w: Tensor,
    seed: Tensor | None,
    stream: Tensor | None,
    sample_ids: Tensor | None,
    moments_scale: float | None,
    grad_scale: Tensor | None,
    want_sums: bool,
    want_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(sums (B, 3) float32 or None, gradient like pred or None); see csrc/diffusion_loss.cpp."""
    sums = torch.empty(pred.shape[0], 3, dtype=torch.float32) if want_sums else None
    grad = empty_like(pred) if want_grad else None
    _extension().diffusion_loss(
        _source(x0, noise, seed, stream, sample_ids, moments_scale),
        pred=pred.data_ptr(),
        pred_dtype=_DTYPE_CODES[pred.dtype],
        c_x=c_x.data_ptr(),
        c_eps=c_eps.data_ptr(),
        w=w.data_ptr(),
        sums=0 if sums is None else sums.data_ptr(),
        grad=0 if grad is None else grad.data_ptr(),
        grad_scale=1.0 if grad_scale is None else float(grad_scale),
        isa=cpu_isa(),
    )
    return sums, grad
