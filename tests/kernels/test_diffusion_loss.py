from typing import Any

import pytest
import torch

from erdfast.kernels import layout
from erdfast.kernels.diffusion_loss import LOSS_BLOCK, diffusion_loss, scale_
from erdfast.ops.source import sample_layouts
from tests.kernels.inputs import (
    DTYPES,
    GUARD,
    NORMAL_ERROR,
    ROUNDING,
    SHAPES,
    assert_guard_intact,
    assert_within,
    make_inputs,
)


def make_pred(shape, dtype, device):
    rng = torch.Generator().manual_seed(shape[0] + 7 * shape[1])
    return (3.0 * torch.randn(shape, generator=rng)).to(dtype).to(device)


def run(inputs, pred, *, grad_scale=None, sums=True, grad=True) -> tuple[Any, Any]:
    """(sums, gradient); the loss is compared with the weighted mean of the sums."""
    out_grad = torch.empty_like(pred) if grad else None
    drawn = inputs.noise is None or inputs.moments_scale is not None
    layouts = sample_layouts(inputs.x0, inputs.noise, pred, out_grad, drawn=drawn)
    loss, out_sums = diffusion_loss(
        pred,
        inputs.x0,
        inputs.noise,
        inputs.coef[0],
        inputs.coef[1],
        inputs.coef[2],
        inputs.seed,
        inputs.stream,
        inputs.sample_ids,
        inputs.moments_scale,
        grad_scale,
        out_grad,
        sums,
        layouts,
    )
    assert (loss is None) == (out_sums is None)
    if loss is not None and out_sums is not None:
        expected = (inputs.coef[2].double() * out_sums[:, 0].double()).mean() / pred[0].numel()
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    return out_sums, out_grad


def reference(inputs, pred):
    """(r, sums, magnitude of the summands) in float64."""
    c_x, c_eps = (c.cpu().double()[:, None] for c in inputs.coef[:2])
    r = pred.cpu().double() - (c_x * inputs.clean64 + c_eps * inputs.eps64)
    terms = torch.stack([r * r, r * inputs.clean64, r * inputs.eps64], dim=2)
    return r, terms.sum(dim=1), terms.abs().sum(dim=1)


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that the launcher allocates is NaN and lies between guard zones, which `check` looks
    at."""
    whole = []

    def allocate(shape, dtype, device):
        numel = torch.Size(shape).numel()
        whole.append(torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype, device=device))
        return whole[-1][GUARD : GUARD + numel].view(shape)

    original = torch.Tensor.new_empty

    def new_empty(tensor, shape, *, dtype=None, device=None):
        if device is not None:  # the interpreter's own, which becomes a view of a launch's argument
            return original(tensor, shape, dtype=dtype, device=device)
        return allocate(shape, dtype, tensor.device)

    monkeypatch.setattr(torch, "empty_like", lambda t: allocate(t.shape, t.dtype, t.device))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)

    def check(count):
        assert len(whole) == count
        for tensor in whole:
            assert_guard_intact(tensor)

    return check


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
@pytest.mark.parametrize("keyed", [True, False], ids=["key", "noise"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, keyed, moments, shape, device, poisoned):
    batch, n = shape
    inputs = make_inputs(shape, DTYPES[dtype], keyed=keyed, moments=moments, device=device)
    pred = make_pred(shape, DTYPES[dtype], device)
    sums, grad = run(inputs, pred)
    r, sums64, magnitude = reference(inputs, pred)
    assert sums is not None
    assert sums.shape == (batch, 3)
    assert sums.dtype == torch.float32
    assert grad is not None
    assert grad.shape == shape
    assert grad.dtype == pred.dtype
    assert_within(sums, sums64, 1e-6 * magnitude)
    unit = 2.0 * inputs.coef[2].cpu().double()[:, None] / (batch * n)
    expected = unit * r
    denormal = torch.finfo(pred.dtype).smallest_normal * torch.finfo(pred.dtype).eps
    assert_within(grad, expected, ROUNDING[pred.dtype] * expected.abs() + 2 * NORMAL_ERROR * unit + denormal)
    poisoned(3 if n <= 4 * layout.MAX_BLOCK else 4)


def test_several_steps_and_programs(monkeypatch, device):
    """Samples beyond 8 million elements, in small: at most two programs, so that each takes two steps."""
    monkeypatch.setattr(layout, "MAX_CHUNKS", 2)
    n = 4 * 3000 + 1
    part = layout.partition(n)
    assert (part.steps, part.chunks) == (2, 2)
    inputs = make_inputs((2, n), torch.float32, keyed=True, moments=True, device=device)
    pred = make_pred((2, n), torch.float32, device)
    sums, grad = run(inputs, pred)
    r, sums64, magnitude = reference(inputs, pred)
    assert sums is not None
    assert grad is not None
    assert_within(sums, sums64, 1e-6 * magnitude)
    unit = 2.0 * inputs.coef[2].cpu().double()[:, None] / (2 * n)
    assert_within(grad, unit * r, 2.0**-22 * (unit * r).abs() + 2 * NORMAL_ERROR * unit)


@pytest.mark.parametrize(("pred", "x0"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_mixes_dtypes(pred, x0, device):
    inputs = make_inputs((3, 257), DTYPES[x0], keyed=True, moments=False, device=device)
    prediction = make_pred((3, 257), DTYPES[pred], device)
    sums, grad = run(inputs, prediction)
    r, sums64, magnitude = reference(inputs, prediction)
    assert sums is not None
    assert grad is not None
    assert grad.dtype == DTYPES[pred]
    assert_within(sums, sums64, 1e-6 * magnitude)
    expected = 2.0 * inputs.coef[2].cpu().double()[:, None] / (3 * 257) * r
    assert_within(grad, expected, ROUNDING[grad.dtype] * expected.abs() + 1e-8)


@pytest.mark.parametrize("layouts", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("keyed", [True, False], ids=["key", "noise"])
@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
def test_channels_last_is_the_same_numbers(layouts, keyed, moments, device):
    """Of x0, noise and pred in turn; elements are numbered channels first in either layout."""
    shape = (2, 3, 19, 23)
    inputs = make_inputs((2, 3 * 19 * 23), torch.bfloat16, keyed=keyed, moments=moments, device=device)
    pred = make_pred((2, 3 * 19 * 23), torch.bfloat16, device).view(shape)
    sums, grad = run(inputs, pred.flatten(1))
    x0 = inputs.x0.view(2, -1, 19, 23)
    noise = None if inputs.noise is None else inputs.noise.view(shape)
    x0, noise, pred = (
        t.contiguous(memory_format=torch.channels_last) if last and t is not None else t
        for t, last in zip((x0, noise, pred), layouts, strict=True)
    )
    assert pred is not None
    sums_last, grad_last = run(inputs._replace(x0=x0, noise=noise), pred)
    torch.testing.assert_close(sums_last, sums, rtol=1e-6, atol=1e-5)
    assert grad_last.stride() == pred.stride()
    assert torch.equal(grad_last.flatten(1), grad)


@pytest.mark.parametrize("n", [257, 4099])
def test_computes_only_what_is_wanted(n, device):
    inputs = make_inputs((3, n), torch.float32, keyed=True, moments=False, device=device)
    pred = make_pred((3, n), torch.float32, device)
    r, sums64, magnitude = reference(inputs, pred)
    sums, no_grad = run(inputs, pred, grad=False)
    no_sums, grad = run(inputs, pred, sums=False)
    assert sums is not None
    assert grad is not None
    assert no_sums is None
    assert no_grad is None
    assert_within(sums, sums64, 1e-6 * magnitude)
    unit = 2.0 * inputs.coef[2].cpu().double()[:, None] / (3 * n)
    assert_within(grad, unit * r, 2.0**-22 * (unit * r).abs() + 2 * NORMAL_ERROR * unit)
    assert run(inputs, pred, sums=False, grad=False) == (None, None)


@pytest.mark.parametrize("n", [257, 4099])
def test_sums_do_not_depend_on_the_batch(n, device):
    inputs = make_inputs((5, n), torch.float32, keyed=True, moments=False, device=device)
    pred = make_pred((5, n), torch.float32, device)
    sums, _ = run(inputs, pred, grad=False)
    assert sums is not None
    assert inputs.sample_ids is not None
    row = slice(3, 4)
    coef = (inputs.coef[0][row], inputs.coef[1][row], inputs.coef[2][row])
    one = inputs._replace(x0=inputs.x0[row], coef=coef, sample_ids=inputs.sample_ids[row])
    alone, _ = run(one, pred[row], grad=False)
    assert alone is not None
    assert torch.equal(alone, sums[row])


def test_loss_scale_acts_before_rounding_to_fp16(device):
    """Gradients of about 1e-8 are zero in fp16, unless they are scaled in float32 first."""
    inputs = make_inputs((2, 1030), torch.float16, keyed=True, moments=False, device=device)
    w = torch.full((2,), 1e-5, device=device)
    inputs = inputs._replace(coef=(*inputs.coef[:2], w))
    pred = make_pred((2, 1030), torch.float16, device)
    _, unscaled = run(inputs, pred, sums=False)
    _, scaled = run(inputs, pred, sums=False, grad_scale=torch.tensor(65536.0, device=device))
    r, _, _ = reference(inputs, pred)
    expected = 65536.0 * 2e-5 / 2060 * r
    assert unscaled is not None
    assert (unscaled == 0).float().mean() > 0.5
    assert scaled is not None
    assert_within(scaled, expected, 2.0**-11 * expected.abs() + 2.0**-24)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("n", [257, 4099])
def test_not_finite_predictions_show(n, value, device):
    """In the sums of their sample and in the gradient of their element, and nowhere else."""
    inputs = make_inputs((3, n), torch.float32, keyed=True, moments=False, device=device)
    pred = make_pred((3, n), torch.float32, device)
    pred[1, n - 1] = value
    sums, grad = run(inputs, pred)
    assert sums is not None
    assert grad is not None
    assert torch.isfinite(sums).all(dim=1).tolist() == [True, False, True]
    assert not torch.isfinite(sums[1, 0])
    assert (~torch.isfinite(grad)).nonzero().tolist() == [[1, n - 1]]


def test_many_samples_share_one_mean(device):
    batch = LOSS_BLOCK + 3
    inputs = make_inputs((2, 1), torch.float32, keyed=False, moments=False, device=device)
    many = inputs._replace(
        x0=torch.randn(batch, 1, device=device),
        noise=torch.randn(batch, 1, device=device),
        coef=tuple(torch.rand(batch, device=device) for _ in range(3)),
    )
    sums, _ = run(many, torch.randn(batch, 1, device=device))
    assert sums.shape == (batch, 3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [1, 2048, 5003])
def test_scale_in_place(dtype, numel, device):
    whole = torch.full((numel + 2 * GUARD,), float("nan"), dtype=DTYPES[dtype], device=device)
    values = whole[GUARD : GUARD + numel]
    values.copy_(make_pred((1, numel), DTYPES[dtype], device)[0])
    expected = values.cpu().double() * 0.3
    assert scale_(values, torch.tensor(1.0, device=device)) is values
    assert torch.equal(values.cpu(), make_pred((1, numel), DTYPES[dtype], torch.device("cpu"))[0])
    scale_(values, torch.tensor(0.3, device=device))
    assert_within(values, expected, ROUNDING[values.dtype] * expected.abs())
    assert_guard_intact(whole)
    scale_(values, torch.tensor(float("nan"), device=device))
    assert values.isnan().all()
    scale_(values[:0], torch.tensor(2.0, device=device))
