"""Samplers as pure functions of one signature: `sampler(network, latents, levels, *, noise, state_dtype, callback)`.

`network(x, time)` is asked about a state (B, C, H, W) at a time given as a host number. What it answers with, and what
the state is, ASKS says by sampler; erdfast.sampling.Guided offers all of them. Every number that a step
needs comes from `levels` before the loop, as a host number that goes into a kernel as an argument: no step copies
anything to the device or waits for it. The state stays in float32 or float64 throughout: in bf16 the sum of many small
steps loses most of them.

Symbols: step i goes from level (a, s) = (alpha, sigma) to the next (a', s'); D is the clean data that the network
expects at x_t, eps = (x_t - a D)/s the noise that goes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from erdfast.sampling.levels import Levels

Network = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]
"""Number of a step => standard normal noise, shaped like the state, for that step and no other."""
Callback = Callable[[int, Tensor], None]
Slope = Callable[[Tensor, int], Tensor]

STATE_DTYPES = (torch.float32, torch.float64)


class Sampler(Protocol):
    """What all samplers look like."""

    def __call__(
        self,
        network: Network,
        latents: Tensor,
        levels: Levels,
        *,
        noise: Noise | None = None,
        state_dtype: torch.dtype = torch.float32,
        callback: Callback | None = None,
    ) -> Tensor: ...


# ---------------------------------------------------------------------------- slopes in the variable of the levels


def _integrate(
    slope: Slope,
    latents: Tensor,
    levels: Levels,
    corrected: bool,
    state_dtype: torch.dtype,
    callback: Callback | None,
) -> Tensor:
    """dx/dposition = slope, by Euler's rule or, if `corrected`, Heun's trapezoid on all steps but the last.

    The last step stays an Euler step because the slope is not defined at the clean end: 2N - 1 calls instead
    of N.
    """
    x = _start(latents, levels, state_dtype)
    steps = len(levels.times)
    for i in range(steps):
        step = levels.positions[i + 1] - levels.positions[i]
        first = slope(x, i)
        predicted = x + step * first
        if corrected and i + 1 < steps:
            x = x + step * (0.5 * first + 0.5 * slope(predicted, i + 1))
        else:
            x = predicted
        if callback is not None:
            callback(i, x)
    return x


def _start(latents: Tensor, levels: Levels, state_dtype: torch.dtype) -> Tensor:
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype {state_dtype} is not one of {STATE_DTYPES}")
    return latents.to(state_dtype) * levels.scale


def _denoising_slope(network: Network, levels: Levels, state_dtype: torch.dtype) -> Slope:
    """Slope (x - D) / s of the flow in x = x_t / alpha (Karras et al. 2022, eq. 3 with sigma(t) = t)."""

    def slope(x: Tensor, i: int) -> Tensor:
        return (x - network(x, levels.times[i]).to(state_dtype)) / levels.positions[i]

    return slope


def _velocity_slope(network: Network, levels: Levels, state_dtype: torch.dtype) -> Slope:
    def slope(x: Tensor, i: int) -> Tensor:
        return network(x, levels.times[i]).to(state_dtype)

    return slope


def edm_heun(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's deterministic second-order sampler (Karras et al. 2022, alg. 1); 2N - 1 network calls.

    Args:
        network: (x, time) -> clean data D, both (B, C, H, W); x = x_t/alpha has noise of amplitude
            sigma/alpha.
        latents: standard normal (B, C, H, W), any float dtype; scaled here by `levels.scale`.
        levels: from `make_levels` over `ratio`, or from `table_levels`.
        noise: for the stochastic samplers; here it is not used.
        state_dtype: float32 or float64.
        callback: called after step i with (i, state).

    Returns:
        (B, C, H, W) in `state_dtype`.

    Raises:
        ValueError: another state dtype.
    """
    return _integrate(_denoising_slope(network, levels, state_dtype), latents, levels, True, state_dtype, callback)


def edm_euler(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """First-order counterpart of `edm_heun` (DDIM's update in EDM's variables); N network calls."""
    return _integrate(_denoising_slope(network, levels, state_dtype), latents, levels, False, state_dtype, callback)


def heun(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's rule in the time of a continuous process, or the angle of a discrete one; 2N - 1 network calls.

    As `edm_heun`, except that `levels` are over `time`, `network(x_t, time)` returns the velocity, the derivative
    of x_t in the levels' positions, and the state is x_t itself.
    """
    return _integrate(_velocity_slope(network, levels, state_dtype), latents, levels, True, state_dtype, callback)


def euler(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's rule where `heun` has Heun's; N network calls."""
    return _integrate(_velocity_slope(network, levels, state_dtype), latents, levels, False, state_dtype, callback)


# ---------------------------------------------------------------------------- clean data, from amplitude to amplitude


def _amplitudes(levels: Levels) -> tuple[tuple[float, float], ...]:
    if len(levels.amplitudes) != len(levels.times) + 1:
        raise ValueError(
            f"{len(levels.times)} levels have {len(levels.amplitudes)} amplitudes: this sampler needs one more than "
            "levels, as make_levels gives"
        )
    return levels.amplitudes


class Exponential(NamedTuple):
    """One step that is exact for constant D: x' = state * x + clean * (D + slope * (D - D of the step before))."""

    state: float
    clean: float
    slope: float


def exponential_steps(amplitudes: Sequence[tuple[float, float]], *, multistep: bool) -> list[Exponential]:
    """The steps of DDIM and of DPM-Solver++(2M): N rows from N + 1 pairs (alpha, sigma).

    x' = (s'/s) x + (a' - a s'/s) D is DDIM, and the first order of DPM-Solver++ (Lu et al. 2022); their second order
    (alg. 2) extrapolates D by h'/(2h) of its last change, h being steps of log(a/s). Infinite steps, the first from
    a = 0 and the last to s' = 0, and steps of no length have nothing to extrapolate over.
    """
    logs = [math.log(a / s) if a > 0.0 and s > 0.0 else math.inf if a > 0.0 else -math.inf for a, s in amplitudes]
    lengths = [after - before for before, after in pairwise(logs)]
    rows = []
    for i, ((a, s), (a_next, s_next)) in enumerate(pairwise(amplitudes)):
        usable = multistep and i > 0 and math.isfinite(lengths[i]) and lengths[i - 1] > 0.0
        slope = 0.5 * lengths[i] / lengths[i - 1] if usable else 0.0
        rows.append(Exponential(s_next / s, a_next - a * s_next / s, slope))
    return rows


def ddim(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM without noise (Song et al. 2021, eq. 12 with eta = 0): x' = a' D + s' eps; first order, N network calls.

    As `heun`, except that the network answers with clean data D, and `levels` hold their amplitudes.

    Raises:
        ValueError: another state dtype, or levels without amplitudes.
    """
    return _exponential(network, latents, levels, False, state_dtype, callback)


def dpmpp_2m(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): second order for N network calls. Arguments as for `ddim`."""
    return _exponential(network, latents, levels, True, state_dtype, callback)


def _exponential(
    network: Network,
    latents: Tensor,
    levels: Levels,
    multistep: bool,
    state_dtype: torch.dtype,
    callback: Callback | None,
) -> Tensor:
    rows = exponential_steps(_amplitudes(levels), multistep=multistep)
    x = _start(latents, levels, state_dtype)
    before: Tensor | None = None
    for i, row in enumerate(rows):
        clean = network(x, levels.times[i]).to(state_dtype)
        extrapolated = clean if before is None or row.slope == 0.0 else clean + row.slope * (clean - before)
        x = row.state * x + row.clean * extrapolated
        before = clean
        if callback is not None:
            callback(i, x)
    return x


# ---------------------------------------------------------------------------- stochastic samplers


class Drift(NamedTuple):
    """A step's increment at one of its ends, D (a' - a) + 2 eps (s' - s), as state * x + clean * D."""

    state: float
    clean: float


def drift(at: tuple[float, float], start: tuple[float, float], end: tuple[float, float]) -> Drift:
    """The increment over the step from `start` to `end` as seen from the level `at`; all are (alpha, sigma)."""
    state = 2.0 * (end[1] - start[1]) / at[1]
    return Drift(state, (end[0] - start[0]) - at[0] * state)


def sde_euler(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """Euler-Maruyama on the stochastic flow below; N network calls, the last step without noise.

        dx_t = D d alpha + 2 eps d sigma + sqrt(-d sigma^2) dW

    All marginals are those of the probability flow D d alpha + eps d sigma: twice the noise is removed, and what
    sigma^2 has lost is put back fresh. On `flow` this is SiT's SDE with its diffusion "sigma" (Ma et al. 2024); stated
    in amplitudes it is the same for every process and variable, and a discrete process needs no derivatives. Strong
    and weak order 1.

    Args:
        network, latents, levels, state_dtype, callback: as for `ddim`.
        noise: see Noise; asked for in steps 0..N-2.

    Raises:
        ValueError: another state dtype, levels without amplitudes, or no noise.
    """
    return _stochastic(network, latents, levels, noise, False, state_dtype, callback)


def sde_heun(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    noise: Noise | None = None,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """`sde_euler` with the trapezoid of the drift at both ends, the noise in both; 2N - 1 network calls.

    For noise that does not depend on the state this has weak order 2 (Kloeden & Platen 1992, sec. 15.1), and strong
    order 1.
    """
    return _stochastic(network, latents, levels, noise, True, state_dtype, callback)


def _stochastic(
    network: Network,
    latents: Tensor,
    levels: Levels,
    noise: Noise | None,
    corrected: bool,
    state_dtype: torch.dtype,
    callback: Callback | None,
) -> Tensor:
    if noise is None:
        raise ValueError("a stochastic sampler needs noise: a function from the number of a step to standard normals")
    amplitudes = _amplitudes(levels)
    x = _start(latents, levels, state_dtype)
    steps = len(levels.times)
    for i, (start, end) in enumerate(pairwise(amplitudes)):
        clean = network(x, levels.times[i]).to(state_dtype)
        if i + 1 == steps:
            x = clean  # all that is left is noise: the step of the probability flow to sigma = 0
        else:
            here, there = drift(start, start, end), drift(end, start, end)
            fresh = math.sqrt(max(start[1] ** 2 - end[1] ** 2, 0.0)) * noise(i).to(state_dtype)
            first = here.state * x + here.clean * clean
            predicted = x + first + fresh
            if corrected:
                clean = network(predicted, levels.times[i + 1]).to(state_dtype)
                x = x + 0.5 * (first + there.state * predicted + there.clean * clean) + fresh
            else:
                x = predicted
        if callback is not None:
            callback(i, x)
    return x


SAMPLERS: dict[str, Sampler] = {
    "edm_heun": edm_heun,
    "edm_euler": edm_euler,
    "heun": heun,
    "euler": euler,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "sde_euler": sde_euler,
    "sde_heun": sde_heun,
}
"""Samplers by name."""

ASKS: dict[str, str] = {
    "edm_heun": "denoise",
    "edm_euler": "denoise",
    "heun": "velocity",
    "euler": "velocity",
    "ddim": "clean",
    "dpmpp_2m": "clean",
    "sde_euler": "clean",
    "sde_heun": "clean",
}
"""What each sampler asks of its network: the method of `Guided`. Those that `denoise` integrate over `ratio` and hold
x_t/alpha, the others over `time` and hold x_t (see levels.VARIABLES)."""

STOCHASTIC = frozenset({"sde_euler", "sde_heun"})
"""Samplers that need noise."""

TWO_STAGE = frozenset({"edm_heun", "heun", "sde_heun"})
"""Samplers that call the network a second time in every step but the last: 2N - 1 calls, at the times of
`call_times`."""


def call_times(name: str, levels: Levels) -> list[float]:
    """The time of every call of the network that a sampler makes, in order."""
    if name not in TWO_STAGE:
        return list(levels.times)
    return [levels.times[0], *(time for time in levels.times[1:] for _ in range(2))]
