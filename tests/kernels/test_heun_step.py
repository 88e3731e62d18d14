import pytest
import torch

from erdfast.kernels.heun_step import BLOCK, heun_step
from tests.kernels.inputs import DTYPES, ROUNDING, assert_guard_intact, assert_within, guarded

SHAPES = [(1, 1), (3, 5), (2, BLOCK), (2, 2 * BLOCK + 3)]
ROW = (1.75, -0.4, 0.9, -0.3, 0.6)


def make_inputs(shape, dtype, device, *, guided, corrector, extra=0):
    """(pred, x, x_in, row); `extra` numbers beyond the prediction's are NaN."""
    batch, n = shape
    rng = torch.Generator().manual_seed(1000 * batch + n)
    pred = torch.full((batch * (1 + guided), n + extra), float("nan"))
    pred[:, :n] = torch.randn(batch * (1 + guided), n, generator=rng)
    x, x_in = (torch.randn(shape, generator=rng).to(device) for _ in range(2))
    return pred.to(dtype).to(device), x, x_in if corrector else None, torch.tensor(ROW, device=device)


def reference(pred, x, x_in, row):
    """(x_new, network input) in float64: Heun's rule with both slopes written out."""
    scale, pred_factor, state_factor, step, input_scale = row.cpu().double()
    pred, x = pred.cpu().double()[:, : x.shape[1]], x.cpu().double()
    if len(pred) != len(x):
        cond, uncond = pred.chunk(2)
        pred = (1 - scale) * uncond + scale * cond
    if x_in is None:
        new = x + step * (pred_factor * pred + state_factor * x)
    else:
        y = x_in.cpu().double()
        first, second = (y - x) / step, pred_factor * pred + state_factor * y
        new = x + step * (first + second) / 2
    return new, input_scale * new


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("corrector", [False, True], ids=["predictor", "corrector"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, guided, corrector, shape, device):
    dtype = DTYPES[dtype]
    pred, x, x_in, row = make_inputs(shape, dtype, device, guided=guided, corrector=corrector, extra=3)
    for copies in (0, 1, 2):
        whole, out = guarded(shape, torch.float32, device)
        whole_input, network_input = guarded((copies * shape[0], shape[1]), dtype, device)
        heun_step(out, network_input if copies else None, pred, x, x_in, row)
        new, wanted = reference(pred, x, x_in, row)
        assert_within(out, new, 1e-6 * new.abs() + 2e-6)
        for copy in network_input.chunk(copies) if copies else ():
            assert_within(copy, wanted, ROUNDING[dtype] * wanted.abs() + 2e-6)
        assert_guard_intact(whole)
        assert_guard_intact(whole_input)


@pytest.mark.parametrize("over", ["x", "x_in"])
def test_overwrites_either_state(over, device):
    pred, x, x_in, row = make_inputs((2, 2 * BLOCK + 3), torch.float32, device, guided=True, corrector=True)
    assert x_in is not None
    expected = torch.empty_like(x)
    heun_step(expected, None, pred, x, x_in, row)
    out = x if over == "x" else x_in
    heun_step(out, None, pred, x, x_in, row)
    assert torch.equal(out, expected)


def test_rows_of_a_table_and_samples_far_apart(device):
    """A row that starts at no multiple of 16 bytes; a prediction that is a slice of a larger output."""
    pred, x, _, row = make_inputs((3, 8), torch.float32, device, guided=False, corrector=False, extra=5)
    table = torch.stack([row, row, row])
    first, second = torch.empty_like(x), torch.empty_like(x)
    heun_step(first, None, pred, x, None, table[1])
    heun_step(second, None, pred[:, :8], x, None, row)
    assert torch.equal(first, second)
    assert_within(first, reference(pred, x, None, row)[0], 2e-6)


def test_empty_batch(device):
    pred, x, _, row = make_inputs((0, 8), torch.float32, device, guided=False, corrector=False)
    heun_step(torch.empty_like(x), torch.empty_like(x), pred, x, None, row)
