"""python -m erdfast.prepare: CelebA and ImageNet to our own format; resumed, counted, trained on, measured against."""

import json
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from erdfast import evaluate, prepare, presets, train
from erdfast.cli import parse_train
from erdfast.data import FileDataset, convert
from erdfast.data.pictures import decode_middle, decode_picture
from erdfast.models import DiTConfig
from erdfast.training.setup import network_config, open_data
from tests.data.test_celeba import ATTRIBUTES, FILES, NAMES, PARTITION
from tests.data.test_formats import png, write
from tests.data.test_imagenet import FILES as SYNSET_FILES
from tests.data.test_imagenet import SORTED
from tests.data.test_tar_files import nested, write_tar
from tests.evaluation.inception_files import save_pictures, use_small_network
from tests.runs import ROOT, refused, single_thread, words


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture
def celeba(tmp_path) -> list[object]:
    """Options for four pictures, two of them in the training partition."""
    images = write(tmp_path / "img_align_celeba.zip", FILES)
    (tmp_path / "parts.txt").write_text(PARTITION)
    (tmp_path / "attributes.txt").write_text(ATTRIBUTES)
    return ["--dataset", "celeba", "--images", images, "--partition-file", tmp_path / "parts.txt"]


@pytest.fixture
def imagenet(tmp_path) -> list[object]:
    """Options for six pictures in three synset folders."""
    return ["--dataset", "imagenet", "--images", write(tmp_path / "train", SYNSET_FILES), "--size", 16]


def run(*arguments: object) -> int:
    return prepare.main([str(argument) for argument in arguments])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_celeba(tmp_path, celeba, capsys):
    assert run(*celeba, "--out", tmp_path / "out", "--workers", 2) == 0
    shown = capsys.readouterr()
    assert "complete: 2 images 3x64x64, no labels, scaled to [-1, 1], train partition, middle 140x140" in shown.out
    assert shown.out.splitlines()[-1] == "2 pictures, no labels"
    assert "warning: 2 pictures, but CelebA's partition 'train' has 162,770 pictures" in shown.err
    data = FileDataset(tmp_path / "out", shape=(3, 64, 64))
    assert (data.num_classes, data.class_names, data.kind) == (0, [], "pixels")
    for row, name in zip(data.take(torch.arange(2)).numpy(), (NAMES[0], NAMES[2]), strict=True):
        content = FILES[f"img_align_celeba/{name}"]
        np.testing.assert_array_equal(row, decode_middle(content, expected=(178, 218), crop=140, size=64))


def test_an_attribute_is_the_label(tmp_path, celeba, capsys):
    labelled = ["--partition", "all", "--attributes", tmp_path / "attributes.txt", "--attribute", "Male"]
    assert run(*celeba, *labelled, "--size", 8, "--crop", 100, "--out", tmp_path / "out") == 0
    assert "4 pictures in 2 classes; per class: 2 each" in capsys.readouterr().out
    data = FileDataset(tmp_path / "out")
    assert (data.class_names, data.labels(torch.arange(4)).tolist()) == (["not Male", "Male"], [1, 1, 0, 0])
    assert data.shape == (3, 8, 8)


def test_imagenet(tmp_path, imagenet, capsys):
    assert run(*imagenet, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == "6 pictures in 3 classes; per class: 2 each"
    line = "warning: 6 pictures in 3 classes, but ImageNet's training set has 1,281,167 pictures and ImageNet's "
    assert line + "validation set has 50,000 pictures, in 1,000 classes" in shown.err
    data = FileDataset(tmp_path / "out")
    assert (data.class_names, data.labels(torch.arange(6)).tolist()) == (SORTED, [0, 0, 1, 1, 2, 2])
    for row, name in zip(data.take(torch.arange(6)).numpy(), sorted(SYNSET_FILES), strict=True):
        np.testing.assert_array_equal(row, decode_picture(SYNSET_FILES[name], size=16))


def test_no_warning_where_the_numbers_are_right(tmp_path, imagenet, celeba, capsys, monkeypatch):
    monkeypatch.setitem(prepare.imagenet.COUNTS, "validation", 6)
    monkeypatch.setattr(prepare.imagenet, "CLASSES", 3)
    monkeypatch.setitem(prepare.celeba.COUNTS, "test", 1)
    assert run(*imagenet, "--out", tmp_path / "a") == 0
    assert run(*celeba, "--partition", "test", "--out", tmp_path / "b") == 0
    assert "warning" not in capsys.readouterr().err


def test_the_tar_gives_what_the_folder_gives(tmp_path, imagenet):
    tar = write_tar(tmp_path / "ILSVRC2012_img_train.tar", nested(SYNSET_FILES))
    (tmp_path / "names.json").write_text(json.dumps(["a", "b", "c"]))
    options = ["--class-names", tmp_path / "names.json", "--out"]
    assert run(*imagenet, *options, tmp_path / "a", "--workers", 1) == 0
    assert run(*imagenet, "--images", tar, *options, tmp_path / "b", "--workers", 5) == 0
    first, second = (FileDataset(tmp_path / name) for name in "ab")
    assert first.class_names == second.class_names == ["a", "b", "c"]
    parts = [next((tmp_path / name).glob("part-*")).read_bytes() for name in "ab"]
    assert parts[0] == parts[1]


def test_damaged_exif_is_not_mentioned(tmp_path, capsys):
    exif = b"\0\0II*\0\x08\0\0\0\x05\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\0\0"
    content = png(np.zeros((20, 20, 3), np.uint8))
    images = write(tmp_path / "train", {f"{SORTED[0]}/a.JPEG": content, f"{SORTED[0]}/b.JPEG": jpeg(exif)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run("--dataset", "imagenet", "--images", images, "--size", 8, "--out", tmp_path / "out") == 0


def jpeg(exif: bytes) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "JPEG", exif=b"Exif" + exif)
    return stream.getvalue()


# ---------------------------------------------------------------------------- resumed


def two_rows_each(monkeypatch):
    ranges = [(0, 2), (2, 4), (4, 6)]
    monkeypatch.setattr(convert.Plan, "__init__", lambda self, _m, _b: setattr(self, "ranges", ranges))


def test_parts_are_resumed_and_equal(tmp_path, imagenet, monkeypatch):
    two_rows_each(monkeypatch)
    assert run(*imagenet, "--out", tmp_path / "whole") == 0
    calls = []

    def failing(self, start, stop, advance, real=convert.Writer.tensors):
        calls.append(start)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, start, stop, advance)

    with monkeypatch.context() as patch:
        patch.setattr(convert.Writer, "tensors", failing)
        with pytest.raises(OSError, match="No space left"):
            run(*imagenet, "--out", tmp_path / "resumed")
        with pytest.raises(ValueError, match="unfinished: run the same"):
            FileDataset(tmp_path / "resumed")
        assert run(*imagenet, "--out", tmp_path / "resumed") == 0
    assert calls == [0, 2, 2, 4]  # what was there was not made again
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")
    assert run(*imagenet, "--out", tmp_path / "resumed") == 0  # again: nothing to do


def test_killed_and_continued(tmp_path, imagenet, monkeypatch):
    code = (
        "import os, signal, sys; from erdfast import prepare; from erdfast.data import convert\n"
        "convert.Plan.__init__ = lambda self, m, b: setattr(self, 'ranges', [(0, 2), (2, 4), (4, 6)])\n"
        "replace, calls = convert.replace_tensors, []\n"
        "def deadly(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    replace(*args)\n"
        "convert.replace_tensors = deadly\n"
        "prepare.main(sys.argv[1:])\n"
    )
    options = [*map(str, imagenet), "--out", str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000-of-00003.safetensors"]
    two_rows_each(monkeypatch)
    for name in ("out", "whole"):
        assert run(*imagenet, "--out", tmp_path / name) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_another_job_is_not_continued(tmp_path, celeba, capsys):
    out = ["--out", tmp_path / "out"]
    assert run(*celeba, *out) == 0
    before = contents(tmp_path / "out")
    assert "was begun with rows 2, which is now 1" in refused(
        capsys, prepare.main, [*celeba, "--partition", "val", *out]
    )
    line = refused(capsys, prepare.main, [*celeba, "--crop", 120, *out])
    assert "was begun with note 'scaled to [-1, 1], train partition, middle 140x140" in line
    assert "was begun with shape [64, 64, 3]" in refused(capsys, prepare.main, [*celeba, "--size", 32, *out])
    assert contents(tmp_path / "out") == before
    other = write(tmp_path / "other", {"notes.txt": b"mine"})
    assert "exists and was not made by erdfast.encode or erdfast.prepare" in refused(
        capsys, prepare.main, [*celeba, "--out", other]
    )
    assert contents(other) == {"notes.txt": b"mine"}


# ---------------------------------------------------------------------------- used


def test_training_reads_what_was_written(tmp_path, celeba, imagenet, capsys, monkeypatch):
    """Unlabelled data make a network without classes, whatever the preset has."""
    network = DiTConfig(depth=1, width=64, num_heads=2, input_shape=(3, 8, 8), num_classes=10)
    monkeypatch.setitem(presets.MODELS, "dit_pixels", network)
    assert run(*celeba, "--size", 8, "--out", tmp_path / "faces") == 0
    assert run(*imagenet, "--size", 8, "--out", tmp_path / "objects") == 0
    common = words("--recipe tiny_dit --model dit_pixels --batch-size 2 --steps 1 --precision fp32 --sample-every 0")
    options = [*common, "--no-tensorboard", "--data", str(tmp_path / "faces"), "--out", str(tmp_path / "run")]
    assert train.main(options) == 0
    assert "data: 2 images 3x8x8, no labels" in capsys.readouterr().out
    for name, classes in (("faces", 0), ("objects", 3)):
        config = parse_train([*options, "--data", str(tmp_path / name)])
        assert network_config(config, open_data(config)).num_classes == classes


def test_references_from_a_prepared_folder(tmp_path, imagenet, monkeypatch, capsys):
    """Measured against the folder itself, statistics saved from it, or an npz of the same pictures."""
    use_small_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(b"made up")
    files = {
        f"{SORTED[0]}/{i:02d}.JPEG": png(np.random.RandomState(i).randint(0, 256, (16, 16, 3), dtype=np.uint8))
        for i in range(30)
    }
    write(tmp_path / "train", files)
    assert run(*imagenet, "--out", "real") == 0
    np.savez("real.npz", arr_0=FileDataset(Path("real")).take(torch.arange(36)).numpy())
    save_pictures(Path("s.npz"), 40)
    assert evaluate.main(words("--reference real --inception w.pth --save-reference saved.npz")) == 0
    assert "written: saved.npz" in capsys.readouterr().out
    values = []
    for reference in ("real.npz", "real", "saved.npz"):
        assert evaluate.main(words(f"--samples s.npz --reference {reference} --inception w.pth --out m.json")) == 0
        values.append(json.loads(Path("m.json").read_text())["samples"][0])
    assert values[1] == values[0]
    for name in ("fid", "sfid", "is", "precision", "recall"):
        assert values[2][name] == pytest.approx(values[0][name], rel=1e-9)
    assert evaluate.main(words("--samples real --reference real.npz --inception w.pth --metrics fid")) == 0
    assert json.loads(Path("real.metrics.json").read_text())["samples"][0]["fid"] == pytest.approx(0, abs=1e-6)


def test_references_that_are_none(tmp_path, capsys, monkeypatch):
    use_small_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(b"made up")
    Path("empty").mkdir()
    save_pictures(Path("s.npz"), 9)
    common = words("--inception w.pth --save-reference saved.npz --reference")
    assert "the folder holds no erdfast.json" in refused(capsys, evaluate.main, [*common, "empty"])
    cases = {
        "--out, --x and --x-label go with --samples": [*common, "s.npz", "--out", "a.json"],
        "choose one of --samples": words("--reference s.npz --inception w.pth"),
        "--save-reference saves what --reference gave": words("--inception w.pth --metrics is --save-reference a.npz"),
        "gone is no folder that can be written to": [*common, "s.npz", "--save-reference", "gone/a.npz"],
        "--steps goes with --run only": [*common, "s.npz", "--steps", "3"],
    }
    for message, arguments in cases.items():
        assert message in refused(capsys, evaluate.main, arguments)
    assert not Path("saved.npz").exists()


# ---------------------------------------------------------------------------- what is refused


def test_bad_options(tmp_path, celeba, imagenet, capsys):
    out = ["--out", tmp_path / "new"]
    bare = ["--dataset", "celeba", "--images", tmp_path / "img_align_celeba.zip"]
    cases = [
        (["--dataset", "celebs", *bare[2:], *out], ["--dataset", "celebs", "celeba", "imagenet"]),
        ([*bare, *out], ["--partition-file is missing", "list_eval_partition.txt"]),
        ([*celeba, "--partition", "dev", *out], ["--partition", "'dev'", "train", "all"]),
        ([*celeba, "--attribute", "Male", *out], ["--attribute NAME and --attributes"]),
        ([*celeba, "--crop", 179, *out], ["crop is 179", "1 to 178"]),
        ([*celeba, "--crop", 0, *out], ["crop is 0"]),
        ([*celeba, "--size", 141, *out], ["size is 141", "crop of 140"]),
        ([*celeba, "--labels", "x", *out], ["--labels goes with --dataset imagenet"]),
        ([*imagenet, "--crop", 140, *out], ["--crop goes with --dataset celeba"]),
        ([*imagenet, "--partition-file", "x", *out], ["--partition-file goes with --dataset celeba"]),
        ([*imagenet, "--synsets", "x", *out], ["--synsets goes with --labels"]),
        ([*imagenet, "--size", 4, *out], ["size is 4", "8 to 1024"]),
        ([*imagenet, "--workers", 0, *out], ["workers is 0"]),
        ([*imagenet, "--part-mib", 0, *out], ["part_mib is 0"]),
        ([*imagenet], ["--out"]),
        ([*imagenet, "--images", tmp_path / "gone", *out], ["gone: no such file or folder"]),
        ([*celeba, "--partition-file", tmp_path / "gone.txt", *out], ["gone.txt: no such file"]),
        ([*imagenet, "--class-names", tmp_path / "gone.txt", *out], ["gone.txt: no such file"]),
    ]
    for arguments, parts in cases:
        line = refused(capsys, prepare.main, arguments)
        assert all(part in line for part in parts), line
    assert not (tmp_path / "new").exists()


def test_a_damaged_picture_is_named_and_what_was_written_stays(tmp_path, imagenet, capsys, monkeypatch):
    two_rows_each(monkeypatch)
    # The pictures that are looked at first are good; this one is met when its part is written.
    monkeypatch.setattr("erdfast.data.files.spread", lambda size: torch.tensor([0]))
    bad = f"{SORTED[1]}/{SORTED[1]}_1.JPEG"
    whole = SYNSET_FILES[bad]
    (tmp_path / "train" / bad).write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    with pytest.raises(ValueError, match=rf"train: sample 3 \({bad}\) cannot be read: .*truncated"):
        run(*imagenet, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").glob("part-*")] == ["part-00000-of-00003.safetensors"]
    (tmp_path / "train" / bad).write_bytes(whole)
    assert run(*imagenet, "--out", tmp_path / "out") == 0


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m erdfast.prepare" in shown
    assert "list_eval_partition.txt" in shown
