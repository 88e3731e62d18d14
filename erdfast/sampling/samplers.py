"""Samplers as pure functions of one signature: `sampler(network, latents, levels, *, state_dtype, callback)`.

`network(x, time)` is asked about a state (B, C, H, W) at a time given as a host number, so that nothing waits
for the device. It answers with clean data (`edm_*`) or with the velocity dx/dt (`heun`, `euler`); see
erdfast.sampling.Guided. The state stays in float32 or float64 throughout: in bf16 the sum of many small steps
loses most of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from erdfast.sampling.levels import Levels

Network = Callable[[Tensor, float], Tensor]
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
        state_dtype: torch.dtype = torch.float32,
        callback: Callback | None = None,
    ) -> Tensor: ...


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
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype {state_dtype} is not one of {STATE_DTYPES}")
    steps = len(levels.times)
    x = latents.to(state_dtype) * levels.scale
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
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """EDM's deterministic second-order sampler (Karras et al. 2022, alg. 1); 2N - 1 network calls.

    Args:
        network: (x, time) -> clean data D, both (B, C, H, W); x = x_t/alpha has noise of amplitude
            sigma/alpha.
        latents: standard normal (B, C, H, W), any float dtype; scaled here by `levels.scale`.
        levels: from `make_levels` or `table_levels`.
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
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's rule in the time of a continuous process; 2N - 1 network calls.

    As `edm_heun`, except that `network(x_t, t)` returns the velocity dx_t/dt and the state is x_t itself.
    """
    return _integrate(_velocity_slope(network, levels, state_dtype), latents, levels, True, state_dtype, callback)


def euler(
    network: Network,
    latents: Tensor,
    levels: Levels,
    *,
    state_dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's rule in the time of a continuous process; N network calls. See `heun`."""
    return _integrate(_velocity_slope(network, levels, state_dtype), latents, levels, False, state_dtype, callback)


SAMPLERS: dict[str, Sampler] = {"edm_heun": edm_heun, "edm_euler": edm_euler, "heun": heun, "euler": euler}
"""Samplers by name."""
