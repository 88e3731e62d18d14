import io
import json
import os
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from erdfast.data import FileDataset, open_dataset

RANDOM = np.random.RandomState(0)


def opened(path, **options):
    data = open_dataset(os.fspath(path), **options)
    assert isinstance(data, FileDataset)
    return data


def everything(data):
    return data.gather(torch.arange(len(data)))


def latents(count=11, dtype=np.float32):
    return RANDOM.randn(count, 4, 8, 6).astype(dtype)


def test_adm_pictures(tmp_path):
    images = RANDOM.randint(0, 256, (9, 6, 5, 3), dtype=np.uint8)
    labels = np.arange(9) % 4
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "samples.npz", images, labels)
        data = opened(tmp_path / "samples.npz", shape=(3, 6, 5), num_classes=4)
        x, y, scale = data.gather(torch.tensor([8, 0, 8]))
        assert (data.shape, data.num_classes, len(data), scale) == ((3, 6, 5), 4, 9, None)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        expected = images[[8, 0, 8]].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
        assert y.tolist() == [0, 0, 0]
        np.testing.assert_array_equal(data.to_images(x), images[[8, 0, 8]])  # there and back without loss
        assert data.describe() == f"9 images 3x6x5, 4 classes, scaled to [-1, 1] ({tmp_path / 'samples.npz'})"


def test_pictures_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", RANDOM.randint(0, 256, (3, 4, 4, 1), dtype=np.uint8))
    data = opened(tmp_path / "a.npz")
    assert (data.shape, data.num_classes, data.class_names) == ((1, 4, 4), 0, [])
    assert everything(data).y.tolist() == [0, 0, 0]
    assert "no labels" in data.describe()
    with pytest.raises(ValueError, match=r"a\.npz: 10 classes are wanted"):
        opened(tmp_path / "a.npz", num_classes=10)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("compressed", [False, True])
def test_latents_in_npz(tmp_path, dtype, compressed):
    values, labels = latents(dtype=dtype), np.arange(11, dtype=np.uint16)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "l.npz", labels=labels, latents=values)
    data = opened(tmp_path / "l.npz")
    batch = everything(data)
    assert (data.shape, data.num_classes) == ((4, 8, 6), 11)
    assert batch.x.dtype == (torch.float16 if dtype is np.float16 else torch.float32)  # float64 is for no kernel
    np.testing.assert_array_equal(batch.x.float().numpy(), values.astype(np.float32))
    assert batch.y.tolist() == list(range(11))
    assert data.to_images(batch.x).shape == (11, 8, 6, 3)


def test_latents_in_npy_with_and_without_labels(tmp_path):
    values = latents()
    np.save(tmp_path / "latents.npy", values)
    assert opened(tmp_path / "latents.npy").num_classes == 0
    np.save(tmp_path / "labels.npy", np.full((11, 1), 2))
    for path in (tmp_path / "latents.npy", tmp_path):
        data = opened(path)
        assert data.num_classes == 3
        np.testing.assert_array_equal(everything(data).x.numpy(), values)
    assert opened(tmp_path, num_classes=0).num_classes == 0


def test_the_file_is_mapped_and_never_changed(tmp_path):
    np.save(tmp_path / "big.npy", latents())
    before = (tmp_path / "big.npy").read_bytes()
    data = opened(tmp_path / "big.npy")
    x = everything(data).x
    x.zero_()
    assert float(everything(data).x.abs().max()) > 0
    assert (tmp_path / "big.npy").read_bytes() == before
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "big.npy") in maps.read_text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_safetensors(tmp_path, dtype):
    values = torch.from_numpy(latents()).to(dtype)
    save_file({"labels": torch.arange(11), "latents": values}, tmp_path / "l.safetensors", {"scale": "1"})
    data = opened(tmp_path / "l.safetensors", num_classes=1000)
    batch = data.gather(torch.tensor([10, 3]))
    assert torch.equal(batch.x, values[[10, 3]])  # and not float32: as stored
    assert batch.y.tolist() == [10, 3]
    assert data.num_classes == 1000


def test_folder_of_shards_with_statistics(tmp_path):
    values = torch.from_numpy(latents(12))
    for number, part in enumerate([slice(0, 5), slice(5, 6), slice(6, 12)]):
        shard = {"latents": values[part].clone(), "latents_flip": values[part].flip(-1).contiguous()}
        save_file(shard | {"labels": torch.arange(12)[part].clone()}, tmp_path / f"shard{number}.safetensors")
    data = opened(tmp_path)
    assert (len(data), data.num_classes) == (12, 12)
    order = torch.tensor([11, 0, 5, 4, 6, 5])
    assert torch.equal(data.gather(order).x, values[order])
    assert data.gather(order).y.tolist() == order.tolist()
    assert "as stored" in data.describe()

    mean, std = torch.randn(1, 4, 1, 1), torch.rand(1, 4, 1, 1) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    data = opened(tmp_path)
    torch.testing.assert_close(data.gather(order).x, (values[order] - mean) / std)
    assert "normalised by latents_stats.pt" in data.describe()

    torch.save({"mean": mean[:, :3], "std": std[:, :3]}, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match="3 channels, the latents have 4"):
        opened(tmp_path)
    torch.save({"mean": mean, "std": RANDOM}, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        opened(tmp_path)  # an arbitrary object: the restricted reader refuses it


def test_shards_must_agree(tmp_path):
    values = torch.from_numpy(latents(4))
    save_file({"latents": values, "labels": torch.arange(4)}, tmp_path / "a.safetensors")
    save_file({"latents": values}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors and a\.safetensors differ"):
        opened(tmp_path)
    save_file({"latents": values, "labels": torch.arange(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors has 4 latents, but 3 labels"):
        opened(tmp_path)
    save_file({"latents": values.half(), "labels": torch.arange(4)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors holds torch\.float16"):
        opened(tmp_path)


@pytest.mark.parametrize("chunks", [None, (2, 8, 8, 8)])
def test_erd_hdf5(tmp_path, chunks):
    h5py = pytest.importorskip("h5py")
    moments = RANDOM.rand(7, 8, 8, 8).astype(np.float32)
    with h5py.File(tmp_path / "latents.h5", "w") as file:
        file.create_dataset("train_latents", data=moments, chunks=chunks, compression="gzip" if chunks else None)
        file.create_dataset("train_labels", data=np.arange(7, dtype=np.uint16))
    data = opened(tmp_path / "latents.h5", shape=(4, 8, 8), num_classes=1000)
    x, y, scale = data.gather(torch.tensor([6, 2, 6, 0]))
    np.testing.assert_array_equal(x.numpy(), moments[[6, 2, 6, 0]])
    assert (y.tolist(), scale, data.shape) == ([6, 2, 6, 0], 0.18215, (4, 8, 8))
    assert data.to_images(torch.zeros(2, 4, 8, 8)).shape == (2, 8, 8, 3)
    assert "0.18215" in data.describe()


def test_log_variances_are_noticed(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "u.hdf5", "w") as file:
        file["train_latents"] = np.full((3, 8, 4, 4), -5.0, np.float32)
    with pytest.raises(ValueError, match=r"u\.hdf5.*log-variances"):
        opened(tmp_path / "u.hdf5")


def test_missing_h5py_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"a\.h5 needs h5py.*pip install erdfast\[hdf5\]"):
        opened(tmp_path / "a.h5")


def damaged(folder: Path, name: str) -> Path:
    """One file or folder with a single fault, by name."""
    good = {"latents": latents(4), "labels": np.arange(4)}
    path = folder / "bad.npz"
    arrays = {
        "object arrays": {"latents": np.array([None, {}], dtype=object)},
        "empty": {"latents": np.zeros((0, 4, 8, 8), np.float32)},
        "other names": {"weights": np.zeros(3)},
        "float pictures": {"arr_0": np.zeros((2, 4, 4, 3))},
        "two channels": {"arr_0": np.zeros((2, 4, 4, 2), np.uint8)},
        "flat latents": good | {"latents": np.zeros((4, 16), np.float32)},
        "integer latents": good | {"latents": np.zeros((4, 1, 2, 2), np.int64)},
        "fewer labels": good | {"labels": np.arange(3)},
        "float labels": good | {"labels": np.arange(4.0)},
        "negative label": good | {"labels": np.array([0, 1, -2, 3])},
        "label too large": good | {"labels": np.array([0, 1, 10, 3])},
        "text": {"latents": np.array(["a", "b"])},
        "big endian": {"latents": latents(2).astype(">f4")},
        "not finite": {"latents": np.where(np.arange(4)[:, None, None, None] == 2, np.nan, latents(4))},
        "fortran": {"latents": np.asfortranarray(latents(4))},
    }
    if name in arrays:
        np.savez(path, **arrays[name])
        return path
    np.savez(path, **good)
    if name == "truncated npz":
        path.write_bytes(path.read_bytes()[:1000])
    if name == "not a zip":
        path.write_bytes(b"hello")
    if name in ("truncated npy", "pickle"):
        path = folder / "bad.npy"
        array = latents(4) if name == "truncated npy" else np.array([{}], dtype=object)
        np.save(path, array, allow_pickle=True)  # written here: that it is refused is the test
        path.write_bytes(path.read_bytes()[:1000])
    if name in ("truncated safetensors", "long header", "broken header"):
        path = folder / "bad.safetensors"
        save_file({"latents": torch.zeros(4, 1, 8, 8)}, path)
        data = path.read_bytes()
        path.write_bytes({"t": data[:500], "l": b"\xff" * 64, "b": data[:8] + b"x" * (len(data) - 8)}[name[0]])
    if name == "other type":
        path = folder / "bad.txt"
        path.write_text("hello")
    if name == "empty folder":
        path = folder / "bad"
        path.mkdir()
    return path


FAULTS = {
    "object arrays": "'latents' holds Python objects",
    "empty": r"'latents' is empty.*\(0, 4, 8, 8\)",
    "other names": "expected an array 'arr_0'.*'weights'",
    "float pictures": "must be uint8.*float64",
    "two channels": "4, 4, 2",
    "flat latents": r"must be float \(N, C, H, W\), got torch.float32 \(N, 16\)",
    "integer latents": "torch.int64",
    "fewer labels": "labels must be 4 integers.*3",
    "float labels": "labels must be 4 integers.*float64",
    "negative label": r"labels must be in 0\.\.9, found -2",
    "label too large": r"labels must be in 0\.\.9, found 10",
    "text": "type <U1",
    "big endian": "type >f4.*native order",
    "not finite": "sample 2 holds values that are not finite",
    "fortran": "Fortran order",
    "truncated npz": "cannot be read",
    "not a zip": "not a zip file",
    "truncated npy": "ends early",
    "pickle": "Python objects",
    "truncated safetensors": "ends early",
    "long header": "not a safetensors file",
    "broken header": "cannot be read",
    "other type": r"unknown file type '\.txt', expected one of \.npz",
    "empty folder": "holds neither",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files_are_named_with_their_fault(tmp_path, fault):
    path = damaged(tmp_path, fault)
    with pytest.raises(ValueError, match=FAULTS[fault]) as caught:
        opened(path, num_classes=10 if "label" in fault else None)
    assert path.name in str(caught.value)


def test_another_shape_is_refused(tmp_path):
    np.save(tmp_path / "l.npy", latents(2))
    with pytest.raises(ValueError, match=r"l\.npy: the data are 4x8x6, but 4x32x32"):
        opened(tmp_path / "l.npy", shape=(4, 32, 32))
    with pytest.raises(ValueError, match="num_classes must be 0 or more, got -1"):
        opened(tmp_path / "l.npy", num_classes=-1)


def safetensors_bytes(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def npy_bytes(shape: tuple[int, ...], data: bytes) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def test_a_member_never_reads_into_the_next(tmp_path):
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
            archive.writestr("latents.npy", npy_bytes((4, 1, 2, 2), b"\0" * 32))
            archive.writestr("other.npy", npy_bytes((64,), b"\1" * 256))
        with pytest.raises(ValueError, match=r"a\.npz.*ends early: 'latents' needs"):
            opened(tmp_path / "a.npz")


@pytest.mark.parametrize("offsets", [[-64, 0], [64, 0], [0.0, 64.0], [0, 2**70]])
def test_safetensors_offsets_must_lie_within_the_data(tmp_path, offsets):
    header = {"latents": {"dtype": "F32", "shape": [4, 1, 2, 2], "data_offsets": offsets}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 64))
    with pytest.raises(ValueError, match=r"a\.safetensors.*'latents' lies at bytes"):
        opened(tmp_path / "a.safetensors")


@pytest.mark.parametrize("shape", [(10**12, 2, 4, 4), (-4, -1, 2, 2), (-1, 1, 2, 2), (2**70, 1, 2, 2)])
def test_impossible_shapes_are_named(tmp_path, shape):
    array = npy_bytes(shape, b"\0" * 64)
    (tmp_path / "a.npy").write_bytes(array)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / f"a{compression}.npz", "w", compression) as archive:
            archive.writestr("latents.npy", array)
    header = {"latents": {"dtype": "F32", "shape": shape, "data_offsets": [0, 64]}}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 64))
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=path.name):
            opened(path)


def test_missing_external_storage_is_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("train_latents", (3, 8, 4, 4), "f4", external=[("gone.bin", 0, 3 * 8 * 16 * 4)])
    (tmp_path / "gone.bin").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"a\.h5"):
        opened(tmp_path / "a.h5")


def test_entries_that_are_not_used_may_be_anything(tmp_path):
    values, labels = latents(), np.arange(11)
    np.savez(tmp_path / "a.npz", latents=values, labels=labels, scale=0.18215, names=np.array(["a", "b"]))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    header = {
        "latents": {"dtype": "F32", "shape": values.shape, "data_offsets": [4, 4 + values.nbytes]},
        "extra": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
    }
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, b"\0" * 4 + values.tobytes()))
    for name in ("a.npz", "a.safetensors"):
        np.testing.assert_array_equal(everything(opened(tmp_path / name)).x.numpy(), values)
    h5py = pytest.importorskip("h5py")
    moments = np.abs(values)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["train_latents"], file["text"], file["scale"] = moments, ["a", "b"], 0.5
        file["broken"] = h5py.SoftLink("/nowhere")
    np.testing.assert_array_equal(everything(opened(tmp_path / "a.h5")).x.numpy(), moments)


def test_a_label_that_means_too_many_classes_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", latents=latents(2), labels=np.array([0, 2**40]))
    with pytest.raises(ValueError, match=r"a\.npz.*classes.*1099511627776"):
        opened(tmp_path / "a.npz")
