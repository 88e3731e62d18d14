"""Labels of ImageNet pictures that lie in no synset folders: the validation set's, as different people keep them.

    n01751748                                        one synset per line, in the order of the pictures' names
    65                                               one number per line: the place of the synset in the sorted list
    490                                              the devkit's: ILSVRC2012_ID, from 1 on, in an order of its own
    ILSVRC2012_val_00000001.JPEG 65                  names before either of these (Caffe's val.txt)
    ILSVRC2012_val_00048981,n03995372 85 131 499     Kaggle's LOC_val_solution.csv; boxes are ignored

The devkit's ILSVRC2012_validation_ground_truth.txt is not sorted as synsets are: taken as it stands, every label would
be wrong. It needs the synsets in the order of ILSVRC2012_ID, which the devkit's meta.mat holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .text_tables import read_rows

SYNSET = r"n\d{8}"
_LABEL = re.compile(rf"{SYNSET}|\d{{1,6}}")


def read_labels(path: Path, names: Sequence[str], synsets: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of pictures, and their classes.

    Args:
        path: a file of one of the forms above.
        names: paths of the pictures, sorted.
        synsets: all classes; for the devkit's numbers in their order. Without them, classes are those in the file.

    Returns:
        (N,) int64, and the sorted synsets: none where numbers alone are known.

    Raises:
        ValueError: a line that is none of these, a picture without a label; names it.
    """
    texts = _texts_of(path, names)
    kinds = {text[0] == "n" for text in texts}
    if len(kinds) > 1:
        raise ValueError(f"{path}: it holds both synsets and numbers: keep to one of them")
    if kinds == {False}:
        numbers = [int(text) for text in texts]
        if synsets is None:
            return _sorted_already(path, numbers), ()
        texts = _by_number(path, numbers, synsets)
    classes = tuple(sorted(set(texts) if synsets is None else synsets))
    place = {synset: index for index, synset in enumerate(classes)}
    if unknown := next((text for text in texts if text not in place), None):
        raise ValueError(f"{path}: the synset {unknown} is not among those of --synsets")
    return torch.tensor([place[text] for text in texts], dtype=torch.int64), classes


def read_synsets(path: Path) -> list[str]:
    """The first words of a file's lines.

    Raises:
        ValueError: one of them is no synset, or comes twice.
    """
    found: dict[str, int] = {}
    for number, words in read_rows(path):
        if not re.fullmatch(SYNSET, words[0]):
            raise ValueError(f"{path}, line {number}: {words[0]!r:.100} is no synset such as n01440764")
        if words[0] in found:
            raise ValueError(f"{path}, line {number}: {words[0]} is in line {found[words[0]]} already")
        found[words[0]] = number
    return list(found)


def _texts_of(path: Path, names: Sequence[str]) -> list[str]:
    """The label of each picture as it is written."""
    rows = list(read_rows(path))
    if len(rows[0][1]) > 1 and not _LABEL.fullmatch(rows[0][1][1]):  # a line of titles
        del rows[0]
    named = bool(rows) and len(rows[0][1]) > 1
    at = 1 if named else 0
    for number, words in rows:
        if len(words) <= at or (not named and len(words) > 1) or not _LABEL.fullmatch(words[at]):
            wanted = "a file name and a label" if named else "a label"
            text = " ".join(words)
            raise ValueError(f"{path}, line {number}: expected {wanted}, a synset or a number, not {text!r:.100}")
    if not named:
        if len(rows) != len(names):
            raise ValueError(f"{path}: it has {len(rows):,} labels for {len(names):,} pictures")
        return [words[0] for _, words in rows]
    known = {_stem(words[0]): words[1] for _, words in rows}
    if len(known) < len(rows):
        raise ValueError(f"{path}: it has several labels for one picture")
    if double := next((name for name, count in Counter(map(_stem, names)).items() if count > 1), None):
        raise ValueError(f"{path}: several pictures are called {double}, so that its labels do not tell them apart")
    if missing := next((name for name in names if _stem(name) not in known), None):
        raise ValueError(f"{path}: it has no label for {missing}")
    return [known[_stem(name)] for name in names]


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]


def _sorted_already(path: Path, numbers: Sequence[int]) -> Tensor:
    if min(numbers) > 0:
        raise ValueError(
            f"{path}: its numbers go from {min(numbers)} to {max(numbers)}, none is 0: the devkit's ILSVRC2012_ID do, "
            "in another order than sorted synsets: give --synsets FILE, all synsets in the order of ILSVRC2012_ID "
            "(meta.mat of the devkit), one per line"
        )
    return torch.tensor(numbers, dtype=torch.int64)


def _by_number(path: Path, numbers: Sequence[int], synsets: Sequence[str]) -> list[str]:
    """Synsets of the devkit's numbers, which count from 1."""
    low, high = min(numbers), max(numbers)
    if low < 1 or high > len(synsets):
        raise ValueError(
            f"{path}: its numbers go from {low} to {high}, but --synsets holds {len(synsets):,}, counted from 1: "
            "numbers from 0 on are in the order of sorted synsets and need no --synsets"
        )
    return [synsets[number - 1] for number in numbers]
