"""What other projects leave on the disk, one file per sample: read, labelled, scaled, and named when broken."""

import io
import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from erdfast.data import FileDataset
from erdfast.data.pickled_pairs import decode_pair
from erdfast.data.pictures import decode_picture
from erdfast.data.source import SD_VAE_SCALE

RANDOM = np.random.RandomState(1)
EDM2_MEAN, EDM2_STD = np.array([5.81, 3.25, 0.12, -2.15]), np.array([4.17, 4.62, 3.71, 3.28])


def everything(data, flips=None):
    return data.gather(torch.arange(len(data)), flips)


def moments(count: int, mean: float | np.ndarray = 0.0):
    means = RANDOM.randn(count, 4, 6, 6) + np.reshape(mean, (-1, 1, 1))
    return np.concatenate([means, RANDOM.rand(count, 4, 6, 6)], axis=1).astype(np.float32)


def npy(array, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def png(array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


def write(place, files: dict[str, bytes], compression=zipfile.ZIP_STORED):
    """A folder, or a zip."""
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", compression) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return place
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def edm2_files(values, labels):
    names = [f"{i // 3:05d}/img-mean-std-{i:08d}.npy" for i in range(len(values))]
    table = {"labels": None if labels is None else [[n, int(y)] for n, y in zip(names, labels, strict=True)]}
    files = {name: npy(value) for name, value in zip(names, values, strict=True)}
    return files | {"dataset.json": json.dumps(table).encode()}


# ---------------------------------------------------------------------------- EDM2 and REPA


@pytest.mark.parametrize("place", ["data", "data.zip"])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_repa_moments(tmp_path, place, compression):
    values, labels = moments(10), RANDOM.randint(0, 7, 10)
    data = FileDataset(write(tmp_path / place, edm2_files(values, labels), compression))
    x, y, scale = data.gather(torch.tensor([9, 0, 9, 4]))
    np.testing.assert_array_equal(x.numpy(), values[[9, 0, 9, 4]])
    assert (y.tolist(), scale, data.shape) == (labels[[9, 0, 9, 4]].tolist(), SD_VAE_SCALE, (4, 6, 6))
    assert data.describe().startswith("10 latents 4x6x6, moments, fp32, ")
    assert not data.has_flips


def test_edm2_moments_are_told_by_their_mean_and_whitened(tmp_path):
    values = moments(9, EDM2_MEAN)
    data = FileDataset(write(tmp_path / "edm2", edm2_files(values, None)))
    x, _, scale = everything(data)
    factor = (0.5 / EDM2_STD).reshape(4, 1, 1)
    np.testing.assert_allclose(x[:, :4].numpy(), (values[:, :4] - EDM2_MEAN.reshape(4, 1, 1)) * factor, atol=1e-5)
    np.testing.assert_allclose(x[:, 4:].numpy(), values[:, 4:] * factor, atol=1e-6)
    assert (scale, data.num_classes) == (1.0, 0)
    assert "whitened to std 0.5 (EDM2)" in data.describe()
    assert FileDataset(tmp_path / "edm2", latent_scale="sd").gather(torch.tensor([0])).moments_scale == SD_VAE_SCALE
    stored = FileDataset(tmp_path / "edm2", latent_scale="stored")
    assert torch.equal(everything(stored).x, torch.from_numpy(values))
    assert everything(stored).moments_scale == 1.0
    with pytest.raises(ValueError, match="unknown latent_scale 'vp'; choose from auto, stored, sd, edm2"):
        FileDataset(tmp_path / "edm2", latent_scale="vp")


def test_repa_root_with_pictures_beside(tmp_path):
    root = tmp_path / "imagenet"
    write(root / "vae-sd", edm2_files(moments(4), [0, 1, 2, 3]))
    write(root / "images", {"00000/img00000000.png": png(np.zeros((8, 8, 3), np.uint8))})
    assert (len(FileDataset(root)), FileDataset(root).num_classes) == (4, 4)


def test_latents_take_scales_too(tmp_path):
    values = RANDOM.randn(5, 4, 6, 6).astype(np.float32)
    np.save(tmp_path / "l.npy", values)
    scaled = FileDataset(tmp_path / "l.npy", latent_scale="sd")
    np.testing.assert_allclose(everything(scaled).x.numpy(), values * SD_VAE_SCALE, rtol=1e-6)
    assert "times 0.18215" in scaled.describe()
    np.save(tmp_path / "six.npy", RANDOM.randn(5, 6, 6, 6).astype(np.float32))
    with pytest.raises(ValueError, match=r"six\.npy: latent_scale edm2 is for 4 channels, these latents have 6"):
        FileDataset(tmp_path / "six.npy", latent_scale="edm2")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"labels": [["elsewhere.npy", 0]]}, "no label for 00000/img-mean-std-00000000.npy"),
        ({"labels": [1, 2]}, r"\[name, label\] pairs"),
        ({"classes": 3}, r"\[name, label\] pairs"),
        ({"labels": [["00000/img-mean-std-00000000.npy", 0.5]]}, "label of 00000/img-mean-std-00000000.npy is 0.5"),
    ],
)
def test_bad_label_tables(tmp_path, table, message):
    files = edm2_files(moments(1), None) | {"dataset.json": json.dumps(table).encode()}
    for place in ("folder", "archive.zip"):
        with pytest.raises(ValueError, match=f"{place}: .*{message}"):
            FileDataset(write(tmp_path / place, files))


# ---------------------------------------------------------------------------- broken samples


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read"),
        (npy(moments(1)[0])[:-5], "cannot be read"),
        (npy(np.array([{}, None], dtype=object)), "Object arrays cannot be loaded"),
        (npy(np.zeros((8, 6, 5), np.float32)), r"float32 \(8, 6, 5\), the first sample float32 \(8, 6, 6\)"),
        (npy(np.zeros((8, 6, 6), np.float64)), "float64"),
        (npy(np.array(["a"])), "no sample"),
    ],
)
@pytest.mark.parametrize("place", ["folder", "archive.zip"])
def test_broken_samples_are_named_with_their_index(tmp_path, content, reason, place):
    files = edm2_files(moments(200), None)  # of which some are looked at when they are opened, but not this one
    files["00010/img-mean-std-00000032.npy"] = content
    if place.endswith(".zip") and not content:  # which the zip's directory says
        with pytest.raises(ValueError, match=r"archive\.zip: .*img-mean-std-00000032\.npy' has 0 bytes"):
            FileDataset(write(tmp_path / place, files))
        return
    data = FileDataset(write(tmp_path / place, files))
    with pytest.raises(ValueError, match=f"{place}: sample 32 .00010/img-mean-std-00000032.npy.*{reason}"):
        everything(data)


def test_a_damaged_zip_is_noticed(tmp_path):
    path = write(tmp_path / "a.zip", edm2_files(moments(200), None))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("00010/img-mean-std-00000032.npy").header_offset + 400
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sample 32 .*checksum differs"):
        everything(FileDataset(path))
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"a\.zip: cannot be read: File is not a zip file"):
        FileDataset(path)
    with pytest.raises(ValueError, match=r"empty\.zip.*neither"):
        FileDataset(write(tmp_path / "empty.zip", {"readme.txt": b""}))


# ---------------------------------------------------------------------------- fast-DiT


def test_fast_dit(tmp_path):
    values = RANDOM.randn(12, 1, 4, 6, 6).astype(np.float32)
    files = {f"imagenet256_features/{i}.npy": npy(value) for i, value in enumerate(values)}
    files |= {f"imagenet256_labels/{i}.npy": npy(np.array([i % 5])) for i in range(12)}
    write(tmp_path, files)
    order = sorted(range(12), key=str)  # of the names, as fast-DiT reads them
    for path in (tmp_path, tmp_path / "imagenet256_features"):
        data = FileDataset(path)
        batch = everything(data)
        np.testing.assert_array_equal(batch.x.numpy(), values[order, 0])
        assert (batch.y.tolist(), batch.moments_scale) == ([i % 5 for i in order], None)
    (tmp_path / "imagenet256_labels/7.npy").unlink()
    with pytest.raises(ValueError, match=r"1 files are in only one of imagenet256_features and imagenet256_labels: 7"):
        FileDataset(tmp_path)


# ---------------------------------------------------------------------------- U-ViT


def uvit_file(value, label, protocol=None) -> bytes:
    pair = np.empty(2, dtype=object)
    pair[0], pair[1] = value, label
    if protocol is None:
        return npy(pair, allow_pickle=True)  # written here, never read so
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": (2,)})
    pickle.dump(pair, stream, protocol=protocol)
    return stream.getvalue()


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
@pytest.mark.parametrize("label", [3, np.int64(3), np.array(3), np.array([3], np.uint16)])
def test_pickled_pairs_are_read_without_unpickling(monkeypatch, protocol, label):
    value = RANDOM.randn(8, 6, 6).astype(np.float32) * 3
    content = uvit_file(value, label, protocol)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    pair = decode_pair(content)
    assert pair.label == 3
    np.testing.assert_array_equal(pair.mean_and_std[:4], value[:4])
    np.testing.assert_allclose(pair.mean_and_std[4:], np.exp(value[4:] / 2), rtol=1e-6)


class Evil:
    def __reduce__(self):
        return (eval, ("__import__('os').environ.__setitem__('ERDFAST_EVIL', '1')",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (uvit_file(Evil(), 0), r"builtins\.eval, which is refused"),
        (uvit_file(moments(1)[0], Evil()), r"builtins\.eval, which is refused"),
        (uvit_file(moments(1)[0], torch.tensor(1)), "which is refused"),
        (uvit_file(moments(1)[0][:7], 1), r"floats of shape \(2C, H, W\)"),
        (uvit_file(np.zeros((8, 6, 6), np.int64), 1), "floats of shape"),
        (uvit_file(np.zeros((8, 6, 6), np.complex64), 1), "numbers of type"),
        (uvit_file(np.asfortranarray(moments(1)[0]), 1), "C order"),
        (uvit_file(moments(1)[0].astype(">f4"), 1), "big-endian"),
        (uvit_file(moments(1)[0], "cat"), "no whole number but a str"),
        (uvit_file(moments(1)[0], 1)[:-1000], "pickle is broken"),
        (npy(np.array([None], dtype=object), allow_pickle=True), r"something else than a pair"),  # only written
        (npy(np.zeros(3)), "no pickled pair"),
        (b"hello", "magic string"),
    ],
)
def test_other_pickles_are_refused(monkeypatch, content, message):
    monkeypatch.delenv("ERDFAST_EVIL", raising=False)
    with pytest.raises(ValueError, match=message):
        decode_pair(content)
    import os

    assert "ERDFAST_EVIL" not in os.environ


def test_uvit_features_are_for_the_converter(tmp_path):
    values = [RANDOM.randn(8, 6, 6).astype(np.float32) for _ in range(11)]
    write(tmp_path / "f", {f"{i}.npy": uvit_file(value, i % 3) for i, value in enumerate(values)})
    with pytest.raises(ValueError, match=r"f: .*python -m erdfast\.encode --convert --data .*f --out"):
        FileDataset(tmp_path / "f")
    data = FileDataset(tmp_path / "f", pickled=True)
    batch = data.gather(torch.tensor([10, 2]))
    assert (len(data), batch.y.tolist(), batch.moments_scale) == (11, [1, 2], SD_VAE_SCALE)
    np.testing.assert_array_equal(batch.x[0, :4].numpy(), values[10][:4])


# ---------------------------------------------------------------------------- pictures


def picture(side=8, channels=3):
    return RANDOM.randint(0, 256, (side, side, channels), dtype=np.uint8)


def test_image_folder(tmp_path):
    pictures = {f"{c}/{i}.png": picture() for c in ("n01", "n02", "n10") for i in range(3)}
    write(tmp_path / "train", {name: png(value) for name, value in pictures.items()} | {"n01/notes.txt": b"x"})
    data = FileDataset(tmp_path / "train")
    x, y, scale = everything(data)
    expected = np.stack(list(pictures.values())).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(x.numpy(), expected, atol=1e-6)
    assert (y.tolist(), scale, data.class_names) == ([0] * 3 + [1] * 3 + [2] * 3, None, ["n01", "n02", "n10"])
    assert data.has_flips
    flips = torch.arange(9) % 2 == 0
    mirrored = everything(data, flips).x
    assert torch.equal(mirrored[flips], x[flips].flip(-1))
    assert torch.equal(mirrored[~flips], x[~flips])
    assert data.describe() == f"9 images 3x8x8, 3 classes, scaled to [-1, 1] ({tmp_path / 'train'})"
    with pytest.raises(ValueError, match=r"squares of 1 or 3 channels, but 4x32x32.*erdfast\.encode"):
        FileDataset(tmp_path / "train", shape=(4, 32, 32))


def test_pictures_are_cropped_as_adm_does():
    wide = np.zeros((32, 100, 3), np.uint8)
    wide[:, 24:76] = 200
    cropped = decode_picture(png(wide), size=8)
    assert cropped.shape == (8, 8, 3)
    assert (cropped == 200).all()  # the middle alone
    for array in (picture(8, 1)[..., 0], np.dstack([picture(8), np.full((8, 8), 7, np.uint8)])):
        assert decode_picture(png(array)).shape == (8, 8, 3)  # grey, and with transparency
    grey = decode_picture(png(picture(20, 1)[..., 0]), size=8, channels=1)
    assert grey.shape == (8, 8, 1)
    same = picture(8)
    assert np.array_equal(decode_picture(png(same), size=8), same)


@pytest.mark.parametrize("place", ["folder", "archive.zip"])
def test_edm2_pictures(tmp_path, place):
    pictures = [picture() for _ in range(5)]
    files = {f"00000/img{i:08d}.png": png(value) for i, value in enumerate(pictures)}
    assert FileDataset(write(tmp_path / f"plain{place}", files)).num_classes == 0  # 00000 is no class
    table = {"labels": [[name, i] for i, name in enumerate(files)]}
    data = FileDataset(write(tmp_path / place, files | {"dataset.json": json.dumps(table).encode()}), shape=(3, 8, 8))
    assert everything(data).y.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(data.to_images(everything(data).x), np.stack(pictures))


def test_broken_and_different_pictures_are_named(tmp_path):
    files = {f"a/{i}.png": png(picture()) for i in range(3)}
    with pytest.raises(ValueError, match=r"sample 1 \(a/1.png\) cannot be read: it is no picture"):
        FileDataset(write(tmp_path / "broken", files | {"a/1.png": b"not a picture"}))
    with pytest.raises(ValueError, match=r"sample 2 \(a/2.png\)"):
        FileDataset(write(tmp_path / "short", files | {"a/2.png": files["a/2.png"][:100]}))
    mixed = write(tmp_path / "mixed", files | {"a/1.png": png(picture(9))})
    with pytest.raises(ValueError, match=r"sample 1 \(a/1.png\) .*\(9, 9, 3\), the first sample uint8 \(8, 8, 3\)"):
        FileDataset(mixed)
    assert len(FileDataset(mixed, shape=(3, 8, 8))) == 3  # cropped, they are alike


# ---------------------------------------------------------------------------- stored mirror images


def test_lightning_dit_mirror_images(tmp_path):
    values = torch.randn(10, 4, 6, 6)
    for number, part in enumerate([slice(0, 4), slice(4, 10)]):
        shard = {
            "latents": values[part].clone(),
            "latents_flip": -values[part],
            "labels": torch.arange(10)[part].clone(),
        }
        save_file(shard, tmp_path / f"{number}.safetensors")
    mean, std = torch.randn(4), torch.rand(4) + 0.5
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    data = FileDataset(tmp_path)
    flips = torch.arange(10) % 3 == 1
    x = everything(data, flips).x
    sign = torch.where(flips, -1.0, 1.0).view(-1, 1, 1, 1)
    torch.testing.assert_close(x, (sign * values - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert data.has_flips
    assert "with mirror images" in data.describe()
    save_file({"latents": values, "labels": torch.arange(10)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match=r"either all shards have mirror images or none; 2\.safetensors"):
        FileDataset(tmp_path)


def test_a_zip_may_be_read_by_many_threads_and_processes(tmp_path):
    values = moments(200)
    data = FileDataset(write(tmp_path / "a.zip", edm2_files(values, None)))
    order = torch.randperm(200)
    for _ in range(5):
        assert torch.equal(data.gather(order).x, torch.from_numpy(values)[order])
