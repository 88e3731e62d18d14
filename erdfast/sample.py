"""`python -m erdfast.sample`: draw samples from a run's averaged weights, as a picture or an npz file.

Under torchrun the processes share the samples. An npz file that was interrupted goes on where it was.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from erdfast import cli
from erdfast.config import SampleConfig
from erdfast.data.images import save_image_grid
from erdfast.data.store import DTYPES
from erdfast.data.vae import Decoder, open_decoder
from erdfast.published_run import PublishedRun, open_published, open_run
from erdfast.sampling import ImageSampler, default_labels
from erdfast.sampling.drawing import ToPictures, draw_all, draw_parts
from erdfast.sampling.parts import Parts, begin_parts, is_made, rows_per_part
from erdfast.training.parallel import World, open_world
from erdfast.training.progress import progress_bar

SUFFIXES = (".png", ".npz")
MOST_COLUMNS = 20
"""With more classes than these, a grid is square and every picture has its class above it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build, run; returns the exit code."""
    config = cli.parse(SampleConfig, argv)
    config.validate()
    outs = _outs(config)
    _check_out(outs)
    with open_world(torch.device("cuda" if torch.cuda.is_available() else "cpu")) as world:
        job = _open(config, world)
        world.first(lambda: _make_folder(outs[0]))
        for scale, out in zip(config.cfg_scale, outs, strict=True):
            _draw(job, scale, out, world)
    return 0


POLL_S, PATIENCE_S = 0.2, 3600.0
"""Between looks at what other processes have written; and how long none of them may write anything."""


class _Job(NamedTuple):
    """What all guidance scales share."""

    config: SampleConfig
    run: PublishedRun
    decoder: Decoder | None
    labels: Tensor | None

    @property
    def to_pictures(self) -> ToPictures:
        return self.run.dataset.to_images if self.decoder is None else self.decoder.pictures

    def sampler(self, cfg_scale: float) -> ImageSampler:
        config = self.config
        return ImageSampler(
            self.run.model,
            self.run.process,
            cfg_scale=cfg_scale,
            interval=config.interval,
            steps=config.steps,
            sampler=config.sampler,
            level_set=config.level_set,
            seed=config.seed,
            batch_size=config.batch_size,
            autocast_dtype=self.run.precision.autocast_dtype,
            compile=config.compile,
            cuda_graph=config.cuda_graph,
        )

    def record(self, sampler: ImageSampler, cfg_scale: float) -> dict[str, Any]:
        """All that determines the pictures, for going on with the same."""
        config, process = self.config, self.run.config.process
        # What a published checkpoint is taken for is not in its weights; a run's are of one process.
        taken_for = {"schedule": process.schedule, "target": process.target} if config.run.is_file() else {}
        return taken_for | {
            "cfg_scale": cfg_scale,
            "interval": config.interval,
            "steps": config.steps,
            "sampler": sampler.name,
            "level_set": config.level_set,
            "classes": config.classes,
            "seed": config.seed,
            "precision": self.run.precision.name,
            "step": self.run.step,
            "weights": f"{_fingerprint(self.run.model, self.run.process):08x}",
            "vae": None if self.decoder is None else self.decoder.fingerprint,
            "latent_scale": config.latent_scale,
        }


def _open(config: SampleConfig, world: World) -> _Job:
    run = _open_source(config, world)
    labels = None
    if run.model.num_classes:
        labels = default_labels(config.num, run.model.num_classes, config.classes or None)
    elif config.classes:
        raise ValueError(f"--classes {config.classes}: {config.run} was trained without labels")
    decoder = None
    if config.vae is not None:
        dtype = DTYPES[config.vae_precision]
        decoder = open_decoder(config.vae, run.dataset, world.device, dtype, config.latent_scale)
    job = _Job(config, run, decoder, labels)
    for scale in config.cfg_scale:
        job.sampler(scale)  # what is impossible is noticed before the work
    return job


def _open_source(config: SampleConfig, world: World) -> PublishedRun:
    """A run directory, or a published checkpoint."""
    if not config.run.is_file():
        return open_run(config.run, config.precision, world.device, config.weights)
    return open_published(
        config.run,
        config.precision,
        world.device,
        family=config.family,
        model=config.model,
        schedule=config.schedule,
        target=config.target,
        say=lambda line: print(line, flush=True) if world.is_main else None,
    )


def _draw(job: _Job, cfg_scale: float, out: Path, world: World) -> None:
    """One file."""
    begun = time.monotonic()
    count = (_draw_npz if out.suffix == ".npz" else _draw_grid)(job, cfg_scale, out, world)
    speed = f"{count / (time.monotonic() - begun):,.1f} images/s" if count else "drawn before, as they are asked for"
    if world.is_main:
        print(f"{job.config.num:,} samples: {out} ({speed})", flush=True)


def _draw_npz(job: _Job, cfg_scale: float, out: Path, world: World) -> int:
    """Returns how many were drawn now, by all processes."""
    num, shape, sampler = job.config.num, _picture_shape(job), job.sampler(cfg_scale)
    record = job.record(sampler, cfg_scale) | {"num": num, "shape": shape} if world.is_main else {}
    if world.first(lambda: is_made(out, record)) == str(True):
        return 0
    rows = rows_per_part(num, shape, job.config.batch_size, world.size)
    parts = Parts(out, num, shape, int(world.first(lambda: begin_parts(out, rows, record))))
    if world.any(not parts.is_begun()):
        raise ValueError(f"--out {out}: not every process sees {parts.folder}; choose a place that all share")
    missing = json.loads(world.share_text(json.dumps(parts.missing())))
    world.barrier()  # before any process makes one of them
    sampler.batch_size = min(sampler.batch_size, parts.ranges[0][1])
    own = missing[world.rank :: world.size]
    done = there = num - parts.rows(missing)
    with _bar(job, cfg_scale, world, there) as bar:

        def advance(more: int) -> None:
            nonlocal done
            done += more
            others = set(missing) - set(own) - set(parts.missing()) if world.is_main else ()
            bar.update(done + parts.rows(others) - bar.n)

        draw_parts(parts, own, sampler, job.to_pictures, job.labels, advance)
        _wait_for_all(parts, bar)
    world.barrier()  # all have looked: now parts may go
    world.first(lambda: parts.merge(job.labels, record))
    return num - there


def _wait_for_all(parts: Parts, bar: tqdm) -> None:
    """Until every part is there. No barrier as yet: processes give one another up after half an hour."""
    left, seen = parts.missing(), time.monotonic()
    while left:
        time.sleep(POLL_S)
        before, left = left, parts.missing()
        if left != before:
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE_S:
            raise ValueError(
                f"{parts.path(left[0])}: no process has written it, or any other part, in {PATIENCE_S / 60:.0f} "
                "minutes: run the same command again"
            )
        bar.update(parts.num - parts.rows(left) - bar.n)
    bar.update(parts.num - bar.n)


def _draw_grid(job: _Job, cfg_scale: float, out: Path, world: World) -> int:
    """Returns how many were drawn."""
    num = job.config.num
    with _bar(job, cfg_scale, world) as bar:

        def advance(more: int) -> None:
            bar.update(min(more * world.size, num - bar.n))

        sampler = job.sampler(cfg_scale)
        sampler.batch_size = min(sampler.batch_size, math.ceil(num / world.size))
        pictures = draw_all(sampler, job.to_pictures, num, job.labels, world, advance)
    world.first(lambda: _save_grid(job, out, pictures))
    return num


def _save_grid(job: _Job, out: Path, pictures: np.ndarray) -> None:
    names = job.run.dataset.class_names
    if job.labels is None or len(names) < 2:
        save_image_grid(out, pictures)
        return
    columns = len(job.config.classes) or len(names)
    if 1 < columns <= MOST_COLUMNS:
        heads = [names[label] for label in (job.config.classes or range(columns))]
        save_image_grid(out, pictures, columns=columns, column_labels=heads)
    else:
        save_image_grid(out, pictures, captions=[names[label] for label in job.labels.tolist()])


def _bar(job: _Job, cfg_scale: float, world: World, initial: int = 0) -> tqdm:
    name = f"{job.run.name}, step {job.run.step:,}" if job.run.step else job.run.name
    if len(job.config.cfg_scale) > 1:
        name += f", cfg {cfg_scale:g}"
    # Not before it is known that arguments and files are good.
    return progress_bar(world, total=job.config.num, initial=initial, unit="image", desc=name, delay=0.5)


def _picture_shape(job: _Job) -> tuple[int, int, int]:
    """(H, W, C)."""
    latent = job.run.dataset.shape
    if job.decoder is not None:
        channels, height, width = job.decoder.shape(latent)
        return height, width, channels
    return job.to_pictures(torch.zeros(1, *latent)).shape[1:]


def _fingerprint(*modules: nn.Module) -> int:
    """CRC-32 of all weights."""
    value = 0
    for tensor in (tensor for module in modules for tensor in module.state_dict().values()):
        value = zlib.crc32(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value


# ---------------------------------------------------------------------- files


def _outs(config: SampleConfig) -> list[Path]:
    """One file per guidance scale: samples.npz, or samples-cfg1.npz, samples-cfg1.35.npz."""
    folder = config.run.parent if config.run.is_file() else config.run
    out = config.out or folder / "samples.png"
    if len(config.cfg_scale) == 1:
        return [out]
    return [out.with_name(f"{out.stem}-cfg{scale:g}{out.suffix}") for scale in config.cfg_scale]


def _check_out(outs: Sequence[Path]) -> None:
    if len(set(outs)) < len(outs):
        raise ValueError("cfg_scale has numbers that make the same file name: choose them farther apart")
    for out in outs:
        if out.suffix not in SUFFIXES:
            raise ValueError(f"--out {out} must end in {' or '.join(SUFFIXES)}")
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder")


def _make_folder(out: Path) -> None:
    """An impossible --out is noticed before the work, not after it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror or error}") from error


if __name__ == "__main__":
    cli.run(main, "erdfast.sample")
