"""`Process`: schedule, target, weighting and time sampler, combined into the coefficients of every sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import philox
from .coefficients import (
    CONVERSIONS,
    SPACES,
    Coefficients,
    Pair,
    Point,
    choose,
    combine,
    determinant,
    kappa,
    mixing,
)
from .schedule import SCHEDULES, Schedule, Tables
from .target import TARGETS, Target, TargetOptions
from .time import TIME_SAMPLERS, build_times, uniform_numbers
from .weighting import WEIGHTINGS, Level, Weighting, recoverability

ALLOCATIONS = ("time", "logsnr")
LOSS_SPACES = ("target", "x0", "eps", "v", "u")
LATEST_TIME = 1.0 - 2.0**-24
"""The largest float32 below 1: a time drawn close to 1 must not round to it, where targets and weights end."""
LARGEST_WEIGHT = 1e30
"""Weights are held below this, so that they and their products with an error fit float32."""


class Process(Tables):
    """A diffusion process for training and sampling. Everything is computed in float64 on the device of `t`.

    Times: int64 in 0..T-1 on a discrete schedule, real in [0, 1] on a continuous one; larger is noisier.
    At the ends of a continuous schedule, whatever depends on time is held at its value for |log-SNR| = 20
    (within 5e-5 of t = 0 and 1 on `flow`): the score and most weights would diverge there, and some
    conversions divide by 0. alpha, sigma and the network's time stay exact. Integer times out of range are
    not looked for, as that would wait for the device.

    Args:
        schedule: a name of SCHEDULES: cosine, ddpm_linear, sd_linear, logsnr_linear (discrete), flow, vp, gvp,
            logsnr_uniform.
        target: a name of TARGETS: x0, eps, v, u, score, or learnable: k, k2, k(t). The parameters of a
            learnable target are this module's, and gradients reach them through c_x, c_eps and w.
        weighting: a name of WEIGHTINGS.
        time_sampler: a name of TIME_SAMPLERS.
        num_timesteps: T of a discrete schedule, at least 2.
        stratified: draw one time per stratum of the global batch.
        normalize: divide the weighting by its mean under the time sampler; None means: for `erd` alone. The
            mean follows a learnable target, and gradients pass through it. Multiplied by kappa^2 afterwards.
        allocation: of `erd`: "time" makes w(t) proportional to omega, "logsnr" makes w(t)*p(t)*|dt/dlambda|
            so (ERD, remark E.2), its factor capped at about 100 times its mean.
        as_sampling: draw times from the density proportional to p(t)*w(t), with w corrected by p/q: the
            expected gradient stays, and w becomes (nearly) the same number for all.
        loss_space: the space in which the squared error is meant, if not that of the target: w gains kappa^2,
            and for `erd` omega stays the network's own target's. Not for the weightings that are defined in
            eps-space (all but erd, erd_repo and constant): they weigh the same error equally in whatever
            space it is measured.
        kappa_clip: floor of |D| in kappa and in conversions to u and v (k-Diff clamps at 0.05 in pixel
            space).
        noise_scale: factor of the noise (JiT): the process is x_t = alpha*x0 + sigma*(noise_scale*eps), and
            targets are stated in the scaled noise. Folded into sigma and c_eps: eps stays standard normal
            everywhere, conversions to eps return standard normal noise, and `score` is the true score.
        logit_mean, logit_std: of `logit_normal`; t = 1 is noise.
        gamma: of min_snr (default 5), max_snr (1) and p2 (1).
        p2_k: of p2.
        sigmoid_bias: of sigmoid.
        k_init, k_bins: see TargetOptions.

    Raises:
        ValueError: an unknown name, a value out of range, a combination that cannot work, or an option that
            the chosen combination would ignore.
    """

    rule_mean: Tensor

    def __init__(
        self,
        schedule: str = "cosine",
        target: str = "eps",
        weighting: str = "erd",
        *,
        time_sampler: str = "uniform",
        num_timesteps: int = 1000,
        stratified: bool = False,
        normalize: bool | None = None,
        allocation: str = "time",
        as_sampling: bool = False,
        loss_space: str = "target",
        kappa_clip: float = 0.0,
        noise_scale: float = 1.0,
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        gamma: float | None = None,
        p2_k: float = 1.0,
        sigmoid_bias: float = 0.0,
        k_init: float = 0.5,
        k_bins: int = 128,
    ) -> None:
        super().__init__()
        build_schedule = choose(SCHEDULES, schedule, "schedule")
        build_target = choose(TARGETS, target, "target")
        build_sampler = choose(TIME_SAMPLERS, time_sampler, "time sampler")
        self.weighting: Weighting = choose(WEIGHTINGS, weighting, "weighting")
        self._settings: dict[str, Any] = {
            "schedule": schedule,
            "target": target,
            "weighting": weighting,
            "time_sampler": time_sampler,
            "num_timesteps": num_timesteps,
            "stratified": stratified,
            "normalize": self.weighting.normalized if normalize is None else normalize,
            "allocation": allocation,
            "as_sampling": as_sampling,
            "loss_space": loss_space,
            "kappa_clip": kappa_clip,
            "noise_scale": noise_scale,
            "logit_mean": logit_mean,
            "logit_std": logit_std,
            "gamma": gamma,
            "p2_k": p2_k,
            "sigmoid_bias": sigmoid_bias,
            "k_init": k_init,
            "k_bins": k_bins,
        }
        check_ranges(self._settings)
        check_combination(self._settings, build_schedule.discrete)
        self.target_name = target
        self.stratified = stratified
        self.normalize = bool(self._settings["normalize"])
        self.allocation = allocation
        self.as_sampling = as_sampling
        self.loss_space = loss_space
        self.noise_scale = noise_scale
        self.clip = kappa_clip * noise_scale  # D has the noise scale as a factor, kappa_clip has not
        self.rule_options = (gamma if gamma is not None else self.weighting.gamma or 1.0, p2_k, sigmoid_bias)
        self.schedule: Schedule = build_schedule(num_timesteps, noise_scale)
        self.target: Target = build_target(TargetOptions(k_init, k_bins))
        self.times = build_times(self.schedule, build_sampler(self.schedule, logit_mean, logit_std))
        self.table("rule_mean", torch.ones((), device="cpu"))
        if self.normalize and not self.target.learnable:
            self.table("rule_mean", self._average_rule())
        if as_sampling:
            point = self.schedule.point(self.times.nodes)
            self.times.tilt(self._weight(self.times.nodes, point, self.target(point)))
        self._check_numbers()

    @property
    def discrete(self) -> bool:
        """Whether times are integers."""
        return self.schedule.discrete

    def describe(self) -> dict[str, str | int | float | bool | None]:
        """Plain values that rebuild this process, without what it learnt: `Process(**process.describe())`."""
        return dict(self._settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._settings.items())

    def sample_time(
        self,
        batch: int,
        *,
        seed: philox.Integer,
        step: philox.Integer,
        rank_offset: philox.Integer = 0,
        global_batch: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Times for samples rank_offset .. rank_offset+batch-1 of the global batch.

        A draw depends on (seed, step, index in the global batch) alone, and on global_batch if stratified.

        Args:
            batch: samples on this rank, at least 1.
            seed, step: ints in 0..2^64-1 and 0..2^32-1, or 0-d int64 tensors on the process's device: nothing is
                read back, and a compiled step is not compiled anew for each value.
            rank_offset: index of this rank's first sample in the global batch; a 0-d int64 tensor there is not checked.
            global_batch: its size; needed if stratified.
            device: must be the process's device, which is also the default.

        Returns:
            (batch,) int64, or float32 below 1 on a continuous schedule.

        Raises:
            ValueError: sizes that do not fit, a missing global_batch, another device, or a seed or step out of
                range.
        """
        known = not isinstance(rank_offset, Tensor)
        if batch < 1 or (known and rank_offset < 0):
            raise ValueError(f"batch={batch} must be at least 1 and rank_offset={rank_offset} at least 0")
        if known and global_batch is not None and rank_offset + batch > global_batch:
            raise ValueError(f"rank_offset={rank_offset} + batch={batch} exceed global_batch={global_batch}")
        if self.stratified and global_batch is None:
            raise ValueError("stratified times need global_batch, the number of samples over all ranks")
        own = self.rule_mean.device
        seed, step = philox.scalar("seed", seed, 64, own), philox.scalar("step", step, 32, own)
        if device is not None and torch.empty(0, device=device).device != own:
            raise ValueError(f"device={device} is not the process's ({own}); move it with .to() first")
        ids = torch.arange(batch, dtype=torch.int64, device=own) + rank_offset
        t = self.times.draw(uniform_numbers(seed, step, ids, global_batch if self.stratified else None))
        return t if self.discrete else t.to(torch.float32).clamp(max=LATEST_TIME)

    def coefficients(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Coefficients:
        """Everything that training needs at these times.

        Args:
            t: (B,) int64, or floating on a continuous schedule.
            dtype: of the result; computed in float64 in any case.

        Returns:
            Seven tensors of t's shape, all finite.

        Raises:
            ValueError: times of the wrong dtype.
        """
        self.schedule.check(t)
        alpha, sigma = self.schedule.alpha_sigma(t)
        point = self.schedule.point(t)
        c = self.target(point)
        w = self._weight(t, point, c)
        values = (alpha, sigma, *c, w, self.schedule.network_time(t), self.schedule.logsnr(t))
        return Coefficients(*(value.to(dtype) for value in values))

    def forward(self, t: Tensor, dtype: torch.dtype = torch.float32) -> Coefficients:
        """`coefficients`, for callers that want a module to be callable."""
        return self.coefficients(t, dtype)

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2/sigma^2), float64, finite."""
        self.schedule.check(t)
        return self.schedule.logsnr(t)

    def logsnr_density(self, t: Tensor) -> Tensor:
        """Density of the drawn times per unit of log-SNR, p(t)*|dt/dlambda|: float64, of t's shape.

        Of the times that `sample_time` really draws: with `as_sampling` of the tilted density. On a discrete schedule
        it is a step's probability over the log-SNR range nearest to it. Times w, it is the allocation M(lambda) of
        ERD, remark E.2.
        """
        self.schedule.check(t)
        return self.times.logsnr_density(t)

    def recoverability(self, t: Tensor) -> Tensor:
        """ERD's omega of this target, not normalised (eq. 110): float64, of t's shape, whatever the weighting is."""
        self.schedule.check(t)
        point = self.schedule.point(t)
        return recoverability(self._level(t, point, self.target(point)))

    def target_values(self) -> dict[str, Tensor]:
        """The learnt numbers now, detached and on the device: k; k0 and k1; k over time (k_bins + 1,) with k_min and
        k_max. Empty for a fixed target."""
        return self.target.values()

    def convert(self, pred: Tensor, x_t: Tensor, t: Tensor, to: str) -> Tensor:
        """A prediction as x0, unit noise (`eps`), v, u or score; see `coefficients.convert`.

        What the network predicts anyway is returned without a division. `kappa_clip` acts on u and v alone,
        as in the published samplers.

        Args:
            pred, x_t: (B, ...), floating.
            t: (B,), (1,) or 0-d times.
            to: one of CONVERSIONS.

        Returns:
            (B, ...), float32 or wider.
        """
        rule = choose(CONVERSIONS, to, "conversion")
        self.schedule.check(t)
        point = self.schedule.point(t)
        if to == self.target_name:
            zero = torch.zeros_like(point.alpha)
            scale = 1.0 / self.noise_scale if to == "eps" else 1.0
            return combine((zero + scale, zero), pred, x_t)
        clip = self.clip if to in ("u", "v") else 0.0
        return combine(mixing(point, self.target(point), rule(point), clip), pred, x_t)

    def to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean data that a prediction implies."""
        return self.convert(pred, x_t, t, "x0")

    def to_eps(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The unit normal noise that a prediction implies."""
        return self.convert(pred, x_t, t, "eps")

    def to_v(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """v that a prediction implies."""
        return self.convert(pred, x_t, t, "v")

    def to_u(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The velocity d x_t/dt in unit time that a prediction implies; it points towards noise."""
        return self.convert(pred, x_t, t, "u")

    def to_score(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The score that a prediction implies."""
        return self.convert(pred, x_t, t, "score")

    def _weight(self, t: Tensor, point: Point, c: Pair) -> Tensor:
        """w: the normalised rule, times kappa^2, times the correction for the times drawn."""
        mean = self._average_rule() if self.normalize and self.target.learnable else self.rule_mean
        w = self._rule(t, point, c) / mean
        if self.loss_space not in ("target", self.target_name):
            w = w * kappa(point.alpha, point.sigma, c, SPACES[self.loss_space](point), self.clip).square()
        if self.as_sampling:
            w = w * self.times.importance(t)
        return w.clamp(max=LARGEST_WEIGHT)

    def _level(self, t: Tensor, point: Point, c: Pair) -> Level:
        logsnr = self.schedule.logsnr(t)
        ratio = self.times.density_ratio(t) if self.allocation == "logsnr" else None
        return Level(point.alpha, point.sigma, *c, logsnr.exp(), logsnr, ratio, self.target_name, *self.rule_options)

    def _rule(self, t: Tensor, point: Point, c: Pair) -> Tensor:
        """The weighting of an error in the target, not normalised."""
        w = self.weighting.rule(self._level(t, point, c))
        if self.weighting.space == "target":
            return w
        return w * (point.alpha / determinant(point.alpha, point.sigma, c)).square()

    def _average_rule(self) -> Tensor:
        """Mean of the rule under the time sampler, 0-d."""
        point = self.schedule.point(self.times.nodes)
        return (self.times.masses * self._rule(self.times.nodes, point, self.target(point))).sum()

    @torch.no_grad()
    def _check_numbers(self) -> None:
        """ValueError where legal options are so extreme that numbers overflow or every weight vanishes."""
        if any(parameter.device.type != "cpu" for parameter in self.parameters()):
            return  # made under another default device: the tables are on the CPU, the parameters not
        nodes = self.times.nodes
        ends = nodes[:0] if self.discrete else nodes.new_tensor([0.0, 1.0])
        mean = float(self._average_rule())
        values = self.coefficients(torch.cat([nodes, ends]))
        if math.isfinite(mean) and mean > 0 and all(bool(v.isfinite().all()) for v in values) and float(values.w.max()):
            return
        names = ("noise_scale", "logit_mean", "logit_std", "gamma", "p2_k", "sigmoid_bias", "k_init")
        given = ", ".join(f"{name}={self._settings[name]!r}" for name in names)
        raise ValueError(f"these options give weights that vanish, or numbers that overflow: {given}")


def check_ranges(settings: dict[str, Any]) -> None:
    """ValueError for a number or a choice that can never be right."""
    for name, choices in (("allocation", ALLOCATIONS), ("loss_space", LOSS_SPACES)):
        if settings[name] not in choices:
            raise ValueError(f"unknown {name} {settings[name]!r}; choose from {', '.join(choices)}")
    for name in ("stratified", "normalize", "as_sampling"):
        if not isinstance(settings[name], bool):
            raise ValueError(f"{name}={settings[name]!r} must be true or false")
    for name, least in (("num_timesteps", 2), ("k_bins", 1)):
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
    rules: dict[str, tuple[Callable[[float], bool], str]] = {
        "kappa_clip": (lambda x: x >= 0, "at least 0"),
        "noise_scale": (lambda x: x > 0, "above 0"),
        "logit_mean": (lambda x: True, "finite"),
        "logit_std": (lambda x: x > 0, "above 0"),
        "gamma": (lambda x: x > 0, "above 0"),
        "p2_k": (lambda x: x > 0, "above 0"),
        "sigmoid_bias": (lambda x: True, "finite"),
        "k_init": (lambda x: 0 < x < 1, "strictly between 0 and 1"),
    }
    for name, (legal, wanted) in rules.items():
        if name != "gamma" or settings[name] is not None:
            check_number(name, settings[name], legal, wanted)


def check_number(name: str, value: Any, legal: Callable[[float], bool], wanted: str) -> None:
    """ValueError for what is no finite number, or not a legal one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} must be a number {wanted}")
    if not (math.isfinite(value) and legal(value)):
        raise ValueError(f"{name}={value!r} must be a number {wanted}")


def check_combination(settings: dict[str, Any], discrete: bool) -> None:
    """ValueError for an option without meaning in this combination: it would be ignored in silence."""
    weighting, target = settings["weighting"], settings["target"]
    learnable = target not in SPACES
    eps_space = WEIGHTINGS[weighting].space == "eps"
    rows = (
        ("num_timesteps", 1000, discrete, "a continuous schedule has no steps"),
        ("allocation", "time", weighting == "erd", "only 'erd' has an allocation"),
        ("loss_space", "target", not eps_space, f"{weighting!r} weighs an error equally in every space"),
        ("kappa_clip", 0.0, settings["loss_space"] != "target", "loss_space='target' has no kappa"),
        ("logit_mean", 0.0, settings["time_sampler"] == "logit_normal", "only 'logit_normal' has it"),
        ("logit_std", 1.0, settings["time_sampler"] == "logit_normal", "only 'logit_normal' has it"),
        ("gamma", None, WEIGHTINGS[weighting].gamma is not None, f"weighting {weighting!r} has none"),
        ("p2_k", 1.0, weighting == "p2", "only 'p2' has it"),
        ("sigmoid_bias", 0.0, weighting == "sigmoid", "only 'sigmoid' has it"),
        ("k_init", 0.5, learnable, f"target {target!r} learns nothing"),
        ("k_bins", 128, target == "k(t)", "only target 'k(t)' has bins"),
        ("as_sampling", False, not learnable, f"target {target!r} is learnt, its density would change"),
    )
    for name, default, used, reason in rows:
        if settings[name] != default and not used:
            raise ValueError(f"{name}={settings[name]!r} cannot be combined with this process: {reason}")
