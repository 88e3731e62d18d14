"""What the tests of both kernels share: random inputs, guarded outputs, the float64 reference, tolerances."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.philox import normal

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = [(1, 1), (5, 3), (2, 5), (3, 257), (2, 1030), (2, 4099)]
"""The last one takes two programs per sample: 1,025 lanes of which a program has 1,024."""

SEED = -0x0123456789ABCDEF
STREAM = 2**31 + 5
MOMENTS_SCALE = 0.18215

ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
"""Relative error of a stored number: half a unit in the last place for fp16. A whole unit for bf16, because
Triton's interpreter truncates where GPUs round to nearest. A few units for fp32, which is computed with as
many roundings."""

NORMAL_ERROR = 1e-6
"""Absolute error of a normal drawn in float32."""

GUARD = 256
"""Elements on each side of an output that must keep their poison: the interpreter does not notice a store out
of bounds."""


class Inputs(NamedTuple):
    x0: Tensor
    noise: Tensor | None
    coef: tuple[Tensor, Tensor, Tensor]
    """Three numbers per sample: (alpha, sigma, -) or (c_x, c_eps, w)."""
    seed: Tensor | None
    stream: Tensor | None
    sample_ids: Tensor | None
    moments_scale: float | None
    clean64: Tensor
    """x0 in float64, drawn from its moments where they are given: (B, n)."""
    eps64: Tensor


def make_inputs(
    shape: tuple[int, int], dtype: torch.dtype, *, keyed: bool, moments: bool, device: torch.device
) -> Inputs:
    """Random inputs and what they mean in float64; ids include numbers beyond 2^32 and below 0."""
    batch, n = shape
    rng = torch.Generator().manual_seed(1000 * batch + n)
    x0 = torch.randn(batch, 2 * n if moments else n, generator=rng).to(dtype)
    noise = None if keyed else torch.randn(batch, n, generator=rng)
    ids = torch.tensor([7, 2**40 + 3, -2, 0, 123456789])[:batch]
    a, b, c = (0.25 + torch.rand(batch, generator=rng) for _ in range(3))
    clean = x0.double()
    if moments:
        eta = normal(SEED, STREAM, ids, n, domain="posterior")
        clean = MOMENTS_SCALE * (clean[:, :n] + clean[:, n:] * eta)
    eps = normal(SEED, STREAM, ids, n) if noise is None else noise.double()
    needs_key = keyed or moments
    return Inputs(
        x0.to(device),
        None if noise is None else noise.to(device),
        (a.to(device), (-b).to(device), c.to(device)),
        torch.tensor(SEED, device=device) if needs_key else None,
        torch.tensor(STREAM, device=device) if needs_key else None,
        ids.to(device) if needs_key else None,
        MOMENTS_SCALE if moments else None,
        clean,
        eps,
    )


def guarded(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(whole, view): NaN everywhere, the view of `shape` lies between two guard zones."""
    numel = shape[0] * shape[1]
    whole = torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    return whole, whole[GUARD : GUARD + numel].view(shape)


def assert_guard_intact(whole: Tensor) -> None:
    assert whole[:GUARD].isnan().all(), "written before the output"
    assert whole[-GUARD:].isnan().all(), "written beyond the output"


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor | float) -> None:
    """|actual - expected| <= tolerance, element by element in float64; NaN fails."""
    error = (actual.detach().cpu().double() - expected).abs()
    excess = error - tolerance
    assert (excess <= 0).all(), f"error {error.flatten()[excess.argmax()]:.3g} is {excess.max():.3g} more than allowed"
