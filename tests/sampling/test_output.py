"""Labels in turn, and the npz file of ADM's evaluation."""

import errno
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from erdfast.atomic import atomic_write
from erdfast.sampling.output import default_labels, save_npz


def test_labels_come_equally_often() -> None:
    labels = default_labels(1003, 10)
    counts = labels.bincount(minlength=10)
    assert labels.dtype == torch.int64
    assert labels.shape == (1003,)
    assert int(counts.max() - counts.min()) == 1
    assert default_labels(5, 10, [7, 2]).tolist() == [7, 2, 7, 2, 7]
    assert default_labels(0, 3).tolist() == []


def test_bad_labels() -> None:
    with pytest.raises(ValueError, match=r"\[-1, 10\] are not within 0..9"):
        default_labels(5, 10, [10, 3, -1])
    with pytest.raises(ValueError, match="no classes"):
        default_labels(5, 0)
    with pytest.raises(ValueError, match="at least 0"):
        default_labels(-1, 10)


@pytest.mark.parametrize("channels", [1, 3])
def test_file(tmp_path: Path, channels: int) -> None:
    images = np.random.RandomState(0).randint(0, 256, (4, 5, 6, channels)).astype(np.uint8)
    path = save_npz(tmp_path / "new" / "samples.npz", images, torch.tensor([3, 1, 2, 0]))
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1"]
        assert archive["arr_0"].dtype == np.uint8
        assert archive["arr_0"].shape == (4, 5, 6, 3)
        assert np.array_equal(archive["arr_0"], np.broadcast_to(images, (4, 5, 6, 3)))
        assert archive["arr_1"].tolist() == [3, 1, 2, 0]
    assert [file.name for file in path.parent.iterdir()] == ["samples.npz"]


def test_file_without_labels(tmp_path: Path) -> None:
    path = save_npz(str(tmp_path / "samples.npz"), np.zeros((2, 4, 4, 3), np.uint8))
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_npz(tmp_path / "samples.npz", np.zeros((1, 4, 4, 3), np.uint8))
    before = path.read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_npz(path, np.ones((1, 4, 4, 3), np.uint8))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """The system says what is wrong with a write, but not where."""
    for error in (OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EFBIG, "File too large")):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / "a.npz"))), atomic_write(tmp_path / "a.npz"):
            raise error
    with pytest.raises(OSError, match="another"), atomic_write(tmp_path / "a.npz"):
        raise OSError(errno.EIO, "Input/output error", "another")
    assert not list(tmp_path.iterdir())


def test_bad_images(tmp_path: Path) -> None:
    for images in (np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8 NHWC"):
            save_npz(tmp_path / "x.npz", images)
    with pytest.raises(ValueError, match="2 images but labels of shape"):
        save_npz(tmp_path / "x.npz", np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64))
    assert not list(tmp_path.iterdir())


def test_labels_that_are_no_integers_are_refused(tmp_path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    for labels in ([1.7, float("nan")], [1.0, 2.0], ["a", "b"]):
        with pytest.raises(ValueError, match="labels must be integers"):
            save_npz(tmp_path / "a.npz", images, np.array(labels))
    assert not (tmp_path / "a.npz").exists()
    assert default_labels(3, 10, first=2**62 + 9).tolist() == [(2**62 + 9 + i) % 10 for i in range(3)]
