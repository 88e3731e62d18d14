"""The loader gives what `gather(batch_indices(...))` gives, however far ahead it works, and ends what it starts."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from erdfast.data import batch_indices
from erdfast.data.convert import Plan, Writer, begin, finish, write_parts
from erdfast.data.dataset import Batch, Dataset
from erdfast.data.files import FileDataset
from erdfast.data.loader import Loader, choose_cache, dataset_bytes
from erdfast.data.order import batch_flips
from erdfast.data.rows import ByteRows, ShardedRows, read_safetensors

CPU = torch.device("cpu")
N, BATCH, SEED = 37, 12, 3
PARTS = [(2, 3), (5, 3), (8, 1)]
"""Of one process: not from the beginning, and unequal."""


class Numbers(Dataset):
    """Sample i is i + 0.5, and -(i + 0.5) mirrored; gathering can be made to fail or to wait."""

    shape, num_classes, has_flips = (1, 1, 1), 5, True

    def __init__(self) -> None:
        self.gathered = 0
        self.bad: Exception | None = None
        self.bad_at = -1

    def __len__(self) -> int:
        return N

    def gather(self, indices: Tensor, flips: Tensor | None = None) -> Batch:
        self.gathered += 1
        if self.bad is not None and self.gathered - 1 == self.bad_at:
            raise self.bad
        x = indices.float() + 0.5
        if flips is not None:
            x = torch.where(flips, -x, x)
        return Batch(x.view(-1, 1, 1, 1), indices % 5)

    def describe(self) -> str:
        return "37 numbers"


def loader(dataset: Dataset, **options) -> Loader:
    own = {"seed": SEED, "batch_size": BATCH, "parts": PARTS, "device": CPU, "cache": "disk", "say": lambda _line: None}
    return Loader(dataset, **(own | options))


def expected(dataset: Dataset, step: int, part: int, *, flip: bool = False) -> Batch:
    offset, count = PARTS[part]
    indices = batch_indices(SEED, step, BATCH, len(dataset), rank_offset=offset, count=count)
    flips = batch_flips(SEED, step, BATCH, rank_offset=offset, count=count) if flip else None
    return dataset.gather(indices, flips)


def assert_same(got: Batch, wanted: Batch) -> None:
    assert torch.equal(got.x, wanted.x)
    assert got.x.dtype == wanted.x.dtype
    assert torch.equal(got.y, wanted.y)
    assert got.moments_scale == wanted.moments_scale


def gathering_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "_work" in thread.name}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FileDataset:
    """Moments in our own format, in several files of unequal length."""
    folder = tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    np.save(folder / "latents.npy", np.abs(rng.standard_normal((N, 4, 3, 3))).astype(np.float32))
    np.save(folder / "labels.npy", rng.integers(0, 5, N))
    writer = Writer(FileDataset(folder / "latents.npy"), dtype="bf16")
    plan = Plan(writer.manifest, part_bytes=2 * 4 * 9 * 8)
    begin(folder / "out", writer, plan)
    write_parts(folder / "out", writer, plan, lambda _done: None)
    assert len(finish(folder / "out", writer.manifest, plan).parts) == 5
    return FileDataset(folder / "out")


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    before = gathering_threads()  # other tests of this process may have loaders of their own, which end when they like
    yield
    assert gathering_threads() <= before


# ---------------------------------------------------------------------------- what it gives


@pytest.mark.parametrize("cache", ["disk", "ram"])
@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_gives_what_gather_gives(store: FileDataset, cache: str, depth: int) -> None:
    ours = loader(store, cache=cache, depth=depth)
    keys = [(step, part) for step in range(8) for part in range(3)]  # over the ends of two epochs
    for step, part in keys:
        assert_same(ours.batch(step, part), expected(store, step, part))
    ours.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_begins_anew_wherever_it_is_asked(depth: int) -> None:
    data, reference = Numbers(), Numbers()
    ours = loader(data, depth=depth)
    for step, part in [(0, 0), (0, 1), (9, 2), (10, 0), (4, 1), (4, 1), (0, 0), (0, 2)]:
        assert_same(ours.batch(step, part), expected(reference, step, part))
    ours.close()
    assert_same(ours.batch(7, 0), expected(reference, 7, 0))
    ours.close()


def test_parts_join_to_the_batch(store: FileDataset) -> None:
    shares = [[(0, 5), (5, 1)], [(6, 6)]]
    whole = store.gather(batch_indices(SEED, 6, BATCH, N))
    loaders = [loader(store, parts=parts) for parts in shares]
    got = [one.batch(6, part) for one, parts in zip(loaders, shares, strict=True) for part in range(len(parts))]
    assert torch.equal(torch.cat([batch.x for batch in got]), whole.x)
    assert torch.equal(torch.cat([batch.y for batch in got]), whole.y)
    for one in loaders:
        one.close()


def test_works_ahead_by_its_depth_and_no_further() -> None:
    data = Numbers()
    ours = loader(data, depth=3)
    ours.batch(0, 0)
    end = time.monotonic() + 10
    while data.gathered < 5 and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.05)
    assert data.gathered == 5  # taken, three in the queue, and one in hand
    ours.close()
    assert data.gathered == 5


# ---------------------------------------------------------------------------- failures and ends


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_a_failure_belongs_to_its_batch(depth: int) -> None:
    data, reference, before = Numbers(), Numbers(), gathering_threads()
    ours = loader(data, depth=depth)
    data.bad, data.bad_at = OSError("the disk is gone"), 4  # the fifth batch: step 1, part 1
    for key in [(0, 0), (0, 1), (0, 2), (1, 0)]:
        assert_same(ours.batch(*key), expected(reference, *key))
    with pytest.raises(OSError, match="the disk is gone"):
        ours.batch(1, 1)
    assert gathering_threads() <= before
    for key in [(1, 1), (1, 2), (2, 0), (0, 0)]:
        assert_same(ours.batch(*key), expected(reference, *key))
    ours.close()


def test_closing_ends_the_thread_while_the_queue_is_full() -> None:
    before, ours = gathering_threads(), loader(Numbers(), depth=1)
    ours.batch(0, 0)
    while not ours._queue.full():
        time.sleep(0.001)
    (thread,) = gathering_threads() - before
    ours.close()
    assert not thread.is_alive()
    ours.close()  # again: nothing to do
    assert ours._queue.empty()


def test_a_thread_that_vanishes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = loader(Numbers())
    monkeypatch.setattr(ours, "_work", lambda _key, _stop: None)
    with pytest.raises(RuntimeError, match="has ended without a word"):
        ours.batch(0, 0)
    ours.close()


# ---------------------------------------------------------------------------- mirrored samples


@pytest.mark.parametrize("depth", [0, 2])
def test_mirrors_as_batch_flips_says(depth: int) -> None:
    ours, reference = loader(Numbers(), flip=True, depth=depth), Numbers()
    for step in range(3):
        for part in range(3):
            assert_same(ours.batch(step, part), expected(reference, step, part, flip=True))
    ours.close()


def test_flips_depend_on_seed_step_and_place_alone() -> None:
    whole = batch_flips(SEED, 5, BATCH)
    assert (whole.dtype, whole.shape) == (torch.bool, (BATCH,))
    for size in (1, 2, 3, 4, 6, 12):
        shares = [batch_flips(SEED, 5, BATCH, rank_offset=at, count=size) for at in range(0, BATCH, size)]
        assert torch.equal(torch.cat(shares), whole)
    assert torch.equal(batch_flips(SEED, 5, BATCH, rank_offset=7), whole[7:])
    many = batch_flips(SEED, 5, 1000)
    assert not torch.equal(batch_flips(SEED, 6, 1000), many)
    assert not torch.equal(batch_flips(SEED + 1, 5, 1000), many)


def test_about_half_are_mirrored() -> None:
    # 100,000 coins: standard deviation 0.0016.
    assert float(batch_flips(SEED, 0, 100_000).float().mean()) == pytest.approx(0.5, abs=0.008)
    by_step = torch.stack([batch_flips(SEED, step, 64) for step in range(500)]).float()
    assert float((by_step.mean(0) - 0.5).abs().max()) < 0.12  # each place: standard deviation 0.022


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank_offset": 8, "count": 5}, r"the part 8\.\.13 must lie within the batch of 12 samples"),
        ({"rank_offset": -1, "count": 2}, r"the part -1\.\.1 must lie within"),
        ({"rank_offset": 0, "count": -1}, r"the part 0\.\.-1 must lie within"),
        ({"rank_offset": 13}, r"the part 13\.\.12 must lie within"),
    ],
)
def test_flips_lie_within_the_batch(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batch_flips(SEED, 0, BATCH, **arguments)
    with pytest.raises(ValueError, match="need step >= 0 and batch >= 1, got step=-1"):
        batch_flips(SEED, -1, BATCH)
    assert batch_flips(SEED, 0, BATCH, rank_offset=12).numel() == 0


# ---------------------------------------------------------------------------- caches


def test_caches_that_cannot_be_are_refused(store: FileDataset) -> None:
    with pytest.raises(ValueError, match="unknown cache 'tape'; choose from auto, disk, ram, gpu"):
        choose_cache(store, "tape", CPU)
    with pytest.raises(ValueError, match="cache gpu needs a GPU; choose disk, ram or auto"):
        choose_cache(store, "gpu", CPU)
    with pytest.raises(ValueError, match="cache ram holds no mirrored samples; choose disk with --flip"):
        loader(Numbers(), cache="ram", flip=True)
    with pytest.raises(ValueError, match=r"these data cannot be mirrored: .*; leave --flip out"):
        loader(store, flip=True)


def test_what_is_chosen_on_a_cpu(store: FileDataset) -> None:
    assert choose_cache(store, "auto", CPU) == "disk"
    assert choose_cache(Numbers(), "auto", CPU, flip=True) == "disk"
    assert choose_cache(Numbers(), "disk", CPU, flip=True) == "disk"
    assert choose_cache(store, "ram", CPU) == "ram"
    assert dataset_bytes(store) == N * (2 * 4 * 9 + 8)
    said: list[str] = []
    loader(store, cache="ram", say=said.append)
    loader(store, cache="disk", say=said.append)
    assert said == ["reading 37 samples into memory (ram)"]


def test_cached_samples_keep_type_and_scale(store: FileDataset) -> None:
    cached = loader(store, cache="ram").dataset
    assert len(cached) == N
    assert cached.describe() == store.describe()
    assert not cached.has_flips
    assert_same(cached.gather(torch.arange(N)), store.gather(torch.arange(N)))
    with pytest.raises(ValueError, match="cached samples are not mirrored"):
        cached.gather(torch.arange(2), torch.tensor([True, False]))
    assert cached.gather(torch.arange(2), torch.zeros(2, dtype=torch.bool)).x.shape[0] == 2


# ---------------------------------------------------------------------------- rows of several files


def test_rows_of_several_files_come_in_the_order_asked(store: FileDataset) -> None:
    single = store.gather(torch.arange(N)).x
    for indices in ([36, 0, 8, 7, 8, 8, 35], [0], list(range(N)), [9] * 20, []):
        where = torch.tensor(indices, dtype=torch.int64)
        got = store.gather(where).x
        assert torch.equal(got, single[where])
        assert got.is_contiguous()
        got.zero_()  # a copy: the file and later batches stay
    assert torch.equal(store.gather(torch.arange(N)).x, single)


def test_rows_are_announced_once(store: FileDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ShardedRows([read_safetensors(path)["latents"]() for path in sorted(store.path.glob("part-*"))])
    announced: list[int] = []
    announce = ByteRows.announce

    def listen(shard: ByteRows, row: int) -> None:
        announced.append(row)
        announce(shard, row)

    monkeypatch.setattr(ByteRows, "announce", listen)
    rows.take(torch.tensor([3, 30, 36]))
    rows.take(torch.tensor([30, 3, 4]))
    assert announced == [3, 6, 4, 4]  # of the first, fourth, fifth and first file


def test_rows_that_are_not_bytes_are_taken_by_shard() -> None:
    class Counting:
        dtype, shape = torch.float32, (2,)

        def __init__(self, start: int, count: int) -> None:
            self.rows = torch.arange(2.0 * start, 2.0 * (start + count)).view(count, 2)
            self.asked = 0

        def __len__(self) -> int:
            return len(self.rows)

        def take(self, indices: Tensor) -> Tensor:
            self.asked += 1
            return self.rows[indices]

    shards = [Counting(0, 3), Counting(3, 1), Counting(4, 5)]
    where = torch.tensor([8, 0, 4, 2, 8])
    got = ShardedRows(shards).take(where)
    assert got.tolist() == [[2.0 * i, 2.0 * i + 1] for i in where.tolist()]
    assert [shard.asked for shard in shards] == [1, 0, 1]
