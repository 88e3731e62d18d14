"""Power-function averages and their reconstruction after the fact (Karras et al. 2024, EDM2, sec. 3 and appendix C).

The average of weights up to time t with exponent gamma weighs those of time tau in proportion to tau^gamma:

    p_gamma(tau; t) = (gamma + 1) tau^gamma / t^(gamma+1)      std / t = sqrt((gamma+1) / ((gamma+2)^2 (gamma+3)))

A profile that was not kept is approximated by a combination of kept ones whose weights minimise the L2 distance:
x = A^-1 b with A_ij = <p_i, p_j> and b_i = <p_i, p_wanted>,

    <p_a(.; t_a), p_b(.; t_b)> = (a+1)(b+1) min(t_a,t_b)^(a+b+1) / ((a+b+1) t_a^(a+1) t_b^(b+1))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEAST_STD, LARGEST_STD = 0.01, 0.25
"""Relative widths that averages may have; gamma is 0 at 0.289."""


def gamma_of_std(std: float) -> float:
    """The exponent whose profile has this relative standard deviation: the real root of a cubic.

    Raises:
        ValueError: no such profile.
    """
    if not LEAST_STD <= std <= LARGEST_STD:
        raise ValueError(f"a relative width of {std} is out of range: choose one in [{LEAST_STD}, {LARGEST_STD}]")
    # std^-2 (gamma + 1) = (gamma + 2)^2 (gamma + 3)
    roots = np.roots([1.0, 7.0, 16.0 - std**-2, 12.0 - std**-2])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9))


def std_of_gamma(gamma: float) -> float:
    """The inverse."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def inner_products(
    times: np.ndarray, gammas: np.ndarray, other_times: np.ndarray, other_gammas: np.ndarray
) -> np.ndarray:
    """<p_i, q_j> of profiles (N,) and (M,): (N, M) float64."""
    t, a = (np.asarray(values, dtype=np.float64)[:, None] for values in (times, gammas))
    u, b = (np.asarray(values, dtype=np.float64)[None, :] for values in (other_times, other_gammas))
    # By the ratio of the times: powers of the times themselves overflow.
    ratio = np.where(t < u, (t / u) ** b, (u / t) ** a)
    return (a + 1) * (b + 1) / ((a + b + 1) * np.maximum(t, u)) * ratio


def coefficients(times: Sequence[float], stds: Sequence[float], time: float, std: float) -> np.ndarray:
    """Weights (N,) of kept averages (times, relative widths) in the one of `time` and `std`; they add up to about 1."""
    t, gammas = np.asarray(times, dtype=np.float64), np.array([gamma_of_std(value) for value in stds])
    wanted_t, wanted = np.array([time], dtype=np.float64), np.array([gamma_of_std(std)])
    gram = inner_products(t, gammas, t, gammas)
    return np.linalg.lstsq(gram, inner_products(t, gammas, wanted_t, wanted)[:, 0], rcond=1e-13)[0]


def mismatch(times: Sequence[float], stds: Sequence[float], weights: np.ndarray, time: float, std: float) -> float:
    """L2 distance between the profile that `weights` make of the kept ones and the wanted one, relative to its norm."""
    t, gammas = np.asarray(times, dtype=np.float64), np.array([gamma_of_std(value) for value in stds])
    wanted_t, wanted = np.array([time], dtype=np.float64), np.array([gamma_of_std(std)])
    own = inner_products(wanted_t, wanted, wanted_t, wanted)[0, 0]
    cross = inner_products(t, gammas, wanted_t, wanted)[:, 0] @ weights
    made = weights @ inner_products(t, gammas, t, gammas) @ weights
    return float(np.sqrt(max(own - 2 * cross + made, 0.0) / own))
