"""python -m erdfast.sample: parts that are resumed, several processes, guidance sweeps, VAEs, grids with names."""

import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from erdfast import cli, sample, train
from erdfast.data.images import image_grid
from erdfast.published_run import open_run
from erdfast.sampling import parts as parts_module
from erdfast.sampling import sample as draw
from tests.runs import ROOT, TINY, refused, single_thread, words

CPU = torch.device("cpu")
COMMON = words("--steps 3 --precision fp32 --batch-size 8 --cfg-scale 1.5")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of a few steps."""
    folder = tmp_path_factory.mktemp("sampled") / "run"
    assert train.main([*TINY, "--steps", "2", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of eight pictures."""
    monkeypatch.setattr(parts_module, "PART_BYTES", 1)


def sampled(run: Path, out: Path, *arguments: object) -> Path:
    assert sample.main(["--run", str(run), "--out", str(out), *COMMON, *map(str, arguments)]) == 0
    return out


def fails(capsys, run: Path, out: Path, *arguments: object) -> str:
    """As `refused`, but after a progress bar."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: sampled(run, out, "--num", 37, *arguments) and 0, "erdfast.sample")
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("erdfast.sample: error: ")
    return line


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def launched(run: Path, out: Path, *arguments: object, processes: int = 2, code: str = "") -> int:
    """The exit code of the entry point in other processes."""
    return launch(run, out, *arguments, processes=processes, code=code).returncode


def launch(
    run: Path, out: Path, *arguments: object, processes: int = 2, code: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The entry point in other processes, after `code`."""
    program = f"from erdfast.sampling import parts; parts.PART_BYTES = 1\n{code}\nfrom erdfast import cli, sample\n"
    script = out.with_suffix(".py")
    script.write_text(program + "cli.run(sample.main, 'erdfast.sample')\n")
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*start, script, "--", "--run", run, "--out", out, *COMMON, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300, cwd=cwd
    )


# ---------------------------------------------------------------------------- parts


def test_parts_make_what_one_call_makes(run, tmp_path, small_parts):
    got = arrays(sampled(run, tmp_path / "s.npz", "--num", 37))
    opened = open_run(run, "fp32", CPU)
    options = {"cfg_scale": 1.5, "steps": 3, "batch_size": 8}
    images = draw(opened.model, opened.process, num=37, **options)
    assert np.array_equal(got["arr_0"], opened.dataset.to_images(images))
    assert got["arr_1"].tolist() == [i % 10 for i in range(37)]
    assert got["arr_1"].dtype == np.int64
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]
    again = sampled(run, tmp_path / "t.npz", "--num", 37)
    assert again.read_bytes() == (tmp_path / "s.npz").read_bytes()


def test_resumed_where_it_was(run, tmp_path, small_parts, monkeypatch, capsys):
    whole = sampled(run, tmp_path / "whole.npz", "--num", 37)
    out = tmp_path / "out.npz"
    calls: list[int] = []

    def failing(self, number, pictures, real=parts_module.Parts.write):
        calls.append(number)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(self.path(number)))
        real(self, number, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Parts, "write", failing)
        line = fails(capsys, run, out)
        assert "No space left" in line
        assert "part-00002-of-00005.npy" in line
        assert not out.exists()
        sampled(run, out, "--num", 37)
    assert calls == [0, 1, 2, 2, 3, 4]  # what was there was not made again
    assert out.read_bytes() == whole.read_bytes()
    assert "(" in capsys.readouterr().out
    assert not parts_module.folder_of(out).exists()


def test_batch_size_may_change_in_between(run, tmp_path, small_parts, monkeypatch):
    whole = arrays(sampled(run, tmp_path / "whole.npz", "--num", 37))
    folder = stopped(run, tmp_path / "out.npz", monkeypatch)
    kept = {path.name: path.read_bytes() for path in folder.glob("*.npy")}
    got = arrays(sampled(run, tmp_path / "out.npz", "--num", 37, "--batch-size", 5))
    assert len(kept) == 2
    assert np.abs(got["arr_0"].astype(int) - whole["arr_0"]).max() <= 1
    assert np.array_equal(got["arr_0"][:16], whole["arr_0"][:16])


def stopped(run: Path, out: Path, monkeypatch) -> Path:
    """Sampling that was interrupted after two parts; returns their folder."""

    def interrupted(self, number, pictures, real=parts_module.Parts.write):
        if number == 2:
            raise KeyboardInterrupt
        real(self, number, pictures)

    with monkeypatch.context() as patch:
        patch.setattr(parts_module.Parts, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sampled(run, out, "--num", 37)
    return parts_module.folder_of(out)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--seed", 1], "seed 0, which is now 1"),
        (["--cfg-scale", 2], "cfg_scale 1.5, which is now 2.0"),
        (["--steps", 4], "steps 3, which is now 4"),
        (["--num", 38], "num 37, which is now 38"),
        (["--classes", 3], "classes [], which is now [3]"),
        (["--interval", 0, 0.5], "interval [0.0, 1.0], which is now [0.0, 0.5]"),
        (["--sampler", "edm_euler"], "sampler 'edm_heun', which is now 'edm_euler'"),
    ],
)
def test_other_options_do_not_mix(run, tmp_path, small_parts, monkeypatch, capsys, options, name):
    folder = stopped(run, tmp_path / "out.npz", monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    line = refused(capsys, sample.main, ["--run", run, "--out", tmp_path / "out.npz", "--num", 37, *COMMON, *options])
    assert name in line
    assert f"choose another --out, or remove {folder}" in line
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_weights_do_not_mix(run, tmp_path, small_parts, monkeypatch, capsys):
    stopped(run, tmp_path / "out.npz", monkeypatch)
    state = {name: value * 1.5 for name, value in open_run(run, "fp32", CPU).model.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    options = ["--run", run, "--out", tmp_path / "out.npz", "--num", 37, *COMMON]
    assert "weights" in refused(capsys, sample.main, [*options, "--weights", tmp_path / "w.safetensors"])


@pytest.mark.parametrize("damage", ["cut", "other shape", "empty"])
def test_a_damaged_part_is_named(run, tmp_path, small_parts, monkeypatch, capsys, damage):
    folder = stopped(run, tmp_path / "out.npz", monkeypatch)
    victim = folder / "part-00001-of-00005.npy"
    if damage == "other shape":
        np.save(victim, np.zeros((8, 9, 8, 3), np.uint8))
    else:
        victim.write_bytes(victim.read_bytes()[: 200 if damage == "cut" else 0])
    line = fails(capsys, run, tmp_path / "out.npz")
    assert str(victim) in line
    assert not (tmp_path / "out.npz").exists()
    victim.unlink()
    sampled(run, tmp_path / "out.npz", "--num", 37)
    assert len(arrays(tmp_path / "out.npz")["arr_0"]) == 37


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rows": 0}', "same but rows"])
def test_a_damaged_job_is_named(run, tmp_path, small_parts, monkeypatch, capsys, text):
    job = stopped(run, tmp_path / "out.npz", monkeypatch) / "job.json"
    job.write_text(json.dumps(json.loads(job.read_text()) | {"rows": "8"}) if text.startswith("same") else text)
    line = refused(capsys, sample.main, ["--run", run, "--out", tmp_path / "out.npz", "--num", 37, *COMMON])
    assert str(job) in line or "was begun with" in line


def test_parts_of_unknown_work_are_not_taken(run, tmp_path, small_parts):
    """A folder that was being removed when the process was killed."""
    whole = sampled(run, tmp_path / "whole.npz", "--num", 37)
    folder = parts_module.folder_of(tmp_path / "out.npz")
    folder.mkdir()
    np.save(folder / "part-00000-of-00005.npy", np.full((8, 8, 8, 3), 77, np.uint8))
    assert sampled(run, tmp_path / "out.npz", "--num", 37).read_bytes() == whole.read_bytes()


def test_what_is_there_is_not_drawn_again(run, tmp_path, small_parts, monkeypatch, capsys):
    drawn: list[Path] = []

    def noting(parts, *arguments, real=sample.draw_parts):
        drawn.append(parts.out)
        real(parts, *arguments)

    monkeypatch.setattr(sample, "draw_parts", noting)
    out, sweep = tmp_path / "s.npz", ["--num", 8, "--cfg-scale", 1]
    sampled(run, out, *sweep, 2)
    assert len(drawn) == 2
    sampled(run, out, *sweep, 2, 3)
    assert drawn[2:] == [tmp_path / "s-cfg3.npz"]
    assert capsys.readouterr().out.count("drawn before") == 2
    sampled(run, out, *sweep, 2, "--seed", 1)  # other images
    assert len(drawn) == 5
    left = parts_module.folder_of(tmp_path / "s-cfg2.npz")  # of a process that was killed after the file was made
    with zipfile.ZipFile(tmp_path / "s-cfg2.npz") as archive:
        job = json.loads(archive.comment)
    left.mkdir()
    (left / "job.json").write_text(json.dumps(job | {"rows": 8}))
    sampled(run, out, *sweep, 2, "--seed", 1)
    assert len(drawn) == 5
    assert not left.exists()


def test_a_part_that_nobody_writes_is_named(tmp_path, monkeypatch):
    parts = parts_module.Parts(tmp_path / "s.npz", 8, (2, 2, 3), 4)
    parts.folder.mkdir()
    parts.write(0, np.zeros((4, 2, 2, 3), np.uint8))
    monkeypatch.setattr(sample, "POLL_S", 0.001)
    monkeypatch.setattr(sample, "PATIENCE_S", 0.01)
    with tqdm(total=8) as bar, pytest.raises(ValueError, match=r"part-00001-of-00002\.npy: no process has written it"):
        sample._wait_for_all(parts, bar)
    parts.write(1, np.zeros((4, 2, 2, 3), np.uint8))
    with tqdm(total=8) as bar:
        sample._wait_for_all(parts, bar)
        assert bar.n == 8


@pytest.mark.slow
def test_every_process_must_see_the_folder(run, tmp_path):
    """As on machines without a common file system: each is in a folder of its own."""
    code = "import os\nos.makedirs(os.environ['RANK'], exist_ok=True)\nos.chdir(os.environ['RANK'])\n"
    done = launch(run, tmp_path / "out.npz", "--num", 37, "--out", "x.npz", code=code, cwd=tmp_path)
    assert done.returncode == 1
    assert "not every process sees x.npz.parts" in done.stderr


@pytest.mark.parametrize("num", [6, 37])
@pytest.mark.parametrize("name", ["s.npz", "s.png"])
def test_compiled_batches_are_no_larger_than_needed(run, tmp_path, monkeypatch, num, name):
    sizes: set[int] = set()

    def call(model, *, dynamic):
        assert dynamic is False
        return lambda x, time, y: (sizes.add(len(x)), model(x, time, y))[1]

    monkeypatch.setattr(torch, "compile", call)
    sampled(run, tmp_path / name, "--num", num, "--compile", "--cfg-scale", 1, "--batch-size", 32)
    assert sizes == {min(num, 32)}


def test_an_impossible_out_is_noticed_before_the_work(run, capsys, monkeypatch):
    monkeypatch.setattr(sample, "draw_all", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(sample, "draw_parts", lambda *_: pytest.fail("too late"))
    for name in ("/proc/a.png", "/proc/a.npz"):
        assert f"--out {name} cannot be written" in refused(capsys, sample.main, ["--run", run, "--out", name])


def test_a_learnt_target_is_part_of_the_weights(run):
    process = open_run(run, "fp32", CPU).process
    model = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(1, 1)
    assert sample._fingerprint(model, process) == sample._fingerprint(model, process)
    assert sample._fingerprint(model, process) != sample._fingerprint(model, other)


def test_killed_at_any_moment(run, tmp_path):
    """Before, in the middle of and after writing a part, while merging, and after it."""
    assert launched(run, tmp_path / "whole.npz", "--num", 37, processes=1) == 0
    killer = """
import os, pathlib, signal
count = pathlib.Path(__file__).with_suffix(".count")
moment = int(count.read_text()) if count.exists() else 0
count.write_text(str(moment + 1))
def die(at):
    if at == moment: os.kill(os.getpid(), signal.SIGKILL)
real_replace, real_write, real_rmtree = os.replace, parts.Parts.write, parts.shutil.rmtree
def replace(source, target):
    name = os.path.basename(target)
    if name.startswith("part-00001"): die(0)
    real_replace(source, target)
    if name.startswith("part-00002"): die(1)
    if name.endswith(".npz"): die(4)
os.replace = replace
def write(self, number, pictures):
    if number == 4: die(2)
    real_write(self, number, pictures)
parts.Parts.write = write
real_read = parts.Parts._read
def read(self, number):
    if number == 3: die(3)
    return real_read(self, number)
parts.Parts._read = read
def rmtree(folder):
    real_rmtree(folder)
    die(5)
parts.shutil.rmtree = rmtree
"""
    codes = [launched(run, tmp_path / "out.npz", "--num", 37, processes=1, code=killer) for _ in range(5)]
    assert codes == [-signal.SIGKILL] * 5
    assert launched(run, tmp_path / "out.npz", "--num", 37, processes=1) == 0
    assert (tmp_path / "out.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".partial", ".npy")]


@pytest.mark.slow
def test_two_processes_draw_what_one_does(run, tmp_path, small_parts):
    sampled(run, tmp_path / "one.npz", "--num", 37)
    assert launched(run, tmp_path / "two.npz", "--num", 37) == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    for num in (13, 1):  # with one, a process has none
        sampled(run, tmp_path / "one.png", "--num", num)
        assert launched(run, tmp_path / "two.png", "--num", num) == 0
        left, right = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
        assert left.shape == right.shape
        assert np.abs(left - right).max() <= 1  # batches of other sizes round otherwise


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_left(run, tmp_path, small_parts, monkeypatch):
    sampled(run, tmp_path / "one.npz", "--num", 37)
    assert len(list(stopped(run, tmp_path / "out.npz", monkeypatch).glob("*.npy"))) == 2
    assert launched(run, tmp_path / "out.npz", "--num", 37) == 0
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()


# ---------------------------------------------------------------------------- guidance, grids


def test_sweep_of_guidance(run, tmp_path):
    arguments = ["--run", run, "--out", tmp_path / "s.npz", *COMMON[:-2], "--num", 8, "--cfg-scale", 1, 1.35, 2]
    assert sample.main([*map(str, arguments)]) == 0
    names = ["s-cfg1.35.npz", "s-cfg1.npz", "s-cfg2.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    single = arrays(sampled(run, tmp_path / "t.npz", "--num", 8, "--cfg-scale", 1.35))
    swept = [arrays(tmp_path / name)["arr_0"] for name in names]
    assert np.array_equal(swept[0], single["arr_0"])
    assert not np.array_equal(swept[0], swept[1])
    assert not np.array_equal(swept[0], swept[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cfg-scale", 1, 1], "different numbers"),
        (["--cfg-scale", 1, 1.0000001], "the same file name"),
        (["--cfg-scale", 1, -1], "cfg_scale is -1.0"),
        (["--latent-scale", "sd"], "latent_scale goes with --vae"),
        (["--vae-precision", "bf16"], "vae_precision goes with --vae"),
        (["--vae", "nowhere"], "nowhere holds no config.json"),
        (["--out", "samples.jpg"], "must end in .png or .npz"),
        (["--cuda-graph"], "cuda_graph needs a GPU"),
    ],
)
def test_bad_options(run, tmp_path, capsys, options, message):
    out = ["--out", tmp_path / "s.npz"] if "--out" not in options else []
    line = refused(capsys, sample.main, ["--run", run, *out, "--num", 8, *COMMON[:-2], *options])
    if message.startswith("nowhere"):
        message = "do not say how their latents come from a VAE's"  # of a mixture, which comes first
    assert message in line
    assert not list(tmp_path.iterdir())


def test_a_grid_names_its_classes(run, tmp_path):
    for name, options in (("columns", ["--num", 20]), ("chosen", ["--num", 6, "--classes", 7, 3])):
        sampled(run, tmp_path / f"{name}.png", *options)
    wide = Image.open(tmp_path / "columns.png")
    assert wide.width > 10 * 64
    chosen = np.asarray(Image.open(tmp_path / "chosen.png").convert("L"))
    assert (chosen[: 20 - 4] < 128).any()  # ink above the pictures
    assert chosen.shape[1] < 3 * 64 + 20


def test_captions_and_column_labels():
    black = np.zeros((4, 16, 16, 1), np.uint8)
    bare = image_grid(black, columns=2, cell=32)
    heads = image_grid(black, columns=2, cell=32, column_labels=["a", "b"])
    named = image_grid(black, columns=2, cell=32, captions=["cat", "dog", "a name much too long", ""])
    line = heads.height - bare.height
    assert line > 8
    assert named.height - bare.height == 2 * line
    assert bare.width == heads.width == named.width
    pixels = np.asarray(named.convert("L"))
    assert (pixels == 0).sum() >= 4 * 32 * 32  # no text covers a picture
    with pytest.raises(ValueError, match="4 images in 2 columns need 2 column_labels, got 1"):
        image_grid(black, columns=2, column_labels=["a"])
    with pytest.raises(ValueError, match="4 images in 2 columns need 4 captions, got 1"):
        image_grid(black, columns=2, captions=["a"])


def test_compiled_samples_are_the_same(run, tmp_path):
    plain = arrays(sampled(run, tmp_path / "a.npz", "--num", 12))
    compiled = arrays(sampled(run, tmp_path / "b.npz", "--num", 12, "--compile"))
    assert np.abs(plain["arr_0"].astype(int) - compiled["arr_0"]).max() <= 1


def test_torchrun_needs_two_hyphens(run, tmp_path):
    assert sample.main(["--", "--run", str(run), "--out", str(tmp_path / "g.png"), "--num", "2", "--steps", "2"]) == 0
