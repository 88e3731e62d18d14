"""`python -m erdfast.encode`: pictures to latents, or any readable data to our own format, which loads fastest.

Under torchrun the processes share the parts. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from erdfast import cli
from erdfast.data import FileDataset
from erdfast.data.convert import DTYPES, Plan, Writer, begin, finish, write_parts
from erdfast.data.dataset import Shape
from erdfast.data.store import read_manifest, verify
from erdfast.data.vae import Encoder
from erdfast.training.parallel import World, open_world


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode pictures into VAE latents, or convert data of any readable format, into a folder that loads fastest."""

    out: Path
    """Folder to write; where an interrupted run left it unfinished, it goes on."""
    data: Path | None = None
    """Folder of pictures (ImageFolder), zip or file; everything that erdfast.train reads, and U-ViT's features."""
    vae: Path | None = None
    """Folder of diffusers' AutoencoderKL (config.json and safetensors); nothing is downloaded."""
    convert: bool = False
    """Store what --data holds, without a VAE."""
    verify: bool = False
    """Only compare the checksums of the finished folder --out."""
    size: int | None = None
    """Side of the pictures in pixels: shorter side scaled to it, then the square in the middle. 256 with --vae; by
    default as stored with --convert."""
    flips: bool = True
    """Store mirror images of latents too, where they can be had: --flip then works in training."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Type of stored latents."""
    latent_scale: Literal["auto", "stored", "sd", "edm2"] = "auto"
    """auto: with --vae, pictures in [-1, 1] and the VAE's own factor; with --convert, what the format means. edm2:
    pictures in [0, 1], whitened to std 0.5."""
    batch_size: int = 64
    """Pictures at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which the VAE computes."""
    part_mib: int = 512
    """Size of a file, about; twice that is needed in memory."""

    def validate(self) -> None:
        """Raise ValueError for options that do not go together."""
        if self.verify:
            return
        if self.data is None:
            raise ValueError("--data is missing: what is to be encoded?")
        if self.convert == (self.vae is not None):
            raise ValueError("choose one of --vae FOLDER (pictures to latents) and --convert (as they are)")
        for name in ("size", "batch_size", "part_mib"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, then verify, or write what is missing; returns the exit code."""
    config = cli.parse(EncodeConfig, argv)
    config.validate()
    if config.verify:
        _verify(config.out)
        return 0
    with open_world(torch.device("cuda" if torch.cuda.is_available() else "cpu")) as world:
        write_folder(config.out, _writer(config, world), config.part_mib, world)
    return 0


def write_folder(out: Path, writer: Writer, part_mib: int, world: World) -> None:
    """Write what is missing of a folder in our own format; all processes call it.

    Args:
        out: the folder.
        writer: what belongs there.
        part_mib: size of a file, about.
        world: the processes.

    Raises:
        ValueError: the folder holds something else, or was begun with other options; a sample cannot be read.
        OSError: it cannot be written; a later call goes on.
    """
    plan = Plan(writer.manifest, part_mib << 20)
    complete = world.first(lambda: begin(out, writer, plan))
    if complete != str(True):
        _say(world, f"{writer.dataset.describe()} => {out}, parts: {len(plan.ranges)}")
        with _bar(writer, plan, world) as bar:
            write_parts(out, writer, plan, bar.update, rank=world.rank, size=world.size)
        world.barrier()
        world.first(lambda: finish(out, writer.manifest, plan).rows)
    if world.is_main:
        _say(world, f"complete: {FileDataset(out).describe()}")


def _writer(config: EncodeConfig, world: World) -> Writer:
    assert config.data is not None
    if config.convert:
        shape: Shape | None = None if config.size is None else (3, config.size, config.size)
        dataset = FileDataset(config.data, shape=shape, latent_scale=config.latent_scale, pickled=True)
        flips = config.flips and dataset.has_flips
        return Writer(dataset, dtype=config.dtype, flips=flips, batch=config.batch_size)
    assert config.vae is not None
    scale = "sd" if config.latent_scale == "auto" else config.latent_scale
    encoder = Encoder(config.vae, world.device, DTYPES[config.precision], scale)
    size = config.size or 256
    if size % encoder.factor:
        raise ValueError(f"size is {size}; it must be a multiple of {encoder.factor}, the VAE's pixels per latent")
    dataset = FileDataset(config.data, shape=(3, size, size))
    return Writer(dataset, dtype=config.dtype, encoder=encoder, flips=config.flips, batch=config.batch_size)


def _bar(writer: Writer, plan: Plan, world: World) -> tqdm:
    own = plan.ranges[world.rank :: world.size]
    total = sum(stop - start for start, stop in own)
    return tqdm(total=total, unit="images", dynamic_ncols=True, desc=writer.kind, disable=not world.is_main)


def _verify(folder: Path) -> None:
    manifest = read_manifest(folder)
    FileDataset(folder)  # sizes, shapes and labels
    with ThreadPoolExecutor(8) as pool, tqdm(total=len(manifest.parts), unit="part", disable=None) as bar:
        for _ in pool.map(lambda part: verify(folder, part), manifest.parts):
            bar.update()
    print(f"{folder}: {manifest.rows:,} rows, all checksums agree (parts: {len(manifest.parts)})")


def _say(world: World, line: str) -> None:
    if world.is_main:
        print(line, flush=True)


if __name__ == "__main__":
    cli.run(main, "erdfast.encode")
