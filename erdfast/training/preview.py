"""Pictures from the averaged weights, during training and at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from erdfast.config import PreviewConfig
from erdfast.data import Dataset, GaussianMixture
from erdfast.data.images import save_image_grid
from erdfast.models import Backbone
from erdfast.models.flops import forward_flops
from erdfast.process import Coefficients, Process
from erdfast.sampling import sample

from .figures import save_summary
from .metrics import LOGSNR_EDGES
from .parallel import World
from .precision import PrecisionPolicy
from .speed import Speedometer

PREVIEW_SEED = 20_000
"""Pictures of different steps start from the same noise, so that they can be compared."""
PATIENCE_S = 60.0
"""Pictures that would take longer than this, or than a tenth of the training so far, are left to erdfast.sample."""


class Preview:
    """Draws the same samples again and again.

    Args:
        config: how many, how.
        dataset: gives the pictures their colours and the classes their names.
        process, precision: as in training.
    """

    def __init__(self, config: PreviewConfig, dataset: Dataset, process: Process, precision: PrecisionPolicy) -> None:
        self.config, self.dataset, self.process, self.precision = config, dataset, process, precision

    def cost(self, model: Backbone) -> float:
        """Floating-point operations of one grid."""
        calls = 2 * self.config.sample_steps - 1
        guided = 2 if self._cfg_scale(model) != 1.0 else 1
        return float(self.config.sample_num * calls * guided * forward_flops(model.config))

    def is_affordable(
        self, model: Backbone, speed: Speedometer, world: World, run: Path, say: Callable[[str], None]
    ) -> bool:
        """Whether a grid takes a bearable time, by the speed of the training so far; `say` is told if not.

        The first process decides for all, which must all call it.
        """
        seconds = self.cost(model) / max(speed.flops_per_s / world.size, 1.0)
        short = seconds <= max(PATIENCE_S, 0.1 * speed.elapsed)
        if not short:
            say(
                f"no pictures: {self.config.sample_num} samples would take about {seconds / 60:.0f} min here; "
                f"later: python -m erdfast.sample --run {run}"
            )
        return world.any(world.is_main and short)

    def draw(self, model: Backbone) -> np.ndarray:
        """(N, H, W, 1 or 3) uint8."""
        classes = list(range(self.dataset.num_classes)) or None
        images = sample(
            model,
            self.process,
            num=self.config.sample_num,
            classes=classes if model.num_classes else None,
            cfg_scale=self._cfg_scale(model),
            steps=self.config.sample_steps,
            seed=PREVIEW_SEED,
            autocast_dtype=self.precision.autocast_dtype,
        )
        return self.dataset.to_images(images)

    def _cfg_scale(self, model: Backbone) -> float:
        return self.config.sample_cfg_scale if model.null_class is not None else 1.0

    def columns(self) -> int | None:
        """One column per class where they fit, so that a column shows one class."""
        return self.dataset.num_classes if 1 < self.dataset.num_classes <= 20 else None

    def save(self, path: Path, images: np.ndarray) -> None:
        """One grid as PNG."""
        save_image_grid(path, images, columns=self.columns())


def write_summary(
    run: Path, records: Sequence[dict[str, Any]], images: np.ndarray | None, preview: Preview, title: str
) -> None:
    """summary.png: loss curve, loss by noise level (with the Bayes floor where it is known), learnt target, samples."""
    process = preview.process
    save_summary(
        run / "summary.png",
        records,
        images,
        title=title,
        floor=_bayes_floor(preview.dataset, process),
        columns=preview.columns(),
        k_init=float(process.describe()["k_init"] or 0.0) if process.target.learnable else None,
    )


def _bayes_floor(dataset: Dataset, process: Process) -> list[tuple[float, float]] | None:
    """(log-SNR, least possible error of a network that knows the class), over the levels that training draws."""
    if not isinstance(dataset, GaussianMixture) or dataset.num_classes > 100:
        return None  # the estimate visits every mode: with a thousand classes it would take minutes
    where = process.rule_mean.device
    logsnr = torch.linspace(LOGSNR_EDGES[0], LOGSNR_EDGES[-1], 41, dtype=torch.float64, device=where)
    t = process.schedule.t_from_logsnr(logsnr)
    with torch.no_grad():
        coef = Coefficients(*(value.cpu() for value in process.coefficients(t, dtype=torch.float64)))
        floor = dataset.bayes_floor(coef.alpha, coef.sigma, coef.c_x, coef.c_eps, conditional=True)
    points = dict(zip(coef.logsnr.tolist(), floor.tolist(), strict=True))
    return sorted(points.items())
