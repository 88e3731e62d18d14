"""Noise levels: where along the noise axis a sampler evaluates the network.

All of it runs once per call of `sample`, on the host, in float64: a sampling loop never asks the device for a
number.

The level of a discrete process at label i is `sigma_i / alpha_i`, read from the process itself, hence from
the very schedule that the network was trained under. For the `cosine` schedule this equals the recursion
`u[j-1] = sqrt((u[j]^2 + 1) / max(abar'(j-1)/abar'(j), 0.001) - 1)` of EDM's iDDPM preconditioning (Karras et
al. 2022, table 1), which is a telescoped cumulative product of `1 - beta` with beta clipped at 0.999.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from erdfast.process import Process
    from erdfast.process.schedule import Schedule

RHO = 7.0
"""Exponent of EDM's spacing (Karras et al. 2022, eq. 5 and table 1)."""

LARGEST_LEVEL = 80.0
"""EDM's largest sigma/alpha; also where a continuous process starts if its velocity is singular at t = 1."""


class Levels(NamedTuple):
    """The grid of one sampling run: N levels, then the clean end."""

    positions: tuple[float, ...]
    """N + 1 values of the variable integrated over, descending to 0; see VARIABLES."""

    times: tuple[float, ...]
    """N times of the process, one per level that the network may see: integer labels if discrete, else t."""

    scale: float
    """Amplitude of the noise at the first level: the initial state is `scale` times a standard normal."""

    amplitudes: tuple[tuple[float, float], ...] = ()
    """N + 1 pairs (alpha, sigma), the last (1, 0): what `ddim`, `dpmpp_2m` and the stochastic samplers step over."""


def noise_table(process: Process) -> np.ndarray:
    """Noise level sigma/alpha of every label of a discrete process: (T,) float64, ascending."""
    labels = torch.arange(_num_timesteps(process), device=_device_of(process))
    alpha, sigma = process.schedule.alpha_sigma(labels)
    return (sigma / alpha).cpu().numpy()


def _num_timesteps(process: Process) -> int:
    count = process.schedule.num_timesteps
    if count is None:
        raise ValueError("a continuous process has no table of noise levels, only times; use make_levels")
    return count


def _edm(table: np.ndarray, steps: int) -> np.ndarray:
    """Karras et al. 2022, eq. 5, between 0.002 and 80 or what the table reaches."""
    sigma_min, sigma_max = max(0.002, table[0]), min(LARGEST_LEVEL, table[-1])
    ends = sigma_min ** (1 / RHO), sigma_max ** (1 / RHO)
    return (ends[1] + np.linspace(0.0, 1.0, steps) * (ends[0] - ends[1])) ** RHO


def _iddpm(table: np.ndarray, steps: int) -> np.ndarray:
    """Equal steps of the label, between 0.002 and 81 or what the table reaches."""
    inside = table[(table >= 0.002) & (table <= 81.0)][::-1]
    if len(inside) == 0:
        raise ValueError(f"no noise level of {table[0]:.3g}..{table[-1]:.3g} is within 0.002..81, the range of 'iddpm'")
    return inside[np.rint(np.linspace(0.0, len(inside) - 1, steps)).astype(np.int64)]


def _vp(table: np.ndarray, steps: int) -> np.ndarray:
    """Equal steps in the time of the VP SDE from 1 to 0.001, refitted to the ends of the table."""
    first, last = 1.0, 0.001

    def level(t: np.ndarray | float, beta_d: float, beta_min: float) -> np.ndarray:
        return np.sqrt(np.expm1(0.5 * beta_d * np.square(t) + beta_min * np.asarray(t)))

    sigma_min = max(float(level(last, 19.9, 0.1)), table[0])
    sigma_max = min(float(level(first, 19.9, 0.1)), table[-1])
    log_min, log_max = np.log1p(sigma_min**2), np.log1p(sigma_max**2)
    beta_d = 2.0 * (log_min / last - log_max) / (last - first)
    return level(first + np.linspace(0.0, 1.0, steps) * (last - first), beta_d, log_max - 0.5 * beta_d)


def _uniform(table: np.ndarray, steps: int) -> np.ndarray:
    """Equal steps of the label from the last to the first: DDIM's linear spacing (Song et al. 2021, app. D.2)."""
    return table[np.rint(np.linspace(len(table) - 1.0, 0.0, steps)).astype(np.int64)]


def _logsnr(table: np.ndarray, steps: int) -> np.ndarray:
    """Equal steps of the log-SNR (DPM-Solver, Lu et al. 2022), between the ends of `edm`."""
    return np.geomspace(min(LARGEST_LEVEL, table[-1]), max(0.002, table[0]), steps)


LEVEL_SETS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "edm": _edm,
    "iddpm": _iddpm,
    "vp": _vp,
    "uniform": _uniform,
    "logsnr": _logsnr,
}
"""Rules: (table of levels by label, N) -> N descending levels, before rounding to the table of a discrete process."""

VARIABLES = ("ratio", "time")
"""What a sampler integrates over: sigma/alpha, its state being x_t/alpha; or, its state being x_t, the t of a
continuous process, for a discrete one the angle atan2(sigma, alpha), which is known at every label without a
derivative."""


def table_levels(table: np.ndarray, steps: int, level_set: str = "edm") -> Levels:
    """N levels of a discrete process, each rounded to the nearest of its table, then 0.

    Args:
        table: (T,) ascending noise levels by label, see `noise_table`.
        steps: N >= 1. With N = 1 the only level is the largest.
        level_set: a name of LEVEL_SETS.

    Raises:
        ValueError: unknown level set, fewer than one step, or a table that is too short for the level set.
    """
    if level_set not in LEVEL_SETS:
        raise ValueError(f"level set {level_set!r} is not one of {sorted(LEVEL_SETS)} for a discrete process")
    check_whole("steps", steps, 1)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = LEVEL_SETS[level_set](table, steps)
    if not np.isfinite(wanted).all() or np.any(np.diff(wanted) > 0):
        raise ValueError(
            f"level set {level_set!r} does not descend from {table[-1]:.3g} to {table[0]:.3g}, the ends of the table "
            f"of num_timesteps={len(table)}; choose another"
        )
    labels = np.abs(table[None, :] - wanted[:, None]).argmin(axis=1)
    sigmas = tuple(float(table[label]) for label in labels)
    return Levels((*sigmas, 0.0), tuple(int(label) for label in labels), sigmas[0])


def _singular(process: Process) -> bool:
    """Whether the velocity at t = 1 does not follow from the prediction.

    A target that holds no x0 where alpha vanishes (`eps` or `score` on `flow` or `gvp`) leaves it undetermined,
    and close to it a network's error is multiplied by about sigma/alpha.
    """
    return _velocity_gain(process, 1.0) > LARGEST_LEVEL


def _velocity_gain(process: Process, time: float) -> float:
    """Factor between an error of the network and that of its velocity (k-Diff, appendix A)."""
    t = torch.tensor([time], dtype=torch.float64, device=_device_of(process))
    with torch.no_grad():
        return float(process.to_u(torch.ones_like(t), torch.zeros_like(t), t).abs())


def _device_of(process: Process) -> torch.device:
    """Where the process keeps its tables or learnable numbers; the CPU if it has none."""
    held = next(itertools.chain(process.parameters(), process.buffers()), None)
    return torch.device("cpu") if held is None else held.device


def check_whole(name: str, value: int, least: int) -> None:
    """ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def make_levels(process: Process, steps: int, level_set: str | None = None, variable: str | None = None) -> Levels:
    """The levels of a run under a process.

    Runs that begin where alpha = 0 are those over `time` whose target is not singular there; all others begin at
    sigma/alpha = LARGEST_LEVEL or below, as EDM's do.

    Args:
        process: discrete or continuous.
        steps: N >= 1. With N = 1 the only level is the largest.
        level_set: a name of LEVEL_SETS; None means `edm` for a discrete process and over `ratio`, else `uniform`:
            on a continuous process equal steps in t. `iddpm` counts labels, which a continuous process has not.
        variable: a name of VARIABLES; None means `ratio` for a discrete process, else `time`.

    Raises:
        ValueError: an unknown name, a level set that the process does not have, or fewer than one step.
    """
    discrete = process.schedule.discrete
    variable = variable or ("ratio" if discrete else "time")
    if variable not in VARIABLES:
        raise ValueError(f"variable {variable!r} is not one of {list(VARIABLES)}")
    level_set = level_set or ("edm" if discrete or variable == "ratio" else "uniform")
    check_whole("steps", steps, 1)
    if discrete:
        times = table_levels(noise_table(process), steps, level_set).times
    else:
        times = _continuous_times(process, steps, level_set, bounded=variable == "ratio")
    t = torch.tensor(times, dtype=torch.int64 if discrete else torch.float64, device=_device_of(process))
    alpha, sigma = (values.cpu().numpy() for values in process.schedule.alpha_sigma(t))
    amplitudes = (*zip(alpha.tolist(), sigma.tolist(), strict=True), (1.0, 0.0))
    if variable == "ratio":
        return Levels((*(sigma / alpha).tolist(), 0.0), times, float(sigma[0] / alpha[0]), amplitudes)
    positions = np.arctan2(sigma / process.noise_scale, alpha).tolist() if discrete else times
    return Levels((*positions, 0.0), times, float(sigma[0]), amplitudes)


def _continuous_times(process: Process, steps: int, level_set: str, *, bounded: bool) -> tuple[float, ...]:
    """N descending times in (0, 1]; `bounded` keeps them where sigma/alpha is at most LARGEST_LEVEL."""
    schedule = process.schedule
    if level_set == "uniform":
        start = _time_of_level(schedule, LARGEST_LEVEL) if bounded or _singular(process) else 1.0
        return tuple(np.linspace(start, 0.0, steps + 1)[:-1].tolist())
    if level_set == "iddpm" or level_set not in LEVEL_SETS:
        names = sorted(LEVEL_SETS.keys() - {"iddpm"})
        raise ValueError(
            f"level set {level_set!r} is not one of {names} for a continuous process"
            + ("; it counts the labels of a discrete one" if level_set == "iddpm" else "")
        )
    ends = schedule.clamp(torch.tensor([0.0, 1.0], dtype=torch.float64))
    alpha, sigma = schedule.alpha_sigma(ends)
    levels = LEVEL_SETS[level_set]((sigma / alpha).numpy(), steps)
    return tuple(_time_of_level(schedule, float(level)) for level in levels)


def _time_of_level(schedule: Schedule, level: float) -> float:
    """t where sigma/alpha is `level`, or the nearest end of a continuous schedule."""
    return float(schedule.t_from_logsnr(torch.tensor([-2.0 * math.log(level)], dtype=torch.float64)))
