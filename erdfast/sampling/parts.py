"""Many pictures on disk, part by part beside the npz file that they become; each part is complete or absent.

    samples.npz.parts/job.json                 what they are made of
    samples.npz.parts/part-00003-of-00049.npy  uint8 (n, H, W, C)

Which rows a part holds is settled when the work begins: it may go on in another number of processes.
"""

from __future__ import annotations

import glob
import json
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

    def is_begun(self) -> bool:
        """Whether this process sees the folder."""
        return (self.folder / JOB).exists()

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

    def merge(self, labels: Tensor | None, job: dict[str, Any]) -> None:
        """Make the npz file of all parts, then remove them; by one process. Memory is that of a part.

        Args:
            labels: (num,) int64, stored as `arr_1`; None for a file without it.
            job: see `begin_parts`; it becomes the file's comment, which `is_made` reads.

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
            archive.comment = _comment(job)
        _remove(self.folder)

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


def is_made(out: Path, job: dict[str, Any]) -> bool:
    """Whether the npz file is there, of the very same work; what a kill left of its parts is removed then."""
    comment = _comment(job)
    try:
        with zipfile.ZipFile(out) as archive:
            made = bool(comment) and archive.comment == comment
    except (OSError, zipfile.BadZipFile):
        return False
    if made and _comment_of(folder_of(out)) == comment:
        _remove(folder_of(out))
    return made


def begin_parts(out: Path, rows: int, job: dict[str, Any]) -> int:
    """Begin the work, or go on with it; by one process.

    Args:
        out, rows: see Parts.
        job: what determines the pictures, as JSON values.

    Returns:
        The rows of a part: those of the first time.

    Raises:
        ValueError: work of other options lies there; says which. OSError: it cannot be written.
    """
    folder = folder_of(out)
    if not (folder / JOB).exists():  # parts without it are of who knows what work
        _remove_parts(folder)
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


def _remove(folder: Path) -> None:
    """Parts first: without what says of which work they are, they could be taken for another's."""
    _remove_parts(folder)
    shutil.rmtree(folder)


def _remove_parts(folder: Path) -> None:
    for path in folder.glob("part-*.npy"):
        path.unlink()


def _comment(job: dict[str, Any]) -> bytes:
    """What a zip file can say of its work; nothing of one with thousands of classes."""
    text = json.dumps(job, sort_keys=True).encode()
    return text if len(text) <= zipfile.ZIP_MAX_COMMENT else b""


def _comment_of(folder: Path) -> bytes:
    """The same, of a folder of parts; nothing where there is none."""
    try:
        job = json.loads((folder / JOB).read_text())
        job.pop("rows", None)
    except (OSError, ValueError, AttributeError):
        return b""
    return _comment(job)


def _member(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    """Without the time of day, so that equal pictures make equal files."""
    return archive.open(zipfile.ZipInfo(name), "w", force_zip64=True)


def _write_npy(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, parts: Iterable[np.ndarray]) -> None:
    """A .npy file of `parts`, end to end."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, header)
    for part in parts:
        stream.write(np.ascontiguousarray(part).data)
