"""`diagnose dimension`: from the command line to the page, and what its tables say."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from erdfast import diagnose
from erdfast.diagnostics import dimension
from erdfast.diagnostics.dimension import (
    MEASURES,
    Dimension,
    build_process,
    data_table,
    draw_data,
    measure_data,
    one_thread,
    trained_table,
)
from erdfast.diagnostics.dimension_figures import draw_spectrum
from erdfast.diagnostics.intrinsic_dimension import ESTIMATORS, Estimate
from erdfast.diagnostics.linear_theory import averages_of, best_k, k_star, optimal_loss, subspace_variances
from tests.runs import refused, single_thread

LOSS_CURVES, OPTIMAL_KS = functools.cache(dimension.loss_curves), functools.cache(dimension.optimal_ks)


@pytest.fixture(autouse=True, scope="module")
def one_thread_here():
    with single_thread():
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few dimensions, no trained layers, few points, and the curves of the theory but once."""
    monkeypatch.setattr(dimension, "loss_curves", LOSS_CURVES)
    monkeypatch.setattr(dimension, "optimal_ks", OPTIMAL_KS)
    monkeypatch.setattr(dimension, "DIMS", (16, 128, 256))
    monkeypatch.setattr(dimension, "TRAINED", ())
    monkeypatch.setattr(dimension, "CALIBRATION", {"subspace": (1, 3), "torus": (1,)})
    monkeypatch.setattr(dimension, "CALIBRATION_POINTS", 200)


def save(path: Path, x: torch.Tensor) -> str:
    np.savez(path, latents=x.reshape(-1, 1, 4, 4).numpy().astype("float32"))
    return str(path)


def normal(num: int, seed: int = 0) -> torch.Tensor:
    """(num, 16) points of a plane of three dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, generator=generator) @ torch.randn(3, 16, generator=generator)


def measured(spec: str) -> dimension.Measured:
    options = Dimension(out=Path("unused"), data=spec, latent_scale="stored")
    return measure_data(options, draw_data(options))


def page_of(arguments: list[str], out: Path) -> str:
    assert diagnose.main(["dimension", "--out", str(out), *arguments]) == 0
    return (out / "index.html").read_text(encoding="utf-8")


def numbers_of(out: Path, name: str) -> dict:
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((out / f"{name}.json").read_text())


def test_without_data(small, tmp_path, capsys):
    text = page_of(["--neighbours", "4", "8"], tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {tmp_path / 'index.html'}"
    assert text.count("data:image/png;base64,") == 3
    losses = numbers_of(tmp_path, "loss_over_k")
    for dim, curve in losses["curves"]["target"].items():
        assert curve["k_star"] == pytest.approx(k_star(256, int(dim)), abs=1e-5)
        least = min(range(len(losses["k"])), key=curve["loss"].__getitem__)
        assert losses["k"][least] == pytest.approx(curve["k_star"], abs=0.003)
    optima = numbers_of(tmp_path, "k_over_dimension")
    assert optima["k_star"]["target"] == pytest.approx([k_star(256, d) for d in (16, 128, 256)], abs=1e-5)
    assert optima["k_star"]["velocity_floor"] == pytest.approx([1, 1, 1], abs=1e-5)
    rows = numbers_of(tmp_path, "calibration")["rows"]
    assert [(row["manifold"], row["d"], row["rank"]) for row in rows] == [
        ("subspace", 1, 1), ("subspace", 3, 3), ("torus", 1, 4),
    ]  # fmt: skip
    for row in rows:
        assert row["participation ratio"] == pytest.approx(row["rank"], rel=0.1)
        assert row["Levina-Bickel"][0] == pytest.approx(row["d"], rel=0.2)


def test_with_digits(small, tmp_path):
    text = page_of(["--data", "digits", "--num-samples", "400"], tmp_path)
    assert text.count("data:image/png;base64,") == 4
    assert "400 of 1,797 images 1x8x8" in text
    assert "No two samples are identical." in text
    by_size = numbers_of(tmp_path, "estimators")["by_size"]
    assert list(by_size) == ["50", "100", "200", "400"]
    assert set(by_size["400"]) == set(ESTIMATORS)
    assert len(numbers_of(tmp_path, "spectrum")["variances"]) == 64


def test_the_table_of_data_in_a_plane(tmp_path):
    """Three of 16 dimensions: every estimator says so, and k = D/(D+d) of each."""
    spec = save(tmp_path / "plane.npz", normal(1000))
    found = measured(spec)
    assert (found.ambient, found.duplicates) == (16, 0)
    for name in ESTIMATORS:
        assert found.estimates[name].value == pytest.approx(3, rel=0.15)
    assert int((found.variances > 1e-6 * found.variances[0]).sum()) == 3
    head, *rows = data_table(found)
    assert {len(row) for row in rows} == {len(head)}
    for row, name in zip(rows, ESTIMATORS, strict=False):
        value = found.estimates[name].value
        assert row == [
            name,
            f"{value:.3g} (+-{found.estimates[name].error:.2g})",
            f"{value / 16:.3g}",
            f"{16 / (16 + value):.3f}, D/(D+d)",
        ]


def test_the_theory_of_a_covariance_is_that_of_the_subspace(tmp_path):
    """If the covariance is that of the paper's data, the last rows have the k* of the figure."""
    variances = subspace_variances(16, 4)
    estimates: dict[str, Estimate] = {name: Estimate(4.0, 0.1) for name in ESTIMATORS}
    rows = data_table(dimension.Measured("made up", 16, 0, {100: estimates}, [], variances))
    found = {
        row[0].removeprefix("linear theory with the data's covariance, "): row[-1] for row in rows[-len(MEASURES) :]
    }
    assert found["error in the target (theorem 3.2)"] == "0.800"
    for measure, (title, _) in MEASURES.items():
        assert found[title] == f"{best_k(build_process(measure), variances):.3f}"
    assert [row[1] for row in rows if row[0].startswith("components with")] == ["4", "4"]


def test_copies_are_counted_once_and_said(small, tmp_path):
    x = normal(300)
    once = measured(save(tmp_path / "once.npz", x))
    spec = save(tmp_path / "twice.npz", torch.cat([x, x[:120]]))
    twice = measured(spec)
    assert (once.duplicates, twice.duplicates) == (0, 120)
    for name in ESTIMATORS:
        assert twice.estimates[name].value == pytest.approx(once.estimates[name].value, rel=1e-5)
    assert "120 samples are copies of others and are left out of the distances" in twice.duplicates_said


def test_a_trained_layer_reaches_the_theory(monkeypatch):
    monkeypatch.setattr(dimension, "TRAINED", ((6, 2, "target"),))
    head, row = trained_table(0)
    found = dict(zip(head, row, strict=True))
    with torch.no_grad():
        least = float(optimal_loss(averages_of(build_process("target", 0.75)), subspace_variances(6, 2)))
    assert found["k*"] == "0.7500"
    assert float(found["k learnt"]) == pytest.approx(0.75, abs=0.01)
    assert float(found["Delta*"]) == pytest.approx(least, abs=1e-5)
    assert least <= float(found["loss"]) + 1e-5 < 1.001 * least + 1e-5
    assert float(found["|W - W*|/|W*|"]) < 0.05


def test_of_equally_good_k_the_largest():
    """d = D and times that treat both ends alike: the loss is symmetric in k and 1 - k, with two least points."""
    variances = subspace_variances(8, 8)
    for measure in ("velocity", "velocity_floor"):
        k = best_k(build_process(measure), variances)
        with torch.no_grad():
            one, other, middle = (
                float(optimal_loss(averages_of(build_process(measure, at)), variances)) for at in (k, 1 - k, 0.5)
            )
        assert k > 0.9
        assert one == pytest.approx(other, rel=1e-6)
        assert one < middle


def test_threads_are_given_back():
    torch.set_num_threads(2)
    stack = contextlib.ExitStack()
    stack.enter_context(one_thread())
    within = torch.get_num_threads()
    stack.close()
    after = torch.get_num_threads()
    torch.set_num_threads(1)
    assert (within, after) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--neighbours", "1", "5"], "neighbours are 1 to 5; they must rise and start at 2 or more"),
        (["--neighbours", "9", "5"], "neighbours are 9 to 5; they must rise"),
        (["--discard", "1"], "discard is 1.0; it must be at least 0 and below 1"),
        (["--num-samples", "83"], "num_samples is 83; 20 neighbours need 84 or more"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_options_are_refused(options, message, capsys, tmp_path):
    assert message in refused(capsys, diagnose.main, ["dimension", "--out", tmp_path / "x", *options])
    assert not (tmp_path / "x").exists()


def test_bad_data_are_refused(capsys, tmp_path):
    x, fewer = normal(200), "with smaller --neighbours than 10 20, fewer will do"
    cases = {
        "one": (x[:1], f"1 samples are too few, estimates need 84 or more; {fewer}"),
        "constant": (torch.ones(200, 16), "all 200 samples are equal, there is nothing to estimate"),
        "few": (x[:10].repeat(20, 1), f"10 distinct samples are too few, estimates need 84 or more; {fewer}"),
    }
    for name, (values, message) in cases.items():
        spec = save(tmp_path / f"{name}.npz", values)
        arguments = ["dimension", "--out", tmp_path / "x", "--data", spec, "--latent-scale", "stored"]
        line = refused(capsys, diagnose.main, arguments)
        assert message in line, line
        assert spec in line, line
        assert line.endswith(message), line
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("data", [[], ["--data", "digits"]])
def test_an_impossible_folder_is_refused_before_the_work(capsys, tmp_path, monkeypatch, data):
    for name in ("loss_curves", "optimal_ks", "trained_table", "measure_data"):
        monkeypatch.setattr(dimension, name, lambda *_: pytest.fail("worked"))
    (tmp_path / "taken").write_text("a file")
    for out in (tmp_path / "taken", "/proc/self/fdinfo"):  # the second is a folder, and nobody can
        line = refused(capsys, diagnose.main, ["dimension", "--out", out, *data])
        assert f"--out {out} cannot be written" in line


def test_a_single_component_is_drawn(tmp_path):
    """Data on a line have one, and a line through one point is nothing."""
    along = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    found = measured(save(tmp_path / "line.npz", along * torch.arange(1.0, 17.0)))
    left, right = draw_spectrum(found).axes
    assert [np.size(left.lines[0].get_xdata()), np.size(right.lines[0].get_xdata())] == [1, 16]
    for axes in (left, right):
        assert axes.lines[0].get_marker() == "o"
        assert axes.get_xlim()[0] < 1 < axes.get_xlim()[1]
