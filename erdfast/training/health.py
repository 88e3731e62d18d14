"""Whether the loss is still a number, watched on the device and read at log lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .step import StepResult

ADVICE = (
    "Try a lower --lr, --grad-clip 1, --warmup-steps 1000, a bounded --weighting such as erd or min_snr, "
    "or --precision fp32"
)


class NonFiniteError(ArithmeticError):
    """The loss became infinite or not a number; says when, at which noise level, and what to try."""


class Health:
    """Remembers the first sample whose error was not finite, and the mean loss since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((3,), math.nan, dtype=torch.float64, device=device)  # step, log-SNR, time
        self._seen = torch.zeros((), dtype=torch.bool, device=device)
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum, count

    def update(self, step: int, result: StepResult) -> None:
        """Look at a micro-batch, without reading anything back."""
        bad = ~torch.isfinite(result.mse)
        first = bad.to(torch.uint8).argmax().reshape(1)  # plain indexing by a device scalar would synchronise
        levels = torch.cat([values.index_select(0, first) for values in (result.logsnr, result.time)]).double()
        here = torch.cat([levels.new_full((1,), step), levels])
        is_bad = bad.any() | ~torch.isfinite(result.loss.detach())
        self._first = torch.where(is_bad & ~self._seen, here, self._first)
        self._seen = self._seen | is_bad

    def add_loss(self, loss: Tensor) -> None:
        """Count a step's loss into the mean."""
        self._loss[0] += loss
        self._loss[1] += 1

    def read_mean_loss(self) -> float:
        """Mean loss of the steps since the last reading; waits for the device."""
        total, count = self._loss.tolist()
        self._loss.zero_()
        return total / max(count, 1)

    def check(self, newest_checkpoint: Callable[[], str]) -> None:
        """Raise if any loss so far was not finite; waits for the device.

        Args:
            newest_checkpoint: called if so, says from where the run could continue.

        Raises:
            NonFiniteError: with the step, the noise level and what to try.
        """
        if not bool(self._seen):
            return
        step, logsnr, time = self._first.tolist()
        raise NonFiniteError(
            f"the loss is not finite at step {int(step) + 1:,} (log-SNR {logsnr:.2f}, time {time:.4g}); "
            f"{newest_checkpoint()}. {ADVICE}"
        )


def check_weights(weights: Iterable[Tensor], step: int, newest_checkpoint: Callable[[], str]) -> None:
    """Raise if weights are not finite: the last update may have spoilt them after a loss that still was.

    Raises:
        NonFiniteError: with the step and what to try.
    """
    if not bool(torch.stack([torch.isfinite(weight).all() for weight in weights]).all()):
        raise NonFiniteError(f"the weights are not finite after step {step:,}; {newest_checkpoint()}. {ADVICE}")
