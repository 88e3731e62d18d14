"""How many directions a spectrum really has: the exponential of its Shannon entropy (Roy & Vetterli, 2007).

    erank = exp(-sum_i p_i log p_i),   p_i = v_i / sum_j v_j

Between 1 (one direction has all) and K (all K have the same); it counts smoothly, where a rank needs a threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Eigenvalues this little below 0, as a share of the largest, count as 0: what a kernel summed in float32 can have."""


def effective_rank(values: Tensor) -> Tensor:
    """The effective rank of eigenvalues or singular values.

    Args:
        values: (..., K), any floating dtype, at least 0 up to rounding; need not be sorted or normalised.

    Returns:
        (...) float64, in [1, K]; 0 where all values are 0.

    Raises:
        ValueError: a value that is not finite, or clearly negative.
    """
    v = values.double()
    if v.ndim < 1 or v.shape[-1] < 1:
        raise ValueError(f"an effective rank needs one value or more, got the shape {tuple(values.shape)}")
    if not bool(torch.isfinite(v).all()):
        raise ValueError("an effective rank needs finite values")
    largest = v.abs().amax(-1, keepdim=True)
    if bool((v < -ROUNDING * largest).any()):
        raise ValueError(f"an effective rank needs values of at least 0; the least is {float(v.min()):.3g}")
    share = v.clamp(min=0.0) / largest.clamp(min=torch.finfo(torch.float64).tiny)  # the sum cannot overflow
    total = share.sum(-1, keepdim=True)
    share = share / total.clamp(min=torch.finfo(torch.float64).tiny)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(total.squeeze(-1) > 0, rank, 0.0)


def effective_rank_of_features(features: Tensor, *, centered: bool = True) -> Tensor:
    """The effective rank of samples in a feature space: that of the matrix's singular values, as in Roy & Vetterli.

    Args:
        features: (N, D), any floating dtype; one row per sample (or token).
        centered: subtract the mean row first: what samples have in common is then no direction. Without it a large
            common part looks like a collapse.

    Returns:
        0-d float64, at most min(N, D) (min(N - 1, D) if centred); 0 for rows that are all the same and centred.

    Raises:
        ValueError: not a matrix with a row and a column, or a value that is not finite.
    """
    if features.ndim != 2 or min(features.shape) < 1:
        raise ValueError(f"features must be (N, D), got the shape {tuple(features.shape)}")
    f = features.double()
    if not bool(torch.isfinite(f).all()):
        raise ValueError("an effective rank needs finite features")
    if centered:
        rounding = f.shape[0] * torch.finfo(torch.float64).eps * f.abs().max()
        f = f - f.mean(0)
        f = torch.where(f.abs() > rounding, f, 0.0)  # the mean of equal rows is equal to them up to rounding alone
    return effective_rank(torch.linalg.svdvals(f))
