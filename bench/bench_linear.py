"""The matrix products of the networks at their sizes: what a GPU reaches of one large product's rate.

`python -m bench.bench_linear` prints a table and writes bench/results/<device>/linear.json, from which bench.roofline
and bench.step_model take the time of a step's products. A case is the three products of a Linear in one pass, called
forward: its result with the bias, and the gradients of its input and its weights (the bias's is a sum, not a product).
"fused" calls the library for each as a training step does, and eager is the same through autograd. The others are what
could be done instead, and none of them is in use:

    tuned        kernels chosen by measurement among the library's and Triton's (torch.compile's max-autotune; at
                 the sizes of the first network alone: it takes half a minute each)
    cublaslt     the other library, where PyTorch's choice is not that
    padded       U-ViT's 258 tokens as 264, a multiple of 8: more rows than are needed
    split        the gradient of the weights as 4 sums over a quarter of the rows each
    wide         the gradient of the weights in float32 at once; "widened" is fused and that conversion
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
    "cuda": (("uvit_h2", 128), ("dit_xl2", 128), ("dit_b2", 128), ("lightningdit_xl1", 128), ("jit_b16", 128)),
    "cpu": (("dit_digits", 128),),
}
"""(network, batch)."""
SHARE = 0.02
"""A size is measured if it takes more than this part of the operations of a network's products."""
TOKENS, PADDED = 258, 264
SPLITS = 4

Products = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(x, weight, bias, gradient of the result) => result, gradients of x and weight."""


class Shape(NamedTuple):
    """(R, D) by weights (M, D)."""

    rows: int
    inputs: int
    outputs: int


def shapes(models: Sequence[tuple[str, int]]) -> list[Shape]:
    """Of these networks' products with weights, once each."""
    found: dict[Shape, None] = {}
    for model, batch in models:
        works = [work for work in step_budget(presets.model_config(model), batch) if work.op == OP]
        total = sum(work.flops for work in works)
        found |= {Shape(*(work.fields or {})["shape"]): None for work in works if work.flops > SHARE * total}
    return list(found)


def products(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As autograd multiplies."""
    return F.linear(x, weight, bias), grad @ weight, grad.t() @ x


def by_autograd(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a graph."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = F.linear(x, weight, bias)
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), grad)
    return out.detach(), grad_x, grad_weight


def by_cublaslt(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by cuBLASLt."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        return products(x, weight, bias, grad)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def split(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the weights by parts of the rows."""
    grads, inputs = (t.view(SPLITS, -1, t.shape[1]) for t in (grad, x))
    return F.linear(x, weight, bias), grad @ weight, torch.bmm(grads.transpose(1, 2), inputs).sum(0)


def wide(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the weights in float32."""
    return F.linear(x, weight, bias), grad @ weight, torch.mm(grad.t(), x, out_dtype=torch.float32)


def widened(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `wide` spares: the gradient of the weights is converted afterwards."""
    out, grad_x, grad_weight = products(x, weight, bias, grad)
    return out, grad_x, grad_weight.float()


def first_rows(run: Products, rows: int) -> Products:
    """Of inputs that have more."""
    return lambda x, weight, bias, grad: run(x[:rows], weight, bias, grad[:rows])


def candidates(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Products]:
    """What else could be done at this size; on a CPU the libraries are others."""
    found: dict[str, Products] = {"split": split} if shape.rows % SPLITS == 0 else {}
    if device == "cuda":
        found["cublaslt"] = by_cublaslt
        if dtype != torch.float32:
            found |= {"wide": wide, "widened": widened}
        if shape in shapes(MODELS[device][:1]):
            found["tuned"] = torch.compile(products, mode="max-autotune-no-cudagraphs", dynamic=False)
    return found


def make_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Inputs are as long as the longest side wants them; all others take their first rows."""
    rows, inputs, outputs = shape
    pads = rows % TOKENS == 0
    length = rows // TOKENS * PADDED if pads else rows

    def make_inputs(i: int) -> tuple[Tensor, ...]:
        sizes = ((length, inputs), (outputs, inputs), (outputs,), (length, outputs))
        return tuple(torch.randn(size, device=device).to(dtype) for size in sizes)

    sides = {"eager": by_autograd, "fused": products, **candidates(shape, dtype, device)}
    numbers = rows * inputs + inputs * outputs + rows * outputs
    return Case(
        name=f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        fields={"shape": list(shape), "dtype": dtype},
        make_inputs=make_inputs,
        sides={name: first_rows(side, rows) for name, side in sides.items()} | ({"padded": products} if pads else {}),
        passes=("forward",),
        bytes={"forward": 3 * dtype.itemsize * numbers},
        flops={"forward": 6 * rows * inputs * outputs},
        compile=False,  # it calls the same library
    )


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Every size; on a GPU no float32, in which no step multiplies."""
    for dtype in dtypes:
        if device == "cpu" or dtype != torch.float32:
            for shape in shapes(MODELS[device]):
                yield make_case(shape, dtype, device)


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
