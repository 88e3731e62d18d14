"""The numbers per sample that everything else runs on, and what follows from them: conversions and `kappa`.

A noisy sample is x_t = alpha*x0 + sigma*eps and the network regresses on y = c_x*x0 + c_eps*eps. Any other
linear combination z = b_x*x0 + b_eps*eps follows from a prediction of y and from x_t (k-Diff, appendix A):

    z = ((b_x*sigma - b_eps*alpha) * y + (b_eps*c_x - b_x*c_eps) * x_t) / D,    D = c_x*sigma - c_eps*alpha
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

TINY = 1e-12
"""Floor of |D| and of sigma in divisions; no time of a Process reaches it, coefficients made by hand can."""

Pair = tuple[Tensor, Tensor]
"""(factor of x0, factor of eps) of a linear combination, each (B,)."""


class Coefficients(NamedTuple):
    """What one training step needs to know about its times; each (B,), float32 unless asked otherwise."""

    alpha: Tensor
    """Signal amplitude in x_t."""
    sigma: Tensor
    """Noise amplitude in x_t, noise scale included."""
    c_x: Tensor
    """Factor of x0 in the network's target."""
    c_eps: Tensor
    """Factor of the unit normal noise in the network's target."""
    w: Tensor
    """Weight of the sample's mean squared error, at least 0."""
    time: Tensor
    """What the network receives as time."""
    logsnr: Tensor
    """log(alpha^2/sigma^2); finite, held at +-20 at the ends of a continuous schedule."""


class Point(NamedTuple):
    """A place on a schedule, as the rules for targets see it; tensors are (B,) float64."""

    alpha: Tensor
    sigma: Tensor
    """Noise scale included."""
    unit_time: Tensor
    """Time in [0, 1], 1 is noise."""
    velocity: Callable[[], Pair]
    """Gives (d alpha/dt, d sigma/dt) in unit time; a function, because only `u` needs them."""
    noise_scale: float


def x0_space(point: Point) -> Pair:
    """The clean data."""
    return torch.ones_like(point.alpha), torch.zeros_like(point.alpha)


def eps_space(point: Point) -> Pair:
    """The noise as it was added: noise_scale*eps."""
    return torch.zeros_like(point.alpha), torch.full_like(point.alpha, point.noise_scale)


def v_space(point: Point) -> Pair:
    """v = alpha*noise - sigma*x0 (Salimans & Ho), in terms of the scaled noise."""
    return -point.sigma / point.noise_scale, point.alpha * point.noise_scale


def u_space(point: Point) -> Pair:
    """The flow's vector field d x_t/dt; noise_scale*eps - x0 on the straight path."""
    return point.velocity()


def score_space(point: Point) -> Pair:
    """The score of x_t given x0: -eps/sigma."""
    return torch.zeros_like(point.alpha), -1.0 / point.sigma.clamp(min=TINY)


SPACES: dict[str, Callable[[Point], Pair]] = {
    "x0": x0_space,
    "eps": eps_space,
    "v": v_space,
    "u": u_space,
    "score": score_space,
}
"""The fixed linear combinations of data and noise, by name."""


def unit_noise(point: Point) -> Pair:
    """The standard normal noise, whatever its scale: what a conversion to `eps` returns."""
    return torch.zeros_like(point.alpha), torch.ones_like(point.alpha)


CONVERSIONS = {**SPACES, "eps": unit_noise}


Row = TypeVar("Row")


def choose(table: Mapping[str, Row], name: str, what: str) -> Row:
    """`table[name]`, or a ValueError that lists the names."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; choose from {', '.join(table)}")
    return table[name]


def determinant(alpha: Tensor, sigma: Tensor, c: Pair, clip: float = 0.0) -> Tensor:
    """D = c_x*sigma - c_eps*alpha with |D| held at `clip` or above, its sign kept; (B,).

    Below the floor the gradient is 0, as a clamp's is (k-Diff, alg. 1 with the clamp of section 4).
    """
    d = c[0] * sigma - c[1] * alpha
    return torch.copysign(d.abs().clamp(min=max(clip, TINY)), d)


def kappa(alpha: Tensor, sigma: Tensor, c: Pair, b: Pair, clip: float = 0.0) -> Tensor:
    """Factor between an error in the target `c` and the same error in `b`: error_b = kappa * error_c (k-Diff,
    app. A).

    Args:
        alpha, sigma: (B,), the amplitudes in x_t.
        c, b: (factor of x0, factor of eps) of the two targets, each (B,).
        clip: floor of |D|, at least 0.

    Returns:
        (B,) (b_x*sigma - b_eps*alpha)/D.
    """
    return (b[0] * sigma - b[1] * alpha) / determinant(alpha, sigma, c, clip)


def mixing(point: Point, c: Pair, b: Pair, clip: float = 0.0) -> Pair:
    """(factor of the prediction, factor of x_t) of the conversion from target `c` to `b`, each (B,)."""
    d = determinant(point.alpha, point.sigma, c, clip)
    return (b[0] * point.sigma - b[1] * point.alpha) / d, (b[1] * c[0] - b[0] * c[1]) / d


def combine(factors: Pair, pred: Tensor, x_t: Tensor) -> Tensor:
    """factors[0]*pred + factors[1]*x_t with one factor per sample: (B, ...), float32 or wider."""
    if pred.shape != x_t.shape:
        raise ValueError(f"prediction {tuple(pred.shape)} and x_t {tuple(x_t.shape)} differ in shape")
    dtype = torch.promote_types(torch.promote_types(pred.dtype, x_t.dtype), torch.float32)
    p, q = (per_sample(factor, pred).to(dtype) for factor in factors)
    return p * pred.to(dtype) + q * x_t.to(dtype)


def per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """(B,) or 0-d => (B, 1, ..., 1) with as many dimensions as `like`: B never aligns with a width."""
    if factor.ndim > 1 or (factor.ndim == 1 and factor.shape[0] not in (1, like.shape[0])):
        raise ValueError(f"coefficients of shape {tuple(factor.shape)} do not fit {like.shape[0]} samples")
    return factor.reshape(-1, *[1] * (like.ndim - 1))


def convert(
    pred: Tensor,
    x_t: Tensor,
    coefficients: Coefficients | Sequence[Tensor],
    to: str,
    *,
    d_alpha: Tensor | None = None,
    d_sigma: Tensor | None = None,
    noise_scale: float = 1.0,
    clip: float = 0.0,
) -> Tensor:
    """A prediction of c_x*x0 + c_eps*eps as x0, unit noise, v, vector field or score (k-Diff, appendix A).

    Where D = 0 the prediction does not determine the answer; |D| is then floored at 1e-12 and the result
    means nothing (`Process.convert` keeps away from such times). Nothing is read back to the host.

    Args:
        pred, x_t: (B, ...), any floating dtype.
        coefficients: `Coefficients`, or (alpha, sigma, c_x, c_eps): each (B,), (1,) or 0-d.
        to: one of CONVERSIONS: x0, eps, v, u, score.
        d_alpha, d_sigma: derivatives in unit time, needed for `u` alone.
        noise_scale: that of the process; only `v` depends on it.
        clip: floor of |D|.

    Returns:
        (B, ...) in the widest of the dtypes of pred and x_t, at least float32.

    Raises:
        ValueError: unknown `to`, missing derivatives, or shapes that do not fit.
    """
    rule = choose(CONVERSIONS, to, "conversion")
    alpha, sigma, c_x, c_eps = (value.to(torch.float64) for value in tuple(coefficients)[:4])

    def velocity() -> Pair:
        if d_alpha is None or d_sigma is None:
            raise ValueError("a conversion to 'u' needs d_alpha and d_sigma (or use Process.to_u)")
        return d_alpha.to(torch.float64), d_sigma.to(torch.float64)

    point = Point(alpha, sigma, alpha, velocity, noise_scale)
    return combine(mixing(point, (c_x, c_eps), rule(point), clip), pred, x_t)
