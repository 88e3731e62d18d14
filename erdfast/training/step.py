"""From clean data to the loss: the one region of a training step, free of host synchronisation.

Everything random is a function of (seed, step, index in the global batch): times, noise, posterior draws, label drops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from erdfast import philox
from erdfast.models import Backbone
from erdfast.ops import Moments, NoiseKey, add_noise, diffusion_loss
from erdfast.process import Coefficients, Process

from .precision import PrecisionPolicy

COMPILE_MODES = ("none", "block", "full", "max-autotune")


class StepResult(NamedTuple):
    """One micro-batch."""

    loss: Tensor
    """0-d, with gradients."""
    mse: Tensor
    """(B,) unweighted squared error of each sample."""
    logsnr: Tensor
    """(B,) noise level of each sample."""
    time: Tensor
    """(B,) what the network received as time."""


class Noised(NamedTuple):
    """What the network and the loss are given."""

    x_t: Tensor
    labels: Tensor | None
    coef: Coefficients
    ids: Tensor
    """(B,) indices in the global batch: with seed and step the key of the noise."""


class DiffusionStep(nn.Module):
    """Noise, network and loss of one micro-batch; a module, so that DDP can wrap all that is trained.

    Args:
        model: (x, time, y) => prediction; one that has dropout also takes a key.
        process: what is added, predicted and weighed.
        seed: of the run.
        global_batch: samples of an optimiser step over all micro-batches and processes.
        label_drop: share of labels replaced by the null class.
        precision: how the network computes.
        device: where.
    """

    seed: Tensor

    def __init__(
        self,
        model: Backbone,
        process: Process,
        *,
        seed: int,
        global_batch: int,
        label_drop: float,
        precision: PrecisionPolicy,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.process = model, process
        self.num_classes = model.num_classes
        self.has_dropout = getattr(model, "has_dropout", False)  # any (x, time, y) => prediction will do
        self.global_batch, self.label_drop, self.precision = global_batch, label_drop, precision
        # A device tensor, so that a compiled step neither waits for it nor is compiled for one value.
        seed_tensor = torch.full((), philox.signed64(seed), dtype=torch.int64, device=device)
        self.register_buffer("seed", seed_tensor, persistent=False)

    def forward(
        self, x: Tensor, y: Tensor, step: Tensor, offset: Tensor, moments_scale: float | None = None
    ) -> StepResult:
        """The loss of samples `offset`, offset+1, ... of a step's global batch.

        Args:
            x, y, moments_scale: a batch of the data set, on the device.
            step, offset: 0-d int64 on the device.
        """
        noised = self.noised(x, y, step, offset, moments_scale)
        with self.precision.autocast():
            pred = self.model(noised.x_t, noised.coef.time, noised.labels, **self._dropout_key(step, noised.ids))
        return self.measured(pred, x, noised, step, moments_scale)

    def noised(self, x: Tensor, y: Tensor, step: Tensor, offset: Tensor, moments_scale: float | None) -> Noised:
        """All that precedes the network."""
        ids = torch.arange(x.shape[0], device=x.device) + offset
        t = self.process.sample_time(
            x.shape[0], seed=self.seed, step=step, rank_offset=offset, global_batch=self.global_batch, device=x.device
        )
        coef = self.process.coefficients(t)
        x_t = add_noise(_source(x, moments_scale), coef, NoiseKey(self.seed, step, ids), dtype=self.precision.dtype)
        return Noised(x_t, self._labels(y, step, ids), coef, ids)

    def measured(
        self, pred: Tensor, x: Tensor, noised: Noised, step: Tensor, moments_scale: float | None
    ) -> StepResult:
        """All that follows it."""
        # A network with learned variance predicts twice the channels; its second half is not trained here.
        pred = pred[:, : noised.x_t.shape[1]]
        key = NoiseKey(self.seed, step, noised.ids)
        loss, mse = diffusion_loss(pred, _source(x, moments_scale), noised.coef, key, per_sample=True)
        return StepResult(loss, mse, noised.coef.logsnr.detach(), noised.coef.time)

    def _dropout_key(self, step: Tensor, ids: Tensor) -> dict[str, NoiseKey]:
        """What a network with dropout is told in training; nothing for any other."""
        return {"key": NoiseKey(self.seed, step, ids)} if self.model.training and self.has_dropout else {}

    def _labels(self, y: Tensor, step: Tensor, ids: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        dropped = philox.uniform(self.seed, step, ids, "label_drop") < self.label_drop
        return torch.where(dropped, self.num_classes, y)


def _source(x: Tensor, moments_scale: float | None) -> Tensor | Moments:
    return x if moments_scale is None else Moments(x, moments_scale)


def compile_step(step: DiffusionStep, mode: str) -> None:
    """torch.compile, in place: parameter names stay, and shapes are static.

    block: each block of the network (equal blocks share one graph), and what precedes the network. Backward then runs
        block by block, so that DDP and FSDP send gradients meanwhile.
    full: everything from the data to the loss as one graph. max-autotune: the same, with kernels chosen by measurement.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"unknown compile mode {mode!r}; choose from {', '.join(COMPILE_MODES)}")
    if mode == "block":
        blocks = step.model.blocks_for_sharding()
        # A UNet's blocks are almost all of different sizes, of which the compiler otherwise takes eight.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, len(blocks) + 1)
        # The functions, not the modules: FSDP's hooks around them stay outside.
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        step.noised = torch.compile(step.noised, fullgraph=True, dynamic=False)
    elif mode != "none":
        tuned = "max-autotune-no-cudagraphs" if mode == "max-autotune" else None
        step.forward = torch.compile(step.forward, fullgraph=True, dynamic=False, mode=tuned)
