"""One optimiser step over all parameters of a network: AdamW and one average of the weights, with or without clipping.

eager is torch's foreach AdamW and a foreach lerp, torch_fused its fused AdamW and the same lerp, apex NVIDIA's
FusedAdam (where it is installed) and the same lerp, fused is AdamWEma. Per parameter and without clipping they move
80 + 12 (eager), 28 + 12 (torch_fused, apex) and 36 bytes (fused). All sides share parameters, gradients, moments
and averages; each has an optimiser of its own. Gradients stay where they are, as if zeroed in place.

`python -m bench.bench_adamw_ema` prints a table and writes bench/results/<device>/adamw_ema.json.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Case, backend_of, run_cases
from erdfast.ops import BACKENDS, AdamWEma
from erdfast.presets import build_model

OP = "adamw_ema"
MODELS = {"cpu": ("uvit_digits", "dit_b2"), "cuda": ("uvit_h2", "dit_xl2", "dit_b2", "uvit_digits")}
"""uvit_digits is a million parameters in many small tensors."""
OPTIONS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAY = 0.9999
MAX_NORM = 1.0

Optimizers = dict[str, torch.optim.Optimizer]


def shapes_of(model: str) -> list[torch.Size]:
    """Of its trained parameters."""
    with torch.device("meta"):
        network = build_model(model)
    return [parameter.shape for parameter in network.parameters() if parameter.requires_grad]


def fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """NVIDIA's; the `apex` of PyPI is something else and has no such class."""
    try:
        return importlib.import_module("apex.optimizers").FusedAdam
    except (ImportError, AttributeError):
        return None


def make_optimizers(params: list[nn.Parameter], averages: list[Tensor]) -> Optimizers:
    """One for each side; they share the moments. Apex keeps its own way of counting steps."""
    made: Optimizers = {
        "eager": torch.optim.AdamW(params, foreach=True, **OPTIONS),
        "torch_fused": torch.optim.AdamW(params, fused=True, **OPTIONS),
        "fused": AdamWEma(params, emas=[(averages, DECAY)], **OPTIONS),
    }
    moments = [(torch.zeros_like(param), torch.zeros_like(param)) for param in params]
    for side, optimizer in made.items():
        for param, (first, second) in zip(params, moments, strict=True):
            step = torch.zeros((), device="cpu" if side == "eager" else param.device)
            optimizer.state[param] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
    if (apex := fused_adam()) is not None and params[0].is_cuda:
        made["apex"] = apex(params, adam_w_mode=True, **OPTIONS)
        for param, (first, second) in zip(params, moments, strict=True):
            made["apex"].state[param] = {"exp_avg": first, "exp_avg_sq": second}
    return made


def step_and_average(side: str, clip: bool) -> Callable[..., None]:
    """Clipping, optimiser and average as trainers write them."""

    def run(params: list[nn.Parameter], averages: list[Tensor], optimizers: Optimizers) -> None:
        if clip:
            nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizers[side].step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, list[Tensor](params), 1.0 - DECAY)  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim does

    return run


def fused(clip: bool) -> Callable[..., None]:
    """All in one pass, the norm in another."""

    def run(params: list[nn.Parameter], averages: list[Tensor], optimizers: Optimizers) -> None:
        optimizer = optimizers["fused"]
        assert isinstance(optimizer, AdamWEma)
        optimizer.step(max_norm=MAX_NORM if clip else None)

    return run


def make_case(model: str, clip: bool, device: str) -> Case:
    """36 bytes per parameter; 4 more to read the gradients for their norm."""
    shapes = shapes_of(model)
    numel = sum(shape.numel() for shape in shapes)

    def make_inputs(i: int) -> tuple:
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        for param in params:
            param.grad = torch.randn_like(param)
        averages = [param.detach().clone() for param in params]
        return params, averages, make_optimizers(params, averages)

    sides: dict[str, Callable[..., None]] = {"eager": step_and_average("eager", clip), "fused": fused(clip)}
    sides["torch_fused"] = step_and_average("torch_fused", clip)
    if device == "cuda" and fused_adam() is not None:
        sides["apex"] = step_and_average("apex", clip)
    return Case(
        name=f"{model}{' clipped' * clip}",
        fields={"model": model, "parameters": numel, "tensors": len(shapes), "dtype": torch.float32, "clip": clip},
        make_inputs=make_inputs,
        sides=sides,
        passes=("forward",),
        backend=backend_of(OP, device, torch.float32, BACKENDS),
        bytes={"forward": (40 if clip else 36) * numel},
        compile=False,  # takes minutes for hundreds of tensors; fused AdamW is what torch offers for speed
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Parameters and gradients are float32 whatever the dtype of the network."""
    for model in MODELS[device]:
        for clip in (False, True):
            yield make_case(model, clip, device)


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
