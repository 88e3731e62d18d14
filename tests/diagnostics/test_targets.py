"""`diagnose targets`: a page with figures and numbers, the same each time; what cannot be is refused in one line."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import rcParams

from erdfast.diagnose import main
from erdfast.diagnostics import target_figures, targets
from erdfast.diagnostics.report import Report
from erdfast.diagnostics.target_statistics import TARGETS, build_schedule, factors, gaussian_statistics, places_in_time
from erdfast.diagnostics.targets import (
    LINE_POINTS,
    LOGSNR,
    Measured,
    Targets,
    curves_of,
    draw_data,
    measure_data,
    run_targets,
    tabled,
    write_data,
)
from erdfast.process.schedule import SCHEDULES
from tests.runs import refused, single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


def page(out: Path, **options: Any) -> dict[str, Any]:
    """Run; the figures' numbers by name, and the page."""
    own = Targets(out=out, **({"schedules": ("flow", "cosine"), "num_samples": 64} | options))
    own.validate()
    run_targets(own, {"command": "test"})
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert {path.stem for path in out.glob("*.png")} == found.keys()
    return found | {"page": (out / "index.html").read_text()}


def measured(options: Targets) -> Measured:
    return measure_data(draw_data(options), options.seed)


def test_without_data_there_are_closed_forms_alone(tmp_path):
    found = page(tmp_path)
    assert found.keys() == {"by_logsnr", "by_time_discrete", "by_time_continuous", "page"}
    assert found["by_logsnr"]["schedules"].keys() == {"flow", "cosine"}
    drawn = found["by_time_continuous"]["schedules"]
    assert drawn.keys() == {"flow"}
    assert "estimates" not in drawn["flow"]
    place = places_in_time(build_schedule("flow"), LINE_POINTS)
    for target in TARGETS:
        wanted = gaussian_statistics(place, factors(target, place, 0.5))._asdict()
        for quantity, values in wanted.items():
            assert drawn["flow"]["gaussian"][target][quantity] == pytest.approx(values.tolist(), rel=1e-5, abs=1e-12)
    assert found["page"].count("<table>") == 2
    assert found["page"].count("<td>differs</td>") == 1


@pytest.mark.parametrize("data", ["digits", "mixture:1x2x3"])
def test_with_data_there_are_estimates_and_their_errors(tmp_path, data):
    found = page(tmp_path, data=data)
    assert found.keys() == {"by_logsnr", "by_time_discrete", "by_time_continuous", "least_error", "page"}
    sides = {"exact"} if data.startswith("mixture") else {"lower", "upper"}
    for name, numbers in found["by_logsnr"]["schedules"].items():
        estimates = numbers["estimates"]
        assert set(estimates["logsnr"]) <= set(LOGSNR), name
        for target in TARGETS:
            own = estimates["targets"][target]
            assert own["mean"].keys() == own["variance"].keys() == sides
            for estimate in (own["correlation"], *own["mean"].values(), *own["variance"].values()):
                assert len(estimate["value"]) == len(estimate["error"]) == len(estimates["logsnr"])
                assert all(error >= 0 for error in estimate["error"])
    assert found["least_error"]["errors"].keys() == {"in_set", "left_out", "linear", "one_factor"} | sides - {
        "lower",
        "upper",
    }
    assert ("1,797" if data == "digits" else "known Bayes floor") in found["page"]
    assert "No two samples are identical" in found["page"]
    assert found["page"].count("<table>") == 4


def test_the_same_options_give_the_same_numbers(tmp_path):
    options = {"data": "digits", "schedules": ("flow",)}
    one, same = (page(tmp_path / str(i), **options) for i in range(2))
    assert one == same
    first, other = (measured(Targets(out=tmp_path, data="digits", num_samples=64, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first.errors["linear"], other.errors["linear"])


def test_k_is_the_options():
    """k = 1 is x0 and k = 0 is -eps."""
    one, zero = (curves_of(build_schedule("flow"), k, None).gaussian for k in (1.0, 0.0))
    for got, wanted in zip(one["k"], one["x0"], strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(zero["k"].variance, zero["eps"].variance)
    assert torch.equal(zero["k"].correlation, -zero["eps"].correlation)


def test_of_nearly_constant_data_no_target_keeps_more_than_its_variance(tmp_path):
    """49 of 50 samples are equal: what is fitted to some of them says nothing of the one that differs."""
    x = np.full((50, 1, 4, 4), 0.3, np.float32)
    x[7] += np.random.RandomState(0).randn(1, 4, 4)
    np.save(tmp_path / "x.npy", x)
    data = measured(Targets(out=tmp_path, data=str(tmp_path / "x.npy")))
    assert float(data.errors["linear"][-1].mean()) * np.exp(LOGSNR[-1]) > 1e3  # of eps, but for the new bound
    for name in SCHEDULES:
        curve = curves_of(build_schedule(name), 0.5, data)
        for target, found in curve.estimates.items():
            c_x, c_eps = factors(target, curve.at, 0.5)
            total = c_x.square() * data.variance + c_eps.square()
            assert (found.variance["upper"].value <= total * (1 + 1e-9)).all(), (name, target)
            assert (found.mean_square["lower"].value >= -1e-9 * total).all(), (name, target)


@pytest.mark.parametrize(("data", "marks"), [("digits", 2), ("mixture:1x2x3", 1), (None, 0)])
def test_figures_say_what_markers_are_and_which_side_is_noise(tmp_path, data, marks):
    options = Targets(out=tmp_path, data=data, num_samples=64)
    found = None if data is None else measured(options)
    curves = {name: curves_of(build_schedule(name), 0.5, found) for name in ("flow", "cosine")}
    by_logsnr, by_time = target_figures.draw_by_logsnr(curves, found), target_figures.draw_by_time(curves, found)
    for figure, wanted in ((by_logsnr, marks), (by_time, min(marks, 1))):
        _, *explained = figure.legends
        texts = [text.get_text() for legend in explained for text in legend.get_texts()]
        assert len(texts) == wanted
        if data == "digits":
            assert "upper bound of the variance" in texts[0]
        if marks == 1:
            assert "exact posterior" in texts[0]
    drawn = [by_logsnr] if found is None else [by_logsnr, target_figures.draw_errors(found)]
    for figure in drawn:
        labels = {axes.get_xlabel() for axes in figure.axes} - {""}
        assert labels == {"log-SNR      noise  ←  →  clean"}


@pytest.mark.parametrize("styles", [target_figures.TARGET_STYLE, target_figures.SCHEDULE_STYLE])
def test_every_curve_has_a_dash_style_of_its_own(styles):
    """Of two with as many dashes, one is twice as long somewhere."""
    named = {"-": (), "--": rcParams["lines.dashed_pattern"], "-.": rcParams["lines.dashdot_pattern"]}
    named[":"] = rcParams["lines.dotted_pattern"]
    patterns = [named[style] if isinstance(style, str) else style[1] for _, style, _ in styles.values()]
    for one, other in itertools.combinations(patterns, 2):
        assert len(one) != len(other) or any(max(a, b) >= 2 * min(a, b) for a, b in zip(one, other, strict=True))


def test_copies_are_counted(tmp_path):
    x = torch.randn(20, 1, 2, 2, generator=torch.Generator().manual_seed(0)).numpy()
    np.save(tmp_path / "x.npy", np.concatenate([x, x[:3]]))
    found = measured(Targets(out=tmp_path, data=str(tmp_path / "x.npy")))
    assert found.copies == 3
    assert found.shown == "upper"
    report = Report(tmp_path, "", {})
    write_data(report, found)
    assert "3 samples are copies of others" in report.close().read_text()


def test_one_schedule_stands_for_all_that_preserve_the_variance():
    assert tabled(tuple(SCHEDULES)) == ["cosine", "flow"]
    assert tabled(("gvp", "vp")) == ["gvp"]
    assert tabled(("flow",)) == ["flow"]


def test_from_the_command_line(tmp_path, capsys):
    assert main(["targets", "--out", str(tmp_path), "--schedules", "gvp", "sd_linear", "--k", "0.7"]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path}/index.html\n"
    text = (tmp_path / "index.html").read_text()
    assert "--k 0.7" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--schedules", "flow", "linear"], "unknown schedule 'linear'; choose from cosine, ddpm_linear, "),
        (["--schedules", "flow", "flow"], "name one or more, each once"),
        (["--k", "1.5"], "k is 1.5; it must lie between 0 and 1"),
        (["--k", "nan"], "k is nan; it must lie between 0 and 1"),
        (["--num-samples", "1"], "num_samples is 1; it must be from 16 to 10,000"),
        (["--num-samples", "100000"], "num_samples is 100000; it must be from 16 to 10,000"),
        (["--seed", "-1"], "seed is -1"),
        (["--data", "nothing"], "unknown data 'nothing'"),
        (["--data", "mixture:0x1x1"], "cannot read the shape '0x1x1'"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, options, reason):
    assert reason in refused(capsys, main, ["targets", "--out", tmp_path / "out", *options])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [[], ["--data", "digits"]])
def test_an_impossible_folder_is_refused_before_the_work(tmp_path, capsys, monkeypatch, data):
    for name in ("curves_of", "measure_data"):
        monkeypatch.setattr(targets, name, lambda *_: pytest.fail("worked"))
    (tmp_path / "taken").write_text("a file")
    for out in (tmp_path / "taken", "/proc/self/fdinfo"):  # the second is a folder, and nobody can
        line = refused(capsys, main, ["targets", "--out", out, *data])
        assert f"--out {out} cannot be written" in line


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros((0, 1, 2, 2), np.float32), "x.npy"),
        (np.ones((1, 1, 2, 2), np.float32), "1 samples are too few, estimates need 16 or more"),
        (np.ones((30, 1, 2, 2), np.float32), "all 30 samples are equal, there is nothing to estimate"),
        (np.full((30, 1, 2, 2), np.nan, np.float32), "not finite"),
    ],
    ids=["empty", "single", "constant", "nan"],
)
def test_data_that_say_nothing_are_refused(tmp_path, capsys, values, reason):
    np.save(tmp_path / "x.npy", values)
    line = refused(capsys, main, ["targets", "--out", tmp_path / "out", "--data", tmp_path / "x.npy"])
    assert reason in line
    assert "x.npy" in line
