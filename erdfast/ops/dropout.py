"""Dropout whose mask is a function: of a key, of a place in the network and of an element, not of a generator's state.

    y = x / (1 - r) where h >= 2^16 r, else 0                          h: 16 of Philox's bits, r: the rate, 2^-16 exact

Samples drop the same numbers in any batch, in any process and when they are computed again in backward. Elements q,
q+Q, ... q+7Q of a sample of n, Q = ceil(n/8), take the halves of the four words of one counter, low ones first.

The gradient is dropout of the gradient by the same key, so that nothing else is kept for the backward pass. Computed in
float32 (float64 for float64 input). The reference takes some 150 passes over 8 bytes for 8 elements; it too is one op
to torch.compile, which took longer to trace them than the rest of a network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from erdfast import philox

from .backend import KERNEL_DTYPES, in_transform, launcher, resolve_backend
from .fused import FusedOp
from .source import NoiseKey

LEVELS = 2**16
"""Rates are multiples of 1/LEVELS."""
LANES, PLACES = 2**24, 2**8
"""Counters of a place (134 million elements of a sample), and places."""


def dropout(x: Tensor, rate: float, key: NoiseKey, place: int | Tensor = 0, *, backend: str | None = None) -> Tensor:
    """`x` with a share of its numbers set to zero and the others scaled up, so that the mean is kept.

    Args:
        x: (B, ...) of at most 8 LANES elements a sample; float32, bfloat16 or float16 (float64 for the reference). The
            kernel takes contiguous tensors, and channels-last ones whose channels are a multiple of 8.
        rate: the share, 0 <= rate < 1; rounded to 16 bits, and the scale is that of the rounded one.
        key: seed, stream (the training step) and the ids of the samples; tensors are not asked for their values.
        place: 0 <= place < PLACES, or an int64 tensor with one element (for which nothing is compiled anew): equal keys
            drop other numbers at another place.
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        Shape, dtype and layout of x. Differentiable any number of times.

    Raises:
        ValueError: the rate or the place is out of range, x or a part of the key has the wrong shape, dtype or device,
            or the back end cannot run; the message says which.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1, not {rate}")
    if isinstance(place, int) and not 0 <= place < PLACES:
        raise ValueError(f"place must be at least 0 and below {PLACES}, not {place}")
    if x.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"x is {x.dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))} or torch.float64")
    if x.dim() == 0 or x.shape[1:].numel() > 8 * LANES:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be (B, ...) of at most {8 * LANES} elements a sample")
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    if dropped == 0:
        return x
    backend = resolve_backend(backend, x.device, x.dtype, op="dropout", backends=("reference", "triton"))
    inputs = (x, *_key_tensors(x, key, place), dropped)
    if backend == "reference" and in_transform():
        return _reference(*inputs)  # whose operations torch.func and forward-mode derivatives know
    if backend != "reference" and _channels_last(x) is None:
        raise ValueError(
            f"x with shape {tuple(x.shape)} and strides {x.stride()} is neither contiguous nor channels-last with a "
            "multiple of 8 channels; call .contiguous() or use backend='reference'"
        )
    return _dropout(*inputs, backend)


def _key_tensors(x: Tensor, key: NoiseKey, place: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(seed, stream, sample ids, place), int64 on the device of x: the ids (B,) contiguous, the others 0-d."""
    batch, device = x.shape[0], x.device
    ids = torch.arange(batch, device=device) if key.sample_ids is None else key.sample_ids
    if ids.shape != (batch,) or ids.dtype != torch.int64:
        raise ValueError(
            f"sample_ids must be ({batch},) int64 as x {tuple(x.shape)} is, not {tuple(ids.shape)} {ids.dtype}"
        )
    seed = philox.scalar("seed", key.seed, 64, device)
    stream = philox.scalar("stream", key.stream, 32, device)
    tensors = (seed, stream, ids.contiguous(), philox.scalar("place", place, 8, device))
    for name, tensor in zip(("seed", "stream", "sample_ids", "place"), tensors, strict=True):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}; they must share a device")
    return tensors


def _channels_last(x: Tensor) -> bool | None:
    """Whether a tensor is channels-last as the kernel takes it; False for a contiguous one, None for any other."""
    if x.is_contiguous():
        return False
    last = x.dim() > 2 and x.movedim(1, -1).is_contiguous() and x.shape[1] % 8 == 0
    return True if last else None


def _reference(x: Tensor, seed: Tensor, stream: Tensor, ids: Tensor, place: Tensor, dropped: int) -> Tensor:
    keep = _kept(x.shape, seed, stream, ids, place, dropped)
    return torch.where(keep, x * (LEVELS / (LEVELS - dropped)), 0)


def _kept(shape: torch.Size, seed: Tensor, stream: Tensor, ids: Tensor, place: Tensor, dropped: int) -> Tensor:
    """Which numbers stay: bool of this shape."""
    numel = shape[1:].numel()
    lanes = torch.arange((numel + 7) // 8, dtype=torch.int64, device=ids.device) + place * LANES
    words = philox.philox_words(philox.domain_seed(seed, "dropout"), (lanes[None, :], ids[:, None], stream))
    halves = [half for word in words for half in (word & (LEVELS - 1), word >> 16)]
    return torch.cat([half >= dropped for half in halves], dim=1)[:, :numel].reshape(shape)


def _compute(x: Tensor, seed: Tensor, stream: Tensor, ids: Tensor, place: Tensor, dropped: int, backend: str) -> Tensor:
    if backend == "reference":
        return torch.empty_like(x).copy_(_reference(x, seed, stream, ids, place, dropped))  # in the layout of x
    last = _channels_last(x)
    assert last is not None
    return launcher(backend, "dropout").dropout(x, seed, stream, ids, place, dropped, last)


def _fake(x, seed, stream, ids, place, dropped, backend):
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, *key, ctx.dropped, ctx.backend = inputs
    ctx.save_for_backward(*key)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Networks deliver dense gradients; only reductions (an expanded scalar) do not.
    grad = grad if _channels_last(grad) is not None else grad.contiguous()
    return _dropout(grad, *ctx.saved_tensors, ctx.dropped, ctx.backend), *[None] * 6


_dropout = FusedOp("dropout", _compute, _fake, setup_context=_setup_context, backward=_backward)
