"""`python -m erdfast.train`: train a diffusion transformer; without options, the handwritten digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from erdfast import cli, presets
from erdfast.config import TrainConfig
from erdfast.models.flops import training_memory
from erdfast.training.precision import resolve_precision
from erdfast.training.setup import check_attention, describe_network, network_config, open_data


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    config = cli.parse_train(argv)
    config.validate()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve(config, device)
    if config.dry_run:
        print(dry_run(config))
        return 0
    from erdfast.training.run_directory import create_run_directory, lock_run, save_run_config
    from erdfast.training.trainer import Trainer

    if config.resume is None:
        print(f"recipe {config.recipe}: {_summary(config)}")
    dataset = open_data(config)
    print(describe_network(config, dataset))
    print(f"data: {dataset.describe()}")
    check_attention(network_config(config, dataset), resolve_precision(config.precision, device).dtype, device)
    run = create_run_directory(config) if config.resume is None else config.resume
    with lock_run(run):
        trainer = Trainer(config, dataset, run, device)
        if config.resume is not None:
            trainer.restore()
            if trainer.step > config.steps:
                raise ValueError(
                    f"{run} is at step {trainer.step:,} already; --steps {config.steps:,} cannot undo that"
                )
            save_run_config(run, config)
            print(f"resuming {run} at step {trainer.step:,} of {config.steps:,}")
        signal = trainer.train()
        if signal is not None:
            print(
                f"{signal} at step {trainer.step:,}: state saved; continue with python -m erdfast.train --resume {run}"
            )
            return 0
        print(f"summary: {trainer.finish()}")
    _evaluate(config, run)
    return 0


def resolve(config: TrainConfig, device: torch.device) -> TrainConfig:
    """Decide what was left open: the data and the precision.

    Raises:
        ValueError: an unknown model, or a precision that the device does not have.
    """
    shape = "x".join(map(str, presets.model_config(config.model).input_shape))
    precision = resolve_precision(config.precision, device).name
    if config.data is None:
        print(f"no --data: training on the embedded Gaussian mixture, {shape}")
    data = "mixture" if config.data is None else config.data
    if data not in ("", "digits", "mixture") and Path(data).exists():
        data = str(Path(data).resolve())  # a resumed run may start from another folder
    return dataclasses.replace(config, data=data, precision=precision)


def dry_run(config: TrainConfig) -> str:
    """What a run would cost: parameters, operations, memory."""
    network = presets.model_config(config.model)
    micro = config.batch_size // config.accumulation
    memory = training_memory(network, micro, config.precision)
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in memory._asdict().items())
    return "\n".join(
        [
            describe_network(config),
            f"recipe {config.recipe}: {_summary(config)}",
            f"memory for {micro} images at a time in {config.precision}: {memory.total / 2**30:.2f} GiB ({parts})",
            f"checkpoint: {(memory.parameters + memory.optimizer + memory.ema) / 2**30:.2f} GiB each, "
            f"{config.keep_last} kept",
        ]
    )


def _summary(config: TrainConfig) -> str:
    process, optimizer = config.process, config.optimizer
    return (
        f"{process.schedule} schedule, {process.target} target, {process.weighting} weighting; "
        f"batch {config.batch_size}, lr {optimizer.lr:g} {optimizer.lr_schedule}, "
        f"betas {optimizer.betas}, EMA {optimizer.ema_decay}, "
        f"{config.steps:,} steps, {config.precision}, seed {config.seed}"
    )


def _evaluate(config: TrainConfig, run: Path) -> None:
    """The digits have a measure of their own; it takes less than a minute."""
    if config.data == "digits":
        from erdfast import evaluate

        evaluate.main(["--run", str(run)])


if __name__ == "__main__":
    cli.run(main, "erdfast.train")
