"""Checkpoints are complete or absent, whatever happens while they are written."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erdfast.training import checkpoint
from erdfast.training.checkpoint import (
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    publish,
    save_checkpoint,
)


def save(folder: Path, step: int, keep_last: int = 2) -> Path:
    return save_checkpoint(
        folder,
        step,
        tensors={"weights/a": torch.full((3, 2), float(step)), "optimizer/a/step": torch.tensor(float(step))},
        model={"a": torch.full((3, 2), -float(step)).t()},  # not contiguous
        numbers={"scaler": {"scale": 0.1 + 0.2}},
        keep_last=keep_last,
    )


def assert_good(path: Path) -> None:
    found, step = load_checkpoint(path), int(path.name)
    assert found.step == step
    assert torch.equal(found.tensors["weights/a"], torch.full((3, 2), float(step)))
    assert torch.equal(found.model["a"], torch.full((2, 3), -float(step)))


def test_round_trip(tmp_path):
    path = save(tmp_path / "deep" / "checkpoints", 12)
    assert path.name == "00000012"
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "state.json", "state.safetensors"]
    assert_good(path)
    found = load_checkpoint(path)
    assert found.tensors["optimizer/a/step"].shape == ()
    assert found.numbers["scaler"] == {"scale": 0.1 + 0.2}


def test_only_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 99_999_999, 100_000_000):  # the last has one digit more than the others
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["99999999", "100000000"]
    save(tmp_path, 100_000_001, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100000001"]


def test_what_is_not_complete_is_not_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    shutil.copytree(folder / "00000001", folder / ".00000003.partial")
    shutil.copytree(folder / "00000001", folder / "00000004")
    (folder / "00000004" / "state.json").unlink()
    (folder / "notes").mkdir()
    assert newest_checkpoint(tmp_path).name == "00000001"
    save(folder, 4)  # replaces the damaged one
    assert_good(newest_checkpoint(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == ["00000001", "00000004", "notes"]


def test_none_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"holds no complete checkpoint \(looked in .*checkpoints\)"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "failing", ["os.fsync", "pathlib.Path.write_text", "pathlib.Path.rename", "pathlib.Path.mkdir"]
)
def test_a_full_disk_leaves_the_older_ones(tmp_path, monkeypatch, failing):
    save(tmp_path, 1)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(failing, full)
        with pytest.raises(OSError, match="No space left on device"):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert_good(tmp_path / "00000001")
    assert_good(save(tmp_path, 2))


def test_a_full_disk_that_safetensors_reports(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: I/O error: No space left"):
        save(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


EVENTS = ("os.fsync", "os.rename", "os.replace", "os.mkdir", "os.rmdir", "os.unlink", "os.open")


def die_at(event: int, folder: Path) -> int:
    """Save step 3 in a process that kills itself before its `event`-th system call on files; its exit status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        counted = 0

        def deadly(call):
            def wrapped(*args, **options):
                nonlocal counted
                counted += 1
                if counted == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return wrapped

        for name in EVENTS:
            setattr(os, name[3:], deadly(getattr(os, name[3:])))
        checkpoint.save_file = deadly(checkpoint.save_file)
        save(folder, 3)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_every_moment(tmp_path):
    """kill -9 before each system call of a save that also removes an old checkpoint."""
    seen = set()
    for event in range(1, 100):
        folder = tmp_path / str(event)
        save(folder, 1)
        save(folder, 2)
        status = die_at(event, folder)
        found = complete_checkpoints(folder)
        for path in found:
            assert_good(path)
        names = [path.name for path in found]
        assert names[-1] in ("00000002", "00000003")
        seen.add(tuple(names))
        assert all(path.name.startswith(".") for path in folder.iterdir() if path not in found)
        save(folder, 4)
        assert sorted(path.name for path in folder.iterdir()) == [names[-1], "00000004"]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        pytest.fail("the save never ended")
    assert event > 12  # so many moments were tried
    assert seen == {("00000001", "00000002"), ("00000001", "00000002", "00000003"), ("00000002", "00000003")}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("state.json", b"{", "cannot be read"),
        ("state.json", b"\xff\xfe", "cannot be read"),
        ("state.json", b"[]", "is not of format 1"),
        ("state.json", b'{"format": 2, "step": 5}', "is not of format 1"),
        ("state.json", b'{"format": 1}', "says that it is of step None"),
        ("state.json", b'{"format": 1, "step": 6}', "says that it is of step 6"),
        ("state.safetensors", b"", "cannot be read"),
        ("state.safetensors", b"\xff" * 100, "cannot be read"),
        ("model.safetensors", b"text", "cannot be read"),
    ],
)
def test_damage_is_named(tmp_path, file, content, message):
    path = save(tmp_path, 5)
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint .*00000005 {message}"):
        load_checkpoint(path)


def test_a_truncated_file_is_named(tmp_path):
    path = save(tmp_path, 5)
    whole = (path / "state.safetensors").read_bytes()
    (path / "state.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="00000005 cannot be read"):
        load_checkpoint(path)


def test_numbers_are_plain_json(tmp_path):
    assert json.loads((save(tmp_path, 5) / "state.json").read_text()) == {
        "format": 1,
        "step": 5,
        "scaler": {"scale": 0.1 + 0.2},
    }


def test_publishing_replaces_atomically(tmp_path, monkeypatch):
    run = tmp_path / "run"
    path = save(run / "checkpoints", 5)
    save_file({"old": torch.zeros(1)}, run / "model.safetensors")
    old = (run / "model.safetensors").read_bytes()

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in (["os.replace"], ["os.link", "os.fsync"]):  # without hard links it is copied
        with monkeypatch.context() as patch:
            for name in failing:
                patch.setattr(name, full)
            with pytest.raises(OSError, match="No space"):
                publish(path, run)
        assert (run / "model.safetensors").read_bytes() == old
    for failing in ([], ["os.link"]):
        (run / ".model.safetensors.partial").write_text("left by a crash")
        with monkeypatch.context() as patch:
            for name in failing:
                patch.setattr(name, full)
            published = publish(path, run)
        assert published.read_bytes() == (path / "model.safetensors").read_bytes()
        assert published.stat().st_mode & 0o777 == 0o644
        assert sorted(entry.name for entry in run.iterdir()) == ["checkpoints", "model.safetensors"]
    shutil.rmtree(path)  # pruned later
    assert load_file(published).keys() == {"a"}
