import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from erdfast.training.figures import save_image_grid, save_summary, smooth

IMAGES = np.random.RandomState(0).randint(0, 256, (16, 8, 8, 1), dtype=np.uint8)


def records(count, **extra):
    found = []
    for step in range(1, count + 1):
        bins = [None if number == 3 else 1 / (step + number) for number in range(20)]
        found.append({"step": step, "loss": 1 / step, "loss_by_logsnr": bins, "count_by_logsnr": [5] * 20} | extra)
    return found


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def count_color(path, color):
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(pixels(path) - wanted).max(-1) < 8).sum())


BLUE, ORANGE = "#0072B2", "#D55E00"


def test_summary_shows_curves_floor_and_samples(tmp_path):
    floor = [(float(level), 0.01 * (level + 11)) for level in range(10, -11, -1)]
    save_summary(tmp_path / "with.png", records(40), IMAGES, title="a run", floor=floor)
    save_summary(tmp_path / "without.png", records(40), IMAGES, title="a run")
    image = pixels(tmp_path / "with.png")
    assert image.shape[1] > 1000
    assert count_color(tmp_path / "with.png", BLUE) > 500
    assert count_color(tmp_path / "with.png", ORANGE) > 100
    assert (image != pixels(tmp_path / "without.png")).any()
    assert sorted(os.listdir(tmp_path)) == ["with.png", "without.png"]


@pytest.mark.parametrize(
    ("log", "images"),
    [
        ([], None),
        ([], IMAGES),
        (records(1), None),
        ([{"step": 1, "loss": None}], None),
        ([{"step": 1, "loss": 0.0}, {"step": 2, "loss": -1.0}], IMAGES),
        ([{"step": 1, "loss": float("nan")}], None),
        ([{"step": 1, "loss": 1e-3}, {"step": 2, "loss": 1e3}], None),
        ([{"step": 4, "loss_by_logsnr": [None, 0.0], "logsnr_edges": [-1, 0, 1]}], IMAGES),
        ([{"step": 4, "loss_by_logsnr": [None] * 20, "count_by_logsnr": [0] * 20}], IMAGES),
    ],
)
def test_summary_of_what_little_there_is(tmp_path, log, images):
    save_summary(tmp_path / "s.png", log, images, title="little")
    assert pixels(tmp_path / "s.png").std() > 1


def test_lists_must_suit_the_edges(tmp_path):
    with pytest.raises(ValueError, match=r"3 edges of log-SNR need 2 losses and counts, got 20 and 20 \(step 1\)"):
        save_summary(tmp_path / "s.png", records(3, logsnr_edges=[-1, 0, 1]), None, title="bad")
    assert os.listdir(tmp_path) == []


def test_early_and_late_are_weighted_by_counts():
    from erdfast.training.figures import _early_and_late, _pool

    log = [
        {"step": 1, "loss_by_logsnr": [1.0, None], "count_by_logsnr": [3, 0], "logsnr_edges": [-1, 0, 1]},
        {"step": 2, "loss_by_logsnr": [5.0, 2.0], "count_by_logsnr": [1, 4], "logsnr_edges": [-1, 0, 1]},
    ]
    edges, means = _pool(log)
    assert (edges.tolist(), means.tolist()) == ([-1, 0, 1], [2.0, 2.0])
    early, late = _early_and_late(records(25))
    assert [record["step"] for record in early[0]] == [1, 2, 3]
    assert [record["step"] for record in late[0]] == [23, 24, 25]


def test_smoothing():
    values = np.array([1.0, 2.0, 6.0, 2.0, 1.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3.0, 10 / 3, 3.0, 1.5])
    np.testing.assert_array_equal(smooth(values, 1), values)
    np.testing.assert_allclose(smooth([4.0], 9), [4.0])
    np.testing.assert_allclose(smooth(np.ones(50), 7), np.ones(50))


def test_grid_is_exported_here_too(tmp_path):
    save_image_grid(tmp_path / "g.png", IMAGES, columns=4, row_labels=list("abcd"))
    assert pixels(tmp_path / "g.png").shape[0] > 4 * 64


def test_import_leaves_matplotlib_alone():
    code = "import sys, erdfast.training.figures; print(sorted({'matplotlib', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_global_state_of_pyplot(tmp_path):
    code = (
        "import sys; from erdfast.training.figures import save_summary; "
        f"save_summary({str(tmp_path / 's.png')!r}, [], None, title='t'); "
        "print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
