"""Batches on the device before they are asked for: gathered by a thread, copied while the device computes.

Which samples make up a batch is a function of (seed, step) alone (order.py): there is no state to save, and what a
process gets does not depend on how many there are.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dataset import Batch, Dataset
from .order import batch_flips, batch_indices

CACHES = ("auto", "disk", "ram", "gpu")
GPU_SHARE, RAM_SHARE = 0.4, 0.5
"""Of free memory that `auto` lets the data take."""
_LOAD_ROWS = 65_536
"""Samples that are read at once into a cache."""
_WAIT_S = 0.1


class Cached(Dataset):
    """A data set whose samples are held in memory, on the host or on a GPU, in the dtype that they are stored in."""

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        self.dataset = dataset
        self.shape, self.num_classes = dataset.shape, dataset.num_classes
        self.has_flips = False  # what would be mirrored is read from the data set itself
        first = dataset.gather(torch.zeros(1, dtype=torch.int64))
        self.moments_scale = first.moments_scale
        self.x = torch.empty((len(dataset), *first.x.shape[1:]), dtype=first.x.dtype, device=device)
        self.y = torch.empty(len(dataset), dtype=first.y.dtype, device=device)
        for start in range(0, len(dataset), _LOAD_ROWS):
            part = dataset.gather(torch.arange(start, min(start + _LOAD_ROWS, len(dataset))))
            self.x[start : start + len(part.x)].copy_(part.x)
            self.y[start : start + len(part.y)].copy_(part.y)

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: Tensor, flips: Tensor | None = None) -> Batch:
        """See `Dataset.gather`."""
        if flips is not None and bool(flips.any()):
            raise ValueError("cached samples are not mirrored")
        where = indices.to(self.x.device)
        return Batch(self.x.index_select(0, where), self.y.index_select(0, where), self.moments_scale)

    def describe(self) -> str:
        """See `Dataset.describe`."""
        return self.dataset.describe()


class _Ready(NamedTuple):
    """A batch that the thread has made, with what tells when its copy is done."""

    key: tuple[int, int]
    batch: Batch
    copied: torch.cuda.Event | None
    error: BaseException | None = None


class Loader:
    """The parts of every step's batch that one process takes.

    Args:
        dataset: what is gathered from.
        seed: decides the order.
        batch_size: of the global batch.
        parts: (offset, count) of this process's micro-batches in it, in the order in which a step takes them.
        device: where batches are wanted.
        flip: mirror samples at random, where the data set can.
        cache: disk (gather from the data set), ram, gpu (hold all samples there); auto: the fastest that has room.
        depth: batches that are made ahead; 0 for none, without a thread.
        say: prints a line for people.

    Raises:
        ValueError: a cache that does not exist here.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        batch_size: int,
        parts: Sequence[tuple[int, int]],
        device: torch.device,
        flip: bool = False,
        cache: str = "auto",
        depth: int = 2,
        say: Callable[[str], None] = print,
    ) -> None:
        if flip and not dataset.has_flips:
            raise ValueError(f"these data cannot be mirrored: {dataset.describe()}; leave --flip out (--no-flip)")
        self.seed, self.batch_size, self.parts, self.device = seed, batch_size, list(parts), device
        self.flip, self.depth = flip, depth
        self.cache = choose_cache(dataset, cache, device, flip=flip)
        self.dataset = dataset
        if self.cache != "disk":
            say(f"reading {len(dataset):,} samples into memory ({self.cache})")
            self.dataset = Cached(dataset, device if self.cache == "gpu" else torch.device("cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._queue: queue.Queue[_Ready] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._next: tuple[int, int] | None = None

    def batch(self, step: int, part: int) -> Batch:
        """Micro-batch `part` of a step, on the device; those that follow are being made when it returns.

        Raises:
            whatever gathering raised.
        """
        if self.depth == 0:
            return self._finish(self._make((step, part)))
        if self._thread is None or self._next != (step, part):
            self._restart((step, part))
        ready = self._take()
        if ready.error is not None:
            self.close()
            raise ready.error
        self._next = self._after((step, part))
        return self._finish(ready)

    def close(self) -> None:
        """End the thread; `batch` would begin anew."""
        self._stop.set()
        thread, self._thread, self._next = self._thread, None, None
        if thread is not None:
            while thread.is_alive():  # it may be waiting for room
                self._drain()
                thread.join(timeout=_WAIT_S)
        self._drain()

    # ------------------------------------------------------------------ the thread

    def _restart(self, key: tuple[int, int]) -> None:
        self.close()
        self._stop = threading.Event()
        # A daemon: an interpreter that ends without close() does not wait for it.
        self._thread = threading.Thread(target=self._work, args=(key, self._stop), daemon=True)
        self._thread.start()

    def _work(self, key: tuple[int, int], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                ready = self._make(key)
            except BaseException as error:
                ready = _Ready(key, Batch(torch.empty(0), torch.empty(0)), None, error)
            while not stop.is_set():
                try:
                    self._queue.put(ready, timeout=_WAIT_S)
                    break
                except queue.Full:
                    continue
            if ready.error is not None:
                return
            key = self._after(key)

    def _take(self) -> _Ready:
        while True:
            try:
                return self._queue.get(timeout=_WAIT_S)
            except queue.Empty:
                # Once it has ended, it puts nothing more: what is still not there never comes.
                if (self._thread is None or not self._thread.is_alive()) and self._queue.empty():
                    raise RuntimeError("the thread that gathers batches has ended without a word") from None

    def _drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return

    def _after(self, key: tuple[int, int]) -> tuple[int, int]:
        step, part = key
        return (step, part + 1) if part + 1 < len(self.parts) else (step + 1, 0)

    # ------------------------------------------------------------------ one batch

    def _make(self, key: tuple[int, int]) -> _Ready:
        """Gathered, and on its way to the device."""
        step, part = key
        offset, count = self.parts[part]
        where = {"rank_offset": offset, "count": count}
        indices = batch_indices(self.seed, step, self.batch_size, len(self.dataset), **where)
        flips = batch_flips(self.seed, step, self.batch_size, **where) if self.flip else None
        batch = self.dataset.gather(indices) if flips is None else self.dataset.gather(indices, flips)
        if self._stream is None:
            return _Ready(key, batch, None)
        with torch.cuda.stream(self._stream):
            # PyTorch keeps pinned memory for the next batch, and reuses it when the copy from it is done.
            x, y = (t if t.is_cuda else t.pin_memory().to(self.device, non_blocking=True) for t in batch[:2])
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return _Ready(key, Batch(x, y, batch.moments_scale), copied)

    def _finish(self, ready: _Ready) -> Batch:
        """The device waits for the copy; the host does not."""
        if ready.copied is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready.copied)
            for tensor in ready.batch[:2]:
                tensor.record_stream(current)
        return ready.batch


def choose_cache(dataset: Dataset, asked: str, device: torch.device, *, flip: bool = False) -> str:
    """Where the data live.

    Raises:
        ValueError: unknown, a GPU that is not there, or mirrored copies in a cache.
    """
    if asked not in CACHES:
        raise ValueError(f"unknown cache {asked!r}; choose from {', '.join(CACHES)}")
    if asked == "gpu" and device.type != "cuda":
        raise ValueError("cache gpu needs a GPU; choose disk, ram or auto")
    if flip:
        if asked in ("ram", "gpu"):
            raise ValueError(f"cache {asked} holds no mirrored samples; choose disk with --flip")
        return "disk"
    if asked != "auto":
        return asked
    needed = dataset_bytes(dataset)
    if device.type == "cuda" and needed <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "gpu"
    # Files are memory-mapped: what is read once is in RAM already, and on a CPU a copy of it gains nothing.
    if device.type == "cuda" and needed <= RAM_SHARE * _free_ram() / _processes_here():
        return "ram"
    return "disk"


def dataset_bytes(dataset: Dataset) -> int:
    """What all samples take, in the dtype in which they are gathered."""
    first = dataset.gather(torch.zeros(1, dtype=torch.int64))
    return len(dataset) * (first.x.nbytes + first.y.nbytes)


def _free_ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
