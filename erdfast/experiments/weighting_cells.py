"""One cell of the weighting experiment: train one network on one problem with one weighting, and measure it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from erdfast.config import OptimizerConfig
from erdfast.data import GaussianMixture
from erdfast.evaluation.digits import digits_report, load_real_digits
from erdfast.evaluation.frechet import FeatureStatistics
from erdfast.evaluation.mixture import KnownMixture
from erdfast.models import Backbone, BackboneConfig, DiTConfig, UViTConfig
from erdfast.ops import NoiseKey, add_noise
from erdfast.process import Process
from erdfast.sampling import sample

from .training_loop import Examples, train

Result = dict[str, Any]
WEIGHTINGS: dict[str, dict[str, Any]] = {
    "constant": {"weighting": "constant"},
    "min_snr": {"weighting": "min_snr"},
    "p2": {"weighting": "p2"},
    "debias": {"weighting": "debias"},
    "erd": {"weighting": "erd"},
    "erd_logsnr": {"weighting": "erd", "allocation": "logsnr"},
    "erd_sampled": {"weighting": "erd", "as_sampling": True},
    "erd_logsnr_sampled": {"weighting": "erd", "allocation": "logsnr", "as_sampling": True},
}
"""What is compared: options of the process. ERD's allocation is over time if not said otherwise; sampled: its weight is
the density of times."""
USUAL = tuple(name for name in WEIGHTINGS if name != "erd_logsnr_sampled")
"""What most studies have. Over log-SNR ERD's weight is 100 times its mean at rare times: whether that is what spoils
its training, or the allocation, is asked of two studies alone."""
IN_PAPER = ("constant", "min_snr", "p2", "erd")
"""What ERD's figure 6 compares; no more is asked of other spreads."""
TARGETS = ("eps", "x0", "v")
NUM_CLASSES = 10
LABEL_DROP = 0.1
"""Of the digits, which are guided; samples of a mixture are not."""

_SMALL: dict[str, Any] = {"input_shape": (4, 8, 8), "num_classes": NUM_CLASSES, "width": 64, "num_heads": 2}
_LARGE: dict[str, Any] = _SMALL | {"input_shape": (4, 32, 32), "patch_size": 4, "width": 96, "num_heads": 3}
_FULL: dict[str, Any] = _SMALL | {"input_shape": (4, 32, 32), "width": 384, "num_heads": 6}
_DIGITS: dict[str, Any] = _SMALL | {"input_shape": (1, 8, 8)}
NETWORKS: dict[tuple[str, str], BackboneConfig] = {
    ("mixture_4x8x8", "dit"): DiTConfig(depth=4, **_SMALL),
    ("mixture_4x8x8", "uvit"): UViTConfig(depth=5, **_SMALL),
    ("mixture_4x32x32", "dit"): DiTConfig(depth=4, **_LARGE),
    ("mixture_4x32x32", "uvit"): UViTConfig(depth=5, **_LARGE),
    ("mixture_4x32x32", "dit_s2"): DiTConfig(depth=12, **_FULL),
    ("digits", "dit"): DiTConfig(depth=4, **_DIGITS),
}
"""By data and network. A patch has fewer numbers than a token: no weighting can be blamed for a bottleneck."""

EMA_DECAY = 0.99
OPTIMIZER = OptimizerConfig(lr=3e-3, betas=(0.9, 0.99), warmup_steps=50)
"""The rate stays constant, so that every point of a curve is the end of a shorter run. A constant factor
of a weight means nothing to Adam: its shape over the noise levels is compared. Rare weights far above the mean do: the
steps that follow are small."""
LOGSNRS = tuple(range(8, -9, -1))
"""Where the excess is measured; `cosine` reaches from +10 to -20."""
HELD_OUT = 128
_FIRST_HELD_OUT = 10**9
"""Number of the first held-out sample: none is ever seen in training."""
SAMPLER_STEPS, SAMPLER_STEPS_AT_END = 9, (5, 9, 18)
"""Of EDM's Heun sampler: along the training, and at its end."""
CURVE = (0.25, 0.5, 1.0)
"""Shares of the training after which everything is measured."""
DIGITS_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is trained."""

    data: str
    """mixture_4x8x8, mixture_4x32x32 or digits."""
    std: float
    """Spread within a mode of a mixture; the total variance is 1. 0 for digits."""
    network: str
    """With `data`, a key of NETWORKS."""
    target: str
    """A name of TARGETS."""
    weighting: str
    """A name of WEIGHTINGS."""
    seed: int
    """Of the mixture's means, data, noise, times and weights."""
    steps: int
    """Of the optimiser."""
    batch: int
    """Fresh samples of each (digits: drawn with replacement)."""
    samples: int = 500
    """Drawn from the network each time that it is measured (digits: half as many again under guidance)."""

    @property
    def name(self) -> str:
        """Of its file."""
        return (
            f"{self.data}-std{self.std:g}-{self.network}-{self.target}-{self.weighting}"
            f"-{self.steps}x{self.batch}-seed{self.seed}"
        )


def run_cell(cell: Cell) -> Result:
    """Train and measure: a pure function of the cell and the kind of device. Of a network that diverged the curve is
    empty."""
    torch.manual_seed(cell.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # TF32 errs by about 1e-6 of the target's square, far below any excess
        torch.set_float32_matmul_precision("high")
    network = NETWORKS[cell.data, cell.network].build().to(device)
    process = Process("cosine", cell.target, **WEIGHTINGS[cell.weighting]).to(device)
    examples, measure = (digits if cell.data == "digits" else mixture)(cell, device)
    points = {max(round(share * cell.steps), 1) for share in CURVE}
    curve: list[Result] = []

    def look(done: int, exchange: Callable[[], None]) -> None:
        if done in points:
            exchange()
            curve.append({"step": done, **measure(network.eval(), process, done == cell.steps)})
            network.train()
            exchange()

    def batch(step: int) -> Examples:
        time = process.sample_time(cell.batch, seed=cell.seed, step=step)
        x0, labels = examples(step)
        return Examples(x0, time, labels)

    settings: dict[str, Any] = {"steps": cell.steps, "seed": cell.seed, "optimizer": OPTIMIZER, "ema_decay": EMA_DECAY}
    try:
        train(network, process, batch, **settings, after_step=look)
    except FloatingPointError:
        curve = []
    return dataclasses.asdict(cell) | {"curve": curve}


Draw = Callable[[int], tuple[Tensor, Tensor]]
"""(x0, labels) of a step."""
Measure = Callable[[Backbone, Process, bool], Result]
"""What is seen of a network; more of it at the end."""


def finite(x: Tensor) -> Tensor:
    """x; FloatingPointError if the network that made it has diverged."""
    if not bool(x.isfinite().all()):
        raise FloatingPointError("the network has diverged")
    return x


# ---------------------------------------------------------------------- mixtures


def mixture(cell: Cell, device: torch.device) -> tuple[Draw, Measure]:
    """Samples of a mixture of 40 modes, no two the same, and what is known about it."""
    shape = NETWORKS[cell.data, cell.network].input_shape
    data = GaussianMixture(shape, std=cell.std, seed=cell.seed, size=2 * _FIRST_HELD_OUT)
    known = KnownMixture(data)

    def draw(step: int) -> tuple[Tensor, Tensor]:
        batch = data.gather(torch.arange(step * cell.batch, (step + 1) * cell.batch))
        return batch.x.to(device), batch.y.to(device)

    def measure(network: Backbone, process: Process, last: bool) -> Result:
        logsnr, excess, floor = excess_by_level(network, process, data)
        samplers = SAMPLER_STEPS_AT_END if last else (SAMPLER_STEPS,)
        by_steps = {str(steps): sample_errors(network, process, known, cell, steps) for steps in samplers}
        if last:  # what perfect samples would get
            by_steps["perfect"] = compare(known, *held_out(data, cell.samples, first=HELD_OUT))
        return {"logsnr": logsnr, "v_excess": excess, "v_floor": floor, "samples": by_steps}

    return draw, measure


def held_out(data: GaussianMixture, num: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Samples that no training sees, and their labels."""
    batch = data.gather(torch.arange(num) + (_FIRST_HELD_OUT + first))
    return batch.x, batch.y


@torch.no_grad()
def excess_by_level(
    network: Backbone, process: Process, data: GaussianMixture
) -> tuple[list[float], list[float], list[float]]:
    """Mean squared distance per element of the prediction from the best possible one, given the label.

    Measured in v, into which every prediction is converted: errors in x0 and eps are sigma^2 and alpha^2 times as large
    on a variance-preserving schedule. The same samples and noise for every network.

    Returns:
        log-SNR, excess and Bayes floor at the times whose log-SNR is closest to LOGSNRS.
    """
    x0, labels = held_out(data, HELD_OUT)
    device = next(network.parameters()).device
    all_times = torch.arange(process.schedule.num_timesteps or 0, device=device)
    known = process.logsnr(all_times)
    logsnrs, excesses, floors = [], [], []
    for number, wanted in enumerate(LOGSNRS):
        t = (known - wanted).abs().argmin().expand(HELD_OUT)
        coef = process.coefficients(t, dtype=torch.float64)
        x_t = add_noise(x0.to(device), process.coefficients(t), NoiseKey(data.seed, 2**31 + number))
        pred = finite(network(x_t, coef.time.float(), labels.to(device)))
        v = process.convert(pred, x_t, t, "v").double().cpu()
        alpha, sigma = coef.alpha.cpu(), coef.sigma.cpu()
        excesses.append(float((v - data.target_mean(x_t.cpu(), alpha, sigma, -sigma, alpha, labels)).square().mean()))
        logsnrs.append(float(known[t[0]]))
        a, s = alpha[:1], sigma[:1]
        floors.append(float(data.bayes_floor(a, s, -s, a, conditional=True, num_samples=400)))
    return logsnrs, excesses, floors


def sample_errors(network: Backbone, process: Process, known: KnownMixture, cell: Cell, steps: int) -> Result:
    """Samples of all classes alike, by EDM's Heun method, against the mixture."""
    labels = torch.arange(cell.samples) % NUM_CLASSES
    options: dict[str, Any] = {"steps": steps, "seed": cell.seed, "batch_size": 128}
    x = sample(network, process, num=cell.samples, labels=labels, **options)
    return compare(known, finite(x), labels)


def compare(known: KnownMixture, x: Tensor, labels: Tensor) -> Result:
    """Frechet distance from the mixture; total variation of the modes' shares from equal ones; share of the right
    class."""
    modes = torch.bincount(known.nearest_modes(x), minlength=known.num_modes).double() / len(x)
    return {
        "frechet": FeatureStatistics.of(known.features(x)).gaussian().distance(known.gaussian),
        "mode_imbalance": float(0.5 * (modes - 1.0 / len(modes)).abs().sum()),
        "recognised": known.num_recognised(x, labels) / len(x),
    }


# ---------------------------------------------------------------------- digits


@cache
def _digits() -> tuple[Tensor, Tensor]:
    return load_real_digits()


def digits(cell: Cell, device: torch.device) -> tuple[Draw, Measure]:
    """The real digits, some without their label, and their classifier."""
    images, labels = (part.to(device) for part in _digits())

    def draw(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(cell.seed * 10**6 + step)
        chosen = torch.randint(len(images), (cell.batch,), generator=generator).to(device)
        dropped = (torch.rand(cell.batch, generator=generator) < LABEL_DROP).to(device)
        return images[chosen], torch.where(dropped, NUM_CLASSES, labels[chosen])

    def measure(network: Backbone, process: Process, last: bool) -> Result:
        def draw_samples(wanted: Tensor, cfg_scale: float) -> Tensor:
            options: dict[str, Any] = {"steps": DIGITS_STEPS, "seed": cell.seed, "batch_size": 250}
            return finite(sample(network, process, num=len(wanted), labels=wanted, cfg_scale=cfg_scale, **options))

        report = digits_report(draw_samples, num_unguided=cell.samples, num_guided=cell.samples // 2)
        found = {"frechet": report.frechet_distance, "recognised": report.label_accuracy}
        halves = {"perfect": {"frechet": report.frechet_distance_real_halves}} if last else {}
        return {"samples": {str(DIGITS_STEPS): found} | halves}

    return draw, measure
