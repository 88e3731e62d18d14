"""`python -m erdfast.prepare`: your copies of CelebA and ImageNet to pixels in our own format, which loads fastest.

    --dataset celeba   --images img_align_celeba.zip --partition-file list_eval_partition.txt --out celeba64
    --dataset imagenet --images ILSVRC2012_img_train.tar --size 64 --out imagenet64

Nothing is downloaded. Under torchrun the processes share the parts. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from erdfast import cli
from erdfast.data import FileDataset, celeba, imagenet
from erdfast.data.convert import Writer
from erdfast.data.source import Source
from erdfast.encode import write_folder
from erdfast.training.parallel import World, open_world

_OF = {
    "celeba": ("partition_file", "partition", "crop", "attributes", "attribute"),
    "imagenet": ("class_names", "labels", "synsets"),
}
"""Options that one of the data sets has."""
_SMALLEST, _LARGEST = 8, 1024
_PICTURES_PER_THREAD = 16
"""Of a batch: all threads wait for its last picture."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Prepare your own copy of CelebA or ImageNet as uint8 pixels, cropped as the papers do; nothing is downloaded."""

    dataset: Literal["celeba", "imagenet"]
    """celeba: the middle of the aligned pictures, as for FID at 64x64; imagenet: ADM's crop, labels by synset."""
    images: Path
    """Folder of pictures, or a zip or tar that is read in place: img_align_celeba(.zip); ImageNet's folder of synset
    folders, or ILSVRC2012_img_train.tar."""
    out: Path
    """Folder to write; where an interrupted run left it unfinished, it goes on."""
    size: int = 64
    """Side of the results in pixels: 64, 128, 256 or 512, say."""
    partition_file: Path | None = None
    """celeba: list_eval_partition.txt (or Kaggle's .csv), whose order is kept."""
    partition: Literal["train", "val", "test", "all"] | None = None
    """celeba: which part of it; by default train."""
    crop: int | None = None
    """celeba: side of the middle of 178x218 pixels that is kept; by default 140."""
    attributes: Path | None = None
    """celeba: list_attr_celeba.txt (or Kaggle's .csv), for --attribute."""
    attribute: str | None = None
    """celeba: an attribute such as Male, whose absence and presence become labels 0 and 1; by default no labels."""
    class_names: Path | None = None
    """imagenet: readable names, one per line or JSON, in order or by synset; by default the synsets."""
    labels: Path | None = None
    """imagenet: labels of pictures without synset folders (the validation set): synsets or numbers from 0 on, one per
    line in the order of file names, or after them."""
    synsets: Path | None = None
    """imagenet: with --labels, all synsets, one per line; for the devkit's ground truth in the order of its numbers."""
    workers: int | None = None
    """Threads of each process that decode; by default one per CPU core of its share."""
    part_mib: int = 512
    """Size of a file, about; twice that is needed in memory."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range, or options that do not go together."""
        for dataset, names in _OF.items():
            for name in names:
                if dataset != self.dataset and getattr(self, name) is not None:
                    raise ValueError(f"--{name.replace('_', '-')} goes with --dataset {dataset} only")
        if not _SMALLEST <= self.size <= _LARGEST:
            raise ValueError(f"size is {self.size}; it must be from {_SMALLEST} to {_LARGEST}")
        for name in ("workers", "part_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.dataset == "celeba":
            self._validate_celeba()
        elif self.synsets is not None and self.labels is None:
            raise ValueError("--synsets goes with --labels FILE: synset folders say by themselves what they are")

    def _validate_celeba(self) -> None:
        if self.partition_file is None:
            raise ValueError("--partition-file is missing: name CelebA's list_eval_partition.txt")
        if (self.attribute is None) != (self.attributes is None):
            raise ValueError("--attribute NAME and --attributes list_attr_celeba.txt go together")
        crop, width = self.crop or celeba.CROP, min(celeba.ALIGNED)
        if self.crop is not None and not 1 <= self.crop <= width:
            raise ValueError(f"crop is {self.crop}; it must be from 1 to {width}, the width of aligned pictures")
        if self.size > crop:
            raise ValueError(f"size is {self.size}, more than the crop of {crop}: pictures would be enlarged")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, write what is missing, count; returns the exit code."""
    config = cli.parse(PrepareConfig, argv)
    config.validate()
    with warnings.catch_warnings(), open_world(torch.device("cpu")) as world:
        # Some of ImageNet's pictures have damaged EXIF, of which nothing is used.
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        _prepare(config, world)
    return 0


def _prepare(config: PrepareConfig, world: World) -> None:
    threads = config.workers or max(1, (os.cpu_count() or 1) // world.local_size)
    dataset = FileDataset(config.images, source=_OPENERS[config.dataset](config, threads))
    writer = Writer(dataset, dtype="uint8", batch=_PICTURES_PER_THREAD * threads)
    write_folder(config.out, writer, config.part_mib, world)
    if world.is_main:
        print(_describe_classes(dataset), flush=True)
        _warn_of_counts(config, dataset)


def _open_celeba(config: PrepareConfig, threads: int) -> Source:
    assert config.partition_file is not None
    return celeba.open_celeba(
        config.images,
        config.partition_file,
        config.partition or "train",
        size=config.size,
        crop=config.crop or celeba.CROP,
        attributes=config.attributes,
        attribute=config.attribute,
        threads=threads,
    )


def _open_imagenet(config: PrepareConfig, threads: int) -> Source:
    return imagenet.open_imagenet(
        config.images,
        size=config.size,
        class_names=config.class_names,
        labels=config.labels,
        synsets=config.synsets,
        threads=threads,
    )


_OPENERS: dict[str, Callable[[PrepareConfig, int], Source]] = {"celeba": _open_celeba, "imagenet": _open_imagenet}


# ---------------------------------------------------------------------------- counts


def _describe_classes(dataset: FileDataset) -> str:
    """For people: "... per class: 732 (n04399382) to 1,300 (n01440764)", or "50 each"."""
    if not dataset.num_classes:
        return f"{len(dataset):,} pictures, no labels"
    counts = dataset.labels(torch.arange(len(dataset))).bincount(minlength=dataset.num_classes)
    ends = [int(counts.argmin()), int(counts.argmax())]
    few, many = (f"{int(counts[label]):,} ({dataset.class_names[label]})" for label in ends)
    per_class = f"{few} to {many}" if counts[ends[0]] < counts[ends[1]] else f"{int(counts[0]):,} each"
    return f"{len(dataset):,} pictures in {dataset.num_classes:,} classes; per class: {per_class}"


def _warn_of_counts(config: PrepareConfig, dataset: FileDataset) -> None:
    """One line on stderr where the numbers are not those of the whole data set."""
    if config.dataset == "celeba":
        partition = config.partition or "train"
        known = {f"CelebA's partition '{partition}'": celeba.COUNTS[partition]}
    else:
        known = {f"ImageNet's {name} set": count for name, count in imagenet.COUNTS.items()}
    wrong_classes = config.dataset == "imagenet" and dataset.num_classes != imagenet.CLASSES
    if len(dataset) in known.values() and not wrong_classes:
        return
    expected = " and ".join(f"{name} has {count:,} pictures" for name, count in known.items())
    classes = f" in {dataset.num_classes:,} classes" if config.dataset == "imagenet" else ""
    of = f", in {imagenet.CLASSES:,} classes" if config.dataset == "imagenet" else ""
    print(f"warning: {len(dataset):,} pictures{classes}, but {expected}{of}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main, "erdfast.prepare")
