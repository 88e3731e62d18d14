"""From an image file to the square of pixels that a network sees. Needs Pillow, at use."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .sample_files import Decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of files that are taken for pictures; ImageNet's own are called .JPEG."""


def picture_decoder(size: int | None, channels: int = 3) -> Decode:
    """A function from a file's content to (size, size, channels) uint8; without a size, as large as it is stored."""
    return partial(decode_picture, size=size, channels=channels)


def decode_picture(data: bytes, *, size: int | None = None, channels: int = 3) -> np.ndarray:
    """A picture as the diffusion papers crop it: the shorter side scaled to `size`, then the square in the middle.

    As ADM does: halved by box filters while it is at least twice too large, then bicubic (guided-diffusion,
    `center_crop_arr`). A picture of that size already is taken as it is.

    Args:
        data: a file of any type that Pillow reads.
        size: side of the result in pixels; None for the picture as it is.
        channels: 1 for grey, 3 for red, green and blue; palettes, transparency and CMYK are converted.

    Returns:
        (H, W, channels) uint8.

    Raises:
        ValueError, OSError, SyntaxError: it is no picture, or damaged.
    """
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB" if channels == 3 else "L")
    if size is not None and image.size != (size, size):
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        if scale != 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]
