from __future__ import annotations

import json
import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from erdfast import train
from erdfast.training.metrics import LOGSNR_EDGES, LossByLogsnr, MetricsWriter, read_metrics
from tests.runs import TINY, words


def test_every_record_is_on_disk_at_once(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": torch.tensor(0.5), "bins": np.array([1, 2]), "name": "a", "none": [None, 1.5]})
    assert read_metrics(path) == [{"step": 1, "loss": 0.5, "bins": [1, 2], "name": "a", "none": [None, 1.5]}]
    writer.write({"step": 2})
    assert len(path.read_text().splitlines()) == 2
    writer.close()
    writer.close()


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        writer.write({"step": 1, "loss": math.nan, "bins": torch.tensor([1.0, math.inf]), "more": {"x": -math.inf}})
    text = (tmp_path / "m.jsonl").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "step": 1,
        "loss": None,
        "bins": [1.0, None],
        "more": {"x": None},
    }


def test_a_torn_line_is_dropped_and_overwritten(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    with MetricsWriter(path) as writer:
        writer.write({"step": 3})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    path.write_text('{"st')  # nothing but a torn line
    with MetricsWriter(path) as writer:
        writer.write({"step": 1})
    assert read_metrics(path) == [{"step": 1}]


def test_damage_in_the_middle_is_reported(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2"):
        read_metrics(path)
    path.write_text("3\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        read_metrics(path)
    path.write_text('{"step": "x"}\n')
    with pytest.raises(ValueError, match="line 1: expected a whole number as step"):
        read_metrics(path)
    assert read_metrics(tmp_path / "missing.jsonl") == []


BAD_LINES = [b"nonsense", b"3", b"", b"\xff\xfe", b'{"step": null}', b'{"step": "x"}', b"[" * 100_000]


def test_lines_that_are_no_records_are_set_aside(tmp_path):
    path, aside = tmp_path / "m.jsonl", tmp_path / "m.jsonl.damaged"
    said: list[str] = []
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(BAD_LINES) + b'\n{"step": 2, "loss": 0.5}\n{"st')
    with MetricsWriter(path, say=said.append) as writer:
        assert writer.truncate_after(1) == 1
        writer.write({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert aside.read_bytes() == b"\n".join(BAD_LINES) + b"\n"
    assert said == [f"{path}: 7 lines that are no records were moved to {aside}"]

    path.write_bytes(path.read_bytes() + b"more\n")  # what was set aside before stays
    with MetricsWriter(path, say=said.append):
        pass
    assert aside.read_bytes() == b"\n".join([*BAD_LINES, b"more"]) + b"\n"
    assert said[1:] == [f"{path}: 1 line that is no record was moved to {aside}"]
    with MetricsWriter(path, say=said.append):
        pass
    assert len(said) == 2


def test_lines_are_nowhere_else_before_they_are_gone(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    path.write_text('nonsense\n{"step": 1}\n')

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            MetricsWriter(path)
    assert path.read_text() == 'nonsense\n{"step": 1}\n'


def test_resuming_forgets_later_steps(tmp_path):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        writer.write({"note": "start"})
        for step in range(1, 6):
            writer.write({"step": step})
        assert writer.truncate_after(9) == 0
        assert writer.truncate_after(3) == 2
        writer.write({"step": 4, "again": True})
    assert read_metrics(path) == [
        {"note": "start"},
        {"step": 1},
        {"step": 2},
        {"step": 3},
        {"step": 4, "again": True},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]  # no temporary file is left


def test_a_failed_rewrite_keeps_the_file(tmp_path, monkeypatch):
    path = tmp_path / "m.jsonl"
    with MetricsWriter(path) as writer:
        for step in range(4):
            writer.write({"step": step})

        def fail(*_):
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="disk full"):
            writer.truncate_after(1)
    assert len(read_metrics(path)) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.jsonl"]


def test_tensorboard_receives_the_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with MetricsWriter(tmp_path / "m.jsonl", tensorboard=tmp_path / "board") as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 1.0 / step, "note": "text", "list": [1], "flag": True})
        writer.truncate_after(1)
        writer.write({"step": 2, "loss": 7.0})
    board = accumulator.EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert board.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 7.0)]


def test_missing_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install erdfast\[logging\]"):
        MetricsWriter(tmp_path / "m.jsonl", tensorboard=tmp_path)


class Wandb(ModuleType):
    """Stands in for the package; remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.told: list[tuple[str, Any]] = []

    def init(self, **options: Any) -> Wandb:
        self.told.append(("init", options))
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.told.append(("log", (step, numbers)))

    def finish(self) -> None:
        self.told.append(("finish", None))


def test_wandb_receives_the_numbers(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = tmp_path / "run"
    with MetricsWriter(run / "m.jsonl", wandb="project") as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 1.0 / step, "bad": math.nan, "note": "text", "list": [1], "flag": True})
        writer.write({"note": "without a step"})
    where = {"project": "project", "name": "run", "id": "run", "dir": str(run), "resume": "allow"}
    assert wandb.told == [
        ("init", where),
        ("log", (1, {"loss": 1.0})),
        ("log", (2, {"loss": 0.5})),
        ("finish", None),
    ]


def test_wandb_follows_a_run_and_its_continuation(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    run = tmp_path / "run"
    assert train.main([*TINY, *words("--steps 3 --log-every 2 --wandb mine --out"), str(run)]) == 0
    assert [what for what, _ in wandb.told] == ["init", "log", "log", "finish"]
    assert [step for what, (step, _) in wandb.told[1:3]] == [2, 3]
    records = read_metrics(run / "metrics.jsonl")
    assert [numbers["loss"] for _, (_, numbers) in wandb.told[1:3]] == [record["loss"] for record in records]
    wandb.told.clear()
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0
    assert [what for what, _ in wandb.told] == ["init", "log", "finish"]
    assert (wandb.told[0][1]["project"], wandb.told[0][1]["id"]) == ("mine", "run")


def test_loss_by_logsnr_against_numpy():
    generator = torch.Generator().manual_seed(0)
    losses = LossByLogsnr()
    logsnr, mse = torch.randn(3, 50, generator=generator) * 8, torch.rand(3, 50, generator=generator)
    for step in range(3):
        losses.update(logsnr[step], mse[step])
    means, counts = losses.read_and_reset()
    which = np.clip(np.floor(logsnr.double().numpy().ravel()) + 10, 0, 19)  # open ends
    for number in range(20):
        chosen = mse.double().numpy().ravel()[which == number]
        assert counts[number] == len(chosen)
        if len(chosen):
            assert means[number] == pytest.approx(chosen.mean(), rel=1e-12)
        else:
            assert means[number] is None
    assert losses.read_and_reset() == ([None] * 20, [0] * 20)


def test_ends_are_open_and_nan_stays_in_its_bin():
    losses = LossByLogsnr((-1.0, 0.0, 1.0))
    logsnr = torch.tensor([-math.inf, -0.5, 0.5, 30.0, math.inf])
    losses.update(logsnr, torch.tensor([1.0, 3.0, math.nan, 1.0, 1.0]))
    means, counts = losses.read_and_reset()
    assert (means[0], counts) == (2.0, [2, 3])
    assert means[1] is not None
    assert math.isnan(means[1])
    assert len(LOGSNR_EDGES) == 21


def test_many_small_losses_are_summed_without_loss():
    losses = LossByLogsnr((-1.0, 1.0))
    for _ in range(1000):
        losses.update(torch.zeros(256), torch.full((256,), 0.1))
    means, counts = losses.read_and_reset()
    assert counts == [256_000]
    assert means[0] == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_processes_add_their_totals():
    parts = [LossByLogsnr((-1.0, 0.0, 1.0)) for _ in range(2)]
    parts[0].update(torch.tensor([-0.5]), torch.tensor([1.0]))
    parts[1].update(torch.tensor([-0.5, 0.5]), torch.tensor([3.0, 5.0]))
    other = parts[1].totals.clone()
    assert parts[0].read_and_reset(lambda totals: totals.add_(other)) == ([2.0, 5.0], [2, 1])


def test_update_needs_no_value_on_the_host():
    # On the meta device there are no values: any read of one raises, as a synchronisation would.
    losses = LossByLogsnr(device="meta")
    losses.update(torch.zeros(8, device="meta"), torch.zeros(8, device="meta", requires_grad=True))
    assert not losses.totals.requires_grad


def test_bad_edges():
    with pytest.raises(ValueError, match=r"increasing numbers, got \[1.0, 0.0\]"):
        LossByLogsnr((1.0, 0.0))
    with pytest.raises(ValueError, match="two or more"):
        LossByLogsnr((1.0,))
