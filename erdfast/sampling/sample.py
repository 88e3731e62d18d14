"""From a trained model and its process to images, in batches, reproducibly: `ImageSampler`, and `sample` for few."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn

from erdfast.philox import normal, scalar
from erdfast.sampling.graphs import GraphedModel, check_graph
from erdfast.sampling.guidance import FULL_INTERVAL, Guided, Model, check_guidance
from erdfast.sampling.levels import check_whole, make_levels
from erdfast.sampling.output import default_labels
from erdfast.sampling.samplers import ASKS, SAMPLERS, STATE_DTYPES, Noise

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from erdfast.process import Process

SAMPLER_KINDS: dict[str, tuple[str, ...]] = {
    "discrete": ("edm_heun", "edm_euler", "heun", "euler", "ddim", "dpmpp_2m", "sde_euler", "sde_heun"),
    "continuous": ("heun", "euler", "edm_heun", "edm_euler", "ddim", "dpmpp_2m", "sde_euler", "sde_heun"),
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
    return _image_noise(seed, 0, ids, shape)


def step_noise(seed: int, ids: Tensor, shape: tuple[int, int, int]) -> Noise:
    """Fresh noise for a stochastic sampler, a function of (seed, image id, step) alone; arguments as for
    `initial_latents`, whose stream of the generator is 0: step i has stream i + 1."""
    return lambda i: _image_noise(seed, i + 1, ids, shape)


def _image_noise(seed: int, stream: int, ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
    flat = normal(scalar("seed", seed, 64, ids.device), stream, ids, math.prod(shape), domain="latent")
    return flat.reshape(len(ids), *shape)


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
        ValueError: a name that does not exist.
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
    has_null: bool,
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
    outside = y[(y < 0) | (y > num_classes - (not has_null))].unique().tolist()
    if outside:
        null = f" (or {num_classes}, no class)" if has_null else "; this model knows no null class"
        raise ValueError(f"labels {outside} are not within 0..{num_classes - 1}{null}")
    return y


class Batch(NamedTuple):
    """Images of one batch."""

    start: int
    """Of how many others the run has before them."""
    images: Tensor
    """(B, C, H, W) float32 on the device, in the units of the training data, not clipped."""


class SampleOptions(TypedDict, total=False):
    """Keywords of `ImageSampler`, which `sample` passes on."""

    cfg_scale: float
    steps: int
    sampler: str | None
    level_set: str | None
    interval: tuple[float, float]
    seed: int
    batch_size: int
    state_dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    device: torch.device | str | None
    compile: bool
    cuda_graph: bool


class ImageSampler:
    """Draws images from a model: deterministic given the seed, image by image.

    Image i depends on (seed, i) alone: its starting noise does, and so does the noise of each step of a stochastic
    sampler. It is the same, up to the rounding of the network, whatever the batch size and however the images are
    divided over processes. What is compiled or captured once serves all its batches.

    Args:
        model: with attributes `input_shape` (C, H, W) and `num_classes`; a model whose class 0..num_classes-1
            labels have no null label beside them says so by an attribute `null_class = None`.
        process: what the model was trained under.
        cfg_scale, interval: see `Guided`.
        steps: N >= 1; samplers of two stages (TWO_STAGE) call the network 2N - 1 times, the others N times.
        sampler: a name of SAMPLERS; None: `edm_heun` for a discrete process, `heun` for a continuous one.
        level_set: a name of LEVEL_SETS; see `make_levels` for the default.
        seed: of all noise, in 0..2^64-1.
        batch_size: images at a time, at least 1; under guidance the network sees twice as many.
        state_dtype: float32 or float64, of the sampler's state; the network always receives float32.
        autocast_dtype: bfloat16 or float16 for the network's own arithmetic, or None.
        device: where to run; None: where the model's parameters are. The model must be there already.
        compile: call the network by torch.compile, which takes its time at the first call of each kind (with the
            unconditional half and without) and is faster from then on.
        cuda_graph: launch each call of the network as one CUDA graph: for networks whose kernels are short. A GPU only.

    Raises:
        ValueError: any argument outside the ranges above.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        *,
        cfg_scale: float = 1.0,
        steps: int = 50,
        sampler: str | None = None,
        level_set: str | None = None,
        interval: tuple[float, float] = FULL_INTERVAL,
        seed: int = 0,
        batch_size: int = 256,
        state_dtype: torch.dtype = torch.float32,
        autocast_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        self.name = resolve_sampler(process, sampler)
        for what, count in (("batch_size", batch_size), ("steps", steps)):
            check_whole(what, count, 1)
        if state_dtype not in STATE_DTYPES:
            raise ValueError(f"state_dtype {state_dtype} is not one of {STATE_DTYPES}")
        check_guidance(cfg_scale, interval)
        self.device = _device_of(model) if device is None else torch.device(device)
        scalar("seed", seed, 64, self.device)
        if cuda_graph:
            check_graph(self.device)
        self.model, self.seed, self.batch_size, self.state_dtype = model, seed, batch_size, state_dtype
        self.shape = cast("tuple[int, int, int]", model.input_shape)
        self.num_classes = cast("int", model.num_classes)
        self._static = compile or cuda_graph
        call: Model = torch.compile(model, dynamic=False) if compile else model
        if cuda_graph:
            call = GraphedModel(call)
        self.levels = make_levels(process, steps, level_set, "ratio" if ASKS[self.name] == "denoise" else "time")
        null_class = getattr(model, "null_class", self.num_classes if self.num_classes > 0 else None)
        self._has_null = null_class is not None
        label = torch.zeros(1, dtype=torch.int64, device=self.device) if self.num_classes else None
        self._guided = Guided(call, process, label, cfg_scale, interval, null_class, autocast_dtype)
        self._guided.prepare(self.levels.times, self.device)

    def batches(
        self,
        num: int,
        *,
        labels: Tensor | Sequence[int] | None = None,
        classes: Sequence[int] | None = None,
        first_id: int = 0,
    ) -> Iterator[Batch]:
        """Images first_id..first_id+num-1, batch after batch: memory does not grow with `num`.

        Args:
            num: number of images, at least 1.
            labels: (num,) in 0..num_classes (num_classes being the null class, if the model has one), or None.
            classes: instead of labels, the classes to take in turn; with neither, all classes in turn.
            first_id: number of the first image, for runs that draw a part of the whole; classes in turn count from 0.

        Raises:
            ValueError: any argument outside the ranges above.
        """
        check_whole("num", num, 1)
        y = _resolve_labels(num, first_id, self.num_classes, labels, classes, self._has_null)
        return self._batches(num, y, first_id)

    def _batches(self, num: int, y: Tensor | None, first_id: int) -> Iterator[Batch]:
        size = self.batch_size if self._static else min(self.batch_size, num)
        for start in range(0, num, size):
            stop = min(start + size, num)
            # Compiled code and graphs are of one shape: a last batch that is smaller is filled up, and cut afterwards.
            count = size if self._static else stop - start
            ids = torch.arange(first_id + start, first_id + start + count, device=self.device)
            images = self._draw(ids, None if y is None else _filled(y[start:stop], count))
            yield Batch(start, images[: stop - start].to(torch.float32, copy=True))

    def _draw(self, ids: Tensor, y: Tensor | None) -> Tensor:
        guided = self._guided.with_labels(None if y is None else y.to(self.device))
        with evaluation_mode(self.model):  # left before others go on with the images
            return SAMPLERS[self.name](
                getattr(guided, ASKS[self.name]),
                initial_latents(self.seed, ids, self.shape),
                self.levels,
                noise=step_noise(self.seed, ids, self.shape),
                state_dtype=self.state_dtype,
            )


def _filled(y: Tensor, count: int) -> Tensor:
    """(count,) labels: those given, then the first of them as often as is needed."""
    return torch.cat([y, y[:1].expand(count - len(y))])


def sample_batches(
    model: nn.Module,
    process: Process,
    *,
    num: int,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    first_id: int = 0,
    **options: Unpack[SampleOptions],
) -> Iterator[Batch]:
    """`ImageSampler(model, process, **options).batches(...)`, for a model that is asked once."""
    sampler = _sampler_for(num, model, process, options)
    return sampler.batches(num, labels=labels, classes=classes, first_id=first_id)


def _sampler_for(num: int, model: nn.Module, process: Process, options: SampleOptions) -> ImageSampler:
    """With batches no larger than `num`: under compile and graphs they would be filled up."""
    sampler = ImageSampler(model, process, **options)
    check_whole("num", num, 1)
    sampler.batch_size = min(sampler.batch_size, num)
    return sampler


def sample(
    model: nn.Module,
    process: Process,
    *,
    num: int,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[int] | None = None,
    first_id: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[SampleOptions],
) -> Tensor:
    """A few images at once: see `ImageSampler` for what they depend on and for `options` (cfg_scale, steps, ...).

    Args:
        model, process, options: see `ImageSampler`.
        num, labels, classes, first_id: see `ImageSampler.batches`.
        progress: called with (images done, num) after each batch.

    Returns:
        (num, C, H, W) float32 on the CPU, in the units of the training data, not clipped.

    Raises:
        ValueError: any argument outside the ranges given there.
    """
    images: Tensor | None = None
    batches = sample_batches(model, process, num=num, labels=labels, classes=classes, first_id=first_id, **options)
    for start, part in batches:
        if images is None:
            images = torch.empty(num, *part.shape[1:], dtype=torch.float32)
        images[start : start + len(part)] = part.cpu()
        if progress is not None:
            progress(start + len(part), num)
    assert images is not None
    return images


def _device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter is; the CPU for a model without parameters."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
