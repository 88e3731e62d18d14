"""Tiny runs for the tests: a trainer made by hand, and the entry points in this process or one of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from erdfast import cli, recipes
from erdfast.config import TrainConfig
from erdfast.data import Dataset
from erdfast.training.checkpoint_files import STATE, newest_checkpoint, read_model
from erdfast.training.parallel import World
from erdfast.training.run_directory import create_run_directory
from erdfast.training.setup import open_data
from erdfast.training.trainer import Trainer

ROOT = Path(__file__).parents[1]


def words(line: str) -> list[str]:
    """Arguments as they would be typed, without quotes."""
    return line.split()


TINY = words("--model uvit_tiny --data mixture:4x8x8 --batch-size 8 --precision fp32 --sample-every 0 --no-tensorboard")
"""Options of a run whose step takes milliseconds."""


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Two threads on such small tensors only wait for one another; and a run is then the same in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(**options) -> TrainConfig:
    """The same as options; any may be replaced by name."""
    own = {"data": "mixture:4x8x8", "batch_size": 8, "precision": "fp32", "sample_every": 0, "tensorboard": False}
    recipe = recipes.recipe("tiny_dit" if options.get("model") == "dit_tiny" else "tiny_uvit")
    return cli.with_options(TrainConfig(), recipe | own | options)


def tiny_trainer(run: Path, dataset: Dataset | None = None, **options) -> Trainer:
    """A trainer on the CPU with a run directory of its own, or in one that exists."""
    config = tiny_config(out=run, **options)
    config.validate()
    if not (run / "config.json").exists():
        create_run_directory(config)
    world = World(device=torch.device("cpu"))
    return Trainer(config, dataset or open_data(config), run, world, say=lambda _line: None)


def all_tensors(run: Path) -> dict[str, Tensor]:
    """Weights, moments and averages of the newest checkpoint, whole, however many processes wrote it."""
    checkpoint = newest_checkpoint(run)
    return _whole(checkpoint / STATE) | {f"model/{name}": value for name, value in read_model(checkpoint).items()}


def _whole(state: Path) -> dict[str, Tensor]:
    reader = HuggingFaceStorageReader(str(state))
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {name: torch.empty(e.size) for name, e in entries if isinstance(e, TensorStorageMetadata)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is one process
        load(tensors, storage_reader=HuggingFaceStorageReader(str(state)), no_dist=True)
    return tensors


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Equal names, and equal bits under every name."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different


def refused(
    capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int], arguments: Sequence[object]
) -> str:
    """Run an entry point that must end with code 2 and one line on stderr; returns the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(argument) for argument in arguments]), main.__module__)
    lines = capsys.readouterr().err.splitlines()
    assert (stop.value.code, len(lines)) == (2, 1), lines
    assert lines[0].startswith(f"{main.__module__}: error: ")
    return lines[0]


def start(arguments: Sequence[object], code: str = "", **options) -> subprocess.Popen[str]:
    """erdfast.train in a process of its own, on one thread; `code` runs before it."""
    program = f"{code}\nimport sys\nfrom erdfast import cli, train\ncli.run(train.main, 'erdfast.train')"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Wait for something that `process` does; fails if it ends before that."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)
