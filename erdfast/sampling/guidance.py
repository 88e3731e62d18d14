"""From a trained network and its process to the functions that samplers call, with classifier-free guidance.

Guidance is `uncond + cfg_scale * (cond - uncond)` on the network's output, all channels of it. For a given
x_t every conversion (to x0, to the velocity) is affine in the prediction, and the two factors above sum to
one: guiding the output, the velocity or x0 is therefore the same thing, and the output is where it costs
least.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from erdfast.process import Process

FULL_INTERVAL = (0.0, 1.0)
"""Guidance at every noise level."""

Model = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""(x, time, y) => output: a module, or a graph of one."""

ROUNDING = 1e-9
"""Allowance at the interval's ends: a grid's 0.8 may come out as 0.8000000000000003."""


class Affine(NamedTuple):
    """A conversion at one time: pred_factor * prediction + state_factor * x_t."""

    pred_factor: float
    state_factor: float

    def __call__(self, pred: Tensor, x_t: Tensor) -> Tensor:
        """(B, C, H, W) in the dtype of the arguments, which share one."""
        return self.pred_factor * pred + self.state_factor * x_t


class Row(NamedTuple):
    """What one time of the process means: numbers of the host, which go into kernels as arguments."""

    alpha: float
    network_time: Tensor
    """(1,) float32, on the device of the images."""
    to_x0: Affine
    """From the network's output to clean data."""
    to_velocity: Affine
    """From the network's output to the derivative of x_t: in t, or in the angle of a discrete process."""


class Guided:
    """A network under guidance, for one batch of labels: `denoise`, `clean`, `velocity`, `predict`, each (x, time).

    Times are host numbers. Whether a time is guided is decided from that number for every evaluation by
    itself, the second stage of Heun's rule included. Where it is not guided, the unconditional half is not
    computed.

    Args:
        model: `model(x float32 (B, C, H, W), time (B,) float32, y (B,) int64 or None)`. Of its output's
            channels the first C are the prediction; any others (a learned variance) are dropped.
        process: the process that the model was trained under, on the device of the inputs.
        y: (B,) int64 labels, or None for an unconditional model.
        cfg_scale: 1 is the conditional model alone, one call per evaluation; otherwise one call of 2B.
        interval: fractions of the noise axis, 0 clean and 1 pure noise, both ends included, where guidance
            applies. The axis is t for a continuous process, label / (T - 1) for a discrete one.
        null_class: the label that stands for no label; None if the model has none.
        autocast_dtype: bfloat16 or float16 for the model's own arithmetic; None leaves it as it is.

    Raises:
        ValueError: guidance without labels or without a null class, a scale that is not a number of at least
            0, an interval that is not within [0, 1] in order.
    """

    def __init__(
        self,
        model: Model,
        process: Process,
        y: Tensor | None = None,
        cfg_scale: float = 1.0,
        interval: tuple[float, float] = FULL_INTERVAL,
        null_class: int | None = None,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        check_guidance(cfg_scale, interval)
        self.model = model
        self.process = process
        self.y = y
        self.cfg_scale = cfg_scale
        self.interval = interval
        self.autocast_dtype = autocast_dtype
        self._last_time = float(max((process.schedule.num_timesteps or 2) - 1, 1))
        self._null_class = null_class
        self._pair = None if cfg_scale == 1.0 else _with_null(y, null_class, cfg_scale)
        self._rows: dict[float, Row] = {}

    def prepare(self, times: Sequence[float], device: torch.device) -> None:
        """Computes what all these times mean in one go, on the device, and brings it to the host: then the sampling
        loop neither copies anything to the device nor waits for it.

        Without it they are computed at the first use of each time.
        """
        discrete = self.process.schedule.discrete
        t = torch.tensor(times, dtype=torch.int64 if discrete else torch.float64, device=device)
        one, zero = (fill(len(times), dtype=torch.float64, device=device) for fill in (torch.ones, torch.zeros))
        velocity = "v" if discrete else "u"  # d x_t/d angle is v at every label; d x_t/dt is u
        with torch.no_grad():
            coef = self.process.coefficients(t, dtype=torch.float64)
            # A conversion is linear in (prediction, x_t): unit inputs read its two factors off.
            units = ((one, zero), (zero, one))
            factors = [self.process.convert(*unit, t, to) for to in ("x0", velocity) for unit in units]
            numbers = torch.stack([coef.alpha, *factors], dim=1).tolist()
            network_time = coef.time.to(torch.float32)
        for i, (time, (alpha, *pairs)) in enumerate(zip(times, numbers, strict=True)):
            self._rows[time] = Row(alpha, network_time[i : i + 1], Affine(*pairs[:2]), Affine(*pairs[2:]))

    def with_labels(self, y: Tensor | None) -> Guided:
        """The same for another batch of labels, with all that has been prepared."""
        other = copy.copy(self)
        other.y, other._pair = y, None if self._pair is None else _with_null(y, self._null_class, self.cfg_scale)
        return other

    def guided_at(self, time: float) -> bool:
        """Whether an evaluation at this time (label or t) uses the unconditional prediction."""
        low, high = self.interval
        place = time / self._last_time
        return self.cfg_scale != 1.0 and low - ROUNDING <= place <= high + ROUNDING

    def _row(self, x: Tensor, time: float) -> Row:
        if time not in self._rows:
            self.prepare((time,), x.device)
        return self._rows[time]

    def _call(self, x_t: Tensor, row: Row, y: Tensor | None) -> Tensor:
        """The model in its own precision; the first C channels of its output in the dtype of `x_t`."""
        dtype = self.autocast_dtype
        context = contextlib.nullcontext() if dtype is None else torch.autocast(x_t.device.type, dtype)
        with context:
            output = self.model(x_t.to(torch.float32), row.network_time.expand(x_t.shape[0]), y)
        return output[:, : x_t.shape[1]].to(x_t.dtype)

    def predict(self, x_t: Tensor, time: float) -> Tensor:
        """The guided output of the network: (B, C, H, W) in the dtype of `x_t`, float32 or float64."""
        row = self._row(x_t, time)
        if not self.guided_at(time):
            return self._call(x_t, row, self.y)
        cond, uncond = self._call(torch.cat([x_t, x_t]), row, self._pair).chunk(2)
        return uncond + self.cfg_scale * (cond - uncond)

    def denoise(self, x: Tensor, time: float) -> Tensor:
        """Clean data from x = x_t / alpha, as `edm_heun` and `edm_euler` ask for it.

        On a variance-preserving process the network's input alpha * x is x / sqrt(s^2 + 1) at noise level s.
        """
        return self.clean(self._row(x, time).alpha * x, time)

    def clean(self, x_t: Tensor, time: float) -> Tensor:
        """Clean data from x_t, as `ddim`, `dpmpp_2m` and the stochastic samplers ask for it."""
        return self._row(x_t, time).to_x0(self.predict(x_t, time), x_t)

    def velocity(self, x_t: Tensor, time: float) -> Tensor:
        """The derivative of x_t along the probability flow, as `heun` and `euler` ask for it: in t on a continuous
        process, in the angle atan2(sigma, alpha) on a discrete one, where it is v (Salimans & Ho 2022, app. D)."""
        return self._row(x_t, time).to_velocity(self.predict(x_t, time), x_t)


def _with_null(y: Tensor | None, null_class: int | None, cfg_scale: float) -> Tensor:
    """(2B,) labels: those asked for, then the null class as often."""
    if y is None or null_class is None:
        missing = "labels" if y is None else "a null class"
        raise ValueError(f"cfg_scale {cfg_scale} needs {missing}: guidance compares a class with none; use 1")
    return torch.cat([y, torch.full_like(y, null_class)])


def check_guidance(cfg_scale: float, interval: tuple[float, float]) -> None:
    """Raises ValueError for a scale below 0 or not finite, or an interval not in order within [0, 1]."""
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0.0):
        raise ValueError(f"cfg_scale must be a finite number of at least 0, got {cfg_scale}")
    if len(interval) != 2 or not 0.0 <= interval[0] <= interval[1] <= 1.0:
        raise ValueError(f"guidance interval must be (low, high) with 0 <= low <= high <= 1, got {interval}")
