"""Many pictures on disk, part by part beside the npz file that they become; each part is complete or absent.

    samples.npz.parts/job.json                 what they are made of
    samples.npz.parts/part-00003-of-00049.npy  uint8 (n, H, W, C)

Which rows a part holds is settled when the work begins: it may go on in another number of processes.
"""

from __future__ import annotations

import glob
import math
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from erdfast.atomic import atomic_write
from erdfast.data.source import guarded
from erdfast.job_file import begin_job

JOB = "job.json"
PART_BYTES = 64 << 20
"""Of pictures: what a killed process loses at most."""


class Parts:
    """The parts of one file.

    Args:
        out: the npz file.
        num: pictures in all.
        shape: (H, W, C) of one, C 1 or 3.
        rows: pictures in a part.
    """

    def __init__(self, out: Path, num: int, shape: tuple[int, int, int], rows: int) -> None:
        self.out, self.num, self.shape = out, num, shape
        self.folder = folder_of(out)
        self.ranges = [(at, min(at + rows, num)) for at in range(0, num, rows)]

    def path(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{number:05d}-of-{len(self.ranges):05d}.npy"

    def missing(self) -> list[int]:
        """Numbers of the parts that are not on disk."""
        return [number for number in range(len(self.ranges)) if not self.path(number).exists()]

    def rows(self, numbers: Iterable[int]) -> int:
        """Pictures in these parts."""
        return sum(self.ranges[number][1] - self.ranges[number][0] for number in numbers)

    def write(self, number: int, pictures: np.ndarray) -> None:
        """Keep a part: uint8 (n, H, W, C).

        Raises:
            OSError: it cannot be written; the others stay.
        """
        with atomic_write(self.path(number)) as stream:
            np.save(stream, pictures, allow_pickle=False)

    def merge(self, labels: Tensor | None) -> None:
        """Make the npz file of all parts, then remove them; by one process. Memory is that of a part.

        Args:
            labels: (num,) int64, stored as `arr_1`; None for a file without it.

        Raises:
            ValueError: a part is missing or damaged; names it. OSError: the file cannot be written; the parts stay.
        """
        rgb = (self.num, *self.shape[:2], 3)
        with atomic_write(self.out) as stream, zipfile.ZipFile(stream, "w", allowZip64=True) as archive:
            with _member(archive, "arr_0.npy") as member:
                _write_npy(member, rgb, np.dtype(np.uint8), (self._read(i) for i in range(len(self.ranges))))
            if labels is not None:
                numbers = labels.numpy()
                with _member(archive, "arr_1.npy") as member:
                    _write_npy(member, numbers.shape, numbers.dtype, [numbers])
        shutil.rmtree(self.folder)

    def _read(self, number: int) -> np.ndarray:
        """A part in RGB."""
        path, (start, stop) = self.path(number), self.ranges[number]
        part = guarded(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False))
        if part.dtype != np.uint8 or part.shape != (stop - start, *self.shape):
            raise ValueError(f"{path} is damaged ({part.dtype} {part.shape}): remove it and run the same command again")
        return part if self.shape[2] == 3 else np.repeat(part, 3, axis=-1)


def folder_of(out: Path) -> Path:
    """Where the parts of a file are."""
    return out.with_name(f"{out.name}.parts")


def rows_per_part(num: int, shape: tuple[int, int, int], batch_size: int, processes: int) -> int:
    """Whole batches of up to `PART_BYTES`, and few enough for every process to have work."""
    share = math.ceil(num / processes)
    batch = min(batch_size, share)
    return batch * max(1, min(PART_BYTES // math.prod(shape), share) // batch)


def begin_parts(out: Path, num: int, shape: tuple[int, int, int], rows: int, job: dict[str, Any]) -> int:
    """Begin the work, or go on with it; by one process.

    Args:
        out, num, shape, rows: see Parts.
        job: what else determines the pictures, as JSON values.

    Returns:
        The rows of a part: those of the first time.

    Raises:
        ValueError: work of other options lies there; says which. OSError: it cannot be written.
    """
    folder = folder_of(out)
    job = {**job, "num": num, "shape": list(shape)}
    advice = f"choose another --out, or remove {folder}"
    begun = begin_job(folder / JOB, job, settled={"rows": rows}, advice=advice)
    if begun is None:
        return rows
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):  # of a process that was killed while merging
        left.unlink(missing_ok=True)
    settled = begun.get("rows")
    if type(settled) is not int or settled < 1:
        raise ValueError(f"{folder / JOB} cannot be read: rows is {settled!r}")
    return settled


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Without the time of day, so that equal pictures make equal files."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def _write_npy(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
    """A .npy file of `parts`, end to end."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in parts:
        stream.write(np.ascontiguousarray(part).data)
