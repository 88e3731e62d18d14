"""Whole training steps to be compared: plain PyTorch, torch.compile of it, this package's trainer, other repositories.

A side is a function without arguments that makes one optimiser step, from gathering a batch to the averaged weights, on
random data held in memory. All train the same network with AdamW and one average, in bf16 where the hardware has it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench import peers
from bench.budget import step_budget
from erdfast import cli, presets, recipes
from erdfast.config import TrainConfig
from erdfast.data import Batch, Dataset
from erdfast.models import BackboneConfig
from erdfast.ops.backend import default_backend
from erdfast.process import Process
from erdfast.training.parallel import World
from erdfast.training.precision import resolve_precision
from erdfast.training.trainer import Trainer

LATENT_SCALE = 0.18215
EMA_DECAY = 0.9999
NUM_TIMESTEPS = 1000
DEFAULT_COMPILE = "block"
Step = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What every side is told."""

    model: str
    """Preset."""
    batch: int
    """Images per step."""
    compile: str = DEFAULT_COMPILE
    """Of "ours_compile" and of what is compared with it: block, full or max-autotune."""
    samples: int = 4096
    """Images in memory."""
    paths: dict[str, str] = dataclasses.field(default_factory=dict)
    """Checkouts of other repositories by the name of their side."""


class RandomLatents(Dataset):
    """Random VAE moments (mean, standard deviation) as ERD's files hold them; pixels where there are no latents."""

    def __init__(self, config: BackboneConfig, samples: int) -> None:
        channels, height, width = config.input_shape
        self.shape, self.num_classes = config.input_shape, config.num_classes
        self.is_latent = channels == 4
        x = torch.randn(samples, (2 if self.is_latent else 1) * channels, height, width)
        if self.is_latent:
            x[:, channels:] = x[:, channels:].abs()
        self.x, self.y = x, torch.randint(max(config.num_classes, 1), (samples,))

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, indices: Tensor) -> Batch:
        """Rows by index."""
        return Batch(self.x[indices], self.y[indices], LATENT_SCALE if self.is_latent else None)

    def describe(self) -> str:
        """For the log."""
        return f"{len(self):,} random samples"


def build(side: str, options: StepOptions, device: torch.device) -> Step:
    """The step of a side.

    Raises:
        ValueError: an unknown side, or a repository that is not where it should be; the message says what to do.
    """
    if side in peers.PEERS:
        config = presets.model_config(options.model)
        return peers.build(side, options.paths.get(side), config, options.batch, RandomLatents, device)
    if side not in SIDES:
        raise ValueError(f"unknown side {side!r}; choose from {', '.join([*SIDES, *peers.PEERS])}")
    return SIDES[side](options, device)


# ---------------------------------------------------------------------------- plain PyTorch


class EagerStep:
    """The step as a good PyTorch programmer writes it without this package's kernels.

    `compiled` puts network, noise and loss into one torch.compile and takes PyTorch's fused AdamW.
    """

    def __init__(self, options: StepOptions, device: torch.device, *, compiled: bool) -> None:
        config = presets.model_config(options.model)
        self.device, self.batch = device, options.batch
        self.precision = resolve_precision("auto", device)
        self.data = RandomLatents(config, options.samples)
        self.model = config.build().to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        recipe = recipes.recipe(recipes.recipe_of_model(options.model))
        self.process = Process(schedule="cosine", target="eps", weighting="erd").to(device)
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        self.averages: list[Tensor] = [average for average, parameter in pairs if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=1e-4,
            betas=recipe.get("betas", (0.9, 0.999)),
            weight_decay=0.0,
            foreach=not compiled,
            fused=compiled,
        )
        self.loss = torch.compile(self._loss, dynamic=False) if compiled else self._loss
        self.null_class = config.num_classes

    def __call__(self) -> None:
        """One step."""
        batch = self.data.gather(torch.randint(len(self.data), (self.batch,)))
        x, y = (_to_device(part, self.device) for part in batch[:2])
        t = torch.randint(NUM_TIMESTEPS, (self.batch,), device=self.device)
        with default_backend("reference"):
            loss = self.loss(x, y, t)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.averages, self.parameters, 1 - EMA_DECAY)  # pyright: ignore[reportPrivateImportUsage]

    def _loss(self, x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        if self.data.is_latent:
            mean, std = x.chunk(2, dim=1)
            x = LATENT_SCALE * (mean + std * torch.randn_like(mean))
        coef = self.process.coefficients(t)
        alpha, sigma, c_x, c_eps = (c.view(-1, 1, 1, 1) for c in coef[:4])
        noise = torch.randn_like(x)
        x_t = alpha * x + sigma * noise
        labels = torch.where(torch.rand(y.shape, device=y.device) < 0.1, self.null_class, y)
        with self.precision.autocast():
            pred = self.model(x_t, coef.time, labels)
        error = pred[:, : x.shape[1]] - (c_x * x + c_eps * noise)
        return (coef.w * error.square().flatten(1).mean(1)).mean()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ---------------------------------------------------------------------------- this package


def trainer(
    options: StepOptions,
    device: torch.device,
    *,
    compiled: str | None = None,
    graph: bool = False,
    precision: str = "auto",
) -> Trainer:
    """A trainer by the network's own recipe; weights, times and noise do not depend on the last three.

    Args:
        compiled: see erdfast.train; by default what `options` says.
        graph: forward and backward as one CUDA graph.
        precision: auto, fp32, bf16 or fp8.

    Raises:
        ValueError: the device cannot do that.
    """
    recipe = recipes.recipe(recipes.recipe_of_model(options.model))
    own = {
        "model": options.model,
        "batch_size": options.batch,
        "compile": compiled or options.compile,
        "cuda_graph": graph,
        "precision": resolve_precision(precision, device).name,
        "data": "random",
        "steps": 1_000_000,
        "log_every": 1_000_000,
        "sample_every": 0,
        "tensorboard": False,
    }
    config = cli.with_options(TrainConfig(), recipe | own)
    data = RandomLatents(presets.model_config(options.model), options.samples)
    return Trainer(config, data, Path("unused"), World(device=device), say=lambda _line: None)


VARIANTS: dict[str, Callable[..., Trainer]] = {
    "ours": partial(trainer, compiled="none"),
    "ours_compile": trainer,
    "ours_graph": partial(trainer, graph=True),
    "ours_full": partial(trainer, compiled="full"),
    "ours_tuned": partial(trainer, compiled="max-autotune"),
    "ours_fp8": partial(trainer, precision="fp8"),
    "ours_segments": trainer,
}
"""This package's step as options change it: as it is, compiled, and the compiled one with one option more."""

_SEGMENTS = "expandable_segments:True"
ENVIRONMENT: dict[str, dict[str, str]] = {
    "ours_segments": {"PYTORCH_ALLOC_CONF": _SEGMENTS, "PYTORCH_CUDA_ALLOC_CONF": _SEGMENTS},
}
"""What the process of a side is started with beyond its surroundings: the new name of a variable and the old one."""

REPLACED = ("attention", "diffusion_loss", "dropout", "gelu", "modulated_norm", "qk_norm_rope", "swiglu")
"""Ops whose kernels the sides "without_..." do without: torch.compile makes its own of the reference, and PyTorch
chooses its attention. Whether a kernel is worth having in a step is what these say; norms and loss go with what
surrounds them, which an op timed alone cannot show."""


def replaced_sides(model: str) -> list[str]:
    """Those of the ops that a step of this network has."""
    ops = {work.op for work in step_budget(presets.model_config(model), 1)}
    return [f"{WITHOUT}{op}" for op in REPLACED if op in ops]


WITHOUT = "without_"


def _trainers_step(make: Callable[..., Trainer]) -> Callable[[StepOptions, torch.device], Step]:
    return lambda options, device: make(options, device)._train_step


def _replaced_step(op: str) -> Callable[[StepOptions, torch.device], Step]:
    def build(options: StepOptions, device: torch.device) -> Step:
        step = trainer(options, device)._train_step

        def run() -> None:
            with default_backend("reference", op):
                step()

        return run

    return build


SIDES: dict[str, Callable[[StepOptions, torch.device], Step]] = {
    "eager": lambda options, device: EagerStep(options, device, compiled=False),
    "compile": lambda options, device: EagerStep(options, device, compiled=True),
    **{name: _trainers_step(make) for name, make in VARIANTS.items()},
    **{f"{WITHOUT}{op}": _replaced_step(op) for op in REPLACED},
}
