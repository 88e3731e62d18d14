"""Drawing images: the Heun sampler with guidance through this package's ops beside their plain PyTorch references.

Ten steps are nineteen calls of the network, each for the guided and the unguided half. Networks have random weights.
`python -m bench.bench_sampler` prints a table and writes bench/results/<device>/sampler.json.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.harness import Case, run_cases
from erdfast import presets
from erdfast.models import Backbone
from erdfast.models.flops import forward_flops, parameter_count
from erdfast.ops.backend import default_backend
from erdfast.process import Process
from erdfast.sampling import sample

OP = "sampler"
SIZES = {
    "cuda": (("uvit_h2", 64), ("dit_xl2", 64), ("dit_b2", 256)),
    "cpu": (("uvit_digits", 16),),
}
"""Networks, and images at a time."""
STEPS = {"cuda": 10, "cpu": 3}


@functools.lru_cache(maxsize=1)
def network(model: str, device: str) -> tuple[Backbone, Process]:
    """With random numbers in place of the zeros that training starts from: products of zeros are faster."""
    built = presets.build_model(model).to(device).requires_grad_(False)
    for parameter in built.parameters():
        if not parameter.any():
            parameter.normal_(std=0.02)
    return built, Process(schedule="cosine", target="eps", weighting="erd").to(device)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Networks and dtypes."""
    for dtype in dtypes:
        for model, num in SIZES[device]:
            yield make_case(model, num, STEPS[device], dtype, device)


def make_case(model: str, num: int, steps: int, dtype: torch.dtype, device: str) -> Case:
    """Every call of the network reads all weights at least once."""
    config = presets.model_config(model)
    calls = 2 * steps - 1

    def fused(seed: int) -> Tensor:
        built, process = network(model, device)
        autocast = None if dtype == torch.float32 else dtype
        return sample(
            built, process, num=num, cfg_scale=2.0, steps=steps, seed=seed, batch_size=num, autocast_dtype=autocast
        )

    def eager(seed: int) -> Tensor:
        with default_backend("reference"):
            return fused(seed)

    return Case(
        name=f"{model} {num} images {str(dtype).removeprefix('torch.')}",
        fields={"model": model, "images": num, "steps": steps, "dtype": dtype},
        make_inputs=lambda i: (i,),
        sides={"eager": eager, "fused": fused},
        passes=("forward",),
        bytes={"forward": calls * dtype.itemsize * parameter_count(config)},
        flops={"forward": 2 * calls * num * forward_flops(config)},
        backend="reference" if device == "cpu" else None,  # what a network calls is compiled for GPUs alone
        compile=False,
    )


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
