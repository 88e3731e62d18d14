"""Several processes, started by torchrun: who they are, how the network is split among them, and what they agree on.

    none    one process
    ddp     each has the whole network; gradients are summed while backward still runs
    fsdp    weights, gradients, optimiser state and averages split over all processes, block by block (FSDP2)
    hsdp    the same within a machine, whole copies of it across machines

The network itself knows nothing of this: `distribute` is applied from outside.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from erdfast.models import Backbone

from .precision import PrecisionPolicy

MODES = ("none", "ddp", "fsdp", "hsdp")
MEMORY_SHARE = 0.8
"""Of a device's memory that `auto` fills; the rest is for workspaces, fragments and the allocator."""
TIMEOUT = timedelta(minutes=30)
"""Longer than pictures or a checkpoint keep one process from the others."""


@dataclass(frozen=True, kw_only=True)
class World:
    """The processes of a run; one without a launcher is a world of one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes on this machine."""
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.size // self.local_size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is true in any process; all wait for all."""
        if self.size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(int(flag), device=self.device)))

    def barrier(self) -> None:
        """Wait for all."""
        if self.size > 1:
            self.all_reduce(torch.zeros((), device=self.device)).item()

    def first(self, work: Callable[[], object]) -> str:
        """`work` of the first process alone; its result as text in every process.

        Raises:
            ValueError: in every process, where it failed with a ValueError or an OSError.
        """
        if self.size == 1:
            return str(work())
        said = ""
        if self.is_main:
            try:
                said = f"done {work()}"
            except (ValueError, OSError) as error:
                said = f"failed {error}"
        outcome, _, text = self.share_text(said).partition(" ")
        if outcome == "failed":
            raise ValueError(text)
        return text

    def share_text(self, text: str) -> str:
        """What the first process says, in every process."""
        if self.size == 1:
            return text
        content = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        length = torch.tensor(content.numel(), device=self.device)
        dist.broadcast(length, 0)
        if not self.is_main:
            content = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        dist.broadcast(content, 0)
        return bytes(content.tolist()).decode()


GONE = "by peer"
"""Gloo's words where another process is no longer there: its connections are closed, or reset, by peer."""
MENDABLE = (ValueError, ImportError, OSError, ArithmeticError)
"""What users can mend: one line each, wherever it happens."""


_joined = False


def has_joined() -> bool:
    """Whether this process is or was one of several: Gloo's threads may still be there."""
    return _joined


@contextlib.contextmanager
def open_world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started; without it, a world of one. Leaves them at the end.

    An error that several of them meet alike, such as a bad option, stays one in the process that is first to say so;
    the others exit with code 2.

    Args:
        device: "cuda" or "cpu"; each process takes the GPU of its number on its machine.

    Raises:
        ValueError: more processes on a machine than it has GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield World(device=device) if size == 1 else _world(device)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; "
                "start torchrun with as many --nproc-per-node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Both: checkpoints and signals are agreed on between hosts, without a GPU that would have to wait.
    store, rank, size = next(dist.rendezvous("env://"))  # pyright: ignore[reportPrivateImportUsage]
    # torchrun's store outlives a restart: the addresses of processes that died must not be taken for the new ones'.
    own = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)  # pyright: ignore[reportPrivateImportUsage]
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT)
    global _joined
    _joined = True
    try:
        yield _world(device)
    except MENDABLE as error:
        if _said_before(own, error):
            raise SystemExit(2) from None
        raise
    except RuntimeError as error:
        if GONE not in str(error):
            raise
        sys.stderr.write(f"process {rank} ends, since another process did: see what that one said\n")
        raise SystemExit(1) from None
    finally:
        dist.destroy_process_group()


def _said_before(store: Any, error: Exception) -> bool:
    """Whether another process has met the same error; no, where there is nobody left to ask."""
    try:
        return store.add(f"error: {error}", 1) > 1
    except RuntimeError:
        return False


def _world(device: torch.device) -> World:
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size()))),
        device=device,
    )


def choose_mode(asked: str, world: World, memory_bytes: int) -> str:
    """`auto` becomes ddp where one device holds everything, the fastest for networks of this size; else fsdp or hsdp.

    Args:
        asked: auto or one of MODES.
        memory_bytes: what training takes on one device that holds everything.

    Raises:
        ValueError: unknown, or one that needs more processes than there are.
    """
    if asked != "auto" and asked not in MODES:
        raise ValueError(f"unknown parallel mode {asked!r}; choose from auto, {', '.join(MODES)}")
    if asked == "auto":
        if world.size == 1:
            return "none"
        if memory_bytes <= MEMORY_SHARE * _device_memory(world):
            return "ddp"
        return "hsdp" if world.nodes > 1 and world.local_size > 1 else "fsdp"
    if asked == "none" and world.size > 1:
        raise ValueError(
            f"parallel none is for one process, but torchrun started {world.size}; choose ddp, fsdp or auto"
        )
    if asked != "none" and world.size == 1:
        raise ValueError(
            f"parallel {asked} needs several processes: torchrun --nproc-per-node 2 -m erdfast.train; or choose auto"
        )
    if asked == "hsdp" and (world.nodes == 1 or world.local_size == 1):
        raise ValueError(
            f"parallel hsdp needs several machines of several processes, not {world.nodes} of {world.local_size}: "
            "choose fsdp or ddp"
        )
    return asked


def _device_memory(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / world.local_size


def shard(model: Backbone, mode: str, world: World, precision: PrecisionPolicy) -> None:
    """FSDP2, in place: each block a unit of its own, what is around them another. Nothing for the other modes.

    Blocks are gathered in the dtype of the matrix products, which autocast would cast them to anyway: half the traffic.
    What is around them stays float32, and with it the residual stream. Gradients are summed in float32.
    """
    if mode not in ("fsdp", "hsdp"):
        return
    shape, names = ((world.size,), ("shard",))
    if mode == "hsdp":
        shape, names = (world.nodes, world.local_size), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    # Blocks give gates and branches that are views (models/layers.py, Stream); nothing changes them in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    low = MixedPrecisionPolicy(
        param_dtype=precision.autocast_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks_for_sharding():
        fully_shard(block, mesh=mesh, mp_policy=low)
    fully_shard(model, mesh=mesh, mp_policy=full)


def replicate(step: nn.Module, mode: str, world: World, *, accumulation: int = 1, compress: bool = False) -> nn.Module:
    """The training step under DDP; itself for the other modes.

    Args:
        step: holds all that is trained; called once per micro-batch.
        accumulation: micro-batches of a step.
        compress: send gradients as bf16: half the traffic, a rounding of each process's gradient.
    """
    if mode != "ddp":
        return step
    # Buffers are equal from the start and stay so; the option that says it has another name from torch 2.13 on.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    no_buffers: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    wrapped = DistributedDataParallel(
        step,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        static_graph=accumulation == 1,  # its first backward pass must communicate
        **no_buffers,
    )
    if compress:
        wrapped.register_comm_hook(None, _send_as_bf16)
    return wrapped


def _send_as_bf16(_, bucket):  # DDP compares annotations with classes, and here they are text
    """GradBucket => the future of its mean over all processes. PyTorch's own hook refuses everything but NCCL."""
    gradient = bucket.buffer()
    sent = (gradient / dist.get_world_size()).to(torch.bfloat16)
    work = dist.all_reduce(sent, async_op=True)
    assert work is not None  # every process is in the group
    return work.get_future().then(lambda done: gradient.copy_(done.value()[0]))


@contextlib.contextmanager
def communicating(step: nn.Module, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: gradients travel between processes after the last one alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(step, DistributedDataParallel) and not last:
        with step.no_sync():
            yield
    else:
        yield


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Of parameters that FSDP does not know (learnable targets), which every process holds whole."""
    for parameter in parameters:
        if parameter.grad is not None:
            world.all_reduce(parameter.grad).div_(world.size)


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor as a whole tensor, in every process; any other tensor as it is. All processes must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]
