"""The sides of bench_loader: VAE moments [mean, standard deviation] in the files of each project, and how it reads.

What the others do is imitated in code of our own, without what they compute afterwards: ERD after its data set's code,
the others after how they store their samples.

- hdf5: ERD's `Latent` data set. One HDF5 file, float32 `train_latents` and uint16 `train_labels`, not chunked; each
  sample opens the file, reads one row of each, and closes it. Its tensor is made by a copy.
- hdf5_held: the same with the file held open by each worker, which is what one would mend first.
- npy: fast-DiT. A float32 file per sample, and one per label in a folder beside it. (EDM2 and REPA have the same files
  without the labels'.)
- safetensors: LightningDiT. Shards with `latents` and `labels`; each sample looks up its shard in a dict with one entry
  per sample, opens it, and takes a slice of one row of both.

Each of them is a map-style data set in a torch DataLoader that shuffles, with persistent workers. Ours is `Loader` on
the files that `erdfast.encode --convert` writes, bfloat16, and `gather`, what its thread calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from erdfast.data.convert import Plan, Writer, begin, finish, write_parts
from erdfast.data.files import FileDataset
from erdfast.data.loader import Loader
from erdfast.data.order import batch_indices
from erdfast.tensor_files import replace_tensors

SHAPE = (8, 32, 32)
SAMPLE_VALUES = 8 * 32 * 32
CLASSES = 1000
PARTS = 8
"""Files of our own format: enough that a batch takes from many."""
FILE_ROWS = 4096
"""Rows of the sides with a file per sample, and of the shards: more files would take minutes to write."""
SHARD_ROWS = 1024
CHUNK = 2048
SEED = 0
HDF5, STORE, NPY, SHARDS = "moments.h5", "store", "npy", "shards"

Samples = tuple[Tensor, Tensor]
"""(B, 8, 32, 32) and (B,)."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What all sides read, and how much a turn is."""

    folder: Path
    rows: int
    batch: int
    workers: int
    batches: int
    """Of a turn of ours."""
    slow_batches: int
    """Of a turn of the others."""


class Side(Protocol):
    """Reads one way."""

    batches: int
    """Of a turn."""
    value_bytes: int
    """Of a number in the tensors that it gives."""

    def turn(self, number: int) -> Iterator[Samples]:
        """The batches of a turn; nothing is read before it begins or after it ends."""
        ...

    def indices(self, number: int) -> Tensor:
        """Which samples a turn gives, in order: every turn others, spread over all rows."""
        ...

    def close(self) -> None:
        """End threads and processes."""
        ...


# ---------------------------------------------------------------------------- data


def write_data(folder: Path, rows: int) -> None:
    """Random moments in all formats; the sides with many files get the first FILE_ROWS.

    Raises:
        ImportError: h5py is not installed.
    """
    import h5py

    generator = torch.Generator().manual_seed(SEED)
    with h5py.File(folder / HDF5, "w") as file:
        x = file.create_dataset("train_latents", (rows, *SHAPE), dtype="float32")
        y = file.create_dataset("train_labels", (rows,), dtype="uint16")
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            moments = torch.randn(count, *SHAPE, generator=generator)
            moments[:, SHAPE[0] // 2 :].abs_()  # standard deviations
            labels = torch.randint(0, CLASSES, (count,), generator=generator)
            x[start : start + count] = moments.numpy()
            y[start : start + count] = labels.numpy()
            few = max(0, min(FILE_ROWS - start, count))
            _write_npy(folder / NPY, start, moments[:few], labels[:few])
            _write_shards(folder / SHARDS, start, moments[:few], labels[:few])
    _write_store(folder / HDF5, folder / STORE, rows)


def _write_npy(folder: Path, start: int, moments: Tensor, labels: Tensor) -> None:
    for name in ("features", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (x, y) in enumerate(zip(moments.numpy(), labels.numpy(), strict=True), start):
        np.save(folder / "features" / f"{i}.npy", x[None])
        np.save(folder / "labels" / f"{i}.npy", y[None])


def _write_shards(folder: Path, start: int, moments: Tensor, labels: Tensor) -> None:
    folder.mkdir(exist_ok=True)
    for at in range(0, len(moments), SHARD_ROWS):
        tensors = {"latents": moments[at : at + SHARD_ROWS], "labels": labels[at : at + SHARD_ROWS]}
        name = f"latents_{(start + at) // SHARD_ROWS:04d}.safetensors"
        replace_tensors(folder / name, {key: value.contiguous() for key, value in tensors.items()})


def _write_store(hdf5: Path, out: Path, rows: int) -> None:
    writer = Writer(FileDataset(hdf5), dtype="bf16", batch=CHUNK)
    plan = Plan(writer.manifest, part_bytes=2 * SAMPLE_VALUES * -(-rows // PARTS))
    begin(out, writer, plan)
    write_parts(out, writer, plan, lambda _done: None)
    finish(out, writer.manifest, plan)


# ---------------------------------------------------------------------------- ours


class OurLoader:
    """`Loader`, two batches ahead; it begins anew in every turn, as the workers of the others do."""

    value_bytes = 2

    def __init__(self, options: LoadOptions) -> None:
        self.batches, self.batch = options.batches, options.batch
        self.dataset = FileDataset(options.folder / STORE)
        self.loader = Loader(
            self.dataset,
            seed=SEED,
            batch_size=self.batch,
            parts=[(0, self.batch)],
            device=torch.device("cpu"),
            cache="disk",
            depth=2,
        )

    def turn(self, number: int) -> Iterator[Samples]:
        """See `Side.turn`."""
        for step in range(number * self.batches, (number + 1) * self.batches):
            got = self.loader.batch(step, 0)
            yield got.x, got.y
        self.loader.close()

    def indices(self, number: int) -> Tensor:
        """See `Side.indices`."""
        steps = range(number * self.batches, (number + 1) * self.batches)
        return torch.cat([batch_indices(SEED, step, self.batch, len(self.dataset)) for step in steps])

    def close(self) -> None:
        """See `Side.close`."""
        self.loader.close()


class OurGather(OurLoader):
    """What the loader's thread does, without it."""

    def turn(self, number: int) -> Iterator[Samples]:
        """See `Side.turn`."""
        for step in range(number * self.batches, (number + 1) * self.batches):
            got = self.dataset.gather(batch_indices(SEED, step, self.batch, len(self.dataset)))
            yield got.x, got.y


# ---------------------------------------------------------------------------- the others


class HDF5PerSample(TorchDataset[Samples]):
    """Opens the file for each sample."""

    def __init__(self, folder: Path) -> None:
        import h5py

        self.path, self.open = folder / HDF5, h5py.File
        with self.open(self.path, "r") as file:
            self.count = file["train_latents"].shape[0]  # type: ignore[union-attr]  # h5py: any kind of object

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Samples:
        with self.open(self.path, "r") as file:
            return _hdf5_sample(file, index)


class HDF5Held(HDF5PerSample):
    """Opens it once in each worker, after the fork: handles must not be shared."""

    file: Any = None

    def __getitem__(self, index: int) -> Samples:
        if self.file is None:
            self.file = self.open(self.path, "r")
        return _hdf5_sample(self.file, index)


def _hdf5_sample(file: Any, index: int) -> Samples:
    x, y = file["train_latents"][index], file["train_labels"][index]
    return torch.tensor(x), torch.tensor(y, dtype=torch.int64)


class NpyPerSample(TorchDataset[Samples]):
    """Two files per sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / NPY
        self.names = sorted((path.name for path in (self.folder / "features").iterdir()), key=lambda n: int(n[:-4]))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Samples:
        name = self.names[index]
        x, y = np.load(self.folder / "features" / name), np.load(self.folder / "labels" / name)
        return torch.from_numpy(x).squeeze(0), torch.from_numpy(y).squeeze(0)


class SafetensorsPerSample(TorchDataset[Samples]):
    """Opens a shard for each sample."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.open = safe_open
        self.places: dict[int, tuple[str, int]] = {}
        for path in sorted((folder / SHARDS).glob("*.safetensors")):
            with self.open(path, framework="pt", device="cpu") as file:
                count = file.get_slice("labels").get_shape()[0]
            self.places |= {len(self.places) + i: (str(path), i) for i in range(count)}

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Samples:
        path, row = self.places[index]
        with self.open(path, framework="pt", device="cpu") as file:
            x, y = (file.get_slice(name)[row : row + 1] for name in ("latents", "labels"))
        return x.squeeze(0), y.squeeze(0)


class Order(Sampler[int]):
    """Shuffles as DataLoader does, with an order that is known beforehand."""

    def __init__(self) -> None:
        self.indices: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class InDataLoader:
    """A map-style data set in torch's DataLoader; a turn is an epoch of a part of it, so that workers then rest."""

    value_bytes = 4

    def __init__(self, dataset: TorchDataset[Samples], options: LoadOptions) -> None:
        self.dataset, self.batches, self.batch = dataset, options.slow_batches, options.batch
        self.order = Order()
        self.loader = DataLoader(
            dataset,
            batch_size=self.batch,
            sampler=self.order,
            num_workers=options.workers,
            drop_last=True,
            persistent_workers=options.workers > 0,
        )

    def turn(self, number: int) -> Iterator[Samples]:
        """See `Side.turn`."""
        self.order.indices = self.indices(number).tolist()
        yield from self.loader

    def indices(self, number: int) -> Tensor:
        """See `Side.indices`."""
        size = len(self.dataset)  # type: ignore[arg-type]  # torch declares no length for map-style data sets
        generator = torch.Generator().manual_seed(SEED + number)
        wanted = self.batches * self.batch
        passes = [torch.randperm(size, generator=generator) for _ in range(-(-wanted // size))]
        return torch.cat(passes)[:wanted]

    def close(self) -> None:
        """See `Side.close`: DataLoader ends its workers with its iterator."""
        self.loader._iterator = None


def _others(make: Callable[[Path], TorchDataset[Samples]]) -> Callable[[LoadOptions], Side]:
    return lambda options: InDataLoader(make(options.folder), options)


SIDES: dict[str, Callable[[LoadOptions], Side]] = {
    "loader": OurLoader,
    "gather": OurGather,
    "hdf5": _others(HDF5PerSample),
    "hdf5_held": _others(HDF5Held),
    "npy": _others(NpyPerSample),
    "safetensors": _others(SafetensorsPerSample),
}
