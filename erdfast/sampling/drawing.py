"""From an `ImageSampler` to pictures, by any number of processes: a batch becomes pictures while the next is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from erdfast.group import Group
from erdfast.sampling.parts import Parts
from erdfast.sampling.sample import ImageSampler

ToPictures = Callable[[Tensor], np.ndarray]
"""(B, C, H, W) in the units of the training data => (B, H', W', 1 or 3) uint8."""
Advance = Callable[[int], object]
"""Told how many more pictures are done."""


Result = TypeVar("Result")


class _Drawn(NamedTuple):
    """A batch on its way."""

    number: int
    """Of the part that it belongs to."""
    start: int
    """Place of its first image among all."""
    images: Tensor


def draw_all(
    sampler: ImageSampler, to_pictures: ToPictures, num: int, labels: Tensor | None, group: Group, advance: Advance
) -> np.ndarray:
    """All pictures in every process, each of which draws its share: for as many as one looks at.

    Args:
        sampler, to_pictures: how.
        num: pictures.
        labels: (num,) int64, or None.
        group: the processes.
        advance: told the pictures of this process.

    Returns:
        (num, H, W, 1 or 3) uint8.
    """
    start, stop = num * group.rank // group.size, num * (group.rank + 1) // group.size
    shape = torch.zeros(3, dtype=torch.int64, device=sampler.device)
    own: list[np.ndarray] = []
    if stop > start:
        drawn = _drawn(sampler, [(0, start, stop)], labels)
        for pictures in _behind(drawn, lambda batch: to_pictures(batch.images), sampler.device):
            own.append(pictures)
            advance(len(pictures))
        if start == 0:
            shape += torch.tensor(own[0].shape[1:], device=sampler.device)
    if group.size == 1:
        return np.concatenate(own)
    # A process without a share learns here how large pictures are.
    height, width, channels = group.all_reduce(shape).tolist()
    whole = torch.zeros(num, height, width, channels, dtype=torch.uint8, device=sampler.device)
    if own:
        whole[start:stop] = torch.from_numpy(np.concatenate(own)).to(sampler.device)
    return group.all_reduce(whole).cpu().numpy()


def draw_parts(
    parts: Parts,
    numbers: Iterable[int],
    sampler: ImageSampler,
    to_pictures: ToPictures,
    labels: Tensor | None,
    advance: Advance,
) -> None:
    """Draw and write these parts. Memory does not grow with their number.

    Args:
        parts, numbers: which; no other process may have them.
        sampler, to_pictures: how.
        labels: (num,) int64 of all pictures, or None.
        advance: told after every batch how many more pictures are done.

    Raises:
        OSError: a part cannot be written; those before stay.
    """
    ranges = [(number, *parts.ranges[number]) for number in numbers]
    pile = _Pile(parts)

    def finish(batch: _Drawn) -> int:
        return pile.add(batch, to_pictures(batch.images))

    for count in _behind(_drawn(sampler, ranges, labels), finish, sampler.device):
        advance(count)


def _drawn(sampler: ImageSampler, ranges: Iterable[tuple[int, int, int]], labels: Tensor | None) -> Iterator[_Drawn]:
    for number, start, stop in ranges:
        own = None if labels is None else labels[start:stop]
        for at, images in sampler.batches(stop - start, labels=own, first_id=start):
            yield _Drawn(number, start + at, images)


class _Pile:
    """Collects the batches of a part, and writes it when it is complete."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._pictures: list[np.ndarray] = []

    def add(self, batch: _Drawn, pictures: np.ndarray) -> int:
        """Returns how many pictures these are."""
        self._pictures.append(pictures)
        if batch.start + len(pictures) == self._parts.ranges[batch.number][1]:
            self._parts.write(batch.number, np.concatenate(self._pictures))
            self._pictures.clear()
        return len(pictures)


def _behind(drawn: Iterable[_Drawn], work: Callable[[_Drawn], Result], device: torch.device) -> Iterator[Result]:
    """`work` on every batch, in another thread while the next is drawn; at most two batches exist at a time."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(batch: _Drawn, ready: Any) -> Result:
        if stream is None or ready is None:
            return work(batch)
        with torch.cuda.stream(stream):  # waits for this batch, and not for the next, which is launched by then
            stream.wait_event(ready)
            batch.images.record_stream(stream)
            return work(batch)

    with ThreadPoolExecutor(1) as thread:
        pending: Future[Result] | None = None
        for batch in drawn:
            ready = None if stream is None else torch.cuda.current_stream(device).record_event()
            if pending is not None:
                yield pending.result()
            pending = thread.submit(run, batch, ready)
        if pending is not None:
            yield pending.result()
