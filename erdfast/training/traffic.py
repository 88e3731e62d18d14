"""What GPUs send one another in a step, how long that takes, and how much of it computing hides. A model.

Bytes that each of N GPUs sends, on S GPUs per machine and M machines, for P parameters; a ring passes (N - 1)/N of a
tensor once to gather or to reduce it:

    ddp     reduce: 2 (N-1)/N * g P                         g = 4, or 2 with ddp_bf16
    fsdp    gather: (N-1)/N * w P, in forward and again in backward of every micro-batch    w = 2 (bf16), 4 (fp32)
            reduce: (N-1)/N * 4 P
    hsdp    gather: (S-1)/S * w P, within the machine
            reduce: (S-1)/S * 4 P within the machine, and 2 (M-1)/M * 4 P/S across machines

Gradients are reduced once a step, after the last micro-batch. A ring over several machines enters and leaves each
machine once, and the machine's S network cards share that: each card carries 1/S of what a GPU sends. NVLink and
network work at the same time, so the slower of the two counts.

What is hidden: L blocks are communicated one after the other, each while another is computed, so that of a pass that
computes for c seconds and communicates for t seconds

    max(t/L, t - c (L-1)/L)

remain: the first gather or the last reduction has nothing to hide behind.

Latency is what NCCL's own cost model says (src/graph/tuning.cc, protocol LL128): rings pass N - 1 GPUs one after the
other, once per block under fsdp and hsdp; ddp's gradients go through a tree over the machines, bucket by bucket.

Not in it: the multiprocessors that communication takes from computing, jitter between GPUs, a network that is shared.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .gpus import GPUS_PER_MACHINE, Gpu

LINK_SHARE = 0.8
"""Of a link's data sheet that is assumed to arrive. An assumption: this project has measured no links."""


BASE_S, RING_NVLINK_S, RING_NETWORK_S, TREE_NVLINK_S, TREE_NETWORK_S = 14e-6, 1.9e-6, 4.0e-6, 1.25e-6, 8.5e-6
"""NCCL's latencies: of every collective, and of each hop."""
BUCKET_BYTES = 25 << 20
"""Gradients that DistributedDataParallel sends at a time, in float32: its default."""


class Sent(NamedTuple):
    """By each GPU."""

    nvlink: float
    """Bytes."""
    network: float
    """Bytes, by the GPU's own network card."""
    latency_s: float

    def seconds(self, gpu: Gpu) -> float:
        """Latency, and how long the slower of the two links takes."""
        nvlink_s = self.nvlink / (LINK_SHARE * gpu.nvlink_bytes_per_s)
        return self.latency_s + max(nvlink_s, self.network / (LINK_SHARE * gpu.network_bytes_per_s))


class Traffic(NamedTuple):
    """Of one training step, by each GPU."""

    gather: Sent
    """Weights: in forward and again in backward of every micro-batch."""
    reduce: Sent
    """Gradients: in backward of the last micro-batch."""

    def total(self, accumulation: int = 1) -> Sent:
        """All of a step of so many micro-batches."""
        passes = 2 * accumulation
        return Sent(*(passes * gather + reduce for gather, reduce in zip(self.gather, self.reduce, strict=True)))


class Pass(NamedTuple):
    """Seconds that one micro-batch computes."""

    forward_s: float
    backward_s: float


_NOTHING = Sent(0.0, 0.0, 0.0)


def check_gpus(gpus: int) -> None:
    """Raise ValueError unless they fill one machine partly or several wholly."""
    if gpus < 1 or (gpus > GPUS_PER_MACHINE and gpus % GPUS_PER_MACHINE):
        raise ValueError(
            f"gpus is {gpus}; it must be 1 to {GPUS_PER_MACHINE} or a multiple of {GPUS_PER_MACHINE}: "
            f"machines of {GPUS_PER_MACHINE} are assumed"
        )


def modes_for(gpus: int) -> tuple[str, ...]:
    """Ways to share the work among so many GPUs, the one that needs the most memory first."""
    check_gpus(gpus)
    if gpus == 1:
        return ("none",)
    return ("ddp", "fsdp") if gpus <= GPUS_PER_MACHINE else ("ddp", "hsdp", "fsdp")


def step_traffic(
    mode: str, parameters: int, blocks: int, gpus: int, *, weight_bytes: int = 2, gradient_bytes: int = 4
) -> Traffic:
    """What each GPU sends.

    Args:
        mode: one of `modes_for(gpus)`.
        parameters: of the network.
        blocks: of the network, the units that fsdp and hsdp gather and reduce.
        gpus: all of them; above 8, in machines of 8.
        weight_bytes: of a gathered weight.
        gradient_bytes: of a gradient under ddp (fsdp and hsdp reduce in float32).

    Raises:
        ValueError: a mode that this number of GPUs does not have, or an impossible number.
    """
    if mode not in modes_for(gpus):
        raise ValueError(f"parallel {mode} does not suit {gpus} GPUs; choose from {', '.join(modes_for(gpus))}")
    local = min(gpus, GPUS_PER_MACHINE)
    machines = gpus // local
    if mode == "ddp":
        buckets = math.ceil(4 * parameters / BUCKET_BYTES)
        sent = 2 * (gpus - 1) / gpus * gradient_bytes * parameters
        return Traffic(_NOTHING, Sent(sent, _card(sent, machines), buckets * _tree_s(local, machines)))
    if mode == "fsdp":
        return Traffic(*(_ring(size * parameters, blocks, gpus, machines) for size in (weight_bytes, 4)))
    if mode == "hsdp":
        gather, reduce = (_ring(size * parameters, blocks, local, 1) for size in (weight_bytes, 4))
        across = 2 * (machines - 1) / machines * 4 * parameters / local
        return Traffic(gather, Sent(reduce.nvlink, across, reduce.latency_s + blocks * _tree_s(1, machines)))
    return Traffic(_NOTHING, _NOTHING)


def _ring(size: float, messages: int, gpus: int, machines: int) -> Sent:
    """`size` bytes in so many messages, each passed around once."""
    sent = (gpus - 1) / gpus * size
    latency_s = BASE_S + (gpus - machines) * RING_NVLINK_S + (machines - 1) * RING_NETWORK_S
    return Sent(sent, _card(sent, machines), messages * latency_s)


def _card(sent: float, machines: int) -> float:
    """Bytes of a network card, of what each GPU sends in a ring."""
    return sent / GPUS_PER_MACHINE if machines > 1 else 0.0


def _tree_s(local: int, machines: int) -> float:
    """Latency of a sum over machines of `local` GPUs: up the tree, and down again."""
    return BASE_S + 2 * ((local - 1) * TREE_NVLINK_S + math.ceil(math.log2(machines)) * TREE_NETWORK_S)


def exposed_s(traffic: Traffic, gpu: Gpu, one: Pass, *, blocks: int, accumulation: int = 1) -> float:
    """Seconds of a step in which GPUs wait for one another.

    Args:
        one: what a micro-batch computes.
        blocks: of the network, the units in which is communicated.
        accumulation: micro-batches of a step.
    """
    gather_s, reduce_s = traffic.gather.seconds(gpu), traffic.reduce.seconds(gpu)
    forward = _waiting(gather_s, one.forward_s, blocks)
    backward = _waiting(gather_s, one.backward_s, blocks)
    last = _waiting(gather_s + reduce_s, one.backward_s, blocks)
    return accumulation * forward + (accumulation - 1) * backward + last


def _waiting(communication_s: float, compute_s: float, blocks: int) -> float:
    return max(communication_s / blocks, communication_s - compute_s * (blocks - 1) / blocks)
