"""Saving and restoring a run through torch.distributed.checkpoint: in the background, by all processes, to any number.

PyTorch's own storage pickles its index. Its safetensors storage does not: every process writes its shards into a file
that says in its header where they belong, and reading needs nothing else. What lies on the disk: checkpoint_files.py.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from erdfast.tensor_files import checksum, save_tensors, settle_header, sync

from .checkpoint_files import (
    MODEL,
    OURS,
    STATE,
    finish,
    incomplete,
    named_checkpoints,
    read_numbers,
    remove_old,
    remove_partial,
    temporary_path,
    verify,
    write_numbers,
)
from .parallel import World

_UNREADABLE = (OSError, ValueError, SafetensorError, CheckpointException)


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time, in a thread; all processes call the same methods in the same order.

    Args:
        folder: where they go, each into a folder named by its step.
        keep_last: how many to keep.
        keep_every: those of every so many steps are never removed; 0 for none.
        world: the processes of the run.
    """

    def __init__(self, folder: Path, *, keep_last: int, keep_every: int = 0, world: World) -> None:
        self.folder, self.keep_last, self.keep_every, self.world = folder, keep_last, keep_every, world
        # A group of its own: what the thread says must not get between what the training loop says.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if self._group is None:  # it is meant so
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning
            )

    def save(
        self,
        step: int,
        state: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        numbers: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Copy everything to the host, and write it while training goes on.

        Args:
            step: optimiser steps done.
            state: what training continues from, DTensors or the same tensors in every process.
            model: averaged weights, whole, under the published names; the first process writes them.
            numbers: for state.json.
            wait: return when it is on the disk.

        Raises:
            OSError: the checkpoint before this, or with `wait` this one, could not be written.
        """
        self.wait()
        staged = _stage(_with_dimensions(state))
        whole = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.items()} if self._main else {}
        self._thread = threading.Thread(target=self._run, args=(step, staged, whole, dict(numbers)), daemon=False)
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: what was, could not be; in every process, if one failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def poll(self) -> None:
        """As `wait`, but returns at once while something is still being written."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    @property
    def _main(self) -> bool:
        return self.world.is_main

    def _run(self, step: int, state: dict[str, Tensor], model: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        try:
            self._write(step, state, model, numbers)
        except Exception as error:
            self._error = error

    def _write(self, step: int, state: dict[str, Tensor], model: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        target = self.folder / f"{step:08d}"
        temporary = temporary_path(target)
        try:
            self._together(step, lambda: self._begin(temporary) if self._main else None)
            self._together(step, lambda: self._write_state(temporary / STATE, state))
            sums = self._together(step, lambda: self._write_own(temporary, model))
            self._together(step, lambda: self._end(step, temporary, target, numbers, sums) if self._main else None)
        except OSError:
            if self._main:
                remove_partial(self.folder)
            raise
        if self._main:
            remove_old(self.folder, keep_last=self.keep_last, keep_every=self.keep_every)

    def _begin(self, temporary: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partial(self.folder)
        (temporary / STATE).mkdir(parents=True)

    def _write_state(self, folder: Path, state: dict[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)

    def _write_own(self, temporary: Path, model: dict[str, Tensor]) -> dict[str, int]:
        """What this process has written, flushed, with checksums; the first one adds the averaged weights."""
        own = f"shard-{self.world.rank + 1:05d}-"
        files = [file for file in sorted((temporary / STATE).iterdir()) if file.name.startswith(own)]
        for file in files:
            settle_header(file)
        if self._main:
            save_tensors(temporary / MODEL, model, OURS)
            files.append(temporary / MODEL)
        for file in files:
            file.chmod(0o644)
            sync(file)
        sync(temporary / STATE)
        return {str(file.relative_to(temporary)): checksum(file) for file in files}

    def _end(self, step: int, temporary: Path, target: Path, numbers: dict[str, Any], sums: dict[str, int]) -> None:
        write_numbers(temporary, step, numbers, sums)
        finish(temporary, target)

    def _together(self, step: int, work: Any) -> Any:
        """Its result (dicts of all processes joined), or an OSError in every process if it failed in one."""
        result, failure = None, ""
        try:
            result = work()
        except (OSError, SafetensorError, CheckpointException) as error:
            failure = f"{type(error).__name__}: {_innermost(error)}"
        if self._group is not None:
            outcomes: list[Any] = [None] * self.world.size
            dist.all_gather_object(outcomes, (result, failure), group=self._group)
            failure = next((failure for _, failure in outcomes if failure), "")
            if isinstance(result, dict):
                result = {name: value for part, _ in outcomes if part for name, value in part.items()}
        if failure:
            raise OSError(f"the checkpoint of step {step:,} in {self.folder} cannot be written: {failure}")
        return result


def choose_checkpoint(run: Path, world: World, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run whose files have their sizes and checksums, as the first process sees it.

    Args:
        run: the run directory.
        world: the processes that all call this.
        say: told of every newer one that is left out, and why.

    Returns:
        None where the run was interrupted before its first one.

    Raises:
        ValueError: there are only damaged ones.
    """

    def choose() -> str:
        reasons = []
        for path in reversed(named_checkpoints(run / "checkpoints")):
            reason = incomplete(path)
            try:
                if reason is None:
                    verify(path)
                    return str(path)
            except (OSError, ValueError) as error:
                reason = str(error)
            reasons.append(f"checkpoint {path} is left out: {reason}")
            say(reasons[-1])
        if reasons or (run / MODEL).exists():
            raise ValueError(
                "; ".join([f"{run} holds no complete checkpoint (looked in {run / 'checkpoints'})", *reasons])
            )
        say(f"{run} was interrupted before its first checkpoint: starting from step 0")
        return ""

    chosen = world.first(choose)
    return Path(chosen) if chosen else None


def load_into(path: Path, state: Mapping[str, Tensor], world: World, *, verified: bool = False) -> dict[str, Any]:
    """Fill tensors, or shards of DTensors, in place from a checkpoint of any number of processes.

    Args:
        path: the checkpoint's folder.
        state: as it was given to `save`; names that begin with "published/" are not looked for.
        world: the processes that all call this.
        verified: its checksums have just been compared.

    Returns:
        The content of state.json.

    Raises:
        ValueError: it is damaged, or of other tensors; names them.
    """
    wanted = {name: tensor for name, tensor in _with_dimensions(state).items() if not name.startswith("published/")}
    try:
        numbers = read_numbers(path)
        if not verified:
            world.first(lambda: verify(path))
        folder = path if numbers["format"] == 1 else path / STATE
        if numbers["format"] == 1:
            _load_format_1(path, wanted)
            return numbers
        reader = HuggingFaceStorageReader(str(folder))
        _check_names(path, wanted, reader.read_metadata())
        load(dict(wanted), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)
    except _UNREADABLE as error:
        raise ValueError(
            f"checkpoint {path} cannot be restored: {_innermost(error)}; "
            "remove that folder to continue from an older one"
        ) from error
    return numbers


def _check_names(path: Path, wanted: Mapping[str, Tensor], metadata: Metadata) -> None:
    found = {
        name: tuple(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("published/")
    }
    check_shapes({name: tuple(tensor.shape) for name, tensor in wanted.items()}, found)


def check_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError, with an example, unless names and shapes are the same."""
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{len(wrong)} tensors differ, such as {name} (here {_shape(wanted.get(name))}, "
            f"there {_shape(found.get(name))})"
        )


def _load_format_1(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """One process's state.safetensors and model.safetensors, with the names that they had."""
    from safetensors.torch import load_file

    old = load_file(path / "state.safetensors")
    found = {f"ema/model.{name}": value for name, value in load_file(path / MODEL).items()}
    for name, value in old.items():
        group, _, rest = name.partition("/")
        found[f"ema/{rest.replace('/', '.')}" if group == "ema" else name] = value
    averages = {name.split("/")[1] for name in wanted if name.startswith("ema/")}
    if len(averages) > 1:
        raise ValueError(f"it has one average of the weights, this run {len(averages)}")
    for name, tensor in wanted.items():
        group, _, rest = name.partition("/")
        key = f"ema/{rest.partition('/')[2]}" if group == "ema" else name
        if key not in found or found[key].numel() != tensor.numel():
            raise ValueError(f"it has no {key} of shape {tuple(tensor.shape)}")
        if hasattr(tensor, "full_tensor"):
            raise ValueError("it is of format 1, which is restored in one process or with parallel ddp")
        tensor.copy_(found[key].reshape(tensor.shape))


def _with_dimensions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Single numbers as views of one dimension: safetensors has no slices of a number."""
    return {name: tensor.reshape(1) if tensor.dim() == 0 else tensor for name, tensor in _detached(state).items()}


def _detached(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in state.items()}


def _stage(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy on the host, DTensors as DTensors."""
    stager = DefaultStager(StagingOptions(torch.cuda.is_available(), False, False, False))
    try:
        staged = stager.stage(state)
    finally:
        stager.close()
    assert isinstance(staged, dict)
    return staged


def _innermost(error: BaseException) -> str:
    """What went wrong, out of the exceptions of several processes."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
    return str(error)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"
