"""Philox4x32-10: every random number of a run as a function of (seed, stream, id, position), in plain PyTorch.

The generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): a keyed bijection of a
128-bit counter. Nothing here has state, so a draw depends neither on the batch size, nor on the device, nor on the
number of processes. This file is the readable definition; csrc/philox.h and kernels/philox.py compute the same words.

Counter and key, everywhere in the project:

    key     = the 64-bit seed, XORed with a constant of the domain (DOMAINS): noise, times, label drops ... differ
    counter = (q, id low, id high, stream)      q: position within the id; id: sample; stream: usually the training step
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DOMAINS: dict[str, int] = {
    "noise": 0,
    "posterior": 0x5851F42D4C957F2D,
    "time": 0x14057B7EF767814F,
    "label_drop": 0x2545F4914F6CDD1D,
    "latent": 0x369DEA0F31A53F85,
    "data": 0x27BB2EE687B0B0FD,
    "flip": 0x3C79AC492BA7B653,
    "dropout": 0x1C69B3F74AC4AE35,
}
"""Constants that separate the uses of one seed. The noise of the two central ops has 0: its key is the seed itself."""

_M0, _M1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
"""Less 2^32, so that no product leaves int64: C++ leaves undefined what then happens, and compiled code went wrong."""
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Integer = int | Tensor
"""A Python int, or an int64 tensor (0-d for a seed or a stream)."""


def signed64(value: int) -> int:
    """The int64 with the same bits as `value` modulo 2^64: PyTorch has no uint64 arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def scalar(name: str, value: Integer, bits: int, device: torch.device) -> Tensor:
    """A seed (64 bits) or stream (32 bits) as a 0-d int64 tensor with the same bits, without asking the device.

    A compiled function is not compiled anew for each int: the number is compared and moved here, not XORed.

    Raises:
        ValueError: naming `name`, for what is no integer or out of range, or a tensor that is not one int64.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise ValueError(f"{name} is {value.dtype} of shape {tuple(value.shape)}; it must be one int64")
        return value.reshape(())
    if isinstance(value, bool) or not (isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")):
        raise ValueError(f"{name} is {value!r}; it must be an int or an int64 tensor with one element")
    number = int(value)
    if number < 0 or number >= 2**bits:
        raise ValueError(f"{name} is {value}; it must be at least 0 and below 2^{bits}")
    if number >= 2**63:
        number -= 2**64
    return torch.full((), number, dtype=torch.int64, device=device)


def domain_seed(seed: Integer, domain: str) -> Integer:
    """The key for one use of `seed`; stays on the device when `seed` is a tensor."""
    constant = signed64(DOMAINS[domain])
    return seed ^ constant if isinstance(seed, Tensor) else signed64(seed ^ constant)


def philox_words(seed: Integer, counter: tuple[Tensor, Integer, Integer]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter.

    Args:
        seed: the 64-bit key, already of its domain.
        counter: (q, id, stream): q < 2^32 and id (64 bits) are int64 tensors or ints that broadcast, stream < 2^32.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2^32).
    """
    q, sample_id, stream = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    zero = torch.zeros_like(q)
    c0, c1, c2, c3 = torch.broadcast_tensors(
        (q & _MASK) + 0 * zero,
        (sample_id & _MASK) + zero,
        ((sample_id >> 32) & _MASK) + zero,
        (stream & _MASK) + zero,
    )
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # 2^32 times c0 and c2 are missing, which the upper halves get back
        c0, c1, c2, c3 = (
            (((p1 >> 32) + c2) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            (((p0 >> 32) + c0) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def unit_interval(word: Tensor) -> Tensor:
    """A 32-bit word as a float64 in (0, 1] that float32 holds exactly: fl32(fl32(word >> 1) * 2^-31 + 2^-32).

    All back ends take the logarithm of this very number, so that they differ by the rounding of the logarithm alone.
    The smallest value is 2^-32: normals reach 6.66 standard deviations.
    """
    return ((word >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32).to(torch.float64)


def box_muller(radius_word: Tensor, phase_word: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float64) from two 32-bit words; the phase is 2*pi*word/2^32."""
    radius = torch.sqrt(-2.0 * torch.log(unit_interval(radius_word)))
    phase = phase_word.to(torch.float64) * (2.0 * math.pi / 2.0**32)
    return radius * torch.cos(phase), radius * torch.sin(phase)


def normal(seed: Integer, stream: Integer, sample_ids: Tensor, numel: int, domain: str = "noise") -> Tensor:
    """Standard normals of every sample: (B, numel) float64 on the device of `sample_ids`.

    Lane q of a sample owns elements q, q+Q, q+2Q, q+3Q with Q = ceil(numel/4): neighbouring lanes touch neighbouring
    elements whatever the block size, and all four words are used.

    Args:
        seed, stream: ints or 0-d int64 tensors.
        sample_ids: (B,) int64.
        numel: elements of a sample, at least 0.
    """
    lanes = (numel + 3) // 4
    q = torch.arange(lanes, dtype=torch.int64, device=sample_ids.device)
    words = philox_words(domain_seed(seed, domain), (q[None, :], sample_ids[:, None], stream))
    e0, e1 = box_muller(words[0], words[1])
    e2, e3 = box_muller(words[2], words[3])
    return torch.cat([e0, e1, e2, e3], dim=1)[:, :numel]


def uniform(seed: Integer, stream: Integer, ids: Tensor, domain: str) -> Tensor:
    """One float64 in (0, 1) with 52 random bits for each id: (B,) on the device of `ids`."""
    zero = torch.zeros_like(ids)
    high, low, _, _ = philox_words(domain_seed(seed, domain), (zero, ids, stream))
    bits = ((high << 20) ^ (low >> 12)).to(torch.float64)  # 52 bits: the half below is exact in float64
    return (bits + 0.5) * 2.0**-52
