"""Dropout whose mask is a function: of a key, of a place in the network and of an element, not of a generator's state.

    y = x / (1 - r) where h >= 2^16 r, else 0                          h: 16 of Philox's bits, r: the rate, 2^-16 exact

Samples drop the same numbers in any batch, in any process and when they are computed again in backward. Elements q,
q+Q, ... q+7Q of a sample of n, Q = ceil(n/8), take the halves of the four words of one counter, low ones first.

It is PyTorch's own operations: torch.compile makes one kernel of them. Eagerly they cost some 150 passes over 8 bytes
for 8 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from erdfast import philox

from .source import NoiseKey

LEVELS = 2**16
"""Rates are multiples of 1/LEVELS."""
LANES, PLACES = 2**24, 2**8
"""Counters of a place (134 million elements of a sample), and places."""


def dropout(x: Tensor, rate: float, key: NoiseKey, place: int | Tensor = 0) -> Tensor:
    """`x` with a share of its numbers set to zero and the others scaled up, so that the mean is kept.

    Args:
        x: (B, ...), floating point.
        rate: the share, 0 <= rate < 1; rounded to 16 bits, and the scale is that of the rounded one.
        key: seed, stream (the training step) and the ids of the samples.
        place: 0 <= place < PLACES, or an int64 tensor with one element (for which nothing is compiled anew): equal keys
            drop other numbers at another place.

    Returns:
        Shape and dtype of x. Differentiable any number of times.

    Raises:
        ValueError: the rate or the place is out of range, or sample ids do not fit x.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be at least 0 and below 1, not {rate}")
    if isinstance(place, int) and not 0 <= place < PLACES:
        raise ValueError(f"place must be at least 0 and below {PLACES}, not {place}")
    dropped = min(round(rate * LEVELS), LEVELS - 1)
    if dropped == 0:
        return x
    keep = _kept(key, x.shape, x.device, dropped, place)
    return torch.where(keep, x * (LEVELS / (LEVELS - dropped)), 0)


def _kept(key: NoiseKey, shape: torch.Size, device: torch.device, dropped: int, place: int | Tensor) -> Tensor:
    """Which numbers stay: bool of this shape."""
    batch, numel = shape[0], shape[1:].numel()
    ids = torch.arange(batch, device=device) if key.sample_ids is None else key.sample_ids
    if ids.shape != (batch,) or ids.dtype != torch.int64:
        raise ValueError(
            f"sample_ids must be ({batch},) int64 as x {tuple(shape)} is, not {tuple(ids.shape)} {ids.dtype}"
        )
    seed = philox.domain_seed(philox.scalar("seed", key.seed, 64, device), "dropout")
    stream = philox.scalar("stream", key.stream, 32, device)
    lanes = torch.arange((numel + 7) // 8, dtype=torch.int64, device=device) + place * LANES
    words = philox.philox_words(seed, (lanes[None, :], ids[:, None], stream))
    halves = [half for word in words for half in (word & (LEVELS - 1), word >> 16)]
    return torch.cat([half >= dropped for half in halves], dim=1)[:, :numel].reshape(shape)
