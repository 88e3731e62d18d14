"""python -m erdfast.encode: pictures to latents, other formats to ours; resumed, verified, by several processes."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from erdfast import encode, train
from erdfast.data import FileDataset, convert
from erdfast.data.store import MANIFEST
from erdfast.data.vae import Encoder
from tests.runs import ROOT, refused, words
from tests.vaes import save_tiny_vae

SIDE = 16


def run(*arguments) -> int:
    return encode.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """An ImageFolder of 21 pictures of different sizes in 3 classes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for number in range(21):
        path = folder / f"class{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.randint(0, 256, (SIDE + number, SIDE + 3, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def everything(path, flips=None):
    data = FileDataset(path)
    return data.gather(torch.arange(len(data)), flips)


def test_pictures_become_moments(tmp_path, pictures, vae, capsys):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    options = ["--data", pictures, "--vae", vae, "--size", SIDE, "--batch-size", 4, "--dtype", "fp32"]
    assert run(*options, "--out", tmp_path / "out") == 0
    assert "complete: 21 latents 4x8x8, moments, fp32, 3 classes" in capsys.readouterr().out
    source = FileDataset(pictures, shape=(3, SIDE, SIDE))
    x, y, _ = source.gather(torch.arange(21))
    model: Any = AutoencoderKL.from_pretrained(str(vae))
    with torch.inference_mode():
        for flipped in (False, True):
            expected = model.encode(x.flip(-1) if flipped else x).latent_dist
            got = everything(tmp_path / "out", torch.full((21,), flipped))
            torch.testing.assert_close(got.x, torch.cat([expected.mean, expected.std], 1), rtol=1e-4, atol=1e-5)
            assert torch.equal(got.y, y)
            assert got.moments_scale == pytest.approx(0.18215)
    assert FileDataset(tmp_path / "out").class_names == ["class0", "class1", "class2"]


def test_edm2_scale(tmp_path, pictures, vae):
    common = ["--data", pictures, "--vae", vae, "--size", SIDE, "--dtype", "fp32", "--no-flips"]
    assert run(*common, "--out", tmp_path / "edm2", "--latent-scale", "edm2") == 0
    encoder = Encoder(vae, torch.device("cpu"), torch.float32, "stored")
    x = FileDataset(pictures, shape=(3, SIDE, SIDE)).gather(torch.arange(21)).x
    mean, std = encoder.moments((x + 1) / 2).chunk(2, dim=1)
    raw_mean = torch.tensor([5.81, 3.25, 0.12, -2.15]).view(4, 1, 1)
    raw_std = torch.tensor([4.17, 4.62, 3.71, 3.28]).view(4, 1, 1)
    got = everything(tmp_path / "edm2")
    torch.testing.assert_close(got.x[:, :4], 0.5 * (mean - raw_mean) / raw_std, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.x[:, 4:], 0.5 * std / raw_std, rtol=1e-4, atol=1e-6)
    assert got.moments_scale == 1.0
    assert not FileDataset(tmp_path / "edm2").has_flips
    units = FileDataset(tmp_path / "edm2").vae_units
    assert units is not None
    assert units.zero_to_one
    torch.testing.assert_close(units.affine.scale, 0.5 / raw_std)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_conversion_keeps_every_value(tmp_path, dtype):
    for shard in range(3):
        latents = torch.randn(7, 4, 6, 6)
        content = {"latents": latents, "latents_flip": latents.flip(-1).contiguous(), "labels": torch.arange(7)}
        (tmp_path / "old").mkdir(exist_ok=True)
        save_file(content, tmp_path / "old" / f"{shard}.safetensors")
    assert run("--data", tmp_path / "old", "--convert", "--dtype", dtype, "--out", tmp_path / "new") == 0
    flips = torch.arange(21) % 2 == 0
    for wanted in (None, flips):
        old, new = everything(tmp_path / "old", wanted), everything(tmp_path / "new", wanted)
        stored = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        assert torch.equal(new.x, old.x.to(stored))
        assert torch.equal(new.y, old.y)


def test_pixels_keep_every_value_and_are_mirrored_when_read(tmp_path, pictures):
    assert run("--data", pictures, "--convert", "--size", 8, "--out", tmp_path / "new", "--part-mib", 1) == 0
    source, made = FileDataset(pictures, shape=(3, 8, 8)), FileDataset(tmp_path / "new")
    flips = torch.arange(21) % 2 == 0
    assert torch.equal(made.gather(torch.arange(21), flips).x, source.gather(torch.arange(21), flips).x)
    assert made.describe().startswith("21 images 3x8x8, 3 classes")


def test_parts_are_resumed_and_equal(tmp_path, monkeypatch):
    np.save(tmp_path / "l.npy", np.random.RandomState(0).randn(100, 4, 8, 8).astype(np.float32))
    monkeypatch.setattr(convert.Plan, "__init__", lambda self, _m, _b: setattr(self, "ranges", ranges))
    ranges = [(at, at + 10) for at in range(0, 100, 10)]
    options = ["--data", tmp_path / "l.npy", "--convert", "--out"]
    assert run(*options, tmp_path / "whole") == 0
    calls = []

    def failing(self, start, stop, advance, real=convert.Writer.tensors):
        calls.append(start)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return real(self, start, stop, advance)

    with monkeypatch.context() as patch:
        patch.setattr(convert.Writer, "tensors", failing)
        with pytest.raises(OSError, match="No space left"):
            run(*options, tmp_path / "resumed")
        assert calls == [0, 10, 20, 30]
        with pytest.raises(ValueError, match="unfinished: run the same"):
            FileDataset(tmp_path / "resumed")
        assert run(*options, tmp_path / "resumed") == 0
    assert calls[4:] == [30, 40, 50, 60, 70, 80, 90]  # what was there was not made again
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()
    assert run("--verify", "--out", tmp_path / "resumed") == 0
    assert run(*options, tmp_path / "resumed") == 0  # again: nothing to do


def test_killed_and_continued(tmp_path):
    np.save(tmp_path / "l.npy", np.random.RandomState(0).randn(64, 4, 8, 8).astype(np.float32))
    code = (
        "import os, signal, sys; from erdfast import encode; from erdfast.data import convert\n"
        "convert.Plan.__init__ = lambda self, m, b: setattr(self, 'ranges', [(i, i + 8) for i in range(0, 64, 8)])\n"
        "replace, calls = convert.replace_tensors, []\n"
        "def deadly(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*args)\n"
        "convert.replace_tensors = deadly\n"
        "encode.main(sys.argv[2:])\n"
    )
    options = ["--data", str(tmp_path / "l.npy"), "--convert", "--out", str(tmp_path / "out")]
    codes = [
        subprocess.run([sys.executable, "-c", code, str(call), *options], capture_output=True, cwd=ROOT).returncode
        for call in (3, 2, 99)
    ]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    stored = torch.from_numpy(np.load(tmp_path / "l.npy")).bfloat16()
    assert torch.equal(everything(tmp_path / "out").x, stored)


@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path, pictures, vae):
    options = ["--data", pictures, "--vae", vae, "--size", SIDE, "--batch-size", 3, "--part-mib", 1]
    code = (
        "import sys; from erdfast import cli, encode; from erdfast.data import convert\n"
        "convert.Plan.__init__ = lambda self, m, b: setattr(self, 'ranges', [(i, i + 7) for i in range(0, 21, 7)])\n"
        "cli.run(encode.main, 'erdfast.encode')\n"
    )
    script = tmp_path / "encode.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    for start, out in ((launcher, "two"), ([sys.executable], "one")):
        arguments = [*start, script, *options, "--out", tmp_path / out]
        subprocess.run(list(map(str, arguments)), check=True, env=environment, cwd=ROOT, capture_output=True)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_training_reads_what_was_written(tmp_path):
    np.savez(tmp_path / "l.npz", latents=np.random.randn(32, 4, 8, 8).astype(np.float32), labels=np.arange(32) % 4)
    assert run("--data", tmp_path / "l.npz", "--convert", "--out", tmp_path / "data") == 0
    options = words("--model uvit_tiny --batch-size 8 --steps 2 --precision fp32 --sample-every 0 --no-tensorboard")
    assert train.main([*options, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 0


# ---------------------------------------------------------------------------- what is refused


def made(tmp_path):
    np.save(tmp_path / "l.npy", np.random.randn(9, 4, 8, 8).astype(np.float32))
    assert run("--data", tmp_path / "l.npy", "--convert", "--out", tmp_path / "out") == 0
    return tmp_path / "out"


def test_damage_is_found(tmp_path, capsys):
    out = made(tmp_path)
    (part,) = out.glob("part-*")
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    assert "its checksum differs" in refused(capsys, encode.main, ["--verify", "--out", out])
    part.write_bytes(content[:-3])
    assert "bytes instead of" in refused(capsys, encode.main, ["--verify", "--out", out])
    with pytest.raises(ValueError, match="bytes instead of"):
        FileDataset(out)
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00000-of-00001\.safetensors is missing: the folder is incomplete"):
        FileDataset(out)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "not of format 1"),
        ({"kind": "weights"}, "kind 'weights', expected one of latents, moments, pixels"),
        ({"rows": 10}, "do not add up to 10 rows"),
        ({"shape": [4, 8, 9]}, "which erdfast.json does not say"),
        ({"flips": True}, "holds no 'latents_flip'"),
        ({"num_classes": 3}, "holds no 'labels'"),
        ({"moments_scale": "x"}, "moments_scale 'x'"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, change, message):
    out = made(tmp_path)
    values = json.loads((out / MANIFEST).read_text()) | change
    (out / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"out.*{message}"):
        FileDataset(out)


def test_bad_options(tmp_path, capsys, pictures):
    np.save(tmp_path / "l.npy", np.random.randn(9, 4, 8, 8).astype(np.float32))
    data, out = ["--data", tmp_path / "l.npy"], ["--out", tmp_path / "new"]
    cases = {
        "--data is missing": out,
        "choose one of --vae FOLDER": [*data, *out],
        "batch_size is 0": [*data, *out, "--convert", "--batch-size", 0],
        "--out": [*data, "--convert"],
        "holds no config.json": [*data, *out, "--vae", tmp_path],
        "no such file": ["--data", tmp_path / "gone", *out, "--convert"],
        "exists and was not made by erdfast.encode": [*data, "--convert", "--out", tmp_path],
        "cannot be read": ["--verify", *out],
        "latent_scale sd is for latents": ["--data", pictures, "--convert", "--latent-scale", "sd", "--size", 8, *out],
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, encode.main, arguments)
    assert not (tmp_path / "new").exists()
    made(tmp_path)
    line = refused(capsys, encode.main, [*data, "--convert", "--dtype", "fp32", "--out", tmp_path / "out"])
    assert "was begun with dtype 'bf16', which is now 'fp32'" in line


def test_bad_vaes(tmp_path, capsys, pictures, vae):
    common = ["--data", pictures, "--out", tmp_path / "new"]
    assert "size is 17; it must be a multiple of 2" in refused(
        capsys, encode.main, [*common, "--vae", vae, "--size", 17]
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((vae / "config.json").read_bytes())
    assert "the VAE cannot be loaded" in refused(capsys, encode.main, [*common, "--vae", broken])
    (broken / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    assert "the VAE cannot be loaded" in refused(capsys, encode.main, [*common, "--vae", broken])
    weights = load_file(vae / "diffusion_pytorch_model.safetensors")
    name = "encoder.conv_in.weight"
    save_file(weights | {name: weights[name] * float("nan")}, broken / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ArithmeticError, match="not finite in torch"):
        run(*common, "--vae", broken, "--size", SIDE)
    np.save(tmp_path / "l.npy", np.random.randn(9, 3, 16, 16).astype(np.float32))
    line = refused(
        capsys, encode.main, ["--data", tmp_path / "l.npy", "--out", tmp_path / "n", "--vae", vae, "--size", SIDE]
    )
    assert "holds latents, not pictures" in line


def test_missing_diffusers_says_what_to_install(tmp_path, capsys, monkeypatch, pictures):
    for name in [*sys.modules]:
        if name.startswith("diffusers.models.autoencoders.autoencoder_kl"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.autoencoder_kl", None)
    line = refused(capsys, encode.main, ["--data", pictures, "--vae", tmp_path, "--out", tmp_path / "new"])
    assert "pip install erdfast[vae]" in line
