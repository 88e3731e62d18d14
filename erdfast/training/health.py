"""Whether the loss is still a number, watched on the device and read at log lines."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .parallel import World
from .step import StepResult

ADVICE = (
    "Try a lower --lr, --grad-clip 1, --warmup-steps 1000, a bounded --weighting such as erd or min_snr, "
    "or --precision fp32"
)
SPIKE = 3.0
"""A loss that many times the mean of earlier ones is worth a line; from batch to batch they differ by less."""
MOST_SKIPPED = 25
"""Updates left out in a row: then it is not a spike, and the run would only burn time."""


class NonFiniteError(ArithmeticError):
    """The loss became infinite or not a number; says when, at which noise level, and what to try."""


class Losses(NamedTuple):
    """Of the steps since the last reading."""

    mean: float
    largest: float
    skipped: int
    """Updates left out, over the whole run."""


class Health:
    """Remembers the first sample whose error was not finite, and the losses since the last reading.

    Args:
        world: the processes that train together.
        stop: whether an error that is not finite ends the run; else its update is left out and counted.
    """

    def __init__(self, world: World, *, stop: bool = True) -> None:
        device = world.device
        self.world, self.stop = world, stop
        self._first = torch.full((3,), math.nan, dtype=torch.float64, device=device)  # step, log-SNR, time
        self._seen = torch.zeros((), dtype=torch.bool, device=device)
        self._loss = torch.zeros(2, dtype=torch.float64, device=device)  # sum, count of the finite ones
        self._largest = torch.zeros((), dtype=torch.float64, device=device)
        self._skipped = torch.zeros(2, dtype=torch.int64, device=device)  # in all, in a row
        self._usual: float | None = None

    def update(self, step: int, result: StepResult) -> None:
        """Look at a micro-batch, without reading anything back."""
        bad = ~torch.isfinite(result.mse)
        first = bad.to(torch.uint8).argmax().reshape(1)  # plain indexing by a device scalar would synchronise
        levels = torch.cat([values.index_select(0, first) for values in (result.logsnr, result.time)]).double()
        here = torch.cat([levels.new_full((1,), step), levels])
        is_bad = bad.any() | ~torch.isfinite(result.loss.detach())
        self._first = torch.where(is_bad & ~self._seen, here, self._first)
        self._seen = self._seen | is_bad

    def add_step(self, loss: Tensor, grad_norm: Tensor | None) -> None:
        """Count a step: its loss in this process, and the norm of its gradient, by which updates are left out."""
        finite = torch.isfinite(loss)
        self._loss[0] += torch.where(finite, loss, 0.0)
        self._loss[1] += finite
        self._largest = torch.maximum(self._largest, torch.where(finite, loss, 0.0).double())
        if grad_norm is not None and not self.stop:
            left_out = (~torch.isfinite(grad_norm)).long()
            self._skipped[0] += left_out
            self._skipped[1] = (self._skipped[1] + left_out) * left_out

    def read(self, newest_checkpoint: Callable[[], str]) -> Losses:
        """Of all processes since the last reading; waits for the device.

        Raises:
            NonFiniteError: too many updates in a row were left out.
        """
        total, count = self.world.all_reduce(self._loss.clone()).tolist()
        largest = float(self._largest)  # of this process: a mean over fewer samples, which spikes the sooner
        skipped, in_a_row = self._skipped.tolist()
        self._loss.zero_()
        self._largest.zero_()
        if in_a_row >= MOST_SKIPPED:
            raise NonFiniteError(f"{in_a_row} gradients in a row were not finite; {newest_checkpoint()}. {ADVICE}")
        if not count:
            return Losses(math.nan, math.nan, skipped)
        return Losses(total / count, largest, skipped)

    def state_dict(self) -> dict[str, list[int]]:
        """What a run that continues goes on counting from; waits for the device."""
        return {"skipped": self._skipped.tolist()}

    def load_state_dict(self, state: Mapping[str, list[int]]) -> None:
        """Put back what `state_dict` returned; an older checkpoint has nothing."""
        self._skipped.copy_(torch.tensor(state.get("skipped", [0, 0])))

    def spike(self, losses: Losses) -> str | None:
        """A line about a loss far above the usual one, if there was one; learns what is usual."""
        if not math.isfinite(losses.mean):
            return None
        usual = self._usual
        self._usual = losses.mean if usual is None else 0.9 * usual + 0.1 * losses.mean
        if usual is not None and losses.largest > SPIKE * usual:
            return f"loss spike: up to {losses.largest:.4g}, where {usual:.4g} was usual"
        return None

    def check(self, newest_checkpoint: Callable[[], str]) -> None:
        """Raise if any loss so far was not finite, in every process if it was in one; waits for the device.

        Args:
            newest_checkpoint: called if so, says from where the run could continue.

        Raises:
            NonFiniteError: with the step, the noise level and what to try.
        """
        seen = bool(self._seen)
        if not self.stop or not self.world.any(seen):
            return
        if not seen:
            raise NonFiniteError(f"the loss is not finite in another process; {newest_checkpoint()}. {ADVICE}")
        step, logsnr, time = self._first.tolist()
        raise NonFiniteError(
            f"the loss is not finite at step {int(step) + 1:,} (log-SNR {logsnr:.2f}, time {time:.4g}); "
            f"{newest_checkpoint()}. {ADVICE}"
        )


def check_weights(weights: Iterable[Tensor], step: int, world: World, newest_checkpoint: Callable[[], str]) -> None:
    """Raise if weights are not finite: the last update may have spoilt them after a loss that still was.

    Raises:
        NonFiniteError: with the step and what to try, in every process.
    """
    # Of DTensors the part that is here.
    parts = [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]  # pyright: ignore[reportAttributeAccessIssue]
    finite = torch.stack([torch.isfinite(part).all() for part in parts]).all()
    if world.any(not bool(finite)):
        raise NonFiniteError(f"the weights are not finite after step {step:,}; {newest_checkpoint()}. {ADVICE}")
