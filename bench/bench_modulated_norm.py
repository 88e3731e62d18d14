"""What stands between the matrix products of a block: residual, norm and modulation in one pass each way, beside eager
PyTorch and torch.compile.

As under autocast, the residual stream is float32 whatever the dtype of branch, modulation and result; gate, shift and
scale are chunks of one tensor. Cases: "middle" (gated residual, LayerNorm, modulation: the middle of a DiT block),
"first" (LayerNorm and modulation), "end" (gated residual), "uvit" (residual and LayerNorm with weight and bias), "rms"
(gated residual, RMSNorm with weight, modulation: LightningDiT).

`python -m bench.bench_modulated_norm` prints a table and writes bench/results/<device>/modulated_norm.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops.modulated_norm import gated_residual, modulated_norm, residual_norm

OP = "modulated_norm"
SHAPES = {
    "cuda": ((128, 256, 1152), (128, 256, 1024), (256, 256, 768), (256, 256, 384), (64, 257, 1001)),
    "cpu": ((8, 256, 384), (4, 65, 331)),
}
"""Presets' widths and tokens at a batch per GPU, and sizes that are multiples of nothing."""
UVIT_SHAPES = {"cuda": ((128, 258, 1152), (256, 258, 768)), "cpu": ((128, 18, 128),)}


def eager_norm(r: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As DiT spells it, and the cast that autocast makes for the Linear that follows."""
    normed = F.layer_norm(r, r.shape[-1:], eps=1e-6)
    return (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(dtype)


def eager_sides(kind: str, dtype: torch.dtype) -> Callable[..., Any]:
    """What the published networks do, by case."""

    def middle(x: Tensor, branch: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift, scale = modulation.chunk(3, dim=1)
        r = x + gate.unsqueeze(1) * branch
        return r, eager_norm(r, shift, scale, dtype)

    def first(x: Tensor, modulation: Tensor) -> Tensor:
        _, shift, scale = modulation.chunk(3, dim=1)
        return eager_norm(x, shift, scale, dtype)

    def end(x: Tensor, branch: Tensor, modulation: Tensor) -> Tensor:
        return x + modulation.chunk(3, dim=1)[0].unsqueeze(1) * branch

    def uvit(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        r = x + branch
        return r, F.layer_norm(r, r.shape[-1:], weight, bias, eps=1e-5).to(dtype)

    def rms(x: Tensor, branch: Tensor, modulation: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gate, shift, scale = modulation.chunk(3, dim=1)
        r = x + gate.unsqueeze(1) * branch
        normed = F.rms_norm(r, r.shape[-1:], weight, eps=1e-6)
        return r, (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(dtype)

    return {"middle": middle, "first": first, "end": end, "uvit": uvit, "rms": rms}[kind]


def fused_sides(kind: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The ops, by case."""

    def middle(x: Tensor, branch: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, *modulation.chunk(3, dim=1), dtype=dtype)

    def first(x: Tensor, modulation: Tensor) -> Tensor:
        return modulated_norm(x, *modulation.chunk(3, dim=1)[1:], dtype=dtype)

    def end(x: Tensor, branch: Tensor, modulation: Tensor) -> Tensor:
        return gated_residual(x, modulation.chunk(3, dim=1)[0], branch)

    def uvit(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, weight=weight, bias=bias, eps=1e-5, dtype=dtype)

    def rms(x: Tensor, branch: Tensor, modulation: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return residual_norm(x, branch, *modulation.chunk(3, dim=1), weight=weight, norm="rms", dtype=dtype)

    return {"middle": middle, "first": first, "end": end, "uvit": uvit, "rms": rms}[kind]


INPUTS = {
    "middle": ("x", "branch", "modulation"),
    "first": ("x", "modulation"),
    "end": ("x", "branch", "modulation"),
    "uvit": ("x", "branch", "weight", "bias"),
    "rms": ("x", "branch", "modulation", "weight"),
}


def bytes_per_element(kind: str, s: int) -> dict[str, int]:
    """Of the (B, L, D) tensors, the stream being float32 and everything else s bytes.

    Forward: reads x and branch, writes r and y. Backward: reads r, its gradient, that of y and the branch (which only
    the gate's gradient needs), writes the gradients of x and branch. At the end of a block the gradient of x is that of
    the result.
    """
    return {
        "middle": {"forward": 8 + 2 * s, "backward": 12 + 3 * s},
        "rms": {"forward": 8 + 2 * s, "backward": 12 + 3 * s},
        "uvit": {"forward": 8 + 2 * s, "backward": 12 + (2 * s if s < 4 else s)},
        "first": {"forward": 4 + s, "backward": 8 + s},
        "end": {"forward": 8 + s, "backward": 4 + 2 * s},
    }[kind]


def make_case(kind: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> Case:
    """One kind, size and dtype."""
    B, _, D = shape
    shapes = {"x": shape, "branch": shape, "modulation": (B, 3 * D), "weight": (D,), "bias": (D,)}

    def make_inputs(i: int) -> tuple[Tensor, ...]:
        dtypes = {"branch": dtype, "modulation": dtype}
        tensors = (torch.randn(shapes[n], device=device).to(dtypes.get(n, torch.float32)) for n in INPUTS[kind])
        return tuple(tensor.requires_grad_() for tensor in tensors)

    elements = torch.Size(shape).numel()
    per_element = bytes_per_element(kind, dtype.itemsize)
    return Case(
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')} {kind}",
        fields={"shape": list(shape), "dtype": dtype, "stream": "float32", "kind": kind},
        make_inputs=make_inputs,
        sides={"eager": eager_sides(kind, dtype), "fused": fused_sides(kind, dtype)},
        bytes={name: elements * count for name, count in per_element.items()},
        backend=backend_of(OP, device, torch.float32),
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """The middle of a DiT block at every width; the other kinds at the largest."""
    for dtype in dtypes:
        for shape in SHAPES[device]:
            yield make_case("middle", shape, dtype, device)
        for kind in ("first", "end", "rms"):
            yield make_case(kind, SHAPES[device][0], dtype, device)
        for shape in UVIT_SHAPES[device]:
            yield make_case("uvit", shape, dtype, device)


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
