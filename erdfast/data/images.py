"""Grids of pictures: numpy in, PNG out. Needs Pillow, at use."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from erdfast.atomic import atomic_write

if TYPE_CHECKING:
    from PIL.Image import Image

BACKGROUND = (255, 255, 255)
TEXT = (64, 64, 64)


def image_grid(
    images: np.ndarray,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    cell: int = 64,
    gap: int | None = None,
) -> Image:
    """One picture of many, row by row.

    Small pictures are enlarged by a whole factor without interpolation, so that every pixel stays a sharp
    square; none is ever shrunk.

    Args:
        images: (N, H, W, C) uint8 with C = 1 (grey) or 3, N >= 1.
        columns: pictures per row; by default the smallest number that makes the grid no higher than wide.
        row_labels: one short text per row, written to its left.
        column_labels: one per column, written above it.
        captions: one per picture, written above it; what is longer than the picture is wide is cut.
        cell: pictures narrower than this many pixels are enlarged up to it.
        gap: white pixels between pictures; by default a sixteenth of the picture, at least 2.

    Returns:
        An RGB Pillow image.
    """
    from PIL import Image, ImageDraw

    rgb = _as_rgb(images)
    total, height, width, _ = rgb.shape
    columns = math.ceil(math.sqrt(total)) if columns is None else columns
    if columns < 1 or cell < 1:
        raise ValueError(f"columns and cell must be at least 1, got columns={columns}, cell={cell}")
    rows = math.ceil(total / columns)
    texts = (("row_labels", row_labels, rows), ("column_labels", column_labels, columns), ("captions", captions, total))
    for name, labels, count in texts:
        if labels is not None and len(labels) != count:
            raise ValueError(f"{total} images in {columns} columns need {count} {name}, got {len(labels)}")
    factor = max(1, cell // width)
    height, width = height * factor, width * factor
    gap = max(2, width // 16) if gap is None else gap
    share = 0.16 if captions else 0.3  # of the height: a caption has words, a row or column a name
    font, line = _font(height, share), math.ceil(1.3 * _font_size(height, share))
    margin = _label_width(row_labels, font, gap)
    top, pitch = (line if column_labels else 0), height + gap + (line if captions else 0)

    sheet = Image.new("RGB", (margin + columns * (width + gap) + gap, top + rows * pitch + gap), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    for index, picture in enumerate(rgb):
        row, column = divmod(index, columns)
        left, below = margin + gap + column * (width + gap), top + gap + (row + 1) * pitch - gap
        enlarged = picture.repeat(factor, axis=0).repeat(factor, axis=1)
        sheet.paste(Image.fromarray(enlarged), (left, below - height))
        if captions:
            draw.text((left, below - height - 2), _fitting(captions[index], font, width), TEXT, font, anchor="ls")
    for row, label in enumerate(row_labels or ()):
        draw.text((margin, top + gap + (row + 1) * pitch - gap - height // 2), label, TEXT, font, anchor="rm")
    for column, label in enumerate(column_labels or ()):
        centre = margin + gap + column * (width + gap) + width // 2
        draw.text((centre, top), _fitting(label, font, width), TEXT, font, anchor="ms")
    return sheet


def save_png(path: str | os.PathLike[str], image: Image) -> None:
    """Write a PNG so that `path` holds the old file or the complete new one, never a part. Makes the
    folder."""
    with atomic_write(path) as stream:
        image.save(stream, format="PNG")


def save_image_grid(
    path: str | os.PathLike[str],
    images: np.ndarray,
    *,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
    cell: int = 64,
) -> None:
    """`image_grid` of (N, H, W, C) uint8 pictures, written by `save_png`."""
    sheet = image_grid(
        images, columns=columns, row_labels=row_labels, column_labels=column_labels, captions=captions, cell=cell
    )
    save_png(path, sheet)


def _as_rgb(images: np.ndarray) -> np.ndarray:
    good = isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4
    if not good or images.shape[-1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images must be a non-empty uint8 array (N, H, W, 1 or 3), got {found}")
    return images.repeat(3, axis=-1) if images.shape[-1] == 1 else images


def _font(height: int, share: float):
    from PIL import ImageFont

    return ImageFont.load_default(size=_font_size(height, share))


def _font_size(height: int, share: float) -> int:
    return min(28, max(10, round(share * height)))


def _fitting(text: str, font, width: int) -> str:
    """The text, or as much of it as `width` pixels hold."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return f"{text}…" if text else ""


def _label_width(labels: Sequence[str] | None, font, gap: int) -> int:
    if not labels:
        return 0
    return math.ceil(max(font.getlength(label) for label in labels)) + 2 * gap
