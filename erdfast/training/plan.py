"""How the work of a step is divided and compiled: decided once, before a run."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

from erdfast.config import TrainConfig

from .parallel import World


def micro_batches(config: TrainConfig, world: World) -> list[tuple[int, int]]:
    """(offset, count) in the global batch of what this process takes in a step, part by part.

    Raises:
        ValueError: the batch cannot be divided so.
    """
    shares = world.size * config.accumulation
    count, rest = divmod(config.batch_size, shares)
    if rest:
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by {world.size} processes times accumulation "
            f"{config.accumulation}"
        )
    return [((part * world.size + world.rank) * count, count) for part in range(config.accumulation)]


def resolve_compile(asked: str, mode: str, device: torch.device) -> str:
    """`auto` becomes block on a GPU, none elsewhere.

    Raises:
        ValueError: one graph from data to loss is asked for where FSDP's hooks would break it.
    """
    if asked == "auto":
        return "block" if device.type == "cuda" else "none"
    if asked in ("full", "max-autotune") and mode in ("fsdp", "hsdp"):
        raise ValueError(f"compile {asked} makes one graph, which {mode} cannot gather weights in; choose block")
    return asked


def warm_cache(run: Path) -> None:
    """Keep what the compiler makes for this run, so that a restart finds it; a user's own choice stands.

    In the user's cache and not in the run directory: it is code that is executed, and run directories are passed on.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes seconds, and only compiling needs it

    # torch._dynamo puts its default there when it is imported, which is nobody's choice.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == os.path.abspath(default_cache_dir()):
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    folder = compiled_folder(run)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written: PyTorch's own folder, which the next start may not find
        return
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def compiled_folder(run: Path) -> Path:
    """Where the code that is compiled for a run is kept: by the run's path, in XDG_CACHE_HOME or ~/.cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "erdfast" / "compiled" / hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:16]
