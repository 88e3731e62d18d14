"""Progress bars of a run: those of the first process."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from .parallel import World


def progress_bar(world: World, **options: Any) -> tqdm:
    """tqdm with these options, which shows nothing in other processes."""
    return tqdm(
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file needs few lines
        disable=not world.is_main,
        **options,
    )
