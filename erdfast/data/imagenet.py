"""ImageNet (ILSVRC 2012), cropped as ADM does it, from a copy that the user has.

Classes are synsets such as n01440764; a label is the place of its synset in the sorted list: 0 to 999, the numbers that
ADM, DiT and all who follow them use. The validation set comes without folders, and with labels in a file of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .class_names import read_class_names
from .containers import open_container
from .folders import check_classes
from .label_files import SYNSET, read_labels, read_synsets
from .pictures import picture_decoder
from .sample_files import THREADS, SampleRows
from .source import Source, guarded

COUNTS = {"training": 1_281_167, "validation": 50_000}
"""Pictures of each set."""
CLASSES = 1000
_SYNSET = re.compile(SYNSET)


def open_imagenet(
    images: Path,
    *,
    size: int,
    class_names: Path | None = None,
    labels: Path | None = None,
    synsets: Path | None = None,
    threads: int = THREADS,
) -> Source:
    """Pictures in the order of their paths, which is that of their labels where folders give them.

    Args:
        images: folder of synset folders, ILSVRC2012_img_train.tar, or a zip; with `labels` one of pictures alone.
        size: side of the results in pixels.
        class_names: see `class_names.read_class_names`; by default classes are called by their synsets.
        labels: see `label_files.read_labels`.
        synsets: all classes, one per line, for `labels`.
        threads: that read and decode.

    Raises:
        ValueError: a missing or damaged file, a picture without a class; names it.
    """
    container = open_container(images)
    if labels is None:
        numbers, classes = _by_folder(container.names, images)
    else:
        if inside := next((name for name in container.names if _synset_of(name)), None):
            raise ValueError(f"{images}: {inside} lies in the folder of its synset, and needs no --labels")
        known = None if synsets is None else read_synsets(synsets)
        numbers, classes = read_labels(labels, container.names, known)
    count = len(classes) or int(numbers.max()) + 1
    names = classes if class_names is None else read_class_names(class_names, classes, count)
    places = range(len(container.names))
    decode = picture_decoder(size)
    rows = guarded(images, lambda: SampleRows(container.choose(places), decode, images, threads))
    note = f"scaled to [-1, 1], shorter side {size}, middle {size}x{size}"
    return Source(rows, numbers, "pixels", note, class_names=names, num_classes=count)


def _by_folder(names: Sequence[str], images: Path) -> tuple[Tensor, tuple[str, ...]]:
    synsets = [_synset_of(name) for name in names]
    if None in synsets:
        raise ValueError(
            f"{images}: {names[synsets.index(None)]} lies in no synset folder such as n01440764: name the folder that "
            "holds those; for pictures without folders, such as the validation set, give --labels FILE"
        )
    classes = sorted({synset for synset in synsets if synset is not None})
    if images.is_dir() and any((images / name).is_dir() for name in classes):
        guarded(images, lambda: check_classes(images, tuple(classes)))
    number = {synset: index for index, synset in enumerate(classes)}
    return torch.tensor([number[synset] for synset in synsets if synset is not None]), tuple(classes)


def _synset_of(name: str) -> str | None:
    """The first folder of a path that is a synset."""
    return next((part for part in name.split("/")[:-1] if _SYNSET.fullmatch(part)), None)
