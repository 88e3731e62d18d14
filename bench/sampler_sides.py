"""Ways to draw the same images from one network by EDM's Heun sampler: ours, a plain loop, the ERD authors' sampler.

All sides but one call the very same module on the same number of images, with the same steps, level set, guidance and
interval; they differ in what surrounds the calls. `erd_whole` has a network of the same size in the ERD authors' own
code, as whoever runs their repository does. Nothing of it is copied: it is imported from a checkout.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bench.peers import URLS, leave_out, stand_in
from erdfast.models import Backbone, DiTConfig, UViTConfig
from erdfast.process import Process
from erdfast.sampling import make_levels, sample

Call = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
Draw = Callable[[int], Tensor]
"""Seed => images."""
ERD_FILES = ("tools/sampler.py", "tools/cfg_edm.py")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every side is told."""

    model: Backbone
    process: Process
    num: int
    steps: int
    dtype: torch.dtype
    cfg_scale: float
    interval: tuple[float, float]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    def latents(self, seed: int) -> Tensor:
        """Standard normal, as scripts draw them."""
        torch.manual_seed(seed)
        return torch.randn(self.num, *self.model.input_shape, device=self.device)

    def labels(self) -> Tensor:
        """The classes in turn."""
        return torch.arange(self.num, device=self.device) % self.model.num_classes

    def call(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """The network in the run's precision."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.model(x, time.to(torch.float32), y).float()


def ours(run: Run, seed: int, *, compile: bool = False) -> Tensor:
    """`erdfast.sampling.sample`."""
    return sample(
        run.model,
        run.process,
        num=run.num,
        batch_size=run.num,
        steps=run.steps,
        cfg_scale=run.cfg_scale,
        interval=run.interval,
        seed=seed,
        autocast_dtype=None if run.dtype == torch.float32 else run.dtype,
        compile=compile,
    )


@torch.no_grad()
def plain(run: Run, seed: int, *, joined: bool) -> Tensor:
    """The loop that everybody writes: levels on the device, read back in every step; float64 state; guidance in one
    call of both halves (`joined`) or in two."""
    levels = make_levels(run.process, run.steps)
    labels = torch.tensor([*levels.times, levels.times[-1]], device=run.device)
    sigmas = torch.tensor(levels.positions, dtype=torch.float64, device=run.device)
    y, null = run.labels(), torch.full((run.num,), run.model.num_classes, device=run.device)
    last = 999.0

    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        x_in = (x / (sigma**2 + 1).sqrt()).float()
        time = label.repeat(run.num)
        low, high = run.interval
        if run.cfg_scale == 1.0 or not low <= label.item() / last <= high:
            noise = run.call(x_in, time, y)
        else:
            if joined:
                both = run.call(torch.cat([x_in, x_in]), torch.cat([time, time]), torch.cat([y, null]))
                cond, uncond = both.chunk(2)
            else:
                cond, uncond = run.call(x_in, time, y), run.call(x_in, time, null)
            noise = uncond + run.cfg_scale * (cond - uncond)
        return x - sigma * noise.double()

    x = run.latents(seed).double() * sigmas[0]
    for i in range(run.steps):
        sigma, following = sigmas[i], sigmas[i + 1]
        slope = (x - denoise(x, sigma, labels[i])) / sigma
        step = x + (following - sigma) * slope
        if following.item() > 0:
            second = (step - denoise(step, following, labels[i + 1])) / following
            step = x + (following - sigma) * 0.5 * (slope + second)
        x = step
    return x.float().cpu()


def erd(path: str | Path, run: Run, *, whole: bool = False) -> Draw:
    """Their sampler from a checkout, with its own levels and its guidance by interval; `whole`: and their network.

    Raises:
        ValueError: no checkout at the path, or a package that their network needs is missing.
    """
    root = Path(path).expanduser()
    if missing := [name for name in ERD_FILES if not (root / name).exists()]:
        raise ValueError(f"{root} has no {missing[0]}; is it a checkout of {URLS['erd']}?")
    sys.path.insert(0, str(root))
    stand_in("diffusers.models")
    leave_out("tools.dist_util", "models.unet")  # processes and a classifier, which the sampler's loop does not use
    theirs = importlib.import_module("tools.sampler")
    channels, size, _ = run.model.input_shape
    args = argparse.Namespace(
        diffusion_steps=1000, path_type="cosine", beta_range=(1e-4, 0.02), snr_range=(-10.0, 10.0)
    )
    interval = tuple(1000 * end for end in run.interval)  # in labels, the end not included
    call = _erd_network(run) if whole else run.call
    guided = theirs.IntervalCFG(call, run.model.num_classes, run.cfg_scale, interval, True).eval()
    network = theirs.Net(guided, args, size, channels, pred_type="EPSILON").to(run.device)

    @torch.no_grad()
    def draw(seed: int) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            images = theirs.ablation_sampler(
                network, run.latents(seed), run.labels(), num_steps=run.steps, solver="heun", discretization="edm"
            )
        return images.float().cpu()

    return draw


def _erd_network(run: Run) -> Call:
    """Their DiT or U-ViT with the sizes of ours and random weights, in the run's precision."""
    config, device = run.model.config, run.device
    if not isinstance(config, DiTConfig | UViTConfig):
        raise ValueError(f"erd has no {config.backbone}: choose a dit or uvit preset")
    sizes = {
        "image_size": config.input_shape[1],
        "patch_size": config.patch_size,
        "in_channels": config.input_shape[0],
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": config.num_classes,
        "class_dropout_prob": 0.1,  # adds the null class
    }
    try:
        if isinstance(config, DiTConfig):
            model = importlib.import_module("models.dit").DiT(hidden_size=config.width, **sizes)
        else:
            model = importlib.import_module("models.uvit").UViT(embed_dim=config.width, **sizes)
    except ModuleNotFoundError as error:
        raise ValueError(f"erd needs the package {error.name}: pip install {error.name}") from error
    model = model.to(device).requires_grad_(False).eval()
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)

    def call(x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            output = model(x, time, y=y)
        return (output[0] if isinstance(output, tuple) else output).float()

    return call


def sides(run: Run, erd_path: str | None = None) -> dict[str, Draw]:
    """All sides of a run; "fused" is ours. The separate calls of guidance are no side of a run without guidance."""
    chosen: dict[str, Draw] = {"eager": partial(plain, run, joined=True)}
    if run.cfg_scale != 1.0:
        chosen["eager_separate"] = partial(plain, run, joined=False)
    if erd_path is not None:
        chosen["erd"] = erd(erd_path, run)
        chosen["erd_whole"] = erd(erd_path, run, whole=True)
    chosen["fused"] = partial(ours, run)
    chosen["ours_compile"] = partial(ours, run, compile=True)
    return chosen
