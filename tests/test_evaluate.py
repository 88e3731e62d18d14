"""`python -m erdfast.evaluate` on files of samples: what it prints, writes and refuses. (Runs: test_end_to_end.py.)"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from erdfast import evaluate
from erdfast.evaluation.digits import load_real_digits
from tests.evaluation.inception_files import save_pictures, save_weights, use_small_network
from tests.runs import ROOT, refused, single_thread, words

NAMES = ["fid", "sfid", "is", "precision", "recall"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two sets of samples, a reference, weights; and the small network for all but the slow tests."""
    use_small_network(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("w.pth").write_bytes(b"made up")
    save_pictures(Path("s-cfg1.0.npz"), 40, seed=0)
    save_pictures(Path("s-cfg1.5.npz"), 30, seed=1)
    save_pictures(Path("r.npz"), 50, seed=2)
    return tmp_path


def test_one_set(folder, capsys):
    assert evaluate.main(words("--samples s-cfg1.0.npz --reference r.npz --inception w.pth")) == 0
    shown = capsys.readouterr()
    header, line, written = shown.out.splitlines()
    assert header.split() == ["samples", "number", "FID", "sFID", "IS", "precision", "recall"]
    assert line.startswith("s-cfg1.0.npz      40 ")
    assert written == "written: s-cfg1.0.metrics.json"
    record = json.loads(Path("s-cfg1.0.metrics.json").read_text())
    assert record["reference"] == "r.npz"
    assert len(record["inception_crc32"]) == 8
    (sample,) = record["samples"]
    assert list(sample) == ["file", "count", *NAMES]
    assert [f"{sample[name]:.4f}" for name in NAMES] == line.split()[2:]
    assert not list(folder.glob("*.png"))


def test_comparison(folder, capsys):
    arguments = words("--samples s-cfg1.0.npz s-cfg1.5.npz --reference r.npz --inception w.pth --out c.json")
    assert evaluate.main([*arguments, *words("--metrics fid is --batch-size 7")]) == 0
    header, *lines, legend, written = capsys.readouterr().out.splitlines()
    assert header.split() == ["samples", "number", "cfg", "FID", "IS"]
    assert [line.split()[:3] for line in lines] == [["s-cfg1.0.npz", "40", "1"], ["s-cfg1.5.npz", "30", "1.5"]]
    assert (legend, written) == ("* the best", "written: c.json, c.png")
    assert Path("c.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("c.json").read_text())["x_label"] == "cfg"
    assert evaluate.main([*arguments, *words("--metrics is --x 400 800 --x-label step")]) == 0
    record = json.loads(Path("c.json").read_text())
    assert (record["x_label"], [sample["x"] for sample in record["samples"]]) == ("step", [400.0, 800.0])


def test_a_saved_reference(folder):
    common = words("--samples s-cfg1.0.npz --inception w.pth --reference")
    evaluate.main([*common, "r.npz", "--save-reference", "saved.npz", "--out", "a.json"])
    evaluate.main([*common, "saved.npz", "--out", "b.json"])
    before, after = (json.loads(Path(name).read_text())["samples"][0] for name in ("a.json", "b.json"))
    assert [after[name] for name in NAMES] == pytest.approx([before[name] for name in NAMES], rel=1e-12)


def test_the_score_needs_no_reference(folder, capsys):
    assert evaluate.main(words("--samples s-cfg1.0.npz --inception w.pth --metrics is")) == 0
    assert "IS" in capsys.readouterr().out


def test_features_of_any_network(folder, capsys):
    random = np.random.RandomState(0)
    for name, count in (("f", 9), ("g", 30)):
        np.save(f"{name}.npy", random.randn(count, 10))
    assert evaluate.main(words("--samples f.npy --reference g.npy --metrics fd")) == 0
    shown = capsys.readouterr()
    assert "FD" in shown.out.splitlines()[0]
    assert "warning: f.npy: FD: 9 samples for 10 features" in shown.err
    assert json.loads(Path("f.metrics.json").read_text())["samples"][0]["fd"] > 0.0


def save_digits(name: str, count: int = 1797, shift: int = 0) -> None:
    """Real digits as erdfast.sample would write them."""
    images, labels = load_real_digits()
    pixels = ((images[:count] + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3)
    np.savez(name, arr_0=pixels.numpy(), arr_1=(labels[:count].numpy() + shift) % 10)


def test_digits_against_the_real_ones(folder, capsys):
    save_digits("all.npz")
    save_digits("some-1.npz", 600)
    save_digits("some-2.npz", 600, shift=1)
    assert evaluate.main(words("--samples all.npz some-1.npz some-2.npz --reference digits --out d.json")) == 0
    assert "accuracy" in capsys.readouterr().out.splitlines()[0]
    whole, right, wrong = json.loads(Path("d.json").read_text())["samples"]
    assert whole["fd"] == pytest.approx(0.0, abs=1e-3)  # pictures have 256 levels
    assert (whole["precision"], whole["recall"]) == (1.0, 1.0)
    assert right["precision"] == 1.0
    assert right["recall"] < 1.0
    assert right["fd"] > 0.05
    assert right["accuracy"] > 0.95
    assert wrong["accuracy"] < 0.05
    assert evaluate.main(words("--samples all.npz --reference digits --metrics recall")) == 0
    np.savez("bare.npz", arr_0=np.load("all.npz")["arr_0"])
    assert evaluate.main(words("--samples bare.npz --reference digits --metrics fd precision")) == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((9, 16, 16, 3), np.uint8)}, "pictures of 8x8 pixels, these are 16x16"),
        ({"arr_0": np.zeros((9, 8, 8, 3), np.uint8)}, "accuracy needs labels, an array 'arr_1'"),
        ({"arr_0": np.zeros((9, 8, 8, 3), np.uint8), "arr_1": np.arange(9) + 2}, "'arr_1' must be integers in 0..9"),
        ({"arr_0": np.zeros((9, 8, 8, 3), np.uint8), "arr_1": np.arange(8)}, "'arr_1' must be 9, it is 8"),
        ({"arr_0": np.zeros((9, 8, 8, 3), np.uint8), "arr_1": np.arange(9, dtype=np.uint16) + 9}, "integers in 0..9"),
        ({"arr_0": np.arange(9 * 8 * 8 * 3, dtype=np.uint8).reshape(9, 8, 8, 3)}, "coloured"),
    ],
)
def test_other_pictures_are_no_digits(folder, capsys, arrays, message):
    np.savez("other.npz", **arrays)
    line = refused(capsys, evaluate.main, words("--samples other.npz --reference digits"))
    assert "other.npz: " in line
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--samples s-cfg1.0.npz --reference digits --inception w.pth", ["leave out --inception"]),
        ("--samples s-cfg1.0.npz --reference digits --metrics fid", ["metric fid is not of digits"]),
        ("", ["--samples", "--run"]),
        ("--samples s-cfg1.0.npz --run runs/x", ["choose one of --samples", "--run"]),
        ("--run runs/x --metrics is", ["--metrics goes with --samples only"]),
        ("--run runs/x --batch-size 0", ["batch_size is 0"]),
        ("--samples s-cfg1.0.npz --steps 9", ["--steps goes with --run only"]),
        ("--samples s-cfg1.0.npz --inception w.pth", ["--reference is missing"]),
        ("--samples s-cfg1.0.npz --reference r.npz", ["--inception is missing", "pt_inception", "91 MiB"]),
        ("--samples s-cfg1.0.npz --reference r.npz --inception none.pth", ["none.pth: no such file", "pytorch-fid"]),
        ("--samples none.npz --reference r.npz --inception w.pth", ["none.npz: no such file"]),
        ("--samples s-cfg1.0.npz --reference none.npz --inception w.pth", ["none.npz: no such file"]),
        ("--samples s-cfg1.0.npz --metrics kid --reference r.npz", ["'kid'", "fid, sfid, is, precision, recall, fd"]),
        ("--samples s-cfg1.0.npz --metrics fd --reference r.npz", ["s-cfg1.0.npz: features must be floating-point"]),
        ("--samples s-cfg1.0.npz --metrics fd --reference r.npz --inception w.pth", ["leave out --inception"]),
        ("--samples s-cfg1.0.npz --reference r.npz --inception w.pth --x 1 2", ["--x has 2 values for 1 files"]),
        ("--samples s-cfg1.0.npz --reference r.npz --inception w.pth --x one", ["one", "--x"]),
        ("--samples s-cfg1.0.npz --reference r.npz --inception w.pth --out a.txt", ["--out a.txt", ".json"]),
        ("--samples s-cfg1.0.npz --reference r.npz --inception w.pth --out no/a.json", ["no is no folder"]),
        ("--samples s-cfg1.0.npz --inception w.pth --metrics is --save-reference a.npz", ["name one"]),
        (
            "--samples s-cfg1.0.npz --reference r.npz --inception w.pth --save-reference r.npz",
            ["--save-reference r.npz would replace"],
        ),
    ],
)
def test_bad_input_is_one_line(folder, capsys, monkeypatch, arguments, parts):
    if "none.pth" in arguments:
        monkeypatch.undo()
        monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    line = refused(capsys, evaluate.main, words(arguments))
    assert all(part in line for part in parts), line
    assert sorted(folder.iterdir()) == before


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--help"])
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "usage: python -m erdfast.evaluate" in shown
    assert all(flag in shown for flag in ("--samples", "--reference", "--inception", "--metrics", "--x-label", "--run"))


# ---------------------------------------------------------------------- several processes, the real network


def torchrun(arguments: list[str], processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    script = str(ROOT / "tests/evaluation/rank_evaluate.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, script, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_are_one(folder):
    arguments = words("--samples s-cfg1.0.npz s-cfg1.5.npz --reference r.npz --inception w.pth --batch-size 7")
    evaluate.main([*arguments, "--out", "one.json"])
    done = torchrun([*arguments, "--out", "two.json"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("written: two.json, two.png") == 1
    one, two = (json.loads(Path(name).read_text())["samples"] for name in ("one.json", "two.json"))
    for ours, theirs in zip(one, two, strict=True):
        assert [theirs[name] for name in NAMES] == pytest.approx([ours[name] for name in NAMES], rel=1e-6)
    features = np.random.RandomState(0).randn(9000, 4)
    np.save("f.npy", features)
    np.save("g.npy", features[::2] + 1.0)
    arguments = words("--samples f.npy --reference g.npy --metrics fd")
    evaluate.main([*arguments, "--out", "one.json"])
    assert torchrun([*arguments, "--out", "two.json"]).returncode == 0
    one, two = (json.loads(Path(name).read_text())["samples"][0]["fd"] for name in ("one.json", "two.json"))
    assert two == pytest.approx(one, rel=1e-10)


@pytest.mark.slow
def test_an_error_in_two_processes_is_one_line(folder):
    done = torchrun(words("--samples none.npz --reference r.npz --inception w.pth"))
    assert done.returncode != 0
    assert done.stderr.count("erdfast.evaluate: error: none.npz: no such file") == 1


@pytest.mark.slow
def test_the_real_network(tmp_path, capsys):
    """All sizes as they are: 2048 features, 1008 logits; the 2023 of sFID are as slow again."""
    save_weights(tmp_path / "w.pth")
    save_pictures(tmp_path / "s.npz", 6, seed=0)
    arguments = ["--samples", tmp_path / "s.npz", "--reference", tmp_path / "s.npz", "--inception", tmp_path / "w.pth"]
    with single_thread():  # decompositions wait for one another where the cores have other work
        assert evaluate.main([*map(str, arguments), *words("--metrics fid is precision recall")]) == 0
    assert "6 samples for 2,048 features" in capsys.readouterr().err
    (sample,) = json.loads((tmp_path / "s.metrics.json").read_text())["samples"]
    assert abs(sample["fid"]) < 1e-6
    assert (sample["precision"], sample["recall"]) == (1.0, 1.0)
    assert 1.0 <= sample["is"] <= 1008.0
