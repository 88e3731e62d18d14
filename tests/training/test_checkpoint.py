"""Checkpoints are complete or absent, whatever happens while they are written."""

import errno
import json
import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from erdfast.training.checkpoint import CheckpointWriter, load_into
from erdfast.training.checkpoint_files import (
    complete_checkpoints,
    find_newest,
    incomplete,
    newest_checkpoint,
    publish,
    read_model,
    read_numbers,
    read_tensors,
    verify,
)
from erdfast.training.parallel import World

ALONE = World(device=torch.device("cpu"))


def state(step: int) -> dict[str, torch.Tensor]:
    """Of several dtypes and shapes; the sevens are a number, an odd size and nothing at all."""
    return {
        "weights/a": torch.full((3, 2), float(step)),
        "weights/low": torch.full((7,), 1.5 * step, dtype=torch.bfloat16),
        "weights/ids": torch.arange(step, step + 7),
        "optimizer/a/step": torch.tensor(float(step)),
        "published/process.k": torch.tensor(0.5 * step),
    }


def save(folder: Path, step: int, keep_last: int = 2, keep_every: int = 0) -> Path:
    writer = CheckpointWriter(folder, keep_last=keep_last, keep_every=keep_every, world=ALONE)
    model = {"a": torch.full((3, 2), -float(step)).t()}  # not contiguous
    writer.save(step, state(step), model, {"scaler": {"scale": 0.1 + 0.2}}, wait=True)
    return folder / f"{step:08d}"


def assert_good(path: Path) -> None:
    step = int(path.name)
    found = {name: torch.full_like(value, 3) for name, value in state(step).items()}
    numbers = load_into(path, found, ALONE)
    assert (numbers["step"], numbers["scaler"]) == (step, {"scale": 0.1 + 0.2})
    for name, value in state(step).items():
        if not name.startswith("published/"):  # those are for others
            assert torch.equal(found[name], value), name
    assert torch.equal(read_model(path)["a"], torch.full((2, 3), -float(step)))
    assert read_tensors(path, "published/process.")["k"].tolist() == [0.5 * step]


def test_round_trip(tmp_path):
    path = save(tmp_path / "deep" / "checkpoints", 12)
    assert path.name == "00000012"
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "state", "state.json"]
    assert {file.stat().st_mode & 0o777 for file in path.rglob("*") if file.is_file()} == {0o644}
    assert_good(path)
    verify(path)


def test_equal_states_give_equal_bytes(tmp_path):
    first, second = (save(tmp_path / name, 3) for name in ("a", "b"))
    files = [file.relative_to(first) for file in first.rglob("*") if file.is_file()]
    assert len(files) == 3
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_training_goes_on_while_it_is_written(tmp_path):
    writer, tensors = CheckpointWriter(tmp_path, keep_last=2, world=ALONE), state(1)
    writer.save(1, tensors, {"a": tensors["weights/a"]}, {"scaler": {"scale": 0.1 + 0.2}})
    for tensor in tensors.values():
        tensor.zero_()  # the next step
    writer.wait()
    assert read_tensors(tmp_path / "00000001", "weights/")["a"].eq(1.0).all()
    assert read_model(tmp_path / "00000001")["a"].eq(1.0).all()


def test_only_the_newest_are_kept(tmp_path):
    for step in (8, 9, 10, 99_999_999, 100_000_000):  # the last has one digit more than the others
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["99999999", "100000000"]
    save(tmp_path, 100_000_001, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100000001"]


def test_some_are_kept_for_good(tmp_path):
    for step in range(1, 9):
        save(tmp_path, step, keep_last=1, keep_every=3)
    assert [int(path.name) for path in complete_checkpoints(tmp_path)] == [3, 6, 8]


def test_what_is_not_complete_is_not_a_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    shutil.copytree(folder / "00000001", folder / ".00000003.partial")
    shutil.copytree(folder / "00000001", folder / "00000004")
    (folder / "00000004" / "state.json").unlink()
    (folder / "notes").mkdir()
    assert newest_checkpoint(tmp_path).name == "00000001"
    path, (line,) = find_newest(tmp_path)
    assert path == folder / "00000001"
    assert re.search(r"00000004 is left out: .*state.json cannot be read", line)
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
        with pytest.raises(
            OSError, match=r"the checkpoint of step 2 in .* cannot be written: .*No space left on device"
        ):
            save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["00000001"]
    assert_good(tmp_path / "00000001")
    assert_good(save(tmp_path, 2))


def test_a_failure_in_the_background_is_said_once_and_the_next_save_works(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep_last=2, world=ALONE)

    def full(*_args, **_options):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        writer.save(1, state(1), {"a": torch.zeros(1)}, {})
        with pytest.raises(OSError, match=r"step 1 .*cannot write .*model\.safetensors: I/O error: No space left"):
            writer.wait()
    writer.wait()
    writer.save(2, state(2), {"a": torch.zeros(1)}, {}, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["00000002"]


def test_other_tensors_are_refused(tmp_path):
    path = save(tmp_path, 5)
    other = state(5) | {"weights/a": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"1 tensors differ, such as weights/a \(here 2x3, there 3x2\)"):
        load_into(path, other, ALONE)
    del other["weights/a"]
    with pytest.raises(ValueError, match=r"weights/a \(here absent, there 3x2\)"):
        load_into(path, other, ALONE)


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
        safetensors.torch.save_file = deadly(safetensors.torch.save_file)
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
        ("state.json", b"{", "state.json cannot be read"),
        ("state.json", b"\xff\xfe", "state.json cannot be read"),
        ("state.json", b"[]", "is of no format that is known here"),
        ("state.json", b'{"format": 3, "step": 5}', "is of no format that is known here"),
        ("state.json", b'{"format": 2}', "says that it is of step None"),
        ("state.json", b'{"format": 2, "step": 6}', "says that it is of step 6"),
        ("state/shard-00001-model-00001-of-00001.safetensors", b"\xff" * 100, "does not have the checksum"),
        ("model.safetensors", b"text", "does not have the checksum"),
    ],
)
def test_damage_is_named(tmp_path, file, content, message):
    path = save(tmp_path, 5)
    (path / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"checkpoint .*00000005 .*{message}"):
        load_into(path, state(5), ALONE)


ENTRY = {"bytes": 1, "crc32": 1}
EDITS = [
    ({"files": None}, '"files" is missing; it must say bytes and crc32 of every file'),
    ({"files": {}}, '"files" is {}'),
    ({"files": [1]}, r'"files" is \[1\]'),
    ({"files": {"model.safetensors": 5}}, "model.safetensors has 5 for bytes and crc32"),
    ({"files": {"model.safetensors": {"bytes": 1}}}, "both must be whole numbers, at least 0"),
    ({"files": {"model.safetensors": {"bytes": -1, "crc32": 1}}}, "both must be whole numbers"),
    ({"files": {"model.safetensors": {"bytes": 1, "crc32": True}}}, "both must be whole numbers"),
    ({"files": {"model.safetensors": {"bytes": 1, "crc32": "1"}}}, "both must be whole numbers"),
    ({"step": True}, "says that it is of step True"),
    ({"format": True}, "is of no format that is known here"),
    ({"format": [2]}, "is of no format that is known here"),
    ({"scaler": 3}, '"scaler" is 3; it must be an object'),
    ({"health": []}, r'"health" is \[\]; it must be an object'),
    ({"health": {"skipped": "many"}}, "\"skipped\" is 'many'; it must be two whole numbers"),
]


@pytest.mark.parametrize(("edit", "message"), EDITS, ids=[str(edit) for edit, _ in EDITS])
def test_numbers_edited_by_hand_are_named(tmp_path, edit, message):
    path = save(tmp_path / "checkpoints", 1)
    numbers = json.loads((path / "state.json").read_text()) | edit
    (path / "state.json").write_text(json.dumps({name: value for name, value in numbers.items() if value is not None}))
    with pytest.raises(ValueError, match=rf"checkpoint .*00000001 .*state\.json .*{message}"):
        load_into(path, state(1), ALONE)
    with pytest.raises(ValueError, match=rf"00000001 is left out: .*{message}"):
        newest_checkpoint(tmp_path)


def test_files_that_lack_an_entry_or_entries_that_lack_a_file(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    numbers = json.loads((path / "state.json").read_text())
    (shard,) = [name for name in numbers["files"] if name.startswith("state/")]
    entry = numbers["files"][shard]
    for files, reason in (
        ({shard: entry}, "model.safetensors is not listed in state.json"),
        ({"model.safetensors": numbers["files"]["model.safetensors"]}, f"{shard} is not listed in state.json"),
        (numbers["files"] | {"state/more.safetensors": ENTRY}, "state/more.safetensors is missing"),
        (numbers["files"] | {"../../notes": ENTRY}, "../../notes is missing"),
    ):
        (path / "state.json").write_text(json.dumps(numbers | {"files": files}))
        assert incomplete(path) == reason


@pytest.mark.parametrize("name", ["state/extra.safetensors", "state.safetensors"])
def test_a_shard_too_many_is_not_read(tmp_path, name):
    path = save(tmp_path, 1)
    save_file({"weights/a": torch.zeros(3, 2)}, path / name)
    assert incomplete(path) == f"{name} is not listed in state.json"
    with pytest.raises(ValueError, match=f"{name} is not listed in state.json"):
        load_into(path, state(1), ALONE)


def test_deeply_nested_numbers(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    (path / "state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"state\.json cannot be read: .*recursion"):
        newest_checkpoint(tmp_path)


def test_a_folder_whose_name_is_no_number(tmp_path):
    save(tmp_path / "checkpoints", 1)
    for name in ("3²", "4x", "٣"):
        shutil.copytree(tmp_path / "checkpoints" / "00000001", tmp_path / "checkpoints" / name)
    assert newest_checkpoint(tmp_path).name == "00000001"
    save(tmp_path / "checkpoints", 5)
    with pytest.raises(ValueError, match="says that it is of step 1"):
        read_numbers(tmp_path / "checkpoints" / "3²")


@pytest.mark.parametrize("version", [3, "2b", 2.5])
def test_what_a_newer_version_wrote_is_never_removed(tmp_path, version):
    path = save(tmp_path, 5)
    numbers = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(numbers | {"format": version}))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(OSError, match=r"step 5 .* cannot be written: .*state\.json is of format .*move .*00000005"):
        save(tmp_path, 5)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["00000005"]
    assert_good(save(tmp_path, 6))
    assert path.exists()


def test_a_pickle_in_the_folder_is_never_opened(tmp_path):
    path = save(tmp_path, 5)
    (path / "state" / ".metadata").write_bytes(pickle.dumps(Explosive()))
    (path / "state" / "more.pt").write_bytes(pickle.dumps(Explosive()))
    assert_good(path)


class Explosive:
    """Fails the test when it is unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


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
