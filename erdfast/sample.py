"""`python -m erdfast.sample`: draw samples from a run's averaged weights, as a picture or an npz file."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tqdm import tqdm

from erdfast import cli
from erdfast.config import SampleConfig
from erdfast.data.images import save_image_grid
from erdfast.published_run import open_run
from erdfast.sampling import default_labels, sample, save_npz

SUFFIXES = (".png", ".npz")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    config = cli.parse(SampleConfig, argv)
    config.validate()
    out = config.out or config.run / "samples.png"
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out} must end in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = open_run(config.run, config.precision, device, config.weights)
    labels = None
    if run.model.num_classes:
        labels = default_labels(config.num, run.model.num_classes, config.classes or None)
    elif config.classes:
        raise ValueError(f"--classes {config.classes}: {config.run} was trained without labels")
    try:  # an impossible --out is noticed before the work, not after it
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error
    # The delay keeps the bar from being drawn when `sample` refuses an argument at once.
    with tqdm(total=config.num, unit="image", desc=f"{run.config.model}, step {run.step:,}", delay=0.2) as bar:

        def advance(done: int, _total: int) -> None:
            bar.update(done - bar.n)

        images = sample(
            run.model,
            run.process,
            num=config.num,
            labels=labels,
            cfg_scale=config.cfg_scale,
            interval=config.interval,
            steps=config.steps,
            sampler=config.sampler,
            level_set=config.level_set,
            seed=config.seed,
            batch_size=config.batch_size,
            autocast_dtype=run.precision.autocast_dtype,
            progress=advance,
        )
    pictures = run.dataset.to_images(images)
    if out.suffix == ".npz":
        save_npz(out, pictures, labels)
    else:
        chosen = len(config.classes) or run.model.num_classes
        save_image_grid(out, pictures, columns=chosen if 1 < chosen <= 20 else None)
    print(f"{config.num} samples: {out}")
    return 0


if __name__ == "__main__":
    cli.run(main, "erdfast.sample")
