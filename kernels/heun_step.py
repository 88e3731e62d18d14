"""One step of an Euler or Heun sampler from the network's output to its next input, in one pass over memory.

    pred  = uncond + cfg_scale * (cond - uncond)        (or the only prediction there is)
    slope = pred_factor * pred + state_factor * y       y: the state that the network saw
    x_new = x + step * slope                            predictor, and Euler: y = x
    x_new = (x + y)/2 + step/2 * slope                  corrector: y is what the predictor made of x
    input = input_scale * x_new                         in the network's dtype, once or twice

The corrector is Heun's x + step * (first + second)/2 with first = (y - x)/step put in: no slope is ever stored.

Per element of the state, p being the bytes of one number of the prediction and i those of the network's input:

    read      4 + p             (8 + p in the corrector, one more p with guidance)
    written   4 + i             (4 + 2 i where the next call is guided)
    flops     5 to 11

The five numbers are read on the device: nothing waits, and a CUDA graph replays with whatever row was copied in.
Every element is read before it is written by the same thread: the new state may overwrite either old one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import load_float

BLOCK = 512
"""4 elements to a thread, 16 bytes of float32. With 8, those of bf16 and of float32 lie with different threads and meet
through shared memory."""


@triton.jit(do_not_specialize_on_alignment=["row_ptr"])
def heun_step_kernel(
    out_ptr,
    input_ptr,
    pred_ptr,
    x_ptr,
    x_in_ptr,
    row_ptr,
    n,
    pred_stride,
    chunks,
    batch,
    GUIDED: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements of one sample. x_in_ptr is None in the predictor."""
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    i = (pid % chunks) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    pred = load_float(pred_ptr + b * pred_stride + i, mask)
    if GUIDED:
        uncond = load_float(pred_ptr + (b + batch) * pred_stride + i, mask)
        pred = uncond + tl.load(row_ptr) * (pred - uncond)
    x = load_float(x_ptr + b * n + i, mask)
    step = tl.load(row_ptr + 3)
    if x_in_ptr is None:
        y = x
    else:
        y = load_float(x_in_ptr + b * n + i, mask)
        x = 0.5 * (x + y)
        step = 0.5 * step
    new = x + step * (tl.load(row_ptr + 1) * pred + tl.load(row_ptr + 2) * y)
    tl.store(out_ptr + b * n + i, new, mask=mask)
    if COPIES:
        scaled = (tl.load(row_ptr + 4) * new).to(input_ptr.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(input_ptr + (b + copy * batch) * n + i, scaled, mask=mask)


def heun_step(
    out: Tensor, network_input: Tensor | None, pred: Tensor, x: Tensor, x_in: Tensor | None, row: Tensor
) -> None:
    """Writes the new state into `out` and what the network reads next into `network_input`.

    All tensors are on one device; the caller has checked them.

    Args:
        out: (B, n) float32 contiguous; may be x or x_in, or share no memory with any other.
        network_input: (B, n) or (2B, n) contiguous, float32, bfloat16 or float16; None if nothing reads it.
        pred: (B, m) or (2B, m) with m >= n, any of the three dtypes, last stride 1; the first n numbers of a row count.
            Of 2B rows the first B are conditional, the others not.
        x: (B, n) float32 contiguous, the state at the step's start.
        x_in: None in the predictor, else (B, n) float32 contiguous, the predictor's result.
        row: (5,) float32 contiguous: cfg_scale, pred_factor, state_factor, step, input_scale.
    """
    batch, n = x.shape
    if x.numel() == 0:
        return
    chunks = triton.cdiv(n, BLOCK)
    with torch.cuda.device_of(x):
        heun_step_kernel[(batch * chunks,)](
            out,
            network_input,
            pred,
            x,
            x_in,
            row,
            n,
            pred.stride(0),
            chunks,
            batch,
            GUIDED=pred.shape[0] != batch,
            COPIES=0 if network_input is None else network_input.shape[0] // batch,
            BLOCK=BLOCK,
            num_warps=4,
        )
