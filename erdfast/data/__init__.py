"""Data sets: embedded ones, and readers for the files that users of other projects have."""

from __future__ import annotations

import re
from pathlib import Path

from .dataset import Batch, Dataset, Shape, format_shape
from .digits import Digits
from .files import FileDataset
from .formats import READERS
from .mixture import GaussianMixture
from .order import batch_indices

__all__ = [
    "Batch",
    "Dataset",
    "Digits",
    "FileDataset",
    "GaussianMixture",
    "Shape",
    "batch_indices",
    "open_dataset",
]

_CHOICES = (
    "'digits', 'mixture', 'mixture:CxHxW' (such as mixture:4x8x8), or the path of a file "
    f"({', '.join(READERS)}, .zip) or folder of latents or pictures"
)


def open_dataset(
    spec: str,
    *,
    shape: Shape | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    latent_scale: str = "auto",
) -> Dataset:
    """The data set that a short text names.

    Args:
        spec: "digits" (1,797 real 8x8 digits, with scikit-learn), "mixture" (Gaussian mixture latents of
            `shape`, by default 4x32x32), "mixture:4x8x8", or a path (see `erdfast.data.formats`). A file that
            is called like an embedded data set is reached as "./digits".
        shape: (C, H, W) that the network expects; data of another shape are refused.
        num_classes: number of labels. The mixture has 10 by default; files have the largest label plus 1, may
            not have labels beyond a number given, and 0 ignores their labels.
        seed: decides the mixture; other data sets do not depend on it.
        latent_scale: how stored latents are brought to the network's scale: "stored" (they are), "sd" (times
            0.18215), "edm2" (whitened to std 0.5); "auto" as the code does that the format comes from.

    Raises:
        ValueError: an unknown spec, a missing or unreadable file, or data that do not suit `shape` or
            `num_classes`.
        ImportError: a package that this data set needs is missing; the message says what to install.
    """
    if spec == "digits":
        return _digits(shape, num_classes)
    if spec == "mixture" or spec.startswith("mixture:"):
        return _mixture(spec, shape, num_classes, seed)
    path = Path(spec)
    if not spec or not (_exists(path) or path.suffix in (*READERS, ".zip") or len(path.parts) > 1):
        raise ValueError(f"unknown data '{spec}' (and no such file or folder): choose {_CHOICES}")
    return FileDataset(path, shape=shape, num_classes=num_classes, latent_scale=latent_scale)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long a name: the reader says so
        return True


def _digits(shape: Shape | None, num_classes: int | None) -> Dataset:
    if shape is not None and tuple(shape) != Digits.shape:
        raise ValueError(f"data 'digits' are {format_shape(Digits.shape)}, but {format_shape(shape)} is wanted")
    if num_classes not in (None, Digits.num_classes):
        raise ValueError(f"data 'digits' have {Digits.num_classes} classes, but {num_classes} are wanted")
    return Digits()


def _mixture(spec: str, shape: Shape | None, num_classes: int | None, seed: int) -> Dataset:
    _, colon, text = spec.partition(":")
    own: Shape | None = None
    if colon:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f"cannot read the shape '{text}' of data '{spec}': write it as mixture:4x32x32")
        own = (int(match[1]), int(match[2]), int(match[3]))
        if shape is not None and tuple(shape) != own:
            raise ValueError(f"data '{spec}' are {format_shape(own)}, but {format_shape(shape)} is wanted")
    wanted = own or shape or (4, 32, 32)
    return GaussianMixture(wanted, num_classes=10 if num_classes is None else num_classes, seed=seed)
