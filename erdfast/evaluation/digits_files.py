"""Pictures of digits in npz files, as `python -m erdfast.sample` writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .files import open_arrays, open_images, read_array

SIDE = 8


def open_digits(path: Path, *, labelled: bool) -> tuple[Tensor, Tensor | None]:
    """Pictures, and labels where they are asked for.

    Args:
        path: an .npz file: `arr_0` uint8 (N, 8, 8, 3), grey; `arr_1` (N,) integers in 0..9.
        labelled: whether labels are needed.

    Returns:
        (N, 1, 8, 8) float32 in [-1, 1], and (N,) int64 or None.

    Raises:
        ValueError: the file holds no such thing; names it.
    """
    rows = open_images(path)
    if rows.shape[:2] != (SIDE, SIDE):
        raise ValueError(f"{path}: digits are pictures of 8x8 pixels, these are {rows.shape[0]}x{rows.shape[1]}")
    pictures = rows.take(torch.arange(len(rows)))
    if not bool((pictures == pictures[..., :1]).all()):
        raise ValueError(f"{path}: digits are grey, these pictures are coloured")
    images = (pictures[..., :1].float() / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()
    return images, _labels(path, len(rows)) if labelled else None


def _labels(path: Path, count: int) -> Tensor:
    arrays = open_arrays(path)
    if "arr_1" not in arrays:
        raise ValueError(f"{path}: accuracy needs labels, an array 'arr_1'")
    labels = read_array(path, arrays, "arr_1", (count,))
    whole = labels.long()
    if labels.is_floating_point() or int(whole.min()) < 0 or int(whole.max()) > 9:
        raise ValueError(f"{path}: 'arr_1' must be integers in 0..9")
    return whole
