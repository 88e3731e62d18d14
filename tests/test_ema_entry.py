"""Snapshots of power-function averages, and averages of other widths made of them afterwards."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors.torch import load_file, save_file

from erdfast import ema as entry
from erdfast import evaluate, sample
from erdfast.training import snapshots
from erdfast.training.snapshots import combine, list_snapshots, reconstruct
from tests.runs import all_tensors, assert_same_bits, tiny_trainer, words

STEPS = 48


def trained(run, **options):
    trainer = tiny_trainer(run, steps=STEPS, checkpoint_every=STEPS, **options)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "powers"
    return run, trained(run, ema_std=(0.05, 0.1), ema_snapshot_every=4)


def test_snapshots_are_the_averages(finished):
    run, trainer = finished
    found = list_snapshots(run)
    assert [(s.step, s.std) for s in found] == [(n, std) for n in range(4, STEPS + 1, 4) for std in (0.05, 0.1)]
    assert sorted(path.name for path in (run / "ema").iterdir())[0] == "00000004-std0.050.safetensors"
    last = load_file(found[-1].path)
    for name, value in trainer.ema.snapshot(1).items():
        assert torch.equal(last[name], value)


def test_how_often_there_are_snapshots_does_not_change_a_run(finished, tmp_path):
    trained(tmp_path / "other", ema_std=(0.05, 0.1), ema_snapshot_every=30)
    assert_same_bits(all_tensors(finished[0]), all_tensors(tmp_path / "other"))


def test_an_average_of_another_width_is_the_one_that_would_have_been_kept(finished, tmp_path):
    run, _ = finished
    direct = trained(tmp_path / "direct", ema_std=(0.07,))
    wanted = direct.ema.snapshot(0)
    made = reconstruct(combine(list_snapshots(run), STEPS, 0.07))
    moved = {name: value - finished[1].ema.snapshot(1)[name] for name, value in wanted.items()}
    assert made.keys() == wanted.keys()
    missed = sum(float((made[name] - value).square().sum()) for name, value in wanted.items()) ** 0.5
    distance = sum(float(value.square().sum()) for value in moved.values()) ** 0.5
    assert missed < 0.1 * distance  # to the average of width 0.1


def test_at_an_earlier_step(finished):
    run, _ = finished
    combination = combine(list_snapshots(run), 24, 0.1)
    assert combination.error < 1e-6
    assert max(s.step for s in combination.snapshots) == 24
    made = reconstruct(combination)
    kept = load_file(run / "ema" / "00000024-std0.100.safetensors")
    for name, value in kept.items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)


def test_the_command_and_what_samples_from_it(finished, capsys):
    run, _ = finished
    assert entry.main([*words("--std 0.08 --run"), str(run)]) == 0
    out = run / "model-std0.08-step00000048.safetensors"
    assert out.exists()
    assert "the profile within" in capsys.readouterr().out
    assert sample.main([*words("--num 2 --steps 2 --run"), str(run), "--weights", str(out)]) == 0
    assert entry.main([*words("--std 0.08 --run"), str(run)]) == 0  # what it wrote, it replaces
    assert entry.main([*words("--std 0.0812345 --step 40 --run"), str(run)]) == 0
    assert (run / "model-std0.0812345-step00000040.safetensors").exists()
    assert entry.main(["--run", str(run)]) == 0
    assert "width 0.05: 12 snapshots, steps 4 to 48" in capsys.readouterr().out
    with pytest.raises(ValueError, match="only runs on digits"):
        evaluate.main(["--run", str(run), "--weights", str(out)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--std 0.3", r"std is 0.3; it must be in \[0.01, 0.25\]"),
        ("--std 0.1 --step 3", "no snapshot is from step 3 or before"),
        ("--std 0.1 --step 0", "step is 0; it must be at least 1"),
        ("--std 0.1 --out weights.pt", r"must end in .safetensors"),
        ("--std 0.1 --step 5000000000", r"step is 5000000000; it must be at least 1 and below 2\^32"),
        ("--std 0.05 --step 2000000", "too far off"),
        ("--std 0.01", r"the profile within 4\d\.\d\d%: too far off"),
    ],
)
def test_bad_input(finished, arguments, message):
    with pytest.raises(ValueError, match=message):
        entry.main([*words(arguments), "--run", str(finished[0])])


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoints/00000048/model.safetensors", "a.safetensors"])
def test_other_files_are_not_replaced(finished, name):
    run, trainer = finished
    trainer.finish()
    (run / "a.safetensors").write_text("no tensors")
    before = (run / name).read_bytes()
    with pytest.raises(ValueError, match=rf"{name} was not written by erdfast\.ema and is not replaced"):
        entry.main([*words("--std 0.08 --run"), str(run), "--out", str(run / name)])
    assert (run / name).read_bytes() == before


def test_snapshots_are_not_replaced(finished, tmp_path):
    run, _ = finished
    with pytest.raises(ValueError, match="lies among the snapshots of"):
        entry.main([*words("--std 0.08 --run"), str(run), "--out", str(run / "ema" / "new.safetensors")])
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((run / "ema" / "00000004-std0.050.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"was not written by erdfast\.ema"):
        entry.main([*words("--std 0.08 --run"), str(run), "--out", str(copy)])


@pytest.mark.parametrize(
    ("notes", "reason"),
    [
        ({"step": "0", "std": "0.05"}, "its step is 0; it must be at least 1"),
        ({"step": "-4", "std": "0.05"}, "its step is -4"),
        ({"step": "1" * 400, "std": "0.05"}, "its step is 1111"),
        ({"step": "4", "std": "0.3"}, r"its width is 0\.3; it must be in \[0\.01, 0\.25\]"),
        ({"step": "4", "std": "nan"}, "its width is nan"),
        ({"step": "4"}, "no 'std' in its header"),
        ({"step": "four", "std": "0.05"}, "invalid literal"),
    ],
)
def test_snapshots_of_no_step_or_width_are_named(tmp_path, notes, reason):
    (tmp_path / "ema").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "ema" / "00000004-std0.050.safetensors", metadata=notes)
    with pytest.raises(ValueError, match=rf"00000004-std0\.050\.safetensors is no snapshot of an average: {reason}"):
        entry.main([*words("--std 0.05 --run"), str(tmp_path)])


def test_a_snapshot_with_a_wrong_byte_is_named(tmp_path):
    path = snapshots.snapshot_path(tmp_path, 4, "std0.050")
    tensors = {"a": torch.arange(6.0), "none": torch.zeros(0), "number": torch.tensor(3.0)}
    snapshots.write_snapshot(path, tensors, 4, 0.05)
    made = reconstruct(combine(list_snapshots(tmp_path), 4, 0.05))
    assert made["a"].tolist() == pytest.approx(list(range(6)))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"std0\.050\.safetensors is damaged: it does not have the checksum"):
        reconstruct(combine(list_snapshots(tmp_path), 4, 0.05))
    save_file(tensors, path, metadata={"step": "4", "std": "0.05"})  # an older version wrote no checksum
    assert reconstruct(combine(list_snapshots(tmp_path), 4, 0.05)).keys() == tensors.keys()


def test_what_a_killed_process_left_goes_with_the_next_snapshot(tmp_path):
    path = snapshots.snapshot_path(tmp_path, 8, "std0.050")
    path.parent.mkdir()
    (path.parent / ".00000004-std0.050.safetensors.77.partial").write_bytes(b"half")
    (path.parent / "notes.partial").write_text("not ours")
    snapshots.write_snapshot(path, {"a": torch.zeros(1)}, 8, 0.05)
    assert sorted(left.name for left in path.parent.iterdir()) == [path.name, "notes.partial"]


def test_without_snapshots(tmp_path):
    with pytest.raises(ValueError, match="holds no snapshots: train with --ema-std"):
        entry.main([*words("--std 0.1 --run"), str(tmp_path)])


def test_damaged_and_foreign_files(tmp_path):
    folder = tmp_path / "ema"
    folder.mkdir()
    (folder / "00000001-std0.050.safetensors").write_bytes(b"no snapshot")
    with pytest.raises(ValueError, match=r"00000001-std0\.050\.safetensors is no snapshot"):
        list_snapshots(tmp_path)
    save_file({"a": torch.zeros(1)}, folder / "00000001-std0.050.safetensors")
    with pytest.raises(ValueError, match="is no snapshot of an average"):
        list_snapshots(tmp_path)
    snapshots.write_snapshot(snapshots.snapshot_path(tmp_path, 1, "std0.050"), {"a": torch.zeros(1)}, 1, 0.05)
    snapshots.write_snapshot(snapshots.snapshot_path(tmp_path, 2, "std0.050"), {"a": torch.zeros(2)}, 2, 0.05)
    with pytest.raises(ValueError, match="holds other parameters than"):
        reconstruct(combine(list_snapshots(tmp_path), 2, 0.05))


def test_weights_of_another_network(finished, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match=r"other.safetensors does not fit .*config.json"):
        sample.main([*words("--num 2 --steps 2 --run"), str(finished[0]), "--weights", str(other)])
    with pytest.raises(ValueError, match=r"--weights .*nowhere.safetensors cannot be read"):
        sample.main(
            [*words("--num 2 --steps 2 --run"), str(finished[0]), "--weights", str(tmp_path / "nowhere.safetensors")]
        )


def test_a_full_disk_does_not_end_a_run(tmp_path, monkeypatch):
    said = []

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(snapshots, "replace_tensors", full)
    trainer = tiny_trainer(tmp_path / "run", steps=4, ema_std=(0.1,), ema_snapshot_every=1)
    trainer.say = said.append
    trainer.train()
    assert trainer.step == 4
    assert [line for line in said if line.startswith("a snapshot of the averages could not be written")]
