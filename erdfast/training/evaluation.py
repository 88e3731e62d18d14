"""Evaluations of the averaged weights during training: every process draws and measures its share, then sums join.

Nothing of it reaches the training: noise is a function of a seed of its own and the image's number, as are labels.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from erdfast.config import EvalConfig
from erdfast.sampling import default_labels, sample_batches

from .evaluation_records import best, comparable, describe, evaluated_steps, make_record
from .measures import Measure, Progress, Sums
from .parallel import World
from .precision import PrecisionPolicy
from .progress import progress_bar
from .state import Averaged

EVAL_SEED = 1
"""As erdfast.evaluate has it: the same noise at every step, so that the numbers compare."""
SMALLEST_BATCH, LARGEST_BATCH = 32, 256
"""Images at a time: as many as a process trains on, but no fewer than a preview has, and no more than is any faster."""
FAILURES = (OSError, ValueError, ArithmeticError, torch.OutOfMemoryError)
"""What a run survives: no evaluation is worth losing it."""

Result = TypeVar("Result")


class Interrupted(Exception):
    """The run has been told to stop: what is measured now can be measured when it goes on."""


class Evaluator:
    """Measures the averaged network now and then.

    Args:
        config: how often, on how many images, how they are drawn.
        measure: by what; None for no evaluations.
        averaged: the network.
        precision: as in training.
        world: the processes; all of them call `is_due` and `evaluate`.
        batch_size: images that a process trains on at a time.
        run: the run directory.
        interrupted: whether this process has been told to stop.
        say: prints a line for people.
    """

    def __init__(
        self,
        config: EvalConfig,
        measure: Measure | None,
        averaged: Averaged,
        precision: PrecisionPolicy,
        world: World,
        *,
        batch_size: int,
        run: Path,
        interrupted: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.measure, self.averaged, self.precision = config, measure, averaged, precision
        self.world, self.run, self.interrupted, self.say = world, run, interrupted, say
        self._first, stop = (rank * config.eval_num // world.size for rank in (world.rank, world.rank + 1))
        self._count = stop - self._first
        batches = math.ceil(self._count / min(max(batch_size, SMALLEST_BATCH), LARGEST_BATCH))
        # Equal ones: a last batch of a few images would take nearly as long as any.
        self._batch_size = math.ceil(self._count / max(batches, 1))
        self._tried: set[int] | None = None

    def is_due(self, step: int, last_step: int) -> bool:
        """Whether a step is one to evaluate at, and neither this process nor one that it continues did so.

        The first call of a run that is resumed looks into its metrics.jsonl, which must be in order.
        """
        if self.measure is None:
            return False
        if self._tried is None:
            self._tried = self._recorded()
        return (step % self.config.eval_every == 0 or step == last_step) and step not in self._tried

    def _recorded(self) -> set[int]:
        """The steps of which metrics.jsonl has an evaluation, and 0, at which there is nothing to evaluate."""
        steps = self.world.first(lambda: " ".join(map(str, evaluated_steps(self.run))))
        return {0, *map(int, steps.split())}

    def evaluate(self, step: int) -> dict[str, Any] | None:
        """The record of an evaluation at a step that is due; None if something was in the way, which has been said."""
        assert self.measure is not None
        assert self._tried is not None
        self._tried.add(step)
        begun = time.monotonic()
        self.averaged.refresh()
        if (pending := self.measure.prepare()) is not None:
            if self._apart("pictures of the reference", pending.total, pending.work, step) is None:
                return None
            if self._together(pending.join, step) is None:
                return None
        num = self.config.eval_num
        sums = self._apart(f"evaluation at step {step:,}", num, partial(self._draw, self.measure), step)
        if sums is None:
            return None
        values = self._together(sums.values, step)
        if values is None:
            return None
        seconds = time.monotonic() - begun
        self.say(f"evaluation at step {step:,}: {describe(values)} ({num:,} images, {seconds:.0f} s)")
        return make_record(self.config, step, values)

    def say_best(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Say at which step the network was best, if it was measured.

        Args:
            records: of metrics.jsonl.
        """
        if chosen := best(comparable(records)):
            self.say(f"best evaluation: {chosen.value} at step {chosen.step:,}")

    def _draw(self, measure: Measure, progress: Progress) -> Sums:
        """This process's share of the images."""
        model, sums = self.averaged.model, measure.begin(self.config.eval_num)
        if not self._count:
            return sums
        labels = default_labels(self._count, model.num_classes, first=self._first) if model.num_classes else None
        for start, images in sample_batches(
            model,
            self.averaged.process,
            num=self._count,
            first_id=self._first,
            labels=labels,
            cfg_scale=self.config.eval_cfg_scale,
            steps=self.config.eval_steps,
            seed=EVAL_SEED,
            batch_size=self._batch_size,
            autocast_dtype=self.precision.autocast_dtype,
        ):
            if not bool(torch.isfinite(images).all()):
                raise ArithmeticError("the samples hold values that are not finite: the network has diverged")
            places = torch.arange(start, start + len(images))
            sums.add(images, self._first + places, None if labels is None else labels[places])
            progress(len(images))
        return sums

    def _together(self, work: Callable[[], Result], step: int) -> Result | None:
        """The result of work that all processes do at the same time and that ends alike in all of them.

        Memory that is used up in one of several ends the run: the others wait for it, in the middle of a sum.
        """
        alone = (torch.OutOfMemoryError,) if self.world.size == 1 else ()
        try:
            return work()
        except (ValueError, ArithmeticError, *alone) as error:
            self.say(f"no evaluation at step {step:,}: {' '.join(str(error).split())[:300] or type(error).__name__}")
            return None

    def _apart(self, what: str, total: int, work: Callable[[Progress], Result], step: int) -> Result | None:
        """The result of work of which every process does its part, if all came to its end.

        They meet after it and not before: one that fails leaves no other waiting.
        """
        result, why = None, ""
        with progress_bar(self.world, total=total, unit="image", desc=what, leave=False, delay=0.2) as bar:

            def progress(done: int) -> None:
                if self.interrupted():
                    raise Interrupted
                bar.update(min(done * self.world.size, total - bar.n))

            try:
                result = work(progress)
            except Interrupted:
                why = "the run has been told to stop"
            except FAILURES as error:
                why = " ".join(str(error).split())[:300] or type(error).__name__
                if not self.world.is_main:  # the first process can tell its own reason alone
                    sys.stderr.write(f"{what}: process {self.world.rank}: {why}\n")
        if not self.world.any(bool(why)):
            return result
        self.say(f"no evaluation at step {step:,}: {why or 'another process did not come to its end'}")
        return None
