"""`python -m erdfast.evaluate`: measure a run. For digits: Frechet distance in pixel space, label accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from erdfast import cli
from erdfast.atomic import write_text
from erdfast.config import EvaluateConfig
from erdfast.evaluation.digits import digits_report
from erdfast.published_run import open_run
from erdfast.sampling import sample


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    config = cli.parse(EvaluateConfig, argv)
    config.validate()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = open_run(config.run, config.precision, device, config.weights)
    if run.config.data != "digits":
        raise ValueError(f"{config.run} was trained on {run.config.data}; only runs on digits can be evaluated so far")

    def draw(labels: Tensor, cfg_scale: float) -> Tensor:
        return sample(
            run.model,
            run.process,
            num=len(labels),
            labels=labels,
            cfg_scale=cfg_scale,
            steps=config.steps,
            seed=config.seed,
            batch_size=config.batch_size,
            autocast_dtype=run.precision.autocast_dtype,
        )

    report = digits_report(draw)
    result = {"step": run.step, "sampler_steps": config.steps, "seed": config.seed, **dataclasses.asdict(report)}
    write_text(config.run / "evaluation.json", json.dumps(result, indent=2) + "\n")
    print(
        f"label accuracy {100 * report.label_accuracy:.1f}% "
        f"({report.num_guided} samples, guidance {report.cfg_scale:g}); "
        f"Frechet distance {report.frechet_distance:.3f} ({report.num_unguided:,} samples; "
        f"two halves of the real digits: {report.frechet_distance_real_halves:.3f})"
    )
    return 0


if __name__ == "__main__":
    cli.run(main, "erdfast.evaluate")
