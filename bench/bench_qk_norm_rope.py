"""Norm and rotation of q and k in front of attention: the fused op beside the way the published codes write it.

eager splits the output of the qkv Linear by heads, normalises q and k over a head in float32 and turns their pairs in
float32; v stays a view. The gradient of all three goes back into one tensor.

`python -m bench.bench_qk_norm_rope` prints a table and writes bench/results/<device>/qk_norm_rope.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops.qk_norm_rope import qk_norm_rope, rope_tables

OP = "qk_norm_rope"
EPS = 1e-6
SHAPES = {
    "cuda": ((128, 256, 16, 72), (128, 256, 12, 64), (128, 258, 16, 64), (8, 256, 16, 72), (128, 255, 5, 80)),
    "cpu": ((2, 256, 12, 64), (2, 256, 16, 72)),
}
"""Samples, tokens, heads, head width: LightningDiT-XL, JiT-B, two more tokens, few samples, and odd sizes."""


def eager(num_heads: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """As models write it: a norm that returns to the input's dtype, a rotation by stacking."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, _ = qkv.shape
        q, k, v = qkv.view(batch, length, 3, num_heads, -1).unbind(2)
        cos, sin = cos[:, None], sin[:, None]
        q = turn(norm(q, q_weight), cos, sin).to(qkv.dtype)
        k = turn(norm(k, k_weight), cos, sin).to(qkv.dtype)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    return run


def fused(num_heads: int) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """The same through the op."""

    def run(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return qk_norm_rope(qkv, num_heads, q_weight=q_weight, k_weight=k_weight, eps=EPS, rope=(cos, sin))

    return run


def make_inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Callable[[int], tuple]:
    """qkv and weights with gradients, and the tables of a grid of one row."""
    batch, length, heads, width = shape

    def make(_: int) -> tuple:
        qkv = torch.randn(batch, length, 3 * heads * width, device=device, dtype=dtype, requires_grad=True)
        weights = [torch.rand(width, device=device, requires_grad=True) for _ in range(2)]
        return (qkv, *weights, *rope_tables((1, length), width, device=device))

    return make


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Norm and rotation at every shape and dtype."""
    for dtype in dtypes:
        for shape in SHAPES[device]:
            batch, length, heads, width = shape
            part = batch * length * heads * width * dtype.itemsize  # one of q, k and v
            yield Case(
                name=f"{batch}x{length}x{heads}x{width} {str(dtype).removeprefix('torch.')}",
                fields={"shape": list(shape), "dtype": dtype},
                make_inputs=make_inputs(shape, dtype, device),
                sides={"eager": eager(heads), "fused": fused(heads)},
                bytes={"forward": 4 * part, "backward": 8 * part},
                backend=backend_of(OP, device, dtype),
            )


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
