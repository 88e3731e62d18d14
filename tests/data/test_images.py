import os
from typing import cast

import numpy as np
import pytest
from PIL import Image

from erdfast.data.images import image_grid, save_image_grid, save_png


def pictures(count, side=8, channels=1):
    return np.random.RandomState(0).randint(0, 256, (count, side, side, channels), dtype=np.uint8)


def test_pixels_are_enlarged_exactly():
    images = pictures(6)
    sheet = np.asarray(image_grid(images, columns=3, cell=64, gap=4))
    assert sheet.shape == (2 * 68 + 4, 3 * 68 + 4, 3)
    for index in range(6):
        row, column = divmod(index, 3)
        block = sheet[4 + row * 68 : 68 + row * 68, 4 + column * 68 : 68 + column * 68]
        np.testing.assert_array_equal(block[::8, ::8], images[index].repeat(3, axis=-1))
        np.testing.assert_array_equal(block[7::8, 7::8], images[index].repeat(3, axis=-1))
    assert (sheet[:4] == 255).all()
    assert (sheet[:, 68:72] == 255).all()


def test_colour_survives_and_large_pictures_keep_their_size():
    images = pictures(1, side=100, channels=3)
    sheet = np.asarray(image_grid(images, cell=64, gap=2))
    np.testing.assert_array_equal(sheet[2:102, 2:102], images[0])
    assert sheet.shape == (104, 104, 3)


def test_default_columns_and_incomplete_rows():
    assert image_grid(pictures(10), gap=4).size == (4 * 68 + 4, 3 * 68 + 4)
    assert image_grid(pictures(1), gap=4).size == (72, 72)


def test_row_labels_are_written_beside_their_rows():
    plain = image_grid(pictures(4), columns=2, gap=4)
    labelled = image_grid(pictures(4), columns=2, gap=4, row_labels=["7", ""])
    margin = labelled.width - plain.width
    assert margin > 8
    assert labelled.height == plain.height
    np.testing.assert_array_equal(np.asarray(labelled)[:, margin:], np.asarray(plain))
    text = np.asarray(labelled)[:, :margin]
    assert (text[4:68] < 200).any()
    assert (text[72:] == 255).all()


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "new" / "grid.png"
    save_image_grid(path, pictures(4))
    first = path.read_bytes()
    with Image.open(path) as image:
        assert image.size == image_grid(pictures(4)).size
    assert path.stat().st_mode & 0o777 == 0o644

    class Broken:
        def save(self, stream, format):
            stream.write(b"half of it")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(path, cast(Image.Image, Broken()))
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["grid.png"]


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((2, 8, 8, 2), np.uint8),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        [1, 2],
    ],
)
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match="uint8 array"):
        image_grid(images)


def test_bad_layout():
    with pytest.raises(ValueError, match="columns=0"):
        image_grid(pictures(2), columns=0)
    with pytest.raises(ValueError, match="4 images in 2 columns need 2 row_labels, got 1"):
        image_grid(pictures(4), columns=2, row_labels=["a"])
