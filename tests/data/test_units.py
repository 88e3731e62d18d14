"""How values come from a VAE's own latents: every format says what it knows, and a converted folder says the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from erdfast import encode
from erdfast.data import FileDataset
from erdfast.data.source import SD_VAE_SCALE
from erdfast.data.store import JOB, MANIFEST
from tests.data.test_formats import EDM2_MEAN, edm2_files, moments, npy, write

RAW = moments(12, EDM2_MEAN)
"""Mean and deviation as the VAE gave them."""


def repa(folder: Path) -> Path:
    return write(folder, edm2_files(moments(12), None))


def edm2(folder: Path) -> Path:
    return write(folder, edm2_files(RAW, None))


def lightningdit(folder: Path) -> Path:
    folder.mkdir()
    save_file({"latents": torch.from_numpy(RAW[:, :4].copy())}, folder / "0.safetensors")
    stats = {"mean": torch.tensor([1.0, 2.0, 3.0, 4.0]), "std": torch.tensor([2.0, 1.0, 4.0, 0.5])}
    torch.save(stats, folder / "latents_stats.pt")
    return folder


def hdf5(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    folder.mkdir()
    with h5py.File(folder / "a.h5", "w") as file:
        file["train_latents"] = RAW
    return folder / "a.h5"


def latents(data: FileDataset) -> Tensor:
    """The mean of what the network sees, brought back to the VAE's own."""
    x, _, factor = data.gather(torch.arange(len(data)))
    assert data.vae_units is not None
    scale, bias = data.vae_units.affine
    return (x[:, :4].float() * (factor or 1.0) - bias) / scale


@pytest.mark.parametrize("scale", ["auto", "sd", "stored"])
@pytest.mark.parametrize("made", [edm2, lightningdit, hdf5])
def test_units_undo_the_scale(tmp_path, made, scale):
    path = made(tmp_path / "data")
    data = FileDataset(path, latent_scale=scale)
    np.testing.assert_allclose(latents(data).numpy(), RAW[:, :4], rtol=1e-4, atol=1e-5)
    assert data.vae_units is not None
    assert data.vae_units.zero_to_one == (made is edm2 and scale == "auto")
    options = ["--data", path, "--convert", "--no-flips", "--dtype", "fp32", "--latent-scale", scale]
    assert encode.main([*map(str, options), "--out", str(tmp_path / "new")]) == 0
    new = FileDataset(tmp_path / "new")
    np.testing.assert_allclose(latents(new).numpy(), RAW[:, :4], rtol=1e-4, atol=1e-5)
    assert new.vae_units is not None
    assert new.vae_units.zero_to_one == data.vae_units.zero_to_one


def test_stable_diffusion_scale_is_told_from_edm2s(tmp_path):
    units = FileDataset(repa(tmp_path / "data")).vae_units
    assert units is not None
    torch.testing.assert_close(units.affine.scale, torch.full((4, 1, 1), SD_VAE_SCALE))
    assert not units.zero_to_one
    assert not units.affine.bias.any()


def test_fast_dit_is_scaled_already(tmp_path):
    values = np.ones((3, 1, 4, 6, 6), np.float32)
    files = {f"f_features/{i}.npy": npy(value) for i, value in enumerate(values)}
    write(tmp_path, files | {f"f_labels/{i}.npy": npy(np.array([i])) for i in range(3)})
    assert latents(FileDataset(tmp_path)).mean() == pytest.approx(1 / SD_VAE_SCALE, rel=1e-5)


def test_plain_arrays_say_nothing(tmp_path):
    np.savez(tmp_path / "l.npz", latents=RAW[:, :4])
    np.savez(tmp_path / "p.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    assert FileDataset(tmp_path / "l.npz").vae_units is None
    assert FileDataset(tmp_path / "p.npz").vae_units is None
    for scale in ("sd", "edm2"):  # but users may
        data = FileDataset(tmp_path / "l.npz", latent_scale=scale)
        np.testing.assert_allclose(latents(data).numpy(), RAW[:, :4], rtol=1e-4, atol=1e-5)


def scaled_store(folder: Path, **manifest: object) -> Path:
    """Our own format, of latents or moments, with what its erdfast.json shall say."""
    np.save(folder / "l.npy", RAW[:, :4])
    options = ["--data", folder / "l.npy", "--convert", "--dtype", "fp32", "--out", folder / "store"]
    assert encode.main([*map(str, options)]) == 0
    path = folder / "store" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | manifest))
    return folder / "store"


@pytest.mark.parametrize("zero_to_one", [False, True])
@pytest.mark.parametrize("scale", ["auto", "stored", "sd", "edm2"])
def test_scales_are_composed(tmp_path, scale, zero_to_one):
    """A folder whose rows are (latent - 1) / 2 already."""
    units = {"scale": [0.5] * 4, "bias": [-0.5] * 4, "zero_to_one": zero_to_one}
    data = FileDataset(scaled_store(tmp_path, vae_units=units), latent_scale=scale)
    np.testing.assert_allclose(latents(data).numpy(), 2 * RAW[:, :4] + 1, rtol=1e-4, atol=1e-5)
    assert data.vae_units is not None
    assert data.vae_units.zero_to_one == zero_to_one


@pytest.mark.parametrize("scale", ["auto", "stored", "sd", "edm2"])
def test_moments_are_composed_without_their_factor(tmp_path, scale):
    path = repa(tmp_path / "data")
    options = ["--data", path, "--convert", "--no-flips", "--dtype", "fp32", "--out", tmp_path / "new"]
    assert encode.main([*map(str, options)]) == 0
    before, after = FileDataset(path, latent_scale="stored"), FileDataset(tmp_path / "new", latent_scale=scale)
    torch.testing.assert_close(latents(after), latents(before), rtol=1e-4, atol=1e-5)
    assert after.vae_units is not None
    assert not after.vae_units.zero_to_one


def test_an_older_unfinished_folder_goes_on(tmp_path):
    np.save(tmp_path / "l.npy", RAW[:, :4])
    options = ["--data", str(tmp_path / "l.npy"), "--convert", "--out", str(tmp_path / "new")]
    assert encode.main(options) == 0
    assert "vae_units" not in json.loads((tmp_path / "new" / JOB).read_text())
    assert encode.main(options) == 0


@pytest.mark.parametrize(
    "units",
    [[], 3, "sd", {}, {"scale": [1.0], "bias": [0.0]}, {"scale": [1.0], "bias": [0.0, 1.0], "zero_to_one": False}]
    + [{"scale": [value], "bias": [0.0], "zero_to_one": False} for value in (0.0, -1.0, float("nan"), "x", None)]
    + [{"scale": [1.0], "bias": [0.0], "zero_to_one": 1}],
)
def test_units_that_make_no_sense_are_refused(tmp_path, units):
    np.save(tmp_path / "l.npy", RAW[:, :4])
    assert encode.main(["--data", str(tmp_path / "l.npy"), "--convert", "--out", str(tmp_path / "new")]) == 0
    manifest = json.loads((tmp_path / "new" / MANIFEST).read_text())
    assert manifest["vae_units"] is None
    (tmp_path / "new" / MANIFEST).write_text(json.dumps(manifest | {"vae_units": units}))
    with pytest.raises(ValueError, match=MANIFEST):
        FileDataset(tmp_path / "new")


def test_older_folders_say_nothing(tmp_path):
    np.save(tmp_path / "l.npy", RAW[:, :4])
    assert encode.main(["--data", str(tmp_path / "l.npy"), "--convert", "--out", str(tmp_path / "new")]) == 0
    manifest = json.loads((tmp_path / "new" / MANIFEST).read_text())
    del manifest["vae_units"]
    (tmp_path / "new" / MANIFEST).write_text(json.dumps(manifest))
    assert FileDataset(tmp_path / "new").vae_units is None
