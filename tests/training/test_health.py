"""What is done about losses and gradients that are not finite, and about a loss that jumps."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from erdfast.training.checkpoint_files import complete_step, newest_checkpoint, read_numbers
from erdfast.training.health import MOST_SKIPPED, Health, NonFiniteError
from erdfast.training.metrics import read_metrics
from erdfast.training.parallel import World
from erdfast.training.trainer import Trainer
from tests.runs import all_tensors, assert_same_bits, tiny_trainer

ALONE = World(device=torch.device("cpu"))


def nowhere() -> str:
    return "there is no checkpoint yet"


# ---------------------------------------------------------------------- gradients that are not finite


def spoil(trainer: Trainer, *steps: int, value: float = math.nan) -> None:
    """Put a number that is not finite into a gradient of these steps, from 0; the loss stays as it is."""
    micro_batch, last = trainer._micro_batch, list(trainer.parameters.values())[-1]

    def spoilt(*arguments: Any) -> Any:
        result = micro_batch(*arguments)
        if trainer.step in steps:
            assert last.grad is not None
            last.grad.view(-1)[-1] = value
        return result

    trainer._micro_batch = spoilt


def contents(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights, moments and step counters."""
    found = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    for name, parameter in trainer.parameters.items():
        found |= {f"{name}/{key}": value.clone() for key, value in trainer.optimizer.state[parameter].items()}
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_skipped_step_changes_neither_weights_nor_moments(tmp_path, value, clip):
    trainer = tiny_trainer(tmp_path, steps=10, on_nonfinite="skip", grad_clip=clip, ema_decay=(0.75,), lr=1e-2)
    spoil(trainer, 2, value=value)
    for _ in range(2):
        trainer._train_step()
    before, averages = contents(trainer), trainer.ema.snapshot(0)
    expected = {name: 0.75 * average + 0.25 * before[name] for name, average in averages.items()}
    trainer._train_step()
    assert trainer.step == 3
    assert_same_bits(contents(trainer), before)
    assert all(float(state["step"]) == 2 for state in trainer.optimizer.state.values())
    # Averages go on, over the weights as they are: what they weigh is counted in steps.
    for name, average in trainer.ema.snapshot(0).items():
        torch.testing.assert_close(average, expected[name])
    trainer._train_step()
    after = contents(trainer)
    assert all(not torch.equal(after[name], before[name]) for name in trainer.parameters)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())


def test_skipped_steps_are_counted_also_by_the_run_that_continues(tmp_path):
    options: dict[str, Any] = {"steps": 6, "on_nonfinite": "skip", "log_every": 2, "checkpoint_every": 4}
    trainer = tiny_trainer(tmp_path, **options)
    spoil(trainer, 1, 4)
    trainer.train()
    assert [record["skipped_steps"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2]
    again = tiny_trainer(tmp_path, **dict(options, steps=8))
    again.restore()
    spoil(again, 7)
    again.train()
    assert [record["skipped_steps"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 1, 2, 3]
    path = newest_checkpoint(tmp_path) / "state.json"
    numbers = json.loads(path.read_text())
    del numbers["health"]  # as older versions wrote it
    path.write_text(json.dumps(numbers))
    older = tiny_trainer(tmp_path, **options)
    older.restore()
    assert older.health.read(nowhere).skipped == 0


def test_as_many_as_that_in_a_row_stop_the_run(tmp_path):
    options: dict[str, Any] = {"steps": 100, "on_nonfinite": "skip", "log_every": 1, "checkpoint_every": 3}
    trainer = tiny_trainer(tmp_path, **options)
    spoil(trainer, *range(2, 2 + MOST_SKIPPED - 1), *range(50, 100))
    with pytest.raises(
        NonFiniteError, match=rf"{MOST_SKIPPED} gradients in a row were not finite; the newest checkpoint is of step 72"
    ):
        trainer.train()
    assert trainer.step == 50 + MOST_SKIPPED  # one fewer, earlier, did not
    assert complete_step(tmp_path) == 72
    assert read_numbers(newest_checkpoint(tmp_path))["health"] == {"skipped": [2 * MOST_SKIPPED - 4, 22]}
    assert all(bool(torch.isfinite(value).all()) for value in all_tensors(tmp_path).values())


def test_to_skip_what_never_happens_changes_nothing(tmp_path):
    tiny_trainer(tmp_path / "stop", steps=4).train()
    tiny_trainer(tmp_path / "skip", steps=4, on_nonfinite="skip").train()
    assert_same_bits(all_tensors(tmp_path / "skip"), all_tensors(tmp_path / "stop"))


def test_by_default_such_a_gradient_stops_the_run(tmp_path):
    """The update spoils the weights, and neither a log line nor a checkpoint lets that pass."""
    quick: dict[str, Any] = {"steps": 20, "checkpoint_every": 2}
    for name, options in {"logged": {"log_every": 1}, "saved": {"log_every": 100, "checkpoint_every": 1}}.items():
        trainer = tiny_trainer(tmp_path / name, **dict(quick, **options))
        spoil(trainer, 4)
        with pytest.raises(NonFiniteError, match=r"not finite .*step [56].*; the newest checkpoint is of step 4\. Try"):
            trainer.train()
        assert complete_step(tmp_path / name) == 4


# ---------------------------------------------------------------------- a loss that jumps


def logged(health: Health, *losses: float) -> str | None:
    """What is said about these steps at their log line."""
    for loss in losses:
        health.add_step(torch.tensor(loss), None)
    return health.spike(health.read(nowhere))


def test_a_spike_is_said_once():
    health = Health(ALONE)
    assert logged(health, 9.0, 1.0) is None  # nothing is known before the first line
    assert logged(health, 5.0, 5.0) is None
    assert logged(health, 5.0, 14.9) is None  # three times the usual are no more than chance
    assert logged(health, 5.0, 60.0) == "loss spike: up to 60, where 5.495 was usual"
    assert logged(health, 5.0, 5.0) is None
    assert logged(health, 5.0, math.nan) is None  # that is told elsewhere


def test_spikes_of_a_run(tmp_path):
    for name, factor, expected in (("calm", 1.0, []), ("wild", 100.0, ["step 6: loss spike: up to "])):
        said: list[str] = []
        trainer = tiny_trainer(tmp_path / name, steps=10, log_every=2, stratified=True)
        trainer.say = said.append
        replica = trainer.replica

        def run(*arguments: Any, trainer=trainer, replica=replica, factor=factor) -> Any:
            result = replica(*arguments)
            return result._replace(loss=result.loss * factor) if trainer.step == 4 else result

        trainer.replica = run  # pyright: ignore[reportAttributeAccessIssue]  # called alone
        trainer.train()
        assert [line.partition("up to ")[0] + "up to " for line in said if "spike" in line] == expected
