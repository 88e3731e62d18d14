"""ImageNet: labels by sorted synset, the validation set's files of labels, names of classes, its known odd pictures."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from erdfast.data.class_names import read_class_names
from erdfast.data.imagenet import open_imagenet
from erdfast.data.label_files import read_labels, read_synsets
from tests.data.test_formats import picture, png, write
from tests.data.test_hostile_pictures import cropped
from tests.data.test_tar_files import nested, write_tar

SYNSETS = ["n01443537", "n01440764", "n02124075"]
SORTED = sorted(SYNSETS)
ARRAYS = {f"{s}/{s}_{i}.JPEG": picture(24 + 9 * i) for s in SYNSETS for i in range(2)}
FILES = {name: png(array) for name, array in ARRAYS.items()}
VALIDATION = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in range(1, 5)]


def encoded(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


@pytest.mark.parametrize("place", ["folder", "a.zip", "a.tar"])
def test_labels_are_places_of_sorted_synsets(tmp_path, place):
    where = tmp_path / place
    images = write_tar(where, nested(FILES)) if place == "a.tar" else write(where, FILES)
    source = open_imagenet(images, size=16)
    assert source.labels is not None
    assert source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert (source.class_names, source.num_classes) == (tuple(SORTED), 3)
    rows = source.rows.take(torch.arange(6)).numpy()
    for row, name in zip(rows, sorted(FILES), strict=True):
        np.testing.assert_array_equal(row, cropped(ARRAYS[name], 16))


def test_folders_above_synsets_do_not_matter(tmp_path):
    images = write(tmp_path / "CLS-LOC", {f"train/{name}": content for name, content in FILES.items()})
    labels = open_imagenet(images, size=16).labels
    assert labels is not None
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_odd_pictures(tmp_path):
    """CMYK, grey, a PNG called JPEG, a turned one (EXIF, which ADM ignores), damaged EXIF."""
    y, x = np.mgrid[:40, :56]
    array = np.stack([4 * x, 3 * y, 2 * x + y], -1).astype(np.uint8)
    image = Image.fromarray(array)
    exif = Image.Exif()
    exif[0x0112] = 6
    odd = {
        "cmyk": encoded(image.convert("CMYK")),
        "grey": encoded(image.convert("L")),
        "png": png(array),
        "turned": encoded(image, exif=exif),
        "broken": encoded(image, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"),
    }
    images = write(tmp_path / "data", {f"n01440764/{name}.JPEG": content for name, content in odd.items()})
    rows = open_imagenet(images, size=16).rows.take(torch.arange(len(odd))).numpy().astype(int)
    wanted = cropped(array, 16).astype(int)
    grey = cropped(np.asarray(image.convert("L").convert("RGB")), 16).astype(int)
    for name, row in zip(sorted(odd), rows, strict=True):
        assert np.abs(row - (grey if name == "grey" else wanted)).max() < 16, name  # JPEG halves the colours


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val/a.JPEG": FILES[f"{SYNSETS[0]}/{SYNSETS[0]}_0.JPEG"]}, "val/a.JPEG lies in no synset folder such as"),
        ({"a.JPEG": b"x"}, "a.JPEG lies in no synset folder such as n01440764.*--labels FILE"),
        ({"n00000001/a.txt": b"x"}, "the folder n00000001 holds no picture"),
        ({f"{SORTED[0]}/0.JPEG": b"x"}, rf"sample 0 \({SORTED[0]}/0.JPEG\) cannot be read: it is no picture"),
    ],
)
def test_bad_folders(tmp_path, change, message):
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        open_imagenet(write(tmp_path / "data", FILES | change), size=16)


# ---------------------------------------------------------------------------- the validation set


@pytest.mark.parametrize(
    ("text", "synsets", "labels", "classes"),
    [
        ("n02124075\nn01440764\nn01443537\nn01440764\n", None, [2, 0, 1, 0], SORTED),
        ("n02124075\nn01443537\nn01443537\nn02124075\n", SYNSETS, [2, 1, 1, 2], SORTED),
        ("2\n0\n1\n0\n", None, [2, 0, 1, 0], []),
        ("1\n2\n3\n1\n", SYNSETS, [1, 0, 2, 1], SORTED),
        ("".join(f"{name} {i % 3}\n" for i, name in reversed([*enumerate(VALIDATION)])), None, [0, 1, 2, 0], []),
        (
            "ImageId,PredictionString\n"
            + "".join(f"{name.removesuffix('.JPEG')},n01443537 1 2 3 4\n" for name in reversed(VALIDATION)),
            SYNSETS,
            [1, 1, 1, 1],
            SORTED,
        ),
    ],
)
def test_labels_from_a_file(tmp_path, text, synsets, labels, classes):
    (tmp_path / "labels.txt").write_text(text)
    got, names = read_labels(tmp_path / "labels.txt", VALIDATION, synsets)
    assert got.dtype == torch.int64
    assert (got.tolist(), list(names)) == (labels, classes)


@pytest.mark.parametrize(
    ("text", "synsets", "message"),
    [
        ("490\n361\n171\n822\n", None, "go from 171 to 822, none is 0: the devkit's.*give --synsets FILE"),
        ("0\n1\n2\n0\n", SYNSETS, "go from 0 to 2, but --synsets holds 3, counted from 1"),
        ("1\n2\n3\n4\n", SYNSETS, "go from 1 to 4, but --synsets holds 3"),
        ("0\n1\n2\n", None, "it has 3 labels for 4 pictures"),
        ("0\nn01440764\n0\n0\n", None, "both synsets and numbers"),
        ("0\ncat\n0\n0\n", None, "line 2: expected a label, a synset or a number, not 'cat'"),
        ("n02124075\n" * 3 + "n09999999\n", SYNSETS, "the synset n09999999 is not among those of --synsets"),
        ("".join(f"{name} 0\n" for name in VALIDATION[:3]), None, f"no label for {VALIDATION[3]}"),
        ("".join(f"{VALIDATION[0]} {i}\n" for i in range(4)), None, "several labels for one picture"),
        ("", None, "it is empty"),
    ],
)
def test_bad_labels(tmp_path, text, synsets, message):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=f"labels.txt.*{message}"):
        read_labels(tmp_path / "labels.txt", VALIDATION, synsets)


def test_the_validation_set(tmp_path):
    images = write(tmp_path / "val", {name: png(picture(20 + i)) for i, name in enumerate(VALIDATION)})
    (tmp_path / "truth.txt").write_text("1\n2\n3\n1\n")
    (tmp_path / "synsets.txt").write_text("".join(f"{synset} words\n" for synset in SYNSETS))
    (tmp_path / "names.txt").write_text("tench, Tinca tinca\ngoldfish\ntabby\n")
    names = tmp_path / "names.txt"
    labels, synsets = tmp_path / "truth.txt", tmp_path / "synsets.txt"
    source = open_imagenet(images, size=16, labels=labels, synsets=synsets, class_names=names)
    assert source.labels is not None
    assert source.labels.tolist() == [1, 0, 2, 1]
    assert source.class_names == ("tench, Tinca tinca", "goldfish", "tabby")
    with pytest.raises(ValueError, match=r"lies in the folder of its synset, and needs no --labels"):
        open_imagenet(write(tmp_path / "train", FILES), size=16, labels=labels)


def test_bad_synsets(tmp_path):
    (tmp_path / "s.txt").write_text("n01440764\ntench\n")
    with pytest.raises(ValueError, match=r"s.txt, line 2: 'tench' is no synset such as n01440764"):
        read_synsets(tmp_path / "s.txt")
    (tmp_path / "s.txt").write_text("n01440764\n\nn01440764\n")
    with pytest.raises(ValueError, match=r"s.txt, line 3: n01440764 is in line 1 already"):
        read_synsets(tmp_path / "s.txt")


# ---------------------------------------------------------------------------- names of classes

PAIRS = [["n01440764", "tench"], ["n01443537", "goldfish"], ["n02124075", "Egyptian_cat"]]
WORDS = ("tench", "goldfish", "Egyptian_cat")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "tench\ngoldfish\n\nEgyptian_cat\n"),
        ("a.txt", "".join(f"{synset} {word}\n" for synset, word in reversed(PAIRS))),
        ("a.txt", "n09999999,more than needed\n" + "".join(f"{synset}\t{word}\n" for synset, word in PAIRS)),
        ("a.json", json.dumps(WORDS)),
        ("a.json", json.dumps(dict(reversed(PAIRS)))),
        ("a.json", json.dumps({str(i): pair for i, pair in reversed([*enumerate(PAIRS)])})),
        ("a.json", json.dumps({str(i): word for i, word in reversed([*enumerate(WORDS)])})),
    ],
)
def test_class_names(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name, SORTED, 3) == WORDS
    if "more" not in text:
        assert read_class_names(tmp_path / name, (), 3) == WORDS


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "tench\ngoldfish\n", "no name for class 2"),
        ("a.txt", "tench\ngoldfish\ncat\ndog\n", "4 names for 3 classes"),
        ("a.txt", "n01440764 tench\n", "no name for class n01443537"),
        ("a.json", "[1, 2, 3]", "the name of 0 is 1, expected a text"),
        ("a.json", "7", "neither a list nor an object"),
        ("a.json", "[", "cannot be read"),
        ("a.json", "[" * 100_000, "cannot be read"),
    ],
)
def test_bad_class_names(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        read_class_names(tmp_path / name, SORTED, 3)


def test_text_that_is_none(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match=r"a.txt: it is no text"):
        read_class_names(tmp_path / "a.txt", SORTED, 3)
    with pytest.raises(ValueError, match=r"gone: no such file"):
        read_synsets(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"it is a folder, expected a file"):
        read_synsets(tmp_path)
