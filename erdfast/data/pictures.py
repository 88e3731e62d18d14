"""From an image file to the square of pixels that a network sees. Needs Pillow, at use."""

from __future__ import annotations

import io
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

    from .sample_files import Decode

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Of files that are taken for pictures; ImageNet's own are called .JPEG."""
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Whatever a file is called: for some others Pillow would start programs."""
_LONGEST = 4
"""Sides of a picture's middle that is worth scaling: a thread of 1x60000 pixels would become gigabytes."""


def picture_decoder(size: int | None, channels: int = 3) -> Decode:
    """A function from a file's content to (size, size, channels) uint8; without a size, as large as it is stored."""
    return partial(decode_picture, size=size, channels=channels)


def decode_picture(data: bytes, *, size: int | None = None, channels: int = 3) -> np.ndarray:
    """A picture as the diffusion papers crop it: the shorter side scaled to `size`, then the square in the middle.

    As ADM does: halved by box filters while it is at least twice too large, then bicubic (guided-diffusion,
    `center_crop_arr`). A picture of that size already is taken as it is.

    Args:
        data: a file of one of these types, whatever it is called.
        size: side of the result in pixels; None for the picture as it is.
        channels: 1 for grey, 3 for red, green and blue; palettes, transparency and CMYK are converted.

    Returns:
        (H, W, channels) uint8.

    Raises:
        ValueError, OSError, SyntaxError: it is no picture, or damaged.
    """
    from PIL import Image

    image = _open(data, channels)
    if size is not None and image.size != (size, size):
        longest = _LONGEST * min(image.size)
        if max(image.size) > longest:
            image = _middle(image, _shortened(image.width, longest), _shortened(image.height, longest))
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        if scale != 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        image = _middle(image, size, size)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[:, :, None]


def middle_decoder(*, expected: tuple[int, int], crop: int, size: int) -> Decode:
    """A function from a file's content to (size, size, 3) uint8: see `decode_middle`."""
    return partial(decode_middle, expected=expected, crop=crop, size=size)


def decode_middle(data: bytes, *, expected: tuple[int, int], crop: int, size: int) -> np.ndarray:
    """The middle of a picture whose size is known, cropped first and then scaled, as CelebA's.

    Args:
        data: as of `decode_picture`.
        expected: width and height that the picture must have: the crop means nothing in others.
        crop: side of the square in the middle; of an odd margin the smaller half is left and above.
        size: side of the result. Scaled by Pillow's BILINEAR, a triangle as wide as the reduction asks for.

    Returns:
        (size, size, 3) uint8.

    Raises:
        ValueError, OSError, SyntaxError: it is no picture, damaged, or of another size.
    """
    from PIL import Image

    image = _middle(_open(data, 3, expected), crop, crop)
    return np.asarray(image if crop == size else image.resize((size, size), Image.Resampling.BILINEAR))


def _open(data: bytes, channels: int, expected: tuple[int, int] | None = None) -> Image:
    """Decoded, and of 8 bits; refused before that if it is too large, or not of a size that it must have."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
            if expected is not None and opened.size != expected:
                raise ValueError(f"it has {opened.width}x{opened.height} pixels, expected {expected[0]}x{expected[1]}")
            return _eight_bits(opened).convert("RGB" if channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise ValueError("it is no picture") from error
    except Image.DecompressionBombError as error:
        raise ValueError("it has more pixels than any picture should") from error


def _middle(image: Image, width: int, height: int) -> Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _shortened(side: int, longest: int) -> int:
    """A side cut at both ends alike, so that the middle stays where it is."""
    return side - 2 * max(0, (side - longest) // 2)


def _eight_bits(image: Image) -> Image:
    """16-bit grey scaled to 8 bits, which Pillow would clip; numbers without a range have none."""
    if image.mode.startswith("I;16"):
        from PIL.Image import fromarray

        return fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {image.mode}), which have no known range")
    return image
