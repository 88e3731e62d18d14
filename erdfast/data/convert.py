"""Write a data set in our own format (store.py): part by part, by any number of processes, resumable at every part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from erdfast.job_file import begin_job
from erdfast.tensor_files import checksum, replace_tensors

from .dataset import Batch
from .files import FileDataset
from .rows import read_safetensors
from .store import DTYPES, JOB, MANIFEST, Manifest, Part, part_name, units_to_json, write_manifest
from .vae import Encoder

Advance = Callable[[int], object]
"""Told how many samples are done."""


class Writer:
    """The samples of a data set as tensors, range by range.

    Args:
        dataset: where they come from.
        dtype: of `DTYPES`, for latents; pixels stay uint8.
        encoder: turns pictures into moments; None stores what the data set holds.
        flips: store the mirror images of latents too; pixels are mirrored while training.
        batch: samples at a time.

    Raises:
        ValueError: an encoder for what are no pictures, or mirror images that cannot be had.
    """

    def __init__(
        self, dataset: FileDataset, *, dtype: str, encoder: Encoder | None = None, flips: bool = False, batch: int = 64
    ) -> None:
        if encoder is not None and dataset.kind != "pixels":
            raise ValueError(f"{dataset.path} holds {dataset.kind}, not pictures: --convert stores them without a VAE")
        if flips and not dataset.has_flips:
            raise ValueError(f"{dataset.path} holds no mirror images: leave --flips out")
        self.dataset, self.encoder, self.batch = dataset, encoder, batch
        self.dtype = DTYPES[dtype]
        self.kind = dataset.kind if encoder is None else "moments"
        self.flips = flips and self.kind != "pixels"
        self.manifest = self._manifest("uint8" if self.kind == "pixels" else dtype)

    def _manifest(self, dtype: str) -> Manifest:
        first = self._stored(torch.zeros(1, dtype=torch.int64))
        note, scale = self.dataset.note, self.dataset.gather(torch.zeros(1, dtype=torch.int64)).moments_scale
        units = self.dataset.vae_units
        if self.encoder is not None:
            (_, scale, note), units = self.encoder.scaling, self.encoder.network_units
        names, classes = self.dataset.class_names, self.dataset.num_classes
        return Manifest(
            kind=self.kind,
            rows=len(self.dataset),
            shape=tuple(first.shape[1:]),
            dtype=dtype,
            num_classes=classes,
            moments_scale=scale,
            flips=self.flips,
            note=note,
            origin=self.dataset.describe(),
            vae_units=units_to_json(units),
            class_names=tuple(names) if names != [str(label) for label in range(classes)] else (),
        )

    def tensors(self, start: int, stop: int, advance: Advance) -> dict[str, Tensor]:
        """Samples start..stop-1 under the names of store.py."""
        names = [self.kind, *([f"{self.kind}_flip"] if self.flips else [])]
        out = {name: torch.empty((stop - start, *self.manifest.shape), dtype=self._dtype) for name in names}
        labels = []
        for indices, pictures in self._batches(start, stop):
            where = slice(int(indices[0]) - start, int(indices[-1]) + 1 - start)
            for name in names:
                out[name][where] = self._stored(indices, pictures, flipped=name.endswith("_flip"))
                self._check(out[name][where], indices)
            if self.dataset.num_classes:
                labels.append(self.dataset.labels(indices))
            advance(len(indices))
        return out | ({"labels": torch.cat(labels)} if labels else {})

    def _check(self, x: Tensor, indices: Tensor) -> None:
        """Every sample is read here, and not only some as when a file is opened."""
        if self.kind == "pixels":
            return
        good = torch.isfinite(x).flatten(1).all(1)
        if self.kind == "moments":
            good &= (x[:, x.shape[1] // 2 :] >= 0).flatten(1).all(1)
        if not bool(good.all()):
            path, dtype, sample = self.dataset.path, self.manifest.dtype, int(indices[~good][0])
            raise ValueError(f"{path}: sample {sample} is not finite in {dtype}, or has negative deviations")

    @property
    def _dtype(self) -> torch.dtype:
        return torch.uint8 if self.kind == "pixels" else self.dtype

    def _batches(self, start: int, stop: int) -> Iterator[tuple[Tensor, Batch | None]]:
        """Indices, and for the VAE their pictures, of which the next are read meanwhile."""
        parts = [torch.arange(at, min(at + self.batch, stop)) for at in range(start, stop, self.batch)]
        if self.encoder is None:
            yield from ((indices, None) for indices in parts)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(self.dataset.gather, parts[0])
            for number, indices in enumerate(parts):
                pictures = coming.result()
                if number + 1 < len(parts):
                    coming = ahead.submit(self.dataset.gather, parts[number + 1])
                yield indices, pictures

    def _stored(self, indices: Tensor, pictures: Batch | None = None, *, flipped: bool = False) -> Tensor:
        """Rows as they will lie on the disk."""
        if self.encoder is not None:
            x = (self.dataset.gather(indices) if pictures is None else pictures).x
            return self.encoder.moments(x.flip(-1) if flipped else x).to(self.dtype)
        flips = torch.ones(len(indices), dtype=torch.bool) if flipped else None
        if self.kind == "pixels":
            return self.dataset.take(indices)
        return self.dataset.gather(indices, flips).x.to(self.dtype)


class Plan:
    """Which part holds which rows.

    Args:
        manifest: of the data.
        part_bytes: about the size of a part.
    """

    def __init__(self, manifest: Manifest, part_bytes: int) -> None:
        size = torch.Size(manifest.shape).numel() * DTYPES[manifest.dtype].itemsize
        each = max(1, part_bytes // (size * (2 if manifest.flips else 1)))
        self.ranges = [(at, min(at + each, manifest.rows)) for at in range(0, manifest.rows, each)]

    def name(self, number: int) -> str:
        """File of a part."""
        return part_name(number, len(self.ranges))


def begin(out: Path, writer: Writer, plan: Plan) -> bool:
    """Prepare the folder; by one process.

    Returns:
        Whether it is finished already.

    Raises:
        ValueError: it holds something else, or was begun with other options. OSError: it cannot be written.
    """
    job = {**json.loads(writer.manifest.to_json()), "ranges": len(plan.ranges)}
    job |= {"data": writer.dataset.fingerprint(), "vae": writer.encoder and writer.encoder.fingerprint}
    del job["vae_units"]  # follow from these and from the note; folders begun by older versions do not have them
    begun = (out / JOB).exists()
    if not begun and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and was not made by erdfast.encode or erdfast.prepare: choose a new or empty folder"
        )
    begin_job(out / JOB, job)
    return begun and (out / MANIFEST).exists()


def write_parts(out: Path, writer: Writer, plan: Plan, advance: Advance, *, rank: int = 0, size: int = 1) -> None:
    """Write what is missing of this process's parts: every `size`-th from `rank` on; each complete or absent.

    Raises:
        OSError: a part cannot be written; the others stay, and a later call goes on.
    """
    for number in range(rank, len(plan.ranges), size):
        start, stop = plan.ranges[number]
        path = out / plan.name(number)
        if path.exists():
            advance(stop - start)
            continue
        replace_tensors(path, writer.tensors(start, stop, advance))


def finish(out: Path, manifest: Manifest, plan: Plan) -> Manifest:
    """Read every part again, and write erdfast.json with their checksums; by one process.

    Raises:
        ValueError: a part is not what was written. OSError: a part is missing, or the disk is full.
    """

    def part(number: int) -> Part:
        path, (start, stop) = out / plan.name(number), plan.ranges[number]
        if len(read_safetensors(path)[manifest.kind]()) != stop - start:
            raise ValueError(f"{path} does not hold {stop - start:,} rows: remove it and run the same command again")
        return Part(file=path.name, rows=stop - start, bytes=path.stat().st_size, crc32=checksum(path))

    with ThreadPoolExecutor(8) as pool:  # zlib lets other threads run
        manifest = replace(manifest, parts=tuple(pool.map(part, range(len(plan.ranges)))))
    write_manifest(out, manifest)
    return manifest
