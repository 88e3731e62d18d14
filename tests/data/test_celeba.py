"""CelebA: the crop against an independent computation; partitions, attributes, names in folders, zips and tars."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from erdfast.data.celeba import open_celeba, partition_names, read_attribute
from erdfast.data.pictures import decode_middle
from tests.data.test_formats import png, write
from tests.data.test_tar_files import write_tar

RANDOM = np.random.RandomState(2)
NAMES = ["000003.jpg", "000001.jpg", "000004.jpg", "000002.jpg"]
PARTITION = "000003.jpg 0\n000001.jpg 1\n000004.jpg 0\n000002.jpg 2\n"
ATTRIBUTES = (
    "4\nBald Male Smiling\n000001.jpg -1  1 -1\n000002.jpg -1 -1  1\n000003.jpg -1  1  1\n000004.jpg  1 -1 -1\n"
)


def aligned():
    """A smooth picture of CelebA's size with some noise."""
    y, x = np.mgrid[:218, :178]
    waves = np.stack([np.sin(x / (5 + c) + RANDOM.rand()) + np.cos(y / (9 - c)) for c in range(3)], -1)
    return np.clip(128 + 50 * waves + RANDOM.randn(218, 178, 3) * 12, 0, 255).astype(np.uint8)


PICTURES = {name: aligned() for name in NAMES}
FILES = {f"img_align_celeba/{name}": png(picture) for name, picture in PICTURES.items()}


def triangle(size: int, crop: int) -> np.ndarray:
    """(size, crop): a triangle as wide as the reduction, sampled at pixel centres, rows of sum 1."""
    scale = crop / size
    centres = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(crop) + 0.5 - centres[:, None]) / scale
    weights = np.maximum(0.0, 1.0 - distance)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize(("crop", "size"), [(140, 64), (140, 32), (178, 64), (108, 96)])
def test_the_crop(crop, size):
    picture = PICTURES[NAMES[0]]
    got = decode_middle(png(picture), expected=(178, 218), crop=crop, size=size)
    top, left = (218 - crop) // 2, (178 - crop) // 2
    middle = picture[top : top + crop, left : left + crop].astype(np.float64)
    weights = triangle(size, crop)
    expected = np.einsum("ik,jl,klc->ijc", weights, weights, middle)
    assert (got.shape, got.dtype) == ((size, size, 3), np.uint8)
    assert np.abs(got - expected).max() <= 1.01  # two passes, each rounded
    assert np.abs(got - expected).mean() < 0.4


def test_the_crop_is_that_of_other_libraries():
    """torchvision and TensorFlow, bilinear with antialiasing; rows 39 to 178 and columns 19 to 158."""
    picture = PICTURES[NAMES[1]]
    got = decode_middle(png(picture), expected=(178, 218), crop=140, size=64)
    x = torch.from_numpy(picture[39:179, 19:159]).permute(2, 0, 1)[None].double()
    expected = functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(got - expected).max() <= 1.01


def test_a_crop_of_that_size_is_kept():
    picture = PICTURES[NAMES[0]]
    got = decode_middle(png(picture), expected=(178, 218), crop=140, size=140)
    np.testing.assert_array_equal(got, picture[39:179, 19:159])


@pytest.mark.parametrize("place", ["folder", "a.zip", "a.tar"])
def test_order_and_labels(tmp_path, place):
    make = write_tar if place.endswith(".tar") else write
    images = make(tmp_path / place, FILES)
    (tmp_path / "parts.txt").write_text(PARTITION)
    (tmp_path / "attributes.txt").write_text(ATTRIBUTES)
    partition = tmp_path / "parts.txt"
    plain = open_celeba(images, partition, "train", size=64)
    assert (plain.labels, plain.num_classes, plain.class_names) == (None, 0, ())
    attributes = tmp_path / "attributes.txt"
    source = open_celeba(images, partition, "all", size=64, attributes=attributes, attribute="Male")
    assert source.class_names == ("not Male", "Male")
    assert source.labels is not None
    assert source.labels.tolist() == [1, 1, 0, 0]
    rows = source.rows.take(torch.arange(4)).numpy()
    for row, name in zip(rows, NAMES, strict=True):
        expected = decode_middle(png(PICTURES[name]), expected=(178, 218), crop=140, size=64)
        np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(plain.rows.take(torch.arange(2)).numpy(), rows[[0, 2]])


def test_kaggles_tables(tmp_path):
    table = tmp_path / "parts.csv"
    table.write_text("image_id,partition\n" + PARTITION.replace(" ", ","))
    assert partition_names(table, "train") == ["000003.jpg", "000004.jpg"]
    assert partition_names(table, "all") == NAMES
    attributes = tmp_path / "attributes.csv"
    head, *lines = ATTRIBUTES.splitlines()[1:]
    attributes.write_text("\n".join(",".join(line.split()) for line in [f"image_id {head}", *lines]))
    assert read_attribute(attributes, "Smiling", NAMES).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "parts.txt: it is empty"),
        ("000001.jpg\n", r"parts.txt, line 1: '000001.jpg' is no file name and partition out of 0 \(train\), 1"),
        ("000001.jpg 0\n\n000002.jpg 3\n", "parts.txt, line 3: '000002.jpg 3' is no"),
        ("000001.jpg 0\n000001.jpg 0\n", "parts.txt: it names 000001.jpg 2 times"),
        ("000001.jpg 1\n", "parts.txt: it names no picture of the partition 'train'"),
        ("000001.jpg 0\n000009.jpg 0\n", r"img: 000009.jpg is missing, which .*parts.txt names \(missing: 1 of 2\)"),
    ],
)
def test_bad_partitions(tmp_path, text, message):
    (tmp_path / "parts.txt").write_text(text)
    images = write(tmp_path / "img", FILES)
    with pytest.raises(ValueError, match=message):
        open_celeba(images, tmp_path / "parts.txt", "train", size=64)


@pytest.mark.parametrize(
    ("text", "attribute", "message"),
    [
        (ATTRIBUTES, "male", r"no attribute 'male' \(did you mean 'Male'\?\); choose from Bald, Male, Smiling"),
        (ATTRIBUTES, "Young", "no attribute 'Young'; choose from"),
        (ATTRIBUTES.replace("000004", "000005"), "Male", r"no line for 000004.jpg \(missing: 1 of 4\)"),
        (ATTRIBUTES.replace("1 -1 -1", "1 -1"), "Male", "line 6: expected a file name and 3 values 1 or -1"),
        (ATTRIBUTES.replace("-1  1 -1", "-1  2 -1"), "Male", "line 3: expected a file name and 3 values"),
        (ATTRIBUTES.replace("000004", "000001"), "Male", "line [3-6]: 000001.jpg has a line already"),
    ],
)
def test_bad_attributes(tmp_path, text, attribute, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=f"a.txt.*{message}"):
        read_attribute(tmp_path / "a.txt", attribute, NAMES)


def test_other_pictures_are_refused(tmp_path):
    """Already cropped ones, say: the middle of them would be another picture."""
    (tmp_path / "parts.txt").write_text(PARTITION)
    files = FILES | {"img_align_celeba/000004.jpg": png(PICTURES[NAMES[0]][:64, :64])}
    source = open_celeba(write(tmp_path / "img", files), tmp_path / "parts.txt", "train", size=64)
    with pytest.raises(ValueError, match=r"000004.jpg\) cannot be read: it has 64x64 pixels, expected 178x218"):
        source.rows.take(torch.arange(2))
    images = write(tmp_path / "two", {**FILES, "other/000001.jpg": b"x"})
    with pytest.raises(ValueError, match=r"img_align_celeba/000001.jpg and other/000001.jpg have the same name"):
        open_celeba(images, tmp_path / "parts.txt", "train", size=64)
