"""CelebA's aligned pictures, cropped as the papers that report FID at 64x64 do it, from a copy that the user has.

The middle 140x140 of 178x218 pixels (rows 39 to 178, columns 19 to 158), scaled by a bilinear filter whose width grows
with the reduction (2.19): ScoreSDE's `central_crop(140)` and `tf.image.resize(antialias=True)`; the ERD authors'
`CenterCrop(140)` and `Resize(64)` of torchvision, which on pictures of Pillow is Pillow's BILINEAR. The two differ by
rounding alone. Others crop otherwise (DDIM and U-ViT 128x128 around the nose): FIDs across crops do not compare.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .containers import open_container
from .pictures import middle_decoder
from .sample_files import THREADS, SampleRows
from .source import Source, guarded
from .text_tables import read_rows

ALIGNED = (178, 218)
"""Width and height of every picture in img_align_celeba."""
CROP = 140
PARTITIONS = {"train": 0, "val": 1, "test": 2}
"""As list_eval_partition.txt numbers them."""
COUNTS = {"train": 162_770, "val": 19_867, "test": 19_962, "all": 202_599}
"""Pictures of each partition."""


def open_celeba(
    images: Path,
    partition_file: Path,
    partition: str,
    *,
    size: int,
    crop: int = CROP,
    attributes: Path | None = None,
    attribute: str | None = None,
    threads: int = THREADS,
) -> Source:
    """Pictures of a partition, in the order of its file.

    Args:
        images: folder of img_align_celeba, or a zip or tar of it.
        partition_file: list_eval_partition.txt, or .csv.
        partition: of `COUNTS`.
        size: side of the results in pixels.
        crop: side of the middle that is kept, in pixels of the aligned pictures.
        attributes: list_attr_celeba.txt, or .csv.
        attribute: one of its columns, which becomes the label: 1 where it holds, else 0. None: there are no labels.
        threads: that read and decode.

    Raises:
        ValueError: a missing or damaged file, a picture or attribute that is not there; names it.
    """
    names = partition_names(partition_file, partition)
    labels = None
    if attribute is not None:
        assert attributes is not None
        labels = read_attribute(attributes, attribute, names)
    container = open_container(images)
    places = _places(images, container.names, names, partition_file)
    decode = middle_decoder(expected=ALIGNED, crop=crop, size=size)
    rows = guarded(images, lambda: SampleRows(container.choose(places), decode, images, threads))
    note = f"scaled to [-1, 1], {partition} partition, middle {crop}x{crop} resized (bilinear)"
    if attribute is None:
        return Source(rows, None, "pixels", note, num_classes=0)
    return Source(rows, labels, "pixels", note, class_names=(f"not {attribute}", attribute), num_classes=2)


def partition_names(path: Path, partition: str) -> list[str]:
    """File names of a partition.

    Raises:
        ValueError: a line is not of the form "000001.jpg 0", a name comes twice, or the partition is empty.
    """
    known = {str(number) for number in PARTITIONS.values()}
    wanted = known if partition == "all" else {str(PARTITIONS[partition])}
    rows = [(number, words) for number, words in read_rows(path) if words != ["image_id", "partition"]]  # Kaggle's
    for number, words in rows:
        if len(words) != 2 or words[1] not in known:
            text = " ".join(words)
            numbers = ", ".join(f"{value} ({name})" for name, value in PARTITIONS.items())
            raise ValueError(f"{path}, line {number}: {text!r:.100} is no file name and partition out of {numbers}")
    twice, times = Counter(words[0] for _, words in rows).most_common(1)[0] if rows else ("", 0)
    if times > 1:
        raise ValueError(f"{path}: it names {twice} {times} times")
    names = [name for _, (name, value) in rows if value in wanted]
    if not names:
        raise ValueError(f"{path}: it names no picture of the partition '{partition}'")
    return names


def read_attribute(path: Path, attribute: str, names: Sequence[str]) -> Tensor:
    """(N,) int64, 1 where the attribute holds.

    Raises:
        ValueError: there is no such attribute, no line for a name, or more than one; names it.
    """
    rows = read_rows(path)
    _, header = next(rows)
    if len(header) == 1 and header[0].isdigit():  # the number of pictures
        _, header = next(rows, (2, []))
    columns = header[1:] if header[:1] == ["image_id"] else header
    if attribute not in columns:
        close = difflib.get_close_matches(attribute, columns, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{path}: no attribute {attribute!r}{meant}; choose from {', '.join(columns):.1000}")
    column = columns.index(attribute)
    values: dict[str, int] = {}
    for number, (name, *flags) in rows:
        if len(flags) != len(columns) or flags[column] not in ("1", "-1"):
            raise ValueError(f"{path}, line {number}: expected a file name and {len(columns)} values 1 or -1")
        if name in values:
            raise ValueError(f"{path}, line {number}: {name} has a line already")
        values[name] = int(flags[column] == "1")
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{path}: it has no line for {missing[0]} (missing: {len(missing):,} of {len(names):,})")
    return torch.tensor([values[name] for name in names], dtype=torch.int64)


def _places(images: Path, found: Sequence[str], names: Sequence[str], partition_file: Path) -> list[int]:
    """Where the names lie; folders above them do not matter: copies differ in how many there are."""
    place: dict[str, int] = {}
    for index, path in enumerate(found):
        name = path.rpartition("/")[2]
        if name in place:
            raise ValueError(f"{images}: {found[place[name]]} and {path} have the same name: name one of their folders")
        place[name] = index
    if missing := [name for name in names if name not in place]:
        raise ValueError(
            f"{images}: {missing[0]} is missing, which {partition_file} names "
            f"(missing: {len(missing):,} of {len(names):,})"
        )
    return [place[name] for name in names]
