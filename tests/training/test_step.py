"""From clean data to the loss, against the same in float64 written out by hand."""

import pytest
import torch
from torch import nn

from erdfast import philox
from erdfast.data import Batch
from erdfast.process import Process
from erdfast.training.precision import resolve_precision
from erdfast.training.step import DiffusionStep, StepResult

CPU = torch.device("cpu")
SEED, STEP, BATCH = 11, 5, 6
SHAPE = (4, 8, 8)


class Affine(nn.Module):
    """A network simple enough to be repeated in float64; keeps what it was called with."""

    def __init__(self, channels: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.factor = nn.Parameter(torch.full((channels, 1, 1), 0.3))
        self.calls: list[tuple] = []

    def forward(self, x, time, y=None):
        self.calls.append((x, time, y))
        out = x[:, :1] * 0 + torch.cat([x] * (self.factor.shape[0] // x.shape[1]), dim=1) * self.factor
        return out + (0.0 if y is None else 0.01 * y[:, None, None, None].to(x.dtype))


def step_of(model, process, **options) -> DiffusionStep:
    own = {"seed": SEED, "global_batch": BATCH, "label_drop": 0.0, "device": CPU}
    own["precision"] = resolve_precision("fp32", CPU)
    return DiffusionStep(model, process, **(own | options))


def run(diffusion: DiffusionStep, batch: Batch, offset: int = 0, step: int = STEP) -> StepResult:
    return diffusion(batch.x, batch.y, torch.tensor(step), torch.tensor(offset), batch.moments_scale)


def data(seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.randn(BATCH, *SHAPE, generator=generator), torch.arange(BATCH))


def reference(process, x0, ids, predict):
    """(loss, per-sample error, coefficients) in float64, for the network's function of x_t."""
    t = process.sample_time(len(ids), seed=SEED, step=STEP, rank_offset=int(ids[0]), global_batch=BATCH)
    coef = process.coefficients(t, dtype=torch.float64)
    alpha, sigma, c_x, c_eps = (value.view(-1, 1, 1, 1) for value in coef[:4])
    eps = philox.normal(SEED, STEP, ids, x0[0].numel()).reshape(x0.shape)
    residual = predict(alpha * x0 + sigma * eps) - (c_x * x0 + c_eps * eps)
    mse = residual.square().flatten(1).mean(1)
    return (coef.w * mse).mean(), mse, coef


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stratified": True},
        {"schedule": "flow", "target": "u", "weighting": "constant", "time_sampler": "logit_normal"},
        {"target": "x0", "weighting": "min_snr"},
        {"schedule": "flow", "target": "k", "weighting": "constant", "loss_space": "u"},
    ],
)
def test_loss_against_float64(options):
    process, model = Process(**options), Affine()
    x, y, _ = data()
    result = run(step_of(model, process), Batch(x, y))
    labels = 0.01 * y.double()[:, None, None, None]
    loss, mse, coef = reference(process, x.double(), torch.arange(BATCH), lambda x_t: 0.3 * x_t + labels)
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.mse.double(), mse, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.logsnr.double(), coef.logsnr, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.calls[0][1].double(), coef.time, rtol=1e-6, atol=0)
    assert torch.equal(result.time, model.calls[0][1])
    assert not result.mse.requires_grad
    assert not result.logsnr.requires_grad


def test_gradients_reach_network_and_learnable_target():
    process, model = Process(schedule="flow", target="k", weighting="constant"), Affine()
    x, y, _ = data()
    run(step_of(model, process), Batch(x, y)).loss.backward()
    w_k = next(process.parameters())
    found = [gradient(model.factor), gradient(w_k)]

    factor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    process.zero_grad()
    labels = 0.01 * y.double()[:, None, None, None]
    reference(process, x.double(), torch.arange(BATCH), lambda x_t: factor * x_t + labels)[0].backward()
    assert found == pytest.approx([gradient(factor), gradient(w_k)], rel=1e-4)


def gradient(tensor: torch.Tensor) -> float:
    assert tensor.grad is not None
    return float(tensor.grad.sum())


def test_parts_of_a_batch_are_the_batch():
    process, model = Process(stratified=True), Affine()
    x, y, _ = data()
    diffusion = step_of(model, process, label_drop=0.5)
    whole = run(diffusion, Batch(x, y))
    parts = [run(diffusion, Batch(x[start : start + 2], y[start : start + 2]), start) for start in (0, 2, 4)]
    for name in ("mse", "logsnr", "time"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(part.loss for part in parts) / 3, whole.loss, rtol=1e-6, atol=1e-7)
    labels = [call[2] for call in model.calls]
    assert torch.equal(torch.cat(labels[1:]), labels[0])


def test_steps_and_seeds_differ():
    x, y, _ = data()
    seen = set()
    for seed in (SEED, SEED + 1, 2**63 - 1):
        diffusion = step_of(Affine(), Process(), seed=seed)
        for step in (0, 1, 2**32 - 1):
            seen.add(float(run(diffusion, Batch(x, y), step=step).loss.detach()))
    assert len(seen) == 9


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_share_of_dropped_labels(share):
    count = 4000
    model = Affine()
    diffusion = step_of(model, Process(), global_batch=count, label_drop=share)
    y = torch.full((count,), 3)
    run(diffusion, Batch(torch.zeros(count, 4, 1, 1), y))
    labels = model.calls[0][2]
    assert set(labels.tolist()) <= {3, 10}
    spread = (share * (1 - share) / count) ** 0.5
    assert float((labels == 10).float().mean()) == pytest.approx(share, abs=4 * spread)
    assert labels.dtype == torch.int64


def test_unlabelled_networks_receive_no_labels():
    model = Affine(num_classes=0)
    run(step_of(model, Process()), data())
    assert model.calls[0][2] is None


def test_learned_variance_is_left_alone():
    x, y, _ = data()
    plain, double = Affine(4), Affine(8)
    results = [run(step_of(model, Process()), Batch(x, y)) for model in (plain, double)]
    assert torch.equal(results[0].loss, results[1].loss)
    results[1].loss.backward()
    assert double.factor.grad is not None
    assert float(double.factor.grad[:4].abs().min()) > 0
    assert float(double.factor.grad[4:].abs().max()) == 0


def test_moments_are_drawn_from_the_posterior():
    process, model = Process(), Affine()
    x, y, _ = data()
    std = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    result = run(step_of(model, process), Batch(torch.cat([x, std], dim=1), y, 0.25))
    eta = philox.normal(SEED, STEP, torch.arange(BATCH), x[0].numel(), domain="posterior").reshape(x.shape)
    x0 = 0.25 * (x.double() + std.double() * eta)
    labels = 0.01 * y.double()[:, None, None, None]
    loss, _, _ = reference(process, x0, torch.arange(BATCH), lambda x_t: 0.3 * x_t + labels)
    torch.testing.assert_close(result.loss.double(), loss, rtol=1e-5, atol=1e-7)


def test_low_precision_is_the_networks_alone():
    x, y, _ = data()
    model = Affine()
    low = run(step_of(model, Process(), precision=resolve_precision("bf16", CPU)), Batch(x, y))
    high = run(step_of(Affine(), Process()), Batch(x, y))
    assert model.calls[0][0].dtype == torch.bfloat16
    assert model.calls[0][1].dtype == torch.float32  # bf16 would round times
    assert low.loss.dtype == low.mse.dtype == torch.float32
    torch.testing.assert_close(low.loss, high.loss, rtol=2e-2, atol=1e-3)


def test_no_value_is_read_on_the_host():
    """On the meta device there are none: a read raises, as a synchronisation with a GPU would."""
    meta = torch.device("meta")
    diffusion = step_of(Affine().to(meta), Process().to(meta), device=meta, label_drop=0.1)
    x = torch.empty(BATCH, *SHAPE, device=meta)
    step = torch.zeros((), dtype=torch.int64, device=meta)
    t = diffusion.process.sample_time(BATCH, seed=diffusion.seed, step=step, rank_offset=step, global_batch=BATCH)
    ids = torch.arange(BATCH, device=meta)
    labels = diffusion._labels(torch.zeros_like(ids), step, ids)
    assert t.device == meta
    assert labels is not None
    assert labels.shape == (BATCH,)
    assert diffusion.process.coefficients(t).w.shape == x.shape[:1]
