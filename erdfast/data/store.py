"""Our own format: a few large safetensors files, memory-mapped, and a small JSON that says what they hold.

    erdfast.json                     kind, shape, dtype, classes, scale; name, rows, size and checksum of every part
    part-00000-of-00040.safetensors  latents | moments | pixels (n, ...), their mirror images *_flip, labels (n,) int64

A part is complete or absent, and erdfast.json is written last: a folder without it is not finished.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from erdfast.atomic import write_text
from erdfast.tensor_files import checksum

from .rows import Loaders, Rows, ShardedRows, read_safetensors
from .source import Affine, Source, VaeUnits

MANIFEST = "erdfast.json"
JOB = ".job.json"
"""What an unfinished folder is being made of: going on with other options would mix two data sets."""
FORMAT = 1
KINDS = ("latents", "moments", "pixels")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "uint8": torch.uint8}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file."""

    file: str
    rows: int
    bytes: int
    crc32: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of erdfast.json."""

    kind: str
    """One of `KINDS`."""
    rows: int
    shape: tuple[int, ...]
    """Of a row as stored: (C, H, W), moments (2C, H, W), pixels (H, W, C)."""
    dtype: str
    num_classes: int
    """0: there are no labels."""
    moments_scale: float | None
    """Factor of a draw of the moments."""
    flips: bool
    """Whether the mirror image of every row is stored too."""
    note: str
    """How the values are scaled, for people."""
    origin: str
    """What they were made from."""
    class_names: tuple[str, ...] = ()
    vae_units: dict[str, Any] | None = None
    """How the network's values come from a VAE's own: `scale` and `bias` per channel, `zero_to_one` (see VaeUnits)."""
    parts: tuple[Part, ...] = field(default=())

    def to_json(self) -> str:
        """As it lies on the disk."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """erdfast.json of a folder.

    Raises:
        ValueError: it is missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if values.pop("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        parts = tuple(Part(**part) for part in values.pop("parts"))
        shape, names = tuple(values.pop("shape")), tuple(values.pop("class_names"))
        manifest = Manifest(**values, shape=shape, class_names=names, parts=parts)
        _check(manifest)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.kind not in KINDS:
        raise ValueError(f"kind {manifest.kind!r}, expected one of {', '.join(KINDS)}")
    if manifest.rows != sum(part.rows for part in manifest.parts) or not manifest.parts:
        raise ValueError(f"its parts do not add up to {manifest.rows} rows")
    scale = manifest.moments_scale
    if scale is not None and not (type(scale) in (int, float) and 0 < scale < float("inf")):
        raise ValueError(f"moments_scale {scale!r}")
    units_from_json(manifest.vae_units)
    texts = (manifest.note, manifest.origin, manifest.dtype, *manifest.class_names)
    if not all(isinstance(text, str) for text in texts) or type(manifest.flips) is not bool:
        raise ValueError("note, origin, dtype and class_names must be texts, flips true or false")
    if manifest.dtype not in DTYPES:
        raise ValueError(f"dtype {manifest.dtype!r}, expected one of {', '.join(DTYPES)}")


def units_to_json(units: VaeUnits | None) -> dict[str, Any] | None:
    """As `Manifest.vae_units` holds them."""
    if units is None:
        return None
    numbers = {name: getattr(units.affine, name).flatten().tolist() for name in ("scale", "bias")}
    return {**numbers, "zero_to_one": units.zero_to_one}


def units_from_json(values: dict[str, Any] | None) -> VaeUnits | None:
    """The contrary of `units_to_json`.

    Raises:
        ValueError: they are no such thing.
    """
    if values is None:
        return None
    try:
        scale, bias = (torch.tensor(values[name], dtype=torch.float32) for name in ("scale", "bias"))
        zero_to_one = values["zero_to_one"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"vae_units {values!r}") from error
    good = scale.ndim == 1 and scale.shape == bias.shape and scale.isfinite().all() and bias.isfinite().all()
    if not good or not (scale > 0).all() or type(zero_to_one) is not bool:
        raise ValueError(f"vae_units {values!r}")
    return VaeUnits(Affine(scale.view(-1, 1, 1), bias.view(-1, 1, 1)), zero_to_one)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Finish a folder whose parts are all there.

    Raises:
        OSError: it cannot be written.
    """
    write_text(folder / MANIFEST, manifest.to_json())


def part_name(number: int, count: int) -> str:
    """File of a part."""
    return f"part-{number:05d}-of-{count:05d}.safetensors"


def open_store(folder: Path) -> Source:
    """The data of a folder with erdfast.json; sizes are compared, checksums are `verify`'s.

    Raises:
        ValueError: a part is missing, of another size, or does not hold what erdfast.json says; names it.
    """
    manifest = read_manifest(folder)
    rows, flipped, labels = [], [], []
    for part in manifest.parts:
        path = folder / part.file
        size = path.stat().st_size if path.is_file() else None
        if size != part.bytes:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {part.bytes:,}"
            raise ValueError(f"{part.file} {found}: the folder is incomplete")
        tensors = read_safetensors(path)
        rows.append(_load(tensors, manifest.kind, manifest, part))
        if manifest.flips:
            flipped.append(_load(tensors, f"{manifest.kind}_flip", manifest, part))
        if manifest.num_classes:
            labels.append(_labels(tensors, part))
    return Source(
        rows=ShardedRows(rows) if len(rows) > 1 else rows[0],
        labels=torch.cat(labels) if labels else None,
        kind=manifest.kind,
        note=manifest.note,
        moments_scale=manifest.moments_scale,
        units=units_from_json(manifest.vae_units),
        flipped=(ShardedRows(flipped) if len(flipped) > 1 else flipped[0]) if flipped else None,
        class_names=manifest.class_names,
        num_classes=manifest.num_classes,
    )


def _load(tensors: Loaders, name: str, manifest: Manifest, part: Part) -> Rows:
    if name not in tensors:
        raise ValueError(f"{part.file} holds no '{name}'")
    rows = tensors[name]()
    found = (len(rows), tuple(rows.shape), rows.dtype)
    if found != (part.rows, manifest.shape, DTYPES[manifest.dtype]):
        shape = (len(rows), *rows.shape)
        raise ValueError(f"{part.file}: '{name}' is {rows.dtype} of shape {shape}, which {MANIFEST} does not say")
    return rows


def _labels(tensors: Loaders, part: Part) -> Tensor:
    if "labels" not in tensors:
        raise ValueError(f"{part.file} holds no 'labels'")
    rows = tensors["labels"]()
    if len(rows) != part.rows:
        raise ValueError(f"{part.file} has {len(rows)} labels for {part.rows} rows")
    return rows.take(torch.arange(len(rows)))


def verify(folder: Path, part: Part) -> None:
    """Compare a part's checksum.

    Raises:
        ValueError: it is damaged.
    """
    if checksum(folder / part.file) != part.crc32:
        raise ValueError(f"{folder / part.file} is damaged: its checksum differs from that in {MANIFEST}")
