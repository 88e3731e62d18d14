"""`python -m erdfast.diagnose run`: from run directories and published checkpoints to a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.container import ErrorbarContainer
from safetensors.torch import save_file

from erdfast import diagnose
from erdfast.diagnostics.allocation import allocate
from erdfast.diagnostics.gradients import LevelGradients
from erdfast.diagnostics.noise_level_losses import LevelMeasures, v_factor
from erdfast.diagnostics.run import summary_caption, summary_table
from erdfast.diagnostics.run_figures import (
    COLORS,
    LINES,
    MARKERS,
    Measured,
    differ,
    draw_cosines,
    draw_losses,
    draw_ranks,
)
from erdfast.diagnostics.subject import levels_of, shared_logsnr
from erdfast.models import DiTConfig
from erdfast.models.recognise import HEADS
from erdfast.process import Process
from tests.diagnostics.networks import Zero, subject
from tests.models.test_load_published import random_network
from tests.runs import refused, single_thread, tiny_trainer

FIGURES = ("losses", "allocation", "gradients", "gradient_cosines", "ranks")
SMALL = ("--num-levels", "4", "--num-samples", "24", "--grad-samples", "6", "--device", "cpu", "--precision", "fp32")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A few steps each."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "eps": {},
        "weighed": {"weighting": "constant"},
        "k": {"model": "dit_tiny", "schedule": "flow", "target": "k", "loss_space": "u", "weighting": "constant"},
        "unlabelled": {"label_drop": 1.0},
    }
    for name, own in options.items():
        tiny_trainer(folder / name, steps=3, checkpoint_every=3, **own).train()
    return {name: folder / name for name in options}


def diagnosed(out: Path, *arguments: object) -> dict[str, dict]:
    """The numbers behind each figure."""
    assert diagnose.main(["run", *map(str, arguments), "--out", str(out), *SMALL]) == 0
    return {name: json.loads((out / f"{name}.json").read_text()) for name in FIGURES}


def test_a_page_of_two_runs(runs, tmp_path, capsys):
    found = diagnosed(tmp_path / "out", runs["eps"], runs["weighed"])
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path}/out/index.html"
    names = [*(f"{name}.{kind}" for name in FIGURES for kind in ("json", "png")), "index.html", "index.md"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img") == len(FIGURES)
    assert "images, noise and levels are the same for all runs" in page
    assert "can be compared" not in page  # these can as they are
    assert "Errors are means over the times that the run itself draws" in page
    losses = found["losses"]["runs"]
    assert list(losses) == ["eps", "weighed"]
    for name in ("logsnr", "loss", "loss_error", "excess", "floor", "rank_best"):
        assert len(losses["eps"][name]) == 4
        assert None not in losses["eps"][name]
    assert losses["eps"]["floor"] == losses["weighed"]["floor"]  # the same images, noise and levels
    assert losses["eps"]["loss"] != losses["weighed"]["loss"]
    curves = found["allocation"]["runs"]
    assert max(curves["weighed"]["weight"]) == min(curves["weighed"]["weight"]) == 1.0
    assert curves["eps"]["density"] == curves["weighed"]["density"]
    map_ = found["gradient_cosines"]["runs"]["eps"]["cosine"]
    cosine = torch.tensor([[torch.nan if v is None else v for v in row] for row in map_])
    torch.testing.assert_close(cosine, cosine.T, equal_nan=True)
    assert cosine.diagonal().isfinite().sum() >= 2
    torch.testing.assert_close(cosine.diagonal().nan_to_num(1.0), torch.ones(4))
    assert found["gradients"]["about"]["grad samples"] == 6
    # Another time, and without the other run, the numbers are the same.
    again = diagnosed(tmp_path / "again", runs["eps"])
    for name in FIGURES:
        assert found[name]["runs"]["eps"] == again[name]["runs"]["eps"]


def test_different_runs_are_compared_as_v(runs, tmp_path):
    """One has a learnt target, one was never told a label."""
    found = diagnosed(tmp_path / "out", runs["eps"], runs["k"], runs["unlabelled"])["losses"]["runs"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "can be compared" in page
    assert re.search(r"<td>k \(k = 0\.\d{3}\)</td><td>flow</td><td>constant, of errors in u</td>", page)
    floors = {n: [a * b for a, b in zip(of["floor"], of["to_v"], strict=True)] for n, of in found.items()}
    assert floors["k"] == pytest.approx(floors["eps"], rel=0.15)  # levels of a discrete schedule are not quite the same
    assert floors["unlabelled"][1] > 1.05 * floors["eps"][1]


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(HEADS, 48, 4)  # so that a network of this width counts as published
    config = DiTConfig(width=48, depth=2, num_heads=4, input_shape=(4, 8, 8), num_classes=10, learn_sigma=True)
    torch.save({"ema": random_network(config).state_dict()}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_a_published_checkpoint_beside_a_run(runs, published, tmp_path):
    found = diagnosed(tmp_path / "out", runs["eps"], published, "--data", "mixture:4x8x8", "--target", "v")
    assert list(found["losses"]["runs"]) == ["eps", "theirs"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "How errors of theirs were weighed is not known" in page
    assert "<td>v</td><td>ddpm_linear</td><td>constant</td>" in page


def test_held_out_data(runs, tmp_path):
    """Latents without labels in a file, of another scale: the network is told the null class."""
    np.save(tmp_path / "held_out.npy", 3.0 * np.random.RandomState(0).randn(40, 4, 8, 8).astype(np.float32))
    found = diagnosed(tmp_path / "out", runs["eps"], "--data", tmp_path / "held_out.npy")
    assert found["losses"]["runs"]["eps"]["floor"] == [None] * 4
    page = (tmp_path / "out" / "index.html").read_text()
    assert "The least possible error of these data is not known" in page
    assert "Bayes floor" not in page
    assert "There are only" not in page
    assert "share images" not in page
    np.save(tmp_path / "few.npy", np.random.RandomState(0).randn(20, 4, 8, 8).astype(np.float32))
    diagnosed(tmp_path / "out", runs["eps"], "--data", tmp_path / "few.npy")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "There are only 20 images, which come again with other noise" in page
    assert "Gradients of different levels share images" in page


def test_names_and_mixtures_of_other_seeds(runs, tmp_path, monkeypatch):
    """Mixtures of two seeds are described alike, and are not the same images."""
    other = tmp_path / "_$seed$ 1"
    tiny_trainer(other, steps=1, checkpoint_every=1, seed=1).train()
    monkeypatch.chdir(runs["eps"])
    found = diagnosed(tmp_path / "out", ".", other)["losses"]["runs"]
    assert list(found) == ["eps", other.name]
    page = (tmp_path / "out" / "index.html").read_text()
    assert "noise and levels, but not images, are the same for all runs" in page
    assert "data differ: their errors do too" in page
    assert "known Bayes floor), seed 0; mixture:4x8x8" in page
    figure = draw_losses([measured("eps"), measured(other.name)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Bayes floor", "eps", r" _\$seed\$ 1"]
    figure.canvas.draw()  # as text, not as a formula that cannot be read


def test_what_is_wrong_is_one_line(runs, published, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "taken").write_text("a file")
    labels = {"latents": torch.zeros(13, 4, 8, 8), "labels": torch.arange(13)}
    save_file(labels, tmp_path / "labelled.safetensors")
    started = tmp_path / "started"
    started.mkdir()
    (started / "config.json").write_bytes((runs["eps"] / "config.json").read_bytes())
    tiny_trainer(tmp_path / "digits", model="uvit_digits", data="digits", steps=1, checkpoint_every=1).train()
    out = ("--out", tmp_path / "out")
    lines = {
        (tmp_path / "absent", *out): "absent is not a run directory",
        (tmp_path / "notes.txt", "--data", "mixture", *out): "is not a run directory, and as a checkpoint neither",
        (started, *out): "started",
        (published, *out): "theirs.pt is a published checkpoint, which has no data of its own: add --data",
        (published, "--data", "digits", *out): "8x8",
        (runs["eps"], tmp_path / "digits", *out): "eps is for 4x8x8, digits is for 1x8x8",
        (runs["eps"], runs["eps"], *out): "named twice",
        (runs["eps"], "--data", "nothing", *out): "unknown data 'nothing'",
        (runs["eps"], "--data", tmp_path / "labelled.safetensors", *out): "has 13 classes, and uvit_tiny is for 10",
        (runs["eps"], "--family", "dit", *out): "family is for published checkpoints",
        (runs["eps"], "--num-levels", "1", *out): "num_levels is 1",
        (runs["eps"], "--precision", "fp8", *out): "fp8",
        (runs["eps"], "--out", tmp_path / "taken"): "taken cannot be written",
        (runs["eps"], "--out", "/proc/self/fdinfo"): "fdinfo cannot be written",  # a folder, and nobody can
        (runs["eps"],): "--out",
        out: "name one run directory or published checkpoint",
    }
    if not torch.cuda.is_available():
        lines[(runs["eps"], "--device", "cuda", *out)] = "device cuda is not here"
    for arguments, message in lines.items():
        line = refused(capsys, diagnose.main, ["run", *arguments])
        assert message in line, line
    assert not (tmp_path / "out").exists()


def test_quick_is_at_most(tmp_path):
    options = diagnose.Run(run=(tmp_path,), out=tmp_path, num_levels=6, grad_samples=500, seed=5, quick=True)
    found = options.settings
    assert (found.num_levels, found.num_samples, found.grad_samples, found.seed) == (6, 128, 16, 5)


# ---------------------------------------------------------------------- figures and table


def measured(name: str, target: str = "v", *, signal: float = 1.0, **changed) -> Measured:
    """Made-up numbers at four levels."""
    process = Process("flow", target, "erd")
    levels = levels_of(process, shared_logsnr([process], 4))
    some = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    numbers = dict.fromkeys(LevelMeasures._fields, some) | {"to_v": v_factor(levels.coef)} | changed
    products = signal * torch.eye(4, dtype=torch.float64)
    gradients = LevelGradients(some, some / 10, some, some, some / 10, products, 100, 100)
    of = subject(Zero(), process, name=name)
    return Measured(of, levels, allocate(process), LevelMeasures(**numbers), gradients)


def test_every_curve_differs_by_colour_and_by_line_or_marker():
    runs = [measured(f"run{n}") for n in range(12)]
    figure = draw_losses(runs)
    styles = []
    for container in figure.axes[0].containers:
        assert isinstance(container, ErrorbarContainer)
        line = container.lines[0]
        styles.append((line.get_color(), line.get_linestyle(), line.get_marker()))
    assert len({*styles}) == len(runs)
    assert len({(color, marker) for color, _, marker in styles}) == len(runs)
    assert len({len(COLORS), len(LINES), len(MARKERS)}) == 3


def test_panels_are_those_that_mean_something():
    v, eps = measured("v"), measured("eps", "eps")
    assert not differ([v, measured("again")])
    assert differ([v, eps])
    assert [axes.get_title(loc="left") for axes in draw_losses([v, v]).axes] == [
        "Error of v", "Excess above the Bayes floor",
    ]  # fmt: skip
    assert [axes.get_title(loc="left") for axes in draw_losses([v, eps]).axes] == [
        "Error of each run's own target", "The same as errors of v", "Excess above the Bayes floor (v)",
    ]  # fmt: skip
    assert len([axes for axes in draw_cosines([v] * 4).axes if axes.get_visible() and axes.get_title(loc="left")]) == 4


def test_ranks_that_are_all_0(recwarn):
    """A network that has learnt nothing says the same of every image."""
    none = dict.fromkeys(("rank_outputs", "rank_pooled", "rank_tokens", "rank_best"), torch.zeros(4).double())
    assert [axes.get_ylim() for axes in draw_ranks([measured("untrained", **none)]).axes] == [(0.0, 1.0)] * 3
    assert not recwarn.list


def test_the_table():
    head, first, second = summary_table([measured("one"), measured("two", loss=torch.full((4,), 0.25).double())])
    assert len(head) == len(first) == len(second)
    two = dict(zip(head, second, strict=True))
    assert two["run"] == "two"
    assert (two["error"], two["weighted error"]) == ("0.25", "0.25")  # erd's mean weight is 1
    assert two["median log-SNR of M"] == "0.00"
    assert dict(zip(head, first, strict=True))["noise scale of the gradient"] == two["noise scale of the gradient"]


def test_a_noise_scale_that_is_not_known_says_why():
    """With as few samples as --quick takes there may be nothing of the gradient above its noise."""
    known, lost = (summary_table([measured("one", signal=signal)]) for signal in (1.0, -1.0))
    assert dict(zip(*lost, strict=True))["noise scale of the gradient"] == "lost in noise"
    assert "more --grad-samples, without --quick, may bring it out" in summary_caption(lost)
    assert float(dict(zip(*known, strict=True))["noise scale of the gradient"]) > 0
    assert "lost in noise" not in summary_caption(known)
