"""Pictures that are unusual: too large, of 16 or 32 bits, threads of one pixel; and the crop of all others."""

import io

import numpy as np
import pytest
from PIL import Image

from erdfast.data import FileDataset
from erdfast.data.pictures import _eight_bits, decode_picture
from tests.data.test_formats import picture, png, write


def encoded(array, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format=kind)
    return stream.getvalue()


def cropped(array, size: int):
    """As ADM crops, without a limit to the sides."""
    image = Image.fromarray(array)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def test_decompression_bombs_are_named(tmp_path, monkeypatch):
    files = {"a/0.png": png(picture()), "a/1.png": png(picture(40))}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"sample 1 \(a/1\.png\) cannot be read: it has more pixels than any picture"):
        FileDataset(write(tmp_path, files), shape=(3, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(channels):
    ramp = np.linspace(0, 65_535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = decode_picture(png(ramp), channels=channels)
    assert decoded.shape == (64, 64, channels)
    np.testing.assert_array_equal(decoded, np.repeat((ramp >> 8).astype(np.uint8)[..., None], channels, 2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode):
    """As some versions of Pillow open 16-bit PNG."""
    with pytest.raises(ValueError, match=rf"32-bit numbers \(mode {mode}\)"):
        _eight_bits(Image.new(mode, (8, 8), 300))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PPM", "ICO"])
def test_other_formats_under_a_pictures_name_are_refused(tmp_path, kind):
    """EPS among them, for which Pillow would start a program."""
    files = {"a/0.png": png(picture()), "a/1.png": encoded(picture(), kind)}
    with pytest.raises(ValueError, match=r"sample 1 \(a/1\.png\) cannot be read: it is no picture"):
        FileDataset(write(tmp_path, files), shape=(3, 8, 8))


@pytest.mark.parametrize("shape", [(37, 100), (119, 30), (20, 20), (65, 129), (9, 8), (5, 19)])
def test_the_crop_of_ordinary_pictures(shape):
    array = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    for size in (8, 17):
        np.testing.assert_array_equal(decode_picture(png(array), size=size), cropped(array, size))


@pytest.mark.parametrize("shape", [(1, 60), (1, 61), (60, 2), (61, 3), (4, 47)])
def test_the_middle_of_long_pictures_is_the_same(shape):
    array = np.random.RandomState(0).randint(0, 256, (*shape, 3), dtype=np.uint8)
    got, expected = decode_picture(png(array), size=8).astype(int), cropped(array, 8).astype(int)
    assert abs(got - expected).max() <= 3  # the longer side is rounded to whole pixels; half of one differs by 20


@pytest.mark.parametrize("shape", [(1, 60_000), (60_000, 1)])
def test_threads_never_become_large(monkeypatch, shape):
    """256 pixels of the shorter side would be 15 million of the longer: 12 GB."""
    array = np.zeros((*shape, 3), np.uint8)
    array.reshape(-1, 3)[29_990:30_010] = 200
    largest = []

    def resize(self, size, *args, real=Image.Image.resize):
        largest.append(max(size))
        return real(self, size, *args)

    monkeypatch.setattr(Image.Image, "resize", resize)
    decoded = decode_picture(png(array), size=256)
    assert decoded.shape == (256, 256, 3)
    assert (decoded == 200).all()
    assert max(largest) <= 8 * 256
