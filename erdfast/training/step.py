"""From clean data to the loss: the one region of a training step, free of host synchronisation.

Everything random is a function of (seed, step, index in the global batch): times, noise, posterior draws, label drops.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from erdfast import philox
from erdfast.data import Batch
from erdfast.ops import Moments, NoiseKey, add_noise, diffusion_loss
from erdfast.process import Process

from .precision import PrecisionPolicy


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


class DiffusionStep:
    """Noise, network and loss of one micro-batch.

    Args:
        model: (x, time, y) => prediction.
        process: what is added, predicted and weighed.
        seed: of the run.
        global_batch: samples of an optimiser step over all micro-batches and processes.
        label_drop: share of labels replaced by the null class.
        precision: how the network computes.
        device: where.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        *,
        num_classes: int,
        seed: int,
        global_batch: int,
        label_drop: float,
        precision: PrecisionPolicy,
        device: torch.device,
    ) -> None:
        self.model, self.process, self.num_classes = model, process, num_classes
        self.global_batch, self.label_drop, self.precision = global_batch, label_drop, precision
        # Device tensors, so that a compiled step sees neither change nor waits.
        self.seed = torch.full((), philox.signed64(seed), dtype=torch.int64, device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, batch: Batch, offset: int) -> StepResult:
        """The loss of samples `offset`, offset+1, ... of the step's global batch."""
        x, y, moments_scale = batch
        count, device = x.shape[0], x.device
        ids = torch.arange(offset, offset + count, device=device)
        t = self.process.sample_time(
            count,
            seed=self.seed,
            step=self.step,
            rank_offset=offset,
            global_batch=self.global_batch,
            device=device,
        )
        coef = self.process.coefficients(t)
        key = NoiseKey(self.seed, self.step, ids)
        x0 = x if moments_scale is None else Moments(x, moments_scale)
        x_t = add_noise(x0, coef, key, dtype=self.precision.dtype)
        with self.precision.autocast():
            pred = self.model(x_t, coef.time, self._labels(y, ids))
        # A network with learned variance predicts twice the channels; its second half is not trained here.
        pred = pred[:, : x_t.shape[1]]
        loss, mse = diffusion_loss(pred, x0, coef, key, per_sample=True)
        return StepResult(loss, mse, coef.logsnr.detach(), coef.time)

    def _labels(self, y: Tensor, ids: Tensor) -> Tensor | None:
        if self.num_classes == 0:
            return None
        dropped = philox.uniform(self.seed, self.step, ids, "label_drop") < self.label_drop
        return torch.where(dropped, self.num_classes, y)
