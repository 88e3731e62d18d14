"""python -m erdfast.sample of latents: a VAE makes pictures of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erdfast import encode, sample, train
from erdfast.data import FileDataset
from erdfast.data.source import edm2_whitening
from erdfast.data.vae import Decoder, open_decoder
from erdfast.published_run import open_run
from erdfast.sampling import sample as draw
from tests.runs import refused, single_thread, words
from tests.test_sample_entry import CPU, arrays, sampled
from tests.vaes import save_tiny_vae


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory) -> tuple[Path, Path]:
    """A run on encoded pictures, and the VAE."""
    root = tmp_path_factory.mktemp("latents")
    vae = save_tiny_vae(root / "vae")
    pixels = np.random.RandomState(0).randint(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    np.savez(root / "p.npz", arr_0=pixels, arr_1=np.arange(24) % 3)
    common = ["--data", root / "p.npz", "--vae", vae, "--size", 16, "--dtype", "fp32", "--out", root / "data"]
    assert encode.main([*map(str, common)]) == 0
    options = words("--model uvit_tiny --batch-size 8 --steps 2 --precision fp32 --sample-every 0 --no-tensorboard")
    assert train.main([*options, "--data", str(root / "data"), "--out", str(root / "run")]) == 0
    return root / "run", vae


def test_latents_become_pictures(latent_run, tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    run, vae = latent_run
    got = arrays(sampled(run, tmp_path / "s.npz", "--num", 20, "--vae", vae))["arr_0"]
    opened = open_run(run, "fp32", CPU)
    images = draw(opened.model, opened.process, num=20, cfg_scale=1.5, steps=3, batch_size=8)
    with torch.inference_mode():
        pictures = AutoencoderKL.from_pretrained(str(vae)).decode(images / 0.18215).sample  # pyright: ignore
    expected = ((pictures + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy().astype(int)
    assert got.shape == (20, 16, 16, 3)
    assert got.std() > 1
    assert np.abs(got - expected).max() <= 1
    grid = sampled(run, tmp_path / "g.png", "--num", 6, "--vae", vae)
    assert Image.open(grid).width > 3 * 64


def test_units_that_are_not_known_must_be_given(tmp_path, capsys, latent_run):
    _, vae = latent_run
    np.savez(tmp_path / "l.npz", latents=np.random.RandomState(0).randn(32, 4, 8, 8).astype(np.float32))
    options = words("--model uvit_tiny --batch-size 8 --steps 1 --precision fp32 --sample-every 0 --no-tensorboard")
    assert train.main([*options, "--data", str(tmp_path / "l.npz"), "--out", str(tmp_path / "run")]) == 0
    common = ["--run", tmp_path / "run", "--vae", vae, "--num", 4, "--steps", 2, "--out", tmp_path / "s.npz"]
    assert "choose --latent-scale sd" in refused(capsys, sample.main, common)
    pictures = {}
    for scale in ("sd", "stored"):
        assert sample.main([*map(str, common), "--latent-scale", scale]) == 0
        pictures[scale] = arrays(tmp_path / "s.npz")["arr_0"]
    assert not np.array_equal(pictures["sd"], pictures["stored"])


def test_another_vae_is_refused(latent_run, tmp_path, capsys):
    run, _ = latent_run
    other = save_tiny_vae(tmp_path / "other", latent_channels=8)
    line = refused(capsys, sample.main, ["--run", run, "--vae", other, "--out", tmp_path / "s.npz"])
    assert "8 channels" in line


def test_edm2_pictures_are_in_another_range(latent_run):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    _, vae = latent_run
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    raw = x / edm2_whitening(4).scale - edm2_whitening(4).bias / edm2_whitening(4).scale
    with torch.inference_mode():
        pictures = AutoencoderKL.from_pretrained(str(vae)).decode(raw).sample  # pyright: ignore
    expected = (pictures.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(int)
    got = Decoder(vae, CPU, torch.float32, units="edm2").pictures(x)
    assert got.std() > 1
    assert np.abs(got - expected).max() <= 1


def test_a_decoder_works_in_tiles(latent_run):
    _, vae = latent_run
    x = torch.randn(7, 4, 8, 8)
    whole = Decoder(vae, CPU, torch.float32, batch=7).pictures(x)
    tiled = Decoder(vae, CPU, torch.float32, batch=3).pictures(x)
    assert whole.shape == (7, 16, 16, 3)
    assert np.abs(whole.astype(int) - tiled).max() <= 1
    with pytest.raises(ValueError, match="4 channels"):
        Decoder(vae, CPU, torch.float32).pictures(torch.randn(1, 3, 8, 8))
    with pytest.raises(ArithmeticError, match="not finite"):
        Decoder(vae, CPU, torch.float32).pictures(torch.full((1, 4, 8, 8), torch.nan))


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "config.json is of a UNet2DModel"),
        ({"scaling_factor": -1.0}, "scaling_factor in config.json is -1.0"),
        ({"scaling_factor": "abc"}, "scaling_factor in config.json is 'abc'"),
        ({"shift_factor": float("inf")}, "shift_factor in config.json is inf"),
    ],
)
def test_a_configuration_that_makes_no_sense(tmp_path, values, message):
    change_config(save_tiny_vae(tmp_path / "vae"), **values)
    with pytest.raises(ValueError, match=message) as caught:
        Decoder(tmp_path / "vae", CPU, torch.float32)
    assert str(tmp_path / "vae") in str(caught.value)


def test_a_configuration_that_is_no_object(tmp_path):
    (save_tiny_vae(tmp_path / "vae") / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="vae: the VAE cannot be loaded: it holds a list, not an object"):
        Decoder(tmp_path / "vae", CPU, torch.float32)


def test_missing_tensors_are_not_drawn_at_random(tmp_path):
    folder = save_tiny_vae(tmp_path / "vae")
    (path,) = folder.glob("*.safetensors")
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("decoder.mid")}, path)
    with pytest.raises(ValueError, match=r"tensors are missing or of another shape, decoder\.mid"):
        Decoder(folder, CPU, torch.float32)


def test_pixels_are_not_decoded(tmp_path):
    """Also where the VAE's latents have as many channels."""
    folder = save_tiny_vae(tmp_path / "vae", latent_channels=3)
    np.savez(tmp_path / "p.npz", arr_0=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="is for latents, and these data are pictures"):
        open_decoder(folder, FileDataset(tmp_path / "p.npz"), CPU, torch.float32, "sd")
    np.savez(tmp_path / "l.npz", latents=np.zeros((4, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match="choose --latent-scale sd"):
        open_decoder(folder, FileDataset(tmp_path / "l.npz"), CPU, torch.float32)
