"""The matrix products of the networks at their sizes, with no bias: what a GPU reaches of one large product's rate.

`python -m bench.bench_linear` prints a table and writes bench/results/<device>/linear.json, from which bench.roofline
and bench.step_model take the time of a step's products. The fused side is the three products as a training step runs
them, and eager the same through autograd; the others are what could be done instead, and none of them is in use:

    tuned        kernels chosen by measurement among the library's and Triton's (torch.compile's max-autotune)
    cublaslt     the other library, where PyTorch's choice is not that
    padded       U-ViT's 258 tokens as 264, a multiple of 8: more rows than are needed
    split        the gradient of the weights as 4 sums over a quarter of the rows each
    wide         the gradient of the weights in float32, which spares its conversion before the optimiser
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.budget import step_budget
from bench.harness import Case, run_cases
from erdfast import presets

OP = "linear"
MODELS = {
    "cuda": (("uvit_h2", 128), ("dit_xl2", 128), ("dit_b2", 128), ("jit_b16", 128)),
    "cpu": (("dit_digits", 128),),
}
"""(network, batch); LightningDiT-XL's and DiT-XL's products are almost the same."""
SHARE = 0.02
"""A size is measured if it takes more than this part of the operations of a network's products."""
TOKENS, PADDED = 258, 264
SPLITS = 4

Products = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(x, weight, gradient of the result) => result, gradients of x and weight."""


class Shape(NamedTuple):
    """(R, D) by weights (M, D)."""

    rows: int
    inputs: int
    outputs: int


def shapes(device: str) -> list[Shape]:
    """Of all networks' products with weights, once each."""
    found: dict[Shape, None] = {}
    for model, batch in MODELS[device]:
        works = [work for work in step_budget(presets.model_config(model), batch) if work.op == OP]
        total = sum(work.flops for work in works)
        found |= {Shape(*(work.fields or {})["shape"]): None for work in works if work.flops > SHARE * total}
    return list(found)


def products(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autograd multiplies."""
    return F.linear(x, weight), grad @ weight, grad.t() @ x


def by_autograd(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a graph."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = F.linear(x, weight)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad)
    return out.detach(), grad_x, grad_weight


def by_cublaslt(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by cuBLASLt."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return products(x, weight, grad)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def split(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the weights by parts of the rows."""
    parts = [t.view(SPLITS, -1, t.shape[1]) for t in (grad, x)]
    return F.linear(x, weight), grad @ weight, torch.bmm(parts[0].transpose(1, 2), parts[1]).sum(0)


def wide(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the weights in float32."""
    return F.linear(x, weight), grad @ weight, torch.mm(grad.t(), x, out_dtype=torch.float32)


def padded(rows: int) -> Products:
    """With as many rows as PADDED tokens have, which are there already: no copy is made."""
    held: dict[int, list[Tensor]] = {}

    def run(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.data_ptr() not in held:
            more = rows // TOKENS * PADDED - rows
            held[x.data_ptr()] = [F.pad(t, (0, 0, 0, more)) for t in (x, grad)]
        longer = held[x.data_ptr()]
        return products(longer[0], weight, longer[1])

    return run


def candidates(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Products]:
    """What else could be done at this size; on a CPU the libraries are others."""
    found: dict[str, Products] = {"split": split} if shape.rows % SPLITS == 0 else {}
    if shape.rows % TOKENS == 0:
        found["padded"] = padded(shape.rows)
    if device == "cuda":
        found["cublaslt"] = by_cublaslt
        found["tuned"] = torch.compile(products, mode="max-autotune-no-cudagraphs", dynamic=False)
        if dtype != torch.float32:
            found["wide"] = wide
    return found


def make_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """All three products in one pass, called forward: they make no graph."""
    rows, inputs, outputs = shape

    def make_inputs(i: int) -> tuple[Tensor, ...]:
        sizes = ((rows, inputs), (outputs, inputs), (rows, outputs))
        return tuple(torch.randn(size, device=device).to(dtype) for size in sizes)

    numbers = rows * inputs + inputs * outputs + rows * outputs
    return Case(
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        fields={"shape": list(shape), "dtype": dtype},
        make_inputs=make_inputs,
        sides={"eager": by_autograd, "fused": products, **candidates(shape, dtype, device)},
        passes=("forward",),
        bytes={"forward": 3 * dtype.itemsize * numbers},
        flops={"forward": 6 * rows * inputs * outputs},
        compile=False,  # it calls the same library
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Every size and dtype."""
    for dtype in dtypes:
        for shape in shapes(device):
            yield make_case(shape, dtype, device)


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
