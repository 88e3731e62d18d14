"""Comparison of several sets: the axis from file names, the table, the record, the plot."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erdfast.evaluation.comparison import Axis, Row, axis_of, format_table, save_plot, save_record


def names(*stems: str) -> list[Path]:
    return [Path(f"{stem}.npz") for stem in stems]


ROWS = [
    Row(file=Path("a-cfg1.0.npz"), count=50000, values={"fid": 13.25, "is": 91.5}),
    Row(file=Path("a-cfg1.5.npz"), count=50000, values={"fid": 2.5, "is": 250.0}),
    Row(file=Path("a-cfg2.0.npz"), count=1000, values={"fid": 4.75, "is": 310.0}),
]
AXIS = Axis(label="cfg", places=(1.0, 1.5, 2.0))


@pytest.mark.parametrize(
    ("stems", "expected"),
    [
        (("a-cfg1.0", "a-cfg1.5"), Axis(label="cfg", places=(1.0, 1.5))),
        (("run1_step400000", "run1_step0050000"), Axis(label="step", places=(400000.0, 50000.0))),
        (("10", "20"), Axis(label="x", places=(10.0, 20.0))),
        (("dit2-1.5", "sit2-1.5"), None),  # other words
        (("a1-b1", "a2-b2"), None),  # two numbers
        (("a1", "a1"), None),  # the same
        (("a1", "a"), None),
        (("a1",), None),
    ],
)
def test_axis_from_names(stems, expected):
    assert axis_of(names(*stems)) == expected


def test_axis_given():
    files = names("one", "two")
    assert axis_of(files, (1.0, 1.35), "guidance") == Axis(label="guidance", places=(1.0, 1.35))
    assert axis_of(files, (1.0, 1.35)) == Axis(label="x", places=(1.0, 1.35))
    assert axis_of(names("a1", "a2"), (), "guidance") == Axis(label="guidance", places=(1.0, 2.0))
    with pytest.raises(ValueError, match="--x has 3 values for 2 files"):
        axis_of(files, (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"finite numbers, got 1.0 nan"):
        axis_of(files, (1.0, float("nan")))


def test_table():
    assert format_table(ROWS, AXIS).splitlines() == [
        "samples       number   cfg       FID         IS",
        "a-cfg1.0.npz  50,000     1   13.2500    91.5000",
        "a-cfg1.5.npz  50,000   1.5    2.5000*  250.0000",
        "a-cfg2.0.npz   1,000     2    4.7500   310.0000*",
    ]
    assert format_table(ROWS[:1]).splitlines() == [
        "samples       number       FID        IS",
        "a-cfg1.0.npz  50,000   13.2500   91.5000",
    ]


def test_record(tmp_path):
    save_record(tmp_path / "out.json", ROWS, AXIS, {"reference": "r.npz"})
    content = json.loads((tmp_path / "out.json").read_text())
    assert (content["reference"], content["x_label"], len(content["samples"])) == ("r.npz", "cfg", 3)
    assert content["samples"][1] == {"file": "a-cfg1.5.npz", "count": 50000, "x": 1.5, "fid": 2.5, "is": 250.0}
    save_record(tmp_path / "out.json", ROWS, None, {})
    assert "x" not in json.loads((tmp_path / "out.json").read_text())["samples"][0]


@pytest.mark.parametrize("axis", [AXIS, None])
def test_plot(tmp_path, axis):
    save_plot(tmp_path / "out.png", ROWS, axis)
    with Image.open(tmp_path / "out.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > pixels.shape[0] > 300
    assert (np.abs(pixels.astype(int) - [0, 114, 178]).sum(-1) < 20).sum() > 100  # something is drawn
