"""How signal and noise depend on time: alpha(t), sigma(t), their derivatives and the log-SNR.

One convention everywhere: larger times are noisier. A discrete schedule has times 0..T-1 (int64) and is a
table over s = (t+1)/T; a continuous one has real times in [0, 1]. Derivatives are with respect to that unit
time, in both cases. All values are float64. `noise_scale` multiplies sigma (JiT), and so enters the
derivatives and the log-SNR.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .coefficients import Pair, Point

LOGSNR_LIMIT = 20.0
"""Beyond this |log-SNR|, continuous schedules hold whatever would diverge. The smaller amplitude is then
4.5e-5 of the other, which bf16 and fp16 data do not resolve."""

LOGSNR_RANGE = 10.0
"""`logsnr_linear` and `logsnr_uniform` run from +10 to -10."""


class Tables(nn.Module):
    """A module whose tables stay float64 when it is moved or cast: in half precision they would be wrong."""

    def table(self, name: str, values: Tensor) -> None:
        """Register `values` as a buffer that is not saved: it follows from the configuration."""
        self.register_buffer(name, values.to(torch.float64), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != value.dtype:
                self._buffers[name] = value.to(moved.device)
        return self


class Schedule(Tables):
    """Interface of all schedules. Times are (B,) or any other shape; results have that shape, float64."""

    discrete: ClassVar[bool]
    num_timesteps: int | None
    """T of a discrete schedule, None for a continuous one."""
    network_time_range: tuple[float, float]
    """Smallest and largest number that the network receives as time; the larger is always the noisier."""

    def __init__(self, noise_scale: float) -> None:
        super().__init__()
        self.noise_scale = noise_scale
        self.shift = 2.0 * math.log(noise_scale)

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> Pair:
        """Signal and noise amplitude."""

    @abstractmethod
    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2/sigma^2), kept within [-20, 20] at the ends of a continuous schedule."""

    @abstractmethod
    def d_logsnr(self, t: Tensor) -> Tensor:
        """Derivative of the log-SNR in unit time, below 0; held where |log-SNR| > 20."""

    @abstractmethod
    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        """The time with this log-SNR: the nearest integer, or a float64 in [0, 1]."""

    @abstractmethod
    def unit_time(self, t: Tensor) -> Tensor:
        """Time in [0, 1]: (t+1)/T or t itself."""

    @abstractmethod
    def network_time(self, t: Tensor) -> Tensor:
        """What the network receives: t*1000/T, or t itself."""

    @abstractmethod
    def clamp(self, t: Tensor) -> Tensor:
        """The nearest time with |log-SNR| <= 20; discrete times are returned as they are."""

    @abstractmethod
    def check(self, t: Tensor) -> None:
        """ValueError for a tensor of the wrong kind. Values are not read: that would wait for the device."""

    def d_alpha_sigma(self, t: Tensor) -> Pair:
        """(d alpha/dt, d sigma/dt), held where |log-SNR| > 20; here for variance-preserving schedules."""
        t = self.clamp(t)
        alpha, sigma = self.alpha_sigma(t)
        half_slope = 0.5 * self.d_logsnr(t)
        return alpha * (sigma / self.noise_scale).square() * half_slope, -sigma * alpha.square() * half_slope

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha/dt, at most 0."""
        return self.d_alpha_sigma(t)[0]

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma/dt, at least 0."""
        return self.d_alpha_sigma(t)[1]

    def point(self, t: Tensor) -> Point:
        """The place on the schedule that targets and weights are computed from: the clamped time's."""
        t = self.clamp(t)
        alpha, sigma = self.alpha_sigma(t)
        return Point(alpha, sigma, self.unit_time(t), lambda: self.d_alpha_sigma(t), self.noise_scale)


class DiscreteSchedule(Schedule):
    """T steps given by betas, alpha^2 = cumprod(1 - beta); the log-SNR's slope is by central differences."""

    discrete = True
    num_timesteps: int
    alpha_table: Tensor
    sigma_table: Tensor
    logsnr_table: Tensor
    d_logsnr_table: Tensor

    def __init__(self, num_timesteps: int, noise_scale: float) -> None:
        super().__init__(noise_scale)
        self.num_timesteps = num_timesteps
        self.network_time_range = (0.0, 1000.0 * (num_timesteps - 1) / num_timesteps)
        alpha_bar = torch.cumprod(1.0 - self.betas(num_timesteps), dim=0)
        logsnr = torch.log(alpha_bar) - torch.log1p(-alpha_bar)
        self.table("alpha_table", alpha_bar.sqrt())
        self.table("sigma_table", (1.0 - alpha_bar).sqrt() * noise_scale)
        self.table("logsnr_table", logsnr - self.shift)
        self.table("d_logsnr_table", torch.gradient(logsnr, spacing=1.0 / num_timesteps)[0])

    @staticmethod
    @abstractmethod
    def betas(num_timesteps: int) -> Tensor:
        """(T,) float64 in (0, 1)."""

    def check(self, t: Tensor) -> None:
        if t.dtype != torch.int64:
            last = self.num_timesteps - 1
            raise ValueError(f"a discrete schedule takes int64 times in 0..{last}, not {t.dtype}")

    def alpha_sigma(self, t: Tensor) -> Pair:
        return self.alpha_table[t], self.sigma_table[t]

    def logsnr(self, t: Tensor) -> Tensor:
        return self.logsnr_table[t]

    def d_logsnr(self, t: Tensor) -> Tensor:
        return self.d_logsnr_table[t]

    def logsnr_widths(self) -> Tensor:
        """(T,): the log-SNR range nearest to each step, half-way to each neighbour; they add up to the whole range."""
        steps = -self.logsnr_table.diff()
        none = steps.new_zeros(1)
        return 0.5 * (torch.cat([none, steps]) + torch.cat([steps, none]))

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        rising = self.logsnr_table.flip(0)
        midpoints = 0.5 * (rising[1:] + rising[:-1])
        place = torch.searchsorted(midpoints, logsnr.to(torch.float64).contiguous())
        return self.num_timesteps - 1 - place

    def unit_time(self, t: Tensor) -> Tensor:
        return (t.to(torch.float64) + 1.0) / self.num_timesteps

    def network_time(self, t: Tensor) -> Tensor:
        return t.to(torch.float64) * (1000.0 / self.num_timesteps)

    def clamp(self, t: Tensor) -> Tensor:
        return t


def betas_from_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """alpha_bar at i/T, (T+1,) => (T,): beta_i = min(1 - alpha_bar((i+1)/T)/alpha_bar(i/T), 0.999)."""
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def unit_grid(num_timesteps: int) -> Tensor:
    """i/T for i = 0..T, float64; on the CPU whatever the default device, as all tables."""
    return torch.arange(num_timesteps + 1, dtype=torch.float64, device="cpu") / num_timesteps


class Cosine(DiscreteSchedule):
    """alpha_bar(s) = cos^2((s+0.008)/1.008*pi/2) (IDDPM); the ERD paper's default."""

    @staticmethod
    def betas(num_timesteps: int) -> Tensor:
        angle = (unit_grid(num_timesteps) + 0.008) / 1.008 * (math.pi / 2)
        return betas_from_alpha_bar(torch.cos(angle).square())


class DdpmLinear(DiscreteSchedule):
    """Betas linear from 1e-4*1000/T to 0.02*1000/T (DDPM, DiT); at T <= 20 the last would be 1 or more."""

    @staticmethod
    def betas(num_timesteps: int) -> Tensor:
        if num_timesteps <= 20:
            raise ValueError(f"num_timesteps={num_timesteps} gives 'ddpm_linear' betas of 1; use 21 or more")
        scale = 1000.0 / num_timesteps
        return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64, device="cpu")


class SdLinear(DiscreteSchedule):
    """Square roots of betas linear, from 0.00085*1000/T to 0.012*1000/T (Stable Diffusion; the published U-ViTs)."""

    @staticmethod
    def betas(num_timesteps: int) -> Tensor:
        if num_timesteps <= 12:
            raise ValueError(f"num_timesteps={num_timesteps} gives 'sd_linear' betas of 1; use 13 or more")
        scale = 1000.0 / num_timesteps
        ends = math.sqrt(0.00085 * scale), math.sqrt(0.012 * scale)
        return torch.linspace(*ends, num_timesteps, dtype=torch.float64, device="cpu").square()


class LogsnrLinear(DiscreteSchedule):
    """alpha_bar(s) = sigmoid(10 - 20s)/sigmoid(10): betas do not keep alpha_bar(0) (ERD's authors' code)."""

    @staticmethod
    def betas(num_timesteps: int) -> Tensor:
        return betas_from_alpha_bar(torch.sigmoid(LOGSNR_RANGE - 2 * LOGSNR_RANGE * unit_grid(num_timesteps)))


class ContinuousSchedule(Schedule):
    """Closed forms over t in [0, 1]. Subclasses give them for noise_scale 1 and for times inside (0, 1)."""

    discrete = False

    def __init__(self, num_timesteps: int, noise_scale: float) -> None:
        del num_timesteps  # the common signature of SCHEDULES
        super().__init__(noise_scale)
        self.num_timesteps = None
        self.network_time_range = (0.0, 1.0)
        limits = torch.tensor([LOGSNR_LIMIT, -LOGSNR_LIMIT], dtype=torch.float64, device="cpu")
        self.t_min, self.t_max = self.t_from_logsnr(limits).tolist()

    @abstractmethod
    def amplitudes(self, t: Tensor) -> Pair:
        """alpha and sigma before the noise scale, exact at 0 and 1."""

    @abstractmethod
    def log_ratio(self, t: Tensor) -> Tensor:
        """log(alpha^2/sigma^2) before the noise scale."""

    @abstractmethod
    def slope(self, t: Tensor) -> Tensor:
        """Derivative of `log_ratio`."""

    @abstractmethod
    def inverse(self, log_ratio: Tensor) -> Tensor:
        """Inverse of `log_ratio`; may leave [0, 1]."""

    def check(self, t: Tensor) -> None:
        if not t.is_floating_point():
            raise ValueError(f"a continuous schedule takes real times in [0, 1], not {t.dtype}")

    def alpha_sigma(self, t: Tensor) -> Pair:
        alpha, sigma = self.amplitudes(t.to(torch.float64))
        return alpha, sigma * self.noise_scale

    def logsnr(self, t: Tensor) -> Tensor:
        return (self.log_ratio(self.clamp(t)) - self.shift).clamp(-LOGSNR_LIMIT, LOGSNR_LIMIT)

    def d_logsnr(self, t: Tensor) -> Tensor:
        return self.slope(self.clamp(t))

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return self.inverse(logsnr.to(torch.float64) + self.shift).clamp(0.0, 1.0)

    def unit_time(self, t: Tensor) -> Tensor:
        return t.to(torch.float64)

    def network_time(self, t: Tensor) -> Tensor:
        return t.to(torch.float64)

    def clamp(self, t: Tensor) -> Tensor:
        return t.to(torch.float64).clamp(self.t_min, self.t_max)


class Flow(ContinuousSchedule):
    """Straight paths: alpha = 1-t, sigma = t (flow matching; its papers count time the other way)."""

    def amplitudes(self, t: Tensor) -> Pair:
        return 1.0 - t, t

    def log_ratio(self, t: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-t) - torch.log(t))

    def slope(self, t: Tensor) -> Tensor:
        return -2.0 / (t * (1.0 - t))

    def inverse(self, log_ratio: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_ratio)

    def d_alpha_sigma(self, t: Tensor) -> Pair:
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one * self.noise_scale


class VariancePreserving(ContinuousSchedule):
    """beta(t) = 0.1 + 19.9t, log alpha = -(19.9/4)t^2 - 0.05t, sigma^2 = 1 - alpha^2 (score SDE)."""

    curvature: ClassVar[float] = 19.9 / 4
    start: ClassVar[float] = 0.1 / 2

    def log_alpha(self, t: Tensor) -> Tensor:
        """At most 0."""
        return -t * (self.curvature * t + self.start)

    def amplitudes(self, t: Tensor) -> Pair:
        log_alpha = self.log_alpha(t)
        return torch.exp(log_alpha), torch.sqrt(-torch.expm1(2.0 * log_alpha))

    def log_ratio(self, t: Tensor) -> Tensor:
        log_alpha = self.log_alpha(t)
        return 2.0 * log_alpha - torch.log(-torch.expm1(2.0 * log_alpha))

    def slope(self, t: Tensor) -> Tensor:
        d_log_alpha = -(2.0 * self.curvature * t + self.start)
        return 2.0 * d_log_alpha / -torch.expm1(2.0 * self.log_alpha(t))

    def inverse(self, log_ratio: Tensor) -> Tensor:
        decay = 0.5 * functional.softplus(-log_ratio, threshold=1000.0)  # -log alpha; no linear shortcut
        root = torch.sqrt(self.start**2 + 4.0 * self.curvature * decay)
        return 2.0 * decay / (self.start + root)  # this form of the root has no cancellation for small decay


class GeneralizedVariancePreserving(ContinuousSchedule):
    """alpha = cos(pi t/2), sigma = sin(pi t/2) (SiT's GVP); the cosine as a sine, so that it is exactly 0 at
    t = 1."""

    def amplitudes(self, t: Tensor) -> Pair:
        return torch.sin((1.0 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))

    def log_ratio(self, t: Tensor) -> Tensor:
        alpha, sigma = self.amplitudes(t)
        return 2.0 * (torch.log(alpha) - torch.log(sigma))

    def slope(self, t: Tensor) -> Tensor:
        alpha, sigma = self.amplitudes(t)
        return -math.pi / (alpha * sigma)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        return torch.atan(torch.exp(-0.5 * log_ratio)) * (2.0 / math.pi)


class LogsnrUniform(ContinuousSchedule):
    """log-SNR = 10 - 20t, variance preserving: where ERD's derivation is exact (remark E.2)."""

    def amplitudes(self, t: Tensor) -> Pair:
        log_ratio = self.log_ratio(t)
        return torch.sqrt(torch.sigmoid(log_ratio)), torch.sqrt(torch.sigmoid(-log_ratio))

    def log_ratio(self, t: Tensor) -> Tensor:
        return LOGSNR_RANGE * (1.0 - 2.0 * t)

    def slope(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -2.0 * LOGSNR_RANGE)

    def inverse(self, log_ratio: Tensor) -> Tensor:
        return (LOGSNR_RANGE - log_ratio) / (2.0 * LOGSNR_RANGE)


SCHEDULES: dict[str, type[DiscreteSchedule] | type[ContinuousSchedule]] = {
    "cosine": Cosine,
    "ddpm_linear": DdpmLinear,
    "sd_linear": SdLinear,
    "logsnr_linear": LogsnrLinear,
    "flow": Flow,
    "vp": VariancePreserving,
    "gvp": GeneralizedVariancePreserving,
    "logsnr_uniform": LogsnrUniform,
}
"""Every schedule by name; each is made with (num_timesteps, noise_scale)."""
