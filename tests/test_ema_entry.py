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
from tests.runs import tiny_trainer, words

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
    out = run / "model-std0.080.safetensors"
    assert out.exists()
    assert "the profile within" in capsys.readouterr().out
    assert sample.main([*words("--num 2 --steps 2 --run"), str(run), "--weights", str(out)]) == 0
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
        ("--std 0.05 --step 2000000", "too far off"),
    ],
)
def test_bad_input(finished, arguments, message):
    with pytest.raises(ValueError, match=message):
        entry.main([*words(arguments), "--run", str(finished[0])])


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
