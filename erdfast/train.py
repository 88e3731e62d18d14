"""`python -m erdfast.train`: train a diffusion transformer; without options, the handwritten digits.

Under torchrun all its processes train together: `torchrun --nproc-per-node 8 -m erdfast.train --model uvit_h2 ...`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from erdfast import cli, presets, recipes
from erdfast.config import TrainConfig
from erdfast.models.flops import training_memory
from erdfast.training.parallel import World, open_world
from erdfast.training.precision import resolve_precision
from erdfast.training.setup import check_attention, describe_network, network_config, open_data


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with open_world(device) as world:
        config = cli.parse_train(argv, lambda here: world.any(world.is_main and here))
        config.validate()
        if config.dry_run:
            if world.is_main:
                print(predict_run(config) if config.gpus else dry_run(resolve(config, device)))
            return 0
        run = _train(config, world)
    if run is not None and world.is_main:
        _evaluate(config, run)
    return 0


def _train(config: TrainConfig, world: World) -> Path | None:
    """The run directory, once the run is at its last step; None if a signal ended it before."""
    from erdfast.training.measures import open_measure
    from erdfast.training.metrics import import_wandb
    from erdfast.training.run_directory import create_run_directory, lock_run
    from erdfast.training.trainer import Trainer

    def say(line: str) -> None:
        if world.is_main:
            print(line, flush=True)

    config = resolve(config, world.device, say)
    if config.wandb is not None:
        import_wandb()
    if config.resume is None:
        say(describe_recipe(config))
    if config.process.target == "k2" and config.process.loss_space == "target":
        say("warning: the error of k2 in its own space is least at k0 = k1 = 0; choose --loss-space x0, eps, v or u")
    dataset = open_data(config)
    say(describe_network(config, dataset))
    say(f"data: {dataset.describe()}")
    check_attention(
        network_config(config, dataset), resolve_precision(config.precision, world.device).dtype, world.device
    )
    measure = open_measure(config, dataset, world, say)
    if config.resume is None:
        run = Path(world.first(lambda: create_run_directory(config)))
    else:
        run = config.resume
    with contextlib.ExitStack() as stack:
        world.first(lambda: stack.enter_context(lock_run(run)))
        trainer = Trainer(config, dataset, run, world, say=say, measure=measure)
        if config.resume is not None:
            _resume(trainer, config, run, say)
        say(f"{trainer.describe()}; run directory {run}")
        signal = trainer.train()
        if signal is not None:
            say(f"{signal} at step {trainer.step:,}: state saved; continue with python -m erdfast.train --resume {run}")
            return None
        say(f"summary: {trainer.finish()}")
    return run


def _resume(trainer, config: TrainConfig, run: Path, say) -> None:
    from erdfast.training.run_directory import save_run_config

    trainer.restore()
    if trainer.step > config.steps:
        raise ValueError(f"{run} is at step {trainer.step:,} already; --steps {config.steps:,} cannot undo that")
    if trainer.world.is_main:
        save_run_config(run, config)
    say(f"resuming {run} at step {trainer.step:,} of {config.steps:,}")


def resolve(config: TrainConfig, device: torch.device, say=print) -> TrainConfig:
    """Decide what was left open: the data and the precision.

    Raises:
        ValueError: an unknown model, or a precision that the device does not have.
    """
    shape = "x".join(map(str, presets.model_config(config.model).input_shape))
    precision = config.precision
    if precision == "auto" or not config.dry_run:  # what is only computed may be for a machine that is not here
        precision = resolve_precision(precision, device).name
    flip = config.flip
    if config.data is None:
        say(f"no --data: training on the embedded Gaussian mixture, {shape}{', without mirror images' if flip else ''}")
        flip = False  # recipes of pictures set it
    data = "mixture" if config.data is None else config.data
    if data not in ("", "digits", "mixture") and Path(data).exists():
        data = str(Path(data).resolve())  # a resumed run may start from another folder
    evaluation = config.evaluation.absolute()
    return dataclasses.replace(config, data=data, flip=flip, precision=precision, evaluation=evaluation)


def dry_run(config: TrainConfig) -> str:
    """What a run would cost: parameters, operations, memory."""
    network = presets.model_config(config.model)
    micro = config.batch_size // config.accumulation
    memory = training_memory(network, micro, config.precision, num_emas=config.ema.count)
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in memory._asdict().items())
    return "\n".join(
        [
            describe_network(config),
            describe_recipe(config),
            f"memory for {micro} images at a time in {config.precision}: {memory.total / 2**30:.2f} GiB ({parts})",
            f"checkpoint: {(memory.parameters + memory.optimizer + memory.ema) / 2**30:.2f} GiB each, "
            f"{config.keep_last} kept",
        ]
    )


def predict_run(config: TrainConfig) -> str:
    """What a run would cost on GPUs that are not here.

    Raises:
        ValueError: nothing fits, or the options do not go together.
    """
    from erdfast.training.predict import choose, render

    # All GPUs of the table have bf16, whatever this machine has.
    config = dataclasses.replace(config, precision="bf16" if config.precision == "auto" else config.precision)
    return "\n".join([describe_network(config), describe_recipe(config), render(config, choose(config))])


def describe_recipe(config: TrainConfig) -> str:
    """What runs, what the recipe set, what was changed of it (also for want of data), and the published result."""
    assert config.recipe is not None
    set_by_it, values = recipes.recipe(config.recipe), cli.flat_options(config)
    kept = [cli.as_flag(name, value) for name, value in set_by_it.items() if values[name] == value]
    changed = [cli.as_flag(name, values[name]) for name, value in set_by_it.items() if values[name] != value]
    lines = [f"recipe {config.recipe}: {_summary(config)}", f"recipe set: {' '.join(kept)}"]
    if changed:
        lines.append(f"changed: {' '.join(changed)}")
    if origin := recipes.origin(config.recipe):
        # A model without a recipe of its own borrows another's settings, not its result.
        whose = "" if values["model"] == set_by_it["model"] else f" for {set_by_it['model']}"
        lines.append(f"published{whose}: {origin}")
    return "\n".join(lines)


def _summary(config: TrainConfig) -> str:
    process, optimizer = config.process, config.optimizer
    of_k = "" if optimizer.k_lr is None else f" (k: {optimizer.k_lr:g})"
    return (
        f"{process.schedule} schedule, {process.target} target, {process.weighting} weighting; "
        f"batch {config.batch_size}, lr {optimizer.lr:g} {optimizer.lr_schedule}{of_k}, "
        f"betas {optimizer.betas}, EMA {config.ema.describe()}, "
        f"{config.steps:,} steps, {config.precision}, seed {config.seed}"
    )


def _evaluate(config: TrainConfig, run: Path) -> None:
    """The digits have a measure of their own; it takes less than a minute."""
    if config.data == "digits":
        from erdfast import evaluate

        evaluate.main(["--run", str(run)])


if __name__ == "__main__":
    cli.run(main, "erdfast.train")
