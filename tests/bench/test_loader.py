"""Reading beside others' ways: sides give the samples that they say, and a run writes rows that can be rendered."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from bench import bench_loader, report
from bench.loader_sides import HDF5, SIDES, InDataLoader, LoadOptions, write_data
from erdfast.data.files import FileDataset
from tests.runs import words

ROWS, BATCH = 24, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("loader")
    write_data(where, ROWS)
    return where


def options(folder: Path, workers: int = 0) -> LoadOptions:
    return LoadOptions(folder=folder, rows=ROWS, batch=BATCH, workers=workers, batches=8, slow_batches=3)


@pytest.mark.parametrize("name", list(SIDES))
def test_a_side_gives_the_samples_that_it_says(name: str, folder: Path) -> None:
    with h5py.File(folder / HDF5) as file:
        moments, labels = (torch.from_numpy(np.asarray(file[f"train_{what}"])) for what in ("latents", "labels"))
    side = SIDES[name](options(folder))
    seen = []
    for number in (0, 1, 5):
        batches, indices = list(side.turn(number)), side.indices(number)
        assert len(batches) == side.batches
        assert all(x.shape == (BATCH, 8, 32, 32) and x.element_size() == side.value_bytes for x, _ in batches)
        torch.testing.assert_close(torch.cat([x for x, _ in batches]), moments[indices].to(batches[0][0].dtype))
        assert torch.equal(torch.cat([y for _, y in batches]), labels[indices].long())
        seen.append(indices)
    assert not torch.equal(seen[0], seen[1])
    side.close()


def test_our_files_are_several(folder: Path) -> None:
    assert len(list((folder / "store").glob("part-*"))) == 8
    assert FileDataset(folder / "store").gather(torch.tensor([0])).x.dtype == torch.bfloat16


def test_what_a_side_starts_ends(folder: Path) -> None:
    threads = threading.active_count()
    ours = SIDES["loader"](options(folder))
    list(ours.turn(0))
    assert threading.active_count() == threads  # between turns it reads nothing
    ours.close()
    theirs = SIDES["hdf5"](options(folder, workers=1))
    assert isinstance(theirs, InDataLoader)
    assert [len(list(theirs.turn(number))) for number in (0, 1)] == [3, 3]
    assert len(multiprocessing.active_children()) == 1
    theirs.close()
    assert not multiprocessing.active_children()


def test_a_tiny_run_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = ["--results", str(tmp_path), "--folder", str(tmp_path)]
    bench_loader.main(words("--rows 16 --batch 8 --rounds 2 --workers 0 --sides loader gather hdf5") + results)
    (path,) = tmp_path.glob("*/loader.json")
    result = json.loads(path.read_text())
    assert [row["side"] for row in result["rows"]] == ["loader", "gather", "hdf5"]
    assert not result["complete"]
    assert result["missing"] == [
        *(f"side {name}" for name in ("hdf5_held", "npy", "safetensors")),
        "13 of 15 rounds",
        "19984 of 20000 rows",
        "batch 256",
    ]
    ours, _, erd = result["rows"]
    assert ours["ours_over"] is None
    assert ours["timing"]["rounds"] == 2
    assert erd["ours_over"]["median"] == pytest.approx(ours["samples_per_s"] / erd["samples_per_s"])
    assert ours["bytes_per_s"] == pytest.approx(ours["samples_per_s"] * 16384)
    assert erd["samples_per_s_p20"] <= erd["samples_per_s"] <= erd["samples_per_s_p80"]
    assert {"torch", "h5py", "safetensors", "commit", "date", "load_before"} < result["environment"].keys()
    assert not list(tmp_path.glob("erdfast-loader-*"))
    text = report.render_result(result)
    assert f"| hdf5 | {erd['samples_per_s']:,.0f} |" in text
    assert "8 samples a batch, shuffled, of 16 in the page cache; medians of 2 interleaved turns" in text
    assert "Not a full run" in text
    assert report.render_result(result, ["gather"]).count("\n| ") == 2
    shown = capsys.readouterr().out
    assert "goal, at least 100,000 samples/s: " in shown
    assert "goal, at least 20x HDF5 opened per sample: " in shown


def test_a_side_that_cannot_be_built_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_options: LoadOptions) -> InDataLoader:
        raise OSError("no such format")

    monkeypatch.setitem(SIDES, "npy", broken)
    with pytest.raises(SystemExit) as stop:
        bench_loader.main(words("--rows 8 --batch 8 --rounds 1 --workers 0 --sides gather npy --no-save"))
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "npy          not measured: OSError: no such format" in shown
    assert "goal" not in shown


def test_goals() -> None:
    rows = [
        {"side": "loader", "samples_per_s": 99_999.0},
        {"side": "hdf5", "samples_per_s": 1.0, "ours_over": {"median": 20.0}},
    ]
    assert bench_loader.goals(rows) == [
        "goal, at least 100,000 samples/s: 99,999, MISSED",
        "goal, at least 20x HDF5 opened per sample: 20.0x, met",
    ]


def test_options_that_cannot_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ("--rows 8", "--batch: 256 samples are more than the 8 of --rows"),
        ("--rounds 0", "--rounds: must be at least 1, not 0"),
        ("--sides fast", "invalid choice: 'fast'"),
    ):
        with pytest.raises(SystemExit) as stop:
            bench_loader.main(words(arguments))
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
