"""Weights of the squared error. A new weighting is one function of a `Level` and one row of WEIGHTINGS.

Space "eps": the function is w_eps(SNR), the weight of an error in unit noise; for any other target the
process multiplies by alpha^2/D^2, so that the same error always has the same weight, whatever the network
predicts. Space "target": the function is the weight of the error in the network's own output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Level(NamedTuple):
    """What a weighting may depend on; tensors are (B,) float64 and all finite."""

    alpha: Tensor
    sigma: Tensor
    c_x: Tensor
    c_eps: Tensor
    snr: Tensor
    logsnr: Tensor
    density_ratio: Tensor | None
    """Density of uniform log-SNR over the sampler's, for ERD's `logsnr` allocation; None otherwise."""
    target: str
    gamma: float
    p2_k: float
    sigmoid_bias: float


class Weighting(NamedTuple):
    """A row of WEIGHTINGS."""

    rule: Callable[[Level], Tensor]
    space: Literal["eps", "target"]
    gamma: float | None = None
    """Default of gamma; None where the rule has none."""
    normalized: bool = False
    """Whether the mean is 1 unless asked otherwise."""


def constant(at: Level) -> Tensor:
    """1 in the network's own output space."""
    return torch.ones_like(at.snr)


def recoverability(at: Level) -> Tensor:
    """omega = sqrt((c_x*alpha)^2 + (c_eps*sigma)^2), ERD eq. 110."""
    return torch.sqrt((at.c_x * at.alpha).square() + (at.c_eps * at.sigma).square())


def erd(at: Level) -> Tensor:
    """ERD, sec. 3.4: omega, times the density ratio where the allocation is over the log-SNR (remark E.2)."""
    omega = recoverability(at)
    return omega if at.density_ratio is None else omega * at.density_ratio


ERD_REPO_FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "u": torch.ones_like,
    "v": lambda omega: omega / math.sqrt(2.0),
}


def erd_repo(at: Level) -> Tensor:
    """The ERD authors' code: not normalised, alpha*sigma for v and 1 for u."""
    omega = recoverability(at)
    return ERD_REPO_FACTORS[at.target](omega) if at.target in ERD_REPO_FACTORS else omega


def min_snr(at: Level) -> Tensor:
    """min(SNR, gamma)/SNR (Min-SNR)."""
    return at.snr.clamp(max=at.gamma) / at.snr


def max_snr(at: Level) -> Tensor:
    """max(SNR, gamma)/SNR."""
    return at.snr.clamp(min=at.gamma) / at.snr


def p2(at: Level) -> Tensor:
    """1/(k + SNR)^gamma (P2)."""
    return (at.p2_k + at.snr).pow(-at.gamma)


def debias(at: Level) -> Tensor:
    """1/sqrt(SNR)."""
    return at.snr.rsqrt()


def min_debias(at: Level) -> Tensor:
    """min(1/sqrt(SNR), 1)."""
    return at.snr.rsqrt().clamp(max=1.0)


def max_debias(at: Level) -> Tensor:
    """max(1/sqrt(SNR), 1)."""
    return at.snr.rsqrt().clamp(min=1.0)


def snr(at: Level) -> Tensor:
    """1 for an error in the noise, SNR for one in the data."""
    return torch.ones_like(at.snr)


def trunc_snr(at: Level) -> Tensor:
    """max(SNR, 1)/SNR (progressive distillation)."""
    return at.snr.clamp(min=1.0) / at.snr


def sigmoid(at: Level) -> Tensor:
    """sigmoid(bias - log-SNR)."""
    return torch.sigmoid(at.sigmoid_bias - at.logsnr)


def edm(at: Level) -> Tensor:
    """EDM: (s^2 + 0.25)/(0.25 s^2) for the data, s = sigma/alpha; there an error is s times that in eps."""
    return 1.0 + 4.0 / at.snr


WEIGHTINGS: dict[str, Weighting] = {
    "erd": Weighting(erd, "target", normalized=True),
    "erd_repo": Weighting(erd_repo, "target"),
    "constant": Weighting(constant, "target"),
    "min_snr": Weighting(min_snr, "eps", gamma=5.0),
    "max_snr": Weighting(max_snr, "eps", gamma=1.0),
    "p2": Weighting(p2, "eps", gamma=1.0),
    "debias": Weighting(debias, "eps"),
    "min_debias": Weighting(min_debias, "eps"),
    "max_debias": Weighting(max_debias, "eps"),
    "snr": Weighting(snr, "eps"),
    "trunc_snr": Weighting(trunc_snr, "eps"),
    "sigmoid": Weighting(sigmoid, "eps"),
    "edm": Weighting(edm, "eps"),
}
"""Every weighting by name."""
