from typing import Any

import pytest
import torch

from erdfast.kernels.add_noise import add_noise, add_noise_kernel
from erdfast.ops.source import sample_layouts
from tests.kernels.inputs import (
    DTYPES,
    NORMAL_ERROR,
    ROUNDING,
    SHAPES,
    assert_guard_intact,
    assert_within,
    guarded,
    make_inputs,
)


def run(inputs, out):
    alpha, sigma, _ = inputs.coef
    seed, stream, ids = inputs.seed, inputs.stream, inputs.sample_ids
    drawn = inputs.noise is None or inputs.moments_scale is not None
    layouts = sample_layouts(inputs.x0, inputs.noise, out, drawn=drawn)
    add_noise(out, inputs.x0, inputs.noise, alpha, sigma, seed, stream, ids, inputs.moments_scale, layouts)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
@pytest.mark.parametrize("keyed", [True, False], ids=["key", "noise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, keyed, moments, shape, device):
    inputs = make_inputs(shape, DTYPES[dtype], keyed=keyed, moments=moments, device=device)
    whole, out = guarded(shape, DTYPES[dtype], device)
    run(inputs, out)
    alpha, sigma = (c.cpu().double()[:, None] for c in inputs.coef[:2])
    signal, noise = alpha * inputs.clean64, sigma * inputs.eps64
    tolerance = (
        ROUNDING[out.dtype] * (signal + noise).abs() + 2.0**-22 * (signal.abs() + noise.abs()) + 2 * NORMAL_ERROR
    )
    assert_within(out, signal + noise, tolerance)
    assert_guard_intact(whole)


@pytest.mark.parametrize(("x0", "out"), [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16")])
def test_mixes_dtypes(x0, out, device):
    inputs = make_inputs((2, 257), DTYPES[x0], keyed=True, moments=False, device=device)
    whole, view = guarded((2, 257), DTYPES[out], device)
    run(inputs, view)
    alpha, sigma = (c.cpu().double()[:, None] for c in inputs.coef[:2])
    expected = alpha * inputs.clean64 + sigma * inputs.eps64
    assert_within(view, expected, ROUNDING[view.dtype] * expected.abs() + 2 * NORMAL_ERROR)
    assert_guard_intact(whole)


def test_sample_does_not_depend_on_the_batch(device):
    inputs = make_inputs((5, 1030), torch.float32, keyed=True, moments=True, device=device)
    _, together = guarded((5, 1030), torch.float32, device)
    run(inputs, together)
    assert inputs.sample_ids is not None
    for b in range(5):
        _, alone = guarded((1, 1030), torch.float32, device)
        row = slice(b, b + 1)
        coef = (inputs.coef[0][row], inputs.coef[1][row], inputs.coef[2][row])
        run(inputs._replace(x0=inputs.x0[row], coef=coef, sample_ids=inputs.sample_ids[row]), alone)
        assert torch.equal(alone, together[row])


@pytest.mark.parametrize("layouts", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
def test_channels_last_is_the_same_numbers(layouts, moments, device):
    shape, numel = (2, 4, 17, 19), 4 * 17 * 19
    inputs = make_inputs((2, numel), torch.float32, keyed=True, moments=moments, device=device)
    _, plain = guarded((2, numel), torch.float32, device)
    run(inputs, plain)
    whole, out = guarded((2, numel), torch.float32, device)
    out = out.view(2, 17, 19, 4).movedim(-1, 1) if layouts[1] else out.view(shape)
    x0 = inputs.x0.view(2, -1, 17, 19)
    run(inputs._replace(x0=x0.contiguous(memory_format=torch.channels_last) if layouts[0] else x0), out)
    assert torch.equal(out.flatten(1), plain)
    assert_guard_intact(whole)


def test_offsets_beyond_32_bits(device):
    """The last of 5 samples of 2^29 + 3 elements starts beyond 2^31. Of each sample only the lanes of one
    program are computed; the rest of the memory is reserved, never touched. In place, which is allowed: every
    element is read where it is written."""
    batch, n = 5, 2**29 + 3
    block: Any = 512
    no: Any = False
    quarter = (n + 3) // 4
    x = torch.empty(batch, n, dtype=torch.float16, device=device)
    owned = torch.cat([torch.arange(j * quarter, min(j * quarter + block, n)) for j in range(4)]).to(device)
    values = torch.randn(batch, len(owned), generator=torch.Generator().manual_seed(0)).half().to(device)
    x[:, owned] = values
    alpha = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], device=device)
    add_noise_kernel[(batch,)](
        *(x, x, x, alpha, alpha, None, None, None, 1.0, n, quarter, 1, n, n, 0, n, 0, 0),
        KEYED=no,
        MOMENTS=no,
        X0_LAST=no,
        NOISE_LAST=no,
        OUT_LAST=no,
        BLOCK=block,
    )
    expected = 2.0 * alpha.cpu().double()[:, None] * values.cpu().double()
    assert_within(x[:, owned], expected, ROUNDING[x.dtype] * expected.abs())


def test_empty_batch_and_empty_samples(device):
    for shape in ((0, 7), (3, 0)):
        inputs = make_inputs(shape, torch.float32, keyed=True, moments=False, device=device)
        run(inputs, inputs.x0)
