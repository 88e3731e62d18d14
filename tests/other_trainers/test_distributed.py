"""DistributedDataParallel over two processes: both spellings, and one process with the whole batch, end the same."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from tests.other_trainers.loops import (
    Batch,
    Trajectory,
    assert_same,
    key_noise,
    make_batches,
    make_network,
    ours,
    theirs,
    train,
)
from tests.other_trainers.losses import RECIPES

RECIPE = RECIPES["diffusers v min-snr"]
WORLD = 2


def on_cpu(batches: list[Batch]) -> list[Batch]:
    return [Batch(*[value.cpu() for value in batch]) for batch in batches]


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    batches = [Batch(*[value.chunk(WORLD)[rank] for value in batch]) for batch in on_cpu(make_batches(RECIPE, 20))]
    for name, loss in (("ours", ours(RECIPE)), ("theirs", theirs(RECIPE, key_noise))):
        end = train(loss, batches, network=DistributedDataParallel(make_network().cpu()))
        torch.save(end._asdict(), folder / f"{name}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    spawn(work, (tmp_path,), nprocs=WORLD)

    def load(name: str, rank: int) -> Trajectory:
        return Trajectory(**torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True))

    for rank in range(WORLD):
        assert_same(load("ours", rank), load("theirs", rank), 2e-6)
        assert torch.equal(load("ours", rank).parameters, load("ours", 0).parameters)
    alone = train(ours(RECIPE), on_cpu(make_batches(RECIPE, 20)), network=make_network().cpu())
    mean = load("ours", 0)._replace(losses=(load("ours", 0).losses + load("ours", 1).losses) / WORLD)
    assert_same(mean, alone, 5e-6)
