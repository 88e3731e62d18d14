"""Options of how weights are updated and averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from erdfast.typed_json import require

LrSchedule = Literal["constant", "cosine"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and what goes with it."""

    lr: float = 1e-4
    """Learning rate."""
    k_lr: float | None = None
    """Learning rate of a learnable target's w_k (targets k, k2, k(t)); by default --lr, as in k-Diff; 0 keeps k where
    it begins. Warm-up and lr_schedule act on it as on --lr; it is never decayed, and its gradient counts for grad_clip
    with all others."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the network."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    lr_schedule: LrSchedule = "constant"
    """The learning rate after warm-up: constant, or a cosine to 0 at the last step."""
    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        require("lr", self.lr, self.lr > 0, "above 0")
        if self.k_lr is not None:
            require("k_lr", self.k_lr, self.k_lr >= 0, "at least 0 (0 keeps k at k_init)")
        require("betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        require("adam_eps", self.adam_eps, self.adam_eps > 0, "above 0")
        require("weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        require("warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        require("grad_clip", self.grad_clip, self.grad_clip >= 0, "at least 0 (0 does not clip)")


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """Averages of the weights: what is sampled and published."""

    ema_decay: tuple[float, ...] = (0.9999,)
    """Decays of the averages, any number of them; the last is sampled and published."""
    ema_warmup: bool = False
    """Begin with smaller decays, (1 + step)/(10 + step), so that the first weights are soon forgotten."""
    ema_std: tuple[float, ...] = ()
    """Power-function averages of these relative widths instead (EDM2: 0.05 0.1), from which `python -m erdfast.ema`
    makes one of any width afterwards."""
    ema_snapshot_every: int = 0
    """Steps between snapshots of the power-function averages in RUN/ema; 0: at every checkpoint."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        for decay in self.ema_decay:
            require("ema_decay", decay, 0 <= decay < 1, "in [0, 1)")
        for std in self.ema_std:
            require("ema_std", std, 0.01 <= std <= 0.25, "in [0.01, 0.25]")
        require("ema_snapshot_every", self.ema_snapshot_every, self.ema_snapshot_every >= 0, "at least 0")
        if not self.ema_std and not self.ema_decay:
            raise ValueError("ema_decay is empty; name at least one decay in [0, 1)")
        for name in ("ema_decay", "ema_std"):
            if len({*getattr(self, name)}) < len(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; every average must be another")
        if self.ema_std and self.ema_warmup:
            raise ValueError("ema_warmup is for ema_decay: power-function averages need none")

    @property
    def count(self) -> int:
        """How many averages there are."""
        return len(self.ema_std or self.ema_decay)

    def describe(self) -> str:
        """For people: "0.9999", or "power std 0.05, 0.1"."""
        if self.ema_std:
            return "power std " + ", ".join(f"{std:g}" for std in self.ema_std)
        return ", ".join(f"{decay:g}" for decay in self.ema_decay) + (" after warm-up" if self.ema_warmup else "")
