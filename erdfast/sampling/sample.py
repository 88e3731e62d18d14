"""`sample`: from a trained model and its process to images, in batches, reproducibly."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from erdfast.philox import normal, scalar
from erdfast.sampling.guidance import FULL_INTERVAL, Guided, check_guidance
from erdfast.sampling.levels import check_whole, make_levels
from erdfast.sampling.output import default_labels
from erdfast.sampling.samplers import SAMPLERS, STATE_DTYPES

if TYPE_CHECKING:
    from erdfast.process import Process

SAMPLER_KINDS: dict[str, tuple[str, ...]] = {
    "discrete": ("edm_heun", "edm_euler"),
    "continuous": ("heun", "euler"),
}
"""Samplers that suit each kind of process; the first of each is its default."""


def initial_latents(seed: int, ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Standard normal starting points, a function of (seed, image id) alone.

    Args:
        seed: of the run, in 0..2^64-1.
        ids: (B,) int64 on the device wanted.
        shape: (C, H, W) of an image.

    Returns:
        (B, C, H, W) float64.
    """
    channels, height, width = shape
    flat = normal(scalar("seed", seed, 64, ids.device), 0, ids, channels * height * width, domain="latent")
    return flat.reshape(len(ids), channels, height, width)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode without gradients; afterwards every submodule is in its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def resolve_sampler(process: Process, sampler: str | None) -> str:
    """The name of the sampler, by default the best of the process's kind.

    Raises:
        ValueError: a name that does not exist or does not suit the process.
    """
    kind = "discrete" if process.schedule.discrete else "continuous"
    name = SAMPLER_KINDS[kind][0] if sampler is None else sampler
    if name not in SAMPLER_KINDS[kind]:
        raise ValueError(f"sampler {name!r} is not one of {list(SAMPLER_KINDS[kind])} for a {kind} process")
    return name


def _resolve_labels(
    num: int,
    first_id: int,
    num_classes: int,
    labels: Tensor | Sequence[int] | None,
    classes: Sequence[int] | None,
) -> Tensor | None:
    """(num,) int64 labels on the CPU, or None for an unconditional model."""
    check_whole("first_id", first_id, 0)
    if first_id + num > 2**63:
        raise ValueError(f"first_id must leave the last image below 2^63, got {first_id}")
    if labels is not None and classes is not None:
        raise ValueError("give labels (one per image) or classes (taken in turn), not both")
    if num_classes == 0:
        if labels is not None or classes is not None:
            raise ValueError("labels or classes were given, but the model is unconditional")
        return None
    if labels is None:
        return default_labels(num, num_classes, classes, first_id)
    y = torch.as_tensor(labels).cpu()
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise ValueError(f"labels must be integers, got {y.dtype}")
    y = y.to(torch.int64)
    if y.shape != (num,):
        raise ValueError(f"labels must have shape ({num},), got {tuple(y.shape)}")
    outside = y[(y < 0) | (y > num_classes)].unique().tolist()
    if outside:
        raise ValueError(f"labels {outside} are not within 0..{num_classes - 1} (or {num_classes}, no class)")
    return y


def sample(
    model: nn.Module,
    process: Process,
    *,
    num: int,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    cfg_scale: float = 1.0,
    steps: int = 50,
    sampler: str | None = None,
    level_set: str | None = None,
    interval: tuple[float, float] = FULL_INTERVAL,
    seed: int = 0,
    first_id: int = 0,
    batch_size: int = 256,
    state_dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draws images from a model: deterministic given the seed, image by image.

    Image i starts from noise that depends on (seed, first_id + i) alone. It is the same, up to the rounding
    of the network, whatever the batch size and however the images are divided over processes.

    Args:
        model: with attributes `input_shape` (C, H, W) and `num_classes`; a model whose class 0..num_classes-1
            labels have no null label beside them says so by an attribute `null_class = None`.
        process: what the model was trained under.
        num: number of images, at least 1.
        labels: (num,) in 0..num_classes (num_classes being the null class), or None.
        classes: instead of labels, the classes to take in turn; with neither, all classes in turn.
        cfg_scale, interval: see `Guided`.
        steps: N >= 1; Heun's samplers call the network 2N - 1 times.
        sampler: a name of SAMPLERS that suits the process (SAMPLER_KINDS); None: `edm_heun` or `heun`.
        level_set: a name of LEVEL_SETS for a discrete process; None: `edm`.
        seed: of the starting noise, in 0..2^64-1.
        first_id: number of the first image, for runs that draw a part of the whole; classes in turn count from 0.
        batch_size: images at a time, at least 1; under guidance the network sees twice as many.
        state_dtype: float32 or float64, of the sampler's state; the network always receives float32.
        autocast_dtype: bfloat16 or float16 for the network's own arithmetic, or None.
        device: where to run; None: where the model's parameters are. The model must be there already.
        progress: called with (images done, num) after each batch.

    Returns:
        (num, C, H, W) float32 on the CPU, in the units of the training data, not clipped.

    Raises:
        ValueError: any argument outside the ranges above.
    """
    name = resolve_sampler(process, sampler)
    for what, count in (("num", num), ("batch_size", batch_size), ("steps", steps)):
        check_whole(what, count, 1)
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype {state_dtype} is not one of {STATE_DTYPES}")
    check_guidance(cfg_scale, interval)
    num_classes = cast("int", model.num_classes)
    y = _resolve_labels(num, first_id, num_classes, labels, classes)
    null_class = getattr(model, "null_class", num_classes if num_classes > 0 else None)
    where = _device_of(model) if device is None else torch.device(device)
    shape = cast("tuple[int, int, int]", model.input_shape)
    images = torch.empty(num, *shape, dtype=torch.float32)
    with evaluation_mode(model):
        levels = make_levels(process, steps, level_set)
        for start in range(0, num, batch_size):
            part = slice(start, min(start + batch_size, num))
            guided = Guided(
                model,
                process,
                None if y is None else y[part].to(where),
                cfg_scale,
                interval,
                null_class,
                autocast_dtype,
            )
            guided.prepare(levels.times, where)
            ids = torch.arange(first_id + part.start, first_id + part.stop, device=where)
            network = guided.denoise if process.schedule.discrete else guided.velocity
            latents = initial_latents(seed, ids, shape)
            images[part] = SAMPLERS[name](network, latents, levels, state_dtype=state_dtype).float().cpu()
            if progress is not None:
                progress(part.stop, num)
    return images


def _device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
