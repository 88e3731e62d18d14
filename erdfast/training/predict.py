"""What a run on GPUs that are not here would need and take, and the options that fit. A model, not a measurement.

Memory of a GPU: `models.flops.training_memory`, with what fsdp and hsdp divide divided, and the activations that
recomputing still keeps. A run fits if that is no more than `MEMORY_SHARE` of the GPU.

Time of a step, the sum of

- operations at an assumed share of the GPU's bf16 peak (`gpus.Gpu.mfu`: the best published for a diffusion
  transformer), by a smaller part of the GPU where a micro-batch does not give each multiprocessor a tile of a product;
  fp8 is not assumed to be faster than bf16
- the optimiser's pass over the parameters, which does not shrink with the batch. The published share has one in it
  already: at 128 images per GPU it is thereby counted twice, 1% of the step
- the communication that is not hidden (`traffic`)

Launching kernels (all that counts for small networks), loading data, checkpoints, pictures and restarts are not in it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from erdfast import presets
from erdfast.config import TrainConfig
from erdfast.models import BackboneConfig
from erdfast.models.flops import (
    COMPUTE_BYTES,
    TrainingMemory,
    forward_flops,
    parameter_count,
    training_flops,
    training_memory,
)

from .gpus import GPUS, GPUS_PER_MACHINE, Gpu
from .parallel import MEMORY_SHARE
from .recompute import MODES as RECOMPUTE
from .traffic import LINK_SHARE, Pass, exposed_s, modes_for, step_traffic

STEPS = 400_000
"""Of the runs in the papers that these networks are compared in."""
EPOCHS, IMAGENET_IMAGES = 800, 1_281_167
"""Of the long runs, and images of ImageNet's training set."""
TILE = 128
"""Side of the part of a product that one multiprocessor computes: what cuBLAS mostly takes for bf16."""


class Plan(NamedTuple):
    """Options that do not change what is learnt."""

    parallel: str
    accumulation: int
    recompute: str

    def options(self) -> str:
        """As on the command line."""
        return f"--parallel {self.parallel} --accumulation {self.accumulation} --recompute {self.recompute}"


class Prediction(NamedTuple):
    """Of one plan."""

    plan: Plan
    images: int
    """Per GPU and micro-batch."""
    memory: TrainingMemory
    """Bytes per GPU."""
    step_s: float
    """Seconds of a step."""
    exposed_s: float
    """Of which GPUs wait for one another."""
    busy: float
    """Share of a GPU's multiprocessors that products occupy."""

    def hours(self, steps: float) -> float:
        """So many steps, without interruptions."""
        return steps * self.step_s / 3600


def memory_limit(gpu: Gpu) -> float:
    """Bytes that training may take; the rest is for workspaces, fragments and the allocator."""
    return MEMORY_SHARE * gpu.memory_bytes


def activation_bytes(network: BackboneConfig, images: int, precision: str, recompute: str) -> float:
    """What forward keeps, and what one block makes anew in backward.

    full keeps the blocks' inputs. selective also keeps the results of their matrix products and of attention.
    On a CPU, what is alive after a forward pass of a transformer is within 10% of it.

    Raises:
        ValueError: an unknown way.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"unknown recompute mode {recompute!r}; choose from {', '.join(RECOMPUTE)}")
    everything = training_memory(network, images, precision, num_emas=0).activations
    if recompute == "none":
        return everything
    cost = network.accounting()
    kept = (COMPUTE_BYTES[precision] if cost.low_stream else 4) * images * cost.block_inputs
    if recompute == "selective":
        kept += COMPUTE_BYTES[precision] * images * cost.block_products
    return kept + everything * (cost.unsaved_share or 1 / cost.blocks)


def memory_per_gpu(
    network: BackboneConfig, images: int, precision: str, plan: Plan, gpus: int, *, num_emas: int = 1
) -> TrainingMemory:
    """Bytes on each GPU.

    fsdp and hsdp divide parameters, gradients, moments and averages by the number of GPUs that share them; gathered
    are two blocks at a time, the one at work and the next, and one block has its gradients whole. With accumulation,
    FSDP2 keeps the gradients of all blocks whole, in float32, up to the last micro-batch.

    Args:
        images: per GPU and micro-batch.
        precision: "fp32", "bf16", "fp16" or "fp8".
        gpus: all of them.
        num_emas: averaged copies of the parameters.
    """
    memory = training_memory(network, images, precision, num_emas=num_emas)
    memory = memory._replace(activations=math.ceil(activation_bytes(network, images, precision, plan.recompute)))
    if plan.parallel not in ("fsdp", "hsdp"):
        return memory
    shards = gpus if plan.parallel == "fsdp" else min(gpus, GPUS_PER_MACHINE)
    block = math.ceil(parameter_count(network) / network.accounting().blocks) * COMPUTE_BYTES[precision]
    whole = memory.gradients if plan.accumulation > 1 else block
    return memory._replace(
        parameters=math.ceil(memory.parameters / shards),
        gradients=math.ceil(memory.gradients / shards) + whole,
        optimizer=math.ceil(memory.optimizer / shards),
        ema=math.ceil(memory.ema / shards),
        compute_weights=2 * block,
    )


def compute_pass(network: BackboneConfig, images: int, gpu: Gpu, precision: str, recompute: str) -> Pass:
    """Seconds that a micro-batch of `images` per GPU computes.

    Recomputing is in backward. full: one more forward. selective: reads and writes norms, residuals and the
    activation again, at the memory's full rate.
    """
    rate = busy_share(network, images, gpu) * assumed_flops_per_s(gpu, precision)
    forward_s = images * forward_flops(network) / rate
    again_s = {
        "none": 0.0,
        "selective": images * network.accounting().recomputed_bytes / gpu.bytes_per_s,
        "full": forward_s,
    }[recompute]
    return Pass(forward_s, images * training_flops(network) / rate - forward_s + again_s)


def busy_share(network: BackboneConfig, images: int, gpu: Gpu) -> float:
    """Of the multiprocessors: those with a tile of the smallest products, tokens times width."""
    tiles = images * network.accounting().smallest_product / TILE**2
    return min(1.0, tiles / gpu.multiprocessors)


def update_s(memory: TrainingMemory, gpu: Gpu) -> float:
    """The optimiser's pass: reads the gradients, reads and writes the rest, at the memory's full rate."""
    read_and_written = memory.parameters + memory.optimizer + memory.ema
    return (2 * read_and_written + memory.parameters) / gpu.bytes_per_s


def assumed_flops_per_s(gpu: Gpu, precision: str) -> float:
    """The share of the bf16 peak that is assumed; in fp32 no more than the peak of float32."""
    assumed = gpu.mfu * gpu.flops_per_s
    return min(assumed, gpu.fp32_flops_per_s) if precision == "fp32" else assumed


def predict(config: TrainConfig, plan: Plan) -> Prediction:
    """Memory and time of `config.gpus` GPUs with this plan; the precision is not left open."""
    network, gpu = presets.model_config(config.model), GPUS[config.device]
    images = config.batch_size // (config.gpus * plan.accumulation)
    one = compute_pass(network, images, gpu, config.precision, plan.recompute)
    traffic = step_traffic(
        plan.parallel,
        parameter_count(network),
        network.accounting().blocks,
        config.gpus,
        weight_bytes=COMPUTE_BYTES[config.precision],
        gradient_bytes=2 if config.ddp_bf16 else 4,
    )
    waiting = exposed_s(traffic, gpu, one, blocks=network.accounting().blocks, accumulation=plan.accumulation)
    memory = memory_per_gpu(network, images, config.precision, plan, config.gpus, num_emas=config.ema.count)
    step_s = plan.accumulation * sum(one) + waiting + update_s(memory, gpu)
    return Prediction(plan, images, memory, step_s, waiting, busy_share(network, images, gpu))


def choose(config: TrainConfig) -> Prediction:
    """The plan that fits: ddp before what divides the weights, as `--parallel auto` does, and of those the fastest.

    Of plans that are equally fast, the least accumulation. `--parallel` is kept if it is named; `--accumulation` and
    `--recompute` are where the search begins.

    Raises:
        ValueError: nothing fits, or the options do not go together.
    """
    tried: list[Prediction] = []
    for mode in _modes(config):
        plans = [Plan(mode, parts, recompute) for parts in _accumulations(config) for recompute in _recomputes(config)]
        predictions = [predict(config, plan) for plan in plans]
        fitting = [each for each in predictions if each.memory.total <= memory_limit(GPUS[config.device])]
        if fitting:
            # Rounded: sums of parts differ in their last bits.
            return min(fitting, key=lambda each: (round(each.step_s, 9), each.plan.accumulation))
        tried += predictions
    least = min(tried, key=lambda each: each.memory.total)
    raise ValueError(
        f"{config.model} does not fit on {config.gpus} {config.device}: it takes {_gib(least.memory.total)} GiB per "
        f"GPU at least ({least.plan.options()}), and training may fill {_gib(memory_limit(GPUS[config.device]))}; "
        "choose more GPUs or a smaller model"
    )


def _modes(config: TrainConfig) -> tuple[str, ...]:
    if config.precision == "fp8" and not GPUS[config.device].has_fp8:
        with_fp8 = ", ".join(gpu.name for gpu in GPUS.values() if gpu.has_fp8)
        raise ValueError(f"{config.device} has no precision fp8; choose bf16, or device {with_fp8}")
    modes, reason = modes_for(config.gpus), f"{config.gpus} GPUs"
    # What the trainer refuses: see check_graph, resolve_compile and the loss scale.
    for whole in (
        "cuda_graph" if config.cuda_graph else "",
        f"compile {config.compile}" if config.compile in ("full", "max-autotune") else "",
        "precision fp16" if config.precision == "fp16" else "",
    ):
        if whole:
            modes = tuple(mode for mode in modes if mode in ("none", "ddp"))
            reason += f" with {whole}"
    if config.parallel == "auto":
        return modes
    if config.parallel not in modes:
        raise ValueError(f"parallel {config.parallel} does not suit {reason}; choose from auto, {', '.join(modes)}")
    return (config.parallel,)


def _accumulations(config: TrainConfig) -> list[int]:
    """Multiples of what was asked for that divide the batch; validate() has seen to the first."""
    if config.cuda_graph and config.gpus > 1:
        return [config.accumulation]
    images = config.batch_size // (config.gpus * config.accumulation)
    small = [factor for factor in range(1, math.isqrt(images) + 1) if images % factor == 0]
    factors = sorted({*small, *(images // factor for factor in small)})
    return [config.accumulation * factor for factor in factors]


def _recomputes(config: TrainConfig) -> tuple[str, ...]:
    return RECOMPUTE[RECOMPUTE.index(config.recompute) :]


def render(config: TrainConfig, chosen: Prediction) -> str:
    """Lines for people: memory, time, what that rests on, and the options."""
    gpu, memory = GPUS[config.device], chosen.memory
    parts = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in memory._asdict().items())
    epochs = EPOCHS * IMAGENET_IMAGES / config.batch_size
    waiting = f", {1e3 * chosen.exposed_s:,.1f} of them waiting for other GPUs" if config.gpus > 1 else ""
    lines = [
        f"{config.gpus} x {gpu.name}: {chosen.images} images at a time in {config.precision} fit with "
        f"{_gib(memory.total)} of {_gib(memory_limit(gpu))} GiB per GPU ({parts})",
        f"predicted: {config.batch_size / chosen.step_s:,.0f} images/s, {1e3 * chosen.step_s:,.1f} ms a step{waiting}",
        f"predicted: {chosen.hours(STEPS):,.1f} hours for {STEPS:,} steps, {chosen.hours(epochs):,.1f} for {EPOCHS} "
        "epochs of ImageNet",
        f"model, not measured: {_assumption(gpu, config.precision, chosen.busy)}; no launches, no data loading",
    ]
    if config.gpus > 1:
        lines.append(
            f"model, not measured: links at {LINK_SHARE:.0%} of NVLink's {gpu.nvlink_bytes_per_s / 1e9:.0f} and the "
            f"network's {gpu.network_bytes_per_s / 1e9:.0f} GB/s per GPU, hidden block by block, NCCL's latencies; "
            "no jitter"
        )
    return "\n".join([*lines, f"options: {chosen.plan.options()} --precision {config.precision}"])


def _assumption(gpu: Gpu, precision: str, busy: float) -> str:
    text = f"products at {assumed_flops_per_s(gpu, precision) / 1e12:,.1f} TFLOP/s, "
    if assumed_flops_per_s(gpu, precision) < gpu.mfu * gpu.flops_per_s:
        text += "all that fp32 has by the data sheet"
    else:
        text += f"{gpu.mfu:.1%} of the data sheet's, the best published ({gpu.mfu_source})"
    return text if busy == 1 else f"{text}, on the {busy:.0%} of the multiprocessors that have work"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
