"""Files that are wrong on purpose or by accident: refused by name, without hanging, crashing or filling the memory."""

import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from erdfast import encode
from erdfast.data import FileDataset
from erdfast.data.pickled_pairs import decode_pair
from erdfast.data.sample_files import LARGEST_FILE, decode_npy, list_files, list_members
from erdfast.data.store import MANIFEST
from tests.data.test_files import safetensors_bytes
from tests.data.test_formats import edm2_files, everything, moments, npy, picture, png, uvit_file, write
from tests.runs import ROOT, refused

# ---------------------------------------------------------------------------- U-ViT's pickles

PAIR = moments(1)[0]


def object_npy(body: bytes) -> bytes:
    """A file of two Python objects whose pickle is `body`."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": (2,)})
    return stream.getvalue() + body


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def number(code: str, content: bytes) -> bytes:
    """What `scalar(dtype(code), content)` is in a pickle."""
    dtype = named("numpy", "dtype") + b"X" + struct.pack("<I", len(code)) + code.encode() + b"\x85R"
    return named("numpy.core.multiarray", "scalar") + dtype + content + b"\x86R"


DEEP_KEY = b"\x80\x04})" + b"\x85" * 3_000_000 + b"K\x01s."  # {(((...),),): 1}, which is hashed by recursion in C
FROM_INT = named("numpy._core.numeric", "_frombuffer") + b"(J" + struct.pack("<i", 1 << 30)
FROM_INT += named("numpy", "dtype") + b"X\x02\0\0\0f4\x85R" + b"K\x01\x85X\x01\0\0\0CtR."
HOSTILE = {
    "dict": (b"\x80\x04}.", "it holds a EMPTY_DICT, which is refused"),
    "set": (b"\x80\x04\x8f.", "it holds a EMPTY_SET, which is refused"),
    "frozenset": (b"\x80\x04(\x91.", "it holds a FROZENSET, which is refused"),
    "object": (b"\x80\x04)" + named("numpy", "ndarray") + b")\x81.", "it holds a NEWOBJ, which is refused"),
    "text opcodes": (b"I1\n.", "it holds a INT, which is refused"),
    "outside": (b"\x80\x04K\x01Q.", "it holds a BINPERSID, which is refused"),
    "deep": (b"\x80\x04)" + b"\x85" * 3_000_000 + b".", "it holds more than a pair"),
    "memo": (b"\x80\x04Nr" + struct.pack("<I", 400_000_000) + b".", "it holds more than a pair"),
    "buffer of an int": (FROM_INT, "an array that is made of no bytes"),
    "number of an int": (number("f4", b"K\x07") + b".", "a number that is made of no bytes"),
    "long name": (named("m" * 2_000_000, "f") + b".", r"it names m{100}, which is refused"),
    "endless": (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "its pickle is broken"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles(kind):
    body, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=message) as caught:
        decode_pair(object_npy(body))
    assert len(str(caught.value)) < 300


def test_a_deep_key_does_not_end_the_process(tmp_path):
    (tmp_path / "0.npy").write_bytes(object_npy(DEEP_KEY))
    code = "import pathlib, sys; from erdfast import data; data.FileDataset(pathlib.Path(sys.argv[1]), pickled=True)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "sample 0 (0.npy) cannot be read: it holds a EMPTY_DICT" in done.stderr


@pytest.mark.parametrize("state", [b"}X\x08\0\0\0__call__K\x03s", b"N}X\x0c\0\0\0__defaults__)s\x86", b"K\x01"])
@pytest.mark.parametrize("name", [("_codecs", "encode"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype")])
def test_no_file_changes_how_the_next_is_read(state, name):
    with pytest.raises(ValueError, match=r"refused|broken"):
        decode_pair(object_npy(named(*name) + state + b"b."))
    assert decode_pair(uvit_file(PAIR, np.int64(3), 2)).label == 3


@pytest.mark.parametrize("label", [np.array(3.0), np.float32(3), 3.0, True, None, 2**70, np.array([1, 2])])
def test_labels_that_are_no_whole_number(label):
    with pytest.raises(ValueError, match=r"the label is no whole number but a|it holds a BINFLOAT"):
        decode_pair(uvit_file(PAIR, label))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_only_known_opcodes_are_written(protocol):
    """What the reader refuses is not in a valid file, whatever the sizes of its parts."""
    for value in (PAIR, np.zeros((2, 1, 1), np.float16), np.zeros((8, 64, 64), np.float64)):
        for label in (0, 300, 70_000, np.uint8(1), np.array([999])):
            assert decode_pair(uvit_file(value, label, protocol)).label == int(np.asarray(label).item())
    body = pickle.dumps(np.array([PAIR, 1], dtype=object), protocol)
    assert sum(1 for _ in pickletools.genops(body)) < 150


def test_a_pipe_among_pickled_pairs(tmp_path):
    os.mkfifo(tmp_path / "0.npy")
    write(tmp_path, {"1.npy": uvit_file(PAIR, 1)})
    with pytest.raises(ValueError, match=r"sample 0 \(0\.npy\) cannot be read: it is no regular file"):
        FileDataset(tmp_path, pickled=True)


# ---------------------------------------------------------------------------- HDF5


def test_an_external_link_gives_the_other_files_values(tmp_path):
    h5py = pytest.importorskip("h5py")
    values = np.abs(moments(5))
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["deep/latents"] = values
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["padding"] = np.full(values.size * 2, 7.0, np.float32)  # what would be read at the other file's offset
        file["train_latents"] = h5py.ExternalLink("other.h5", "/deep/latents")
    np.testing.assert_array_equal(everything(FileDataset(tmp_path / "link.h5")).x.numpy(), values)


@pytest.mark.parametrize("source", ["other.h5", "."])
def test_virtual_data_sets(tmp_path, source):
    h5py = pytest.importorskip("h5py")
    values, other, path = np.abs(moments(5)), tmp_path / "other.h5", tmp_path / "virtual.h5"
    layout = h5py.VirtualLayout(values.shape, "f4")
    layout[:] = h5py.VirtualSource(source, "values", values.shape)
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("train_latents", layout)
    if source != ".":
        with pytest.raises(ValueError, match=r"virtual\.h5: .*'train_latents' is made of other\.h5, which is missing"):
            FileDataset(path)
    with h5py.File(other, "w") as file:
        file["else"] = 1
    with pytest.raises(ValueError, match=r"virtual\.h5: .*is made of 'values' in .*\.h5, which is missing"):
        FileDataset(path)
    with h5py.File(path if source == "." else other, "a") as file:
        file["values"] = values
    np.testing.assert_array_equal(everything(FileDataset(path)).x.numpy(), values)


# ---------------------------------------------------------------------------- zips

NAMES, LABELS = [f"00000/img-mean-std-{number:08d}.npy" for number in range(3)], "dataset.json"


def with_size(path, name: str, size: int) -> None:
    """Let the zip's directory say that a member has `size` bytes, unpacked."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2", 0, content.rindex(name.encode()))
    content[entry + 24 : entry + 28] = struct.pack("<I", size)
    path.write_bytes(content)


@pytest.mark.parametrize(("member", "size"), [(NAMES[2], 0), (NAMES[2], LARGEST_FILE + 1), (LABELS, LARGEST_FILE + 1)])
def test_sizes_in_a_zip(tmp_path, member, size):
    path = write(tmp_path / "a.zip", edm2_files(moments(6), range(6)), zipfile.ZIP_DEFLATED)
    with_size(path, member, size)
    with pytest.raises(ValueError, match=rf"a\.zip: .*{member}.* has {size:,} bytes"):
        FileDataset(path)


# ---------------------------------------------------------------------------- folders


def test_links_between_folders(tmp_path):
    write(tmp_path / "elsewhere", {"0.png": png(picture())})
    write(tmp_path / "data", {"a/0.png": png(picture())})
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")  # twice is no loop
    assert list_files(tmp_path / "data", (".png",)) == ["a/0.png", "b/0.png", "c/0.png"]
    assert FileDataset(tmp_path / "data").class_names == ["a", "b", "c"]
    (tmp_path / "data/a/again").symlink_to(tmp_path / "data")
    with pytest.raises(ValueError, match=r"data: .*a/again is a link to a folder that it lies in"):
        FileDataset(tmp_path / "data")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write(tmp_path, {f"{name}/0.png": png(picture()) for name in "ab"})

    def failing(path, real=os.scandir):
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PermissionError):
        list_files(tmp_path, (".png",))
    with pytest.raises(ValueError, match=r"Permission denied: .*b"):
        FileDataset(tmp_path)


def test_a_pipe_among_pictures(tmp_path):
    write(tmp_path, {"a/0.png": png(picture()), "a/2.png": png(picture())})
    os.mkfifo(tmp_path / "a/1.png")
    with pytest.raises(ValueError, match=r"sample 1 \(a/1\.png\) cannot be read: it is no regular file"):
        FileDataset(tmp_path)


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
def test_hidden_files_are_no_samples(tmp_path, place):
    hidden = ["._0.png", "a/._0.png", ".cache/1.png", "a/.cache/1.png", "__MACOSX/a/0.png"]
    path = write(tmp_path / place, dict.fromkeys(hidden, b"junk") | {"a/0.png": png(picture())})
    listed = list_files(path, (".png",)) if path.is_dir() else [m.filename for m in list_members(path, (".png",))]
    assert listed == ["a/0.png"]
    assert FileDataset(path).class_names == ["a"]


def test_hidden_shards_and_pairs(tmp_path):
    save_file({"latents": torch.randn(4, 4, 6, 6)}, write(tmp_path / "s", {"._0.safetensors": b"x"}) / "0.safetensors")
    assert len(FileDataset(tmp_path / "s")) == 4
    assert len(FileDataset(write(tmp_path / "u", {"._0.npy": b"x", "0.npy": uvit_file(PAIR, 0)}), pickled=True)) == 1


# ---------------------------------------------------------------------------- labels


def test_class_folders(tmp_path):
    files = {f"{name}/0.png": png(picture()) for name in "ab"}
    with pytest.raises(ValueError, match=r"stray: .*0\.png lies beside folders of classes"):
        FileDataset(write(tmp_path / "stray", files | {"0.png": png(picture())}))
    (write(tmp_path / "empty", files) / "aa").mkdir()
    with pytest.raises(ValueError, match=r"empty: .*the folder aa holds no picture"):
        FileDataset(tmp_path / "empty")


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (None, r"dataset\.json does not hold labels as \[name, label\] pairs"),
        ({"labels": [*([name, 0] for name in NAMES), [NAMES[1], 1]]}, f"two labels for {NAMES[1]}"),
        ({"labels": [*([name, 0] for name in NAMES[:2]), [NAMES[2], 2**70]]}, f"label of {NAMES[2]} is 118059"),
        ({"labels": [*([name, 0] for name in NAMES[:2]), [NAMES[2], -1]]}, f"label of {NAMES[2]} is -1, expected a"),
        ({"labels": [*([name, 0] for name in NAMES[:2]), [NAMES[2], True]]}, f"label of {NAMES[2]} is True"),
        ({"labels": [[{}, 0]]}, r"\[name, label\] pairs"),
    ],
)
def test_label_tables(tmp_path, table, message, place):
    files = edm2_files(moments(3), None) | {"dataset.json": json.dumps(table).encode()}
    with pytest.raises(ValueError, match=f"{place}: .*{message}"):
        FileDataset(write(tmp_path / place, files))


def test_negative_labels_name_the_sample(tmp_path):
    write(tmp_path, {f"{number}.npy": uvit_file(PAIR, [0, 5, -3, 1][number]) for number in range(4)})
    with pytest.raises(ValueError, match=r"labels must be in 0\.\.5, found -3 at sample 2"):
        FileDataset(tmp_path, pickled=True)


def test_two_pairs_of_folders(tmp_path):
    files = {f"{name}_features/0.npy": npy(np.zeros((1, 4, 6, 6), np.float32)) for name in "ab"}
    files |= {f"{name}_labels/0.npy": npy(np.array([1])) for name in "ab"}
    with pytest.raises(ValueError, match="it holds a_features and b_features: name one of them"):
        FileDataset(write(tmp_path, files))
    assert len(FileDataset(tmp_path / "b_features")) == 1


# ---------------------------------------------------------------------------- headers


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "cannot be read as tensors"),
        (b"", "cannot be read as tensors"),
        (pickle.dumps(eval, 2), "cannot be read as tensors"),
        (saved([ONES]), "cannot be read as tensors"),
        (saved({"mean": ONES}), "cannot be read as tensors"),
        (saved({"mean": 1.0, "std": ONES}), "cannot be read as tensors"),
        (saved({"mean": ONES * float("nan"), "std": ONES}), "must hold 'mean' and positive 'std'"),
        (saved({"mean": ONES, "std": ONES * float("inf")}), "must hold 'mean' and positive 'std'"),
        (saved({"mean": ONES, "std": ONES * 0}), "must hold 'mean' and positive 'std'"),
        (saved({"mean": ONES, "std": ONES[:2]}), "must hold 'mean' and positive 'std'"),
    ],
)
def test_statistics(tmp_path, content, message):
    save_file({"latents": torch.randn(4, 4, 6, 6)}, tmp_path / "0.safetensors")
    (tmp_path / "latents_stats.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"latents_stats\.pt.*{message}") as caught:
        FileDataset(tmp_path)
    text = str(caught.value).replace(str(tmp_path), "")
    assert "weights_only" not in text
    assert len(text) < 200


@pytest.mark.parametrize("header", [[], None, 3, "latents", {"latents": []}, {"latents": None}, {"latents": {}}])
def test_safetensors_headers(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 64))
    with pytest.raises(ValueError, match=r"a\.safetensors: cannot be read: ") as caught:
        FileDataset(tmp_path / "a.safetensors")
    assert header == {"latents": {}} or "its header is no table of tensors" in str(caught.value)


OPEN_BRACKETS = b"\x93NUMPY\1\0\x20\0" + b"{'descr': ('<f4', 'shape': (3,  "


def npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    "content", [npy_header((8, 38_000, 38_000)), npy_header((2**70,)), npy_header((-8, -6, 6)), OPEN_BRACKETS]
)
def test_npy_headers_that_lie(tmp_path, content):
    files = edm2_files(moments(200), None) | {"00010/img-mean-std-00000032.npy": content + b"\0" * 64}
    data = FileDataset(write(tmp_path / "folder", files))
    with pytest.raises(ValueError, match=r"folder: sample 32 \(00010/img-mean-std-00000032\.npy\) cannot be read"):
        everything(data)
    (tmp_path / "latents.npy").write_bytes(content + b"\0" * 64)
    with pytest.raises(ValueError, match=r"latents\.npy: cannot be read"):
        FileDataset(tmp_path / "latents.npy")
    assert decode_npy(npy(PAIR)).shape == PAIR.shape


# ---------------------------------------------------------------------------- erdfast.encode


def run(*arguments) -> int:
    return encode.main([str(argument) for argument in arguments])


def latents(path, count=200, *, row=0, value=0.0):
    array = np.random.RandomState(count).randn(count, 4, 6, 6).astype(np.float32)
    array[row, 1, 2, 3] = value
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"note": 3}, "note, origin, dtype and class_names must be texts"),
        ({"note": None}, "must be texts"),
        ({"class_names": [1, 2]}, "must be texts"),
        ({"flips": "no"}, "flips true or false"),
        ({"flips": 0}, "flips true or false"),
        ({"moments_scale": [1]}, r"moments_scale \[1\]"),
        ({"moments_scale": True}, "moments_scale True"),
        ({"moments_scale": -1.0}, r"moments_scale -1\.0"),
        ({"dtype": ["bf16"]}, "must be texts"),
        ({"dtype": "fp8"}, "dtype 'fp8', expected one of fp32, bf16, fp16, uint8"),
        ({"dtype": "fp16"}, "'latents' is torch.bfloat16 of shape .*, which erdfast.json does not say"),
        ({"num_classes": "3"}, "cannot be read"),
        ({"parts": [3]}, "cannot be read"),
        ({"rows": None}, "do not add up"),
    ],
)
def test_manifests_of_wrong_types(tmp_path, change, message):
    assert run("--data", latents(tmp_path / "l.npy", 9), "--convert", "--out", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / MANIFEST).read_text()) | change
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"out.*{message}"):
        FileDataset(tmp_path / "out")


@pytest.mark.parametrize("text", ["[]", "null", "3", "", '{"format": 1}'])
def test_manifests_that_are_none(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"erdfast\.json cannot be read"):
        FileDataset(tmp_path)


def test_a_folder_goes_on_with_the_same_data_alone(tmp_path, capsys):
    options = ["--convert", "--out", tmp_path / "out"]
    (tmp_path / "labels.npy").write_bytes(npy(np.arange(30) % 3))
    data = latents(tmp_path / "a.npy", 30, row=29, value=1.0)
    assert run("--data", data, *options) == 0
    (tmp_path / "out" / MANIFEST).unlink()  # as if it had been killed
    latents(data, 30, row=29, value=2.0)
    assert "out was begun with data " in refused(capsys, encode.main, ["--data", data, *options])
    latents(data, 30, row=29, value=1.0)
    (tmp_path / "labels.npy").write_bytes(npy(np.arange(30)[::-1] % 3))
    assert "out was begun with data " in refused(capsys, encode.main, ["--data", data, *options])
    (tmp_path / "labels.npy").write_bytes(npy(np.arange(30) % 3))
    left = tmp_path / "out" / ".part-00000-of-00001.safetensors.123.partial"
    left.write_bytes(b"half")
    assert run("--data", data, *options) == 0
    assert not left.exists()
    assert (tmp_path / "out" / MANIFEST).exists()


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "bf16"), (float("inf"), "fp32"), (1e5, "fp16")])
def test_every_value_is_looked_at(tmp_path, value, dtype):
    data = latents(tmp_path / "l.npy", row=102, value=value)
    assert FileDataset(data)  # which looks at some rows alone
    options = ["--data", data, "--convert", "--dtype", dtype, "--out", tmp_path / "out"]
    with pytest.raises(ValueError, match=rf"l\.npy: sample 102 is not finite in {dtype}"):
        run(*options)
    assert not (tmp_path / "out" / MANIFEST).exists()
    assert run("--data", latents(data, row=102, value=1e4), *options[2:-1], tmp_path / "other") == 0
