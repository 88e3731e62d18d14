"""The losses of other people's trainers in their loops: precision, loss scale, accumulation, compilation, Lightning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from tests.other_trainers.loops import (
    OPTIMIZERS,
    SEED,
    Batch,
    LightningModule,
    LightningTrainer,
    assert_same,
    key_noise,
    make_batches,
    make_network,
    ours,
    own_noise,
    theirs,
    train,
)
from tests.other_trainers.losses import DEVICE, RECIPES

ROUNDING = 2e-6
BF16_ROUNDING = 1e-3
"""Now and then a difference of float32 rounding crosses the middle between two bfloat16 numbers, 2^-8 apart."""

SOME = ("sit velocity", "sit score", "diffusers v min-snr")
NOISES = {"key": (key_noise, None), "own noise": (own_noise, own_noise)}


def loss_scaler() -> torch.amp.GradScaler:
    """Grows after every fourth step that was finite."""
    return torch.amp.GradScaler(DEVICE, init_scale=2.0**16, growth_interval=4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", SOME)
def test_bfloat16_autocast(name: str, optimizer: str) -> None:
    recipe = RECIPES[name]
    batches = make_batches(recipe, 20)
    options: dict[str, Any] = {"autocast_dtype": torch.bfloat16}
    predictions = []

    def spy(model: nn.Module, batch: Batch, step: int) -> Tensor:
        handle = model.register_forward_hook(lambda _module, _inputs, output: predictions.append(output.dtype))
        loss = ours(recipe)(model, batch, step)
        handle.remove()
        assert loss.dtype == torch.float32
        return loss

    wanted = train(theirs(recipe, key_noise), batches, optimizer, **options)
    assert_same(train(spy, batches, optimizer, **options), wanted, BF16_ROUNDING)
    assert set(predictions) == {torch.bfloat16}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", SOME)
def test_gradient_accumulation(name: str, noise: str) -> None:
    recipe, (given, taken) = RECIPES[name], NOISES[noise]
    batches = make_batches(recipe, 20)
    options: dict[str, Any] = {"gradient_accumulation_steps": 4}
    wanted = train(theirs(recipe, given), batches, **options)
    assert_same(train(ours(recipe, taken), batches, **options), wanted, ROUNDING)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("noise", NOISES)
def test_a_loss_scale_that_grows_and_a_step_that_is_skipped(noise: str, autocast: torch.dtype | None) -> None:
    """A batch with an infinite value overflows both ways: that step is skipped, the scale halved, training goes on."""
    recipe, (given, taken) = RECIPES["diffusers v min-snr"], NOISES[noise]
    batches = make_batches(recipe, 20)
    batches[9].x0[3, 1, 2, 5] = torch.inf

    def run(loss: Any) -> Any:
        return train(loss, batches, autocast_dtype=autocast, scaler=loss_scaler())

    got, wanted = run(ours(recipe, taken)), run(theirs(recipe, given))
    assert_same(got, wanted, ROUNDING if autocast is None else BF16_ROUNDING)
    assert torch.isfinite(got.losses).logical_not().nonzero().flatten().tolist() == [9]
    assert torch.isfinite(got.parameters).all()
    assert (got.scales[2], got.scales[3], got.scales[8], got.scales[9]) == (2.0**16, 2.0**17, 2.0**18, 2.0**17)
    unscaled = train(ours(recipe, taken), [batch for i, batch in enumerate(batches) if i < 9], autocast_dtype=autocast)
    assert torch.equal(unscaled.losses, got.losses[:9]), "a power of two changes no digit"


def test_float16_gradients_below_its_smallest_number() -> None:
    """A float16 prediction whose unscaled gradient is 0: the scale reaches it before it is rounded, both ways."""
    recipe = RECIPES["diffusers epsilon min-snr"]
    batch, scaler = make_batches(recipe, 1)[0], loss_scaler()
    coef = recipe.coefficients(batch.t)
    coef = coef._replace(w=coef.w * 1e-6)
    eps = own_noise(batch, 0)
    with torch.no_grad():
        output = make_network()(add_noise(batch.x0, coef, noise=eps), batch.t).half()

    def gradient(loss_of: Any, scaled: bool) -> Tensor:
        pred = output.clone().requires_grad_()
        loss = loss_of(pred)
        (scaler.scale(loss) if scaled else loss).backward()
        assert pred.grad is not None
        return pred.grad

    def their_loss(pred: Tensor) -> Tensor:
        return ((pred.float() - eps).square().mean(dim=(1, 2, 3)) * coef.w).mean()

    def our_loss(pred: Tensor) -> Tensor:
        return diffusion_loss(pred, batch.x0, coef, noise=eps)

    assert not gradient(our_loss, scaled=False).any()
    got, wanted = gradient(our_loss, scaled=True), gradient(their_loss, scaled=True)
    assert got.dtype == torch.float16
    assert float((wanted != 0).float().mean()) > 0.99
    torch.testing.assert_close(got, wanted, rtol=2.0**-10, atol=2.0**-24)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("noise", NOISES)
def test_compiled_whole(noise: str, autocast: torch.dtype | None) -> None:
    """The step is a Python number that changes, as in every trainer: recompiled once at most, which generalises it."""
    recipe, (_, taken) = RECIPES["diffusers v min-snr"], NOISES[noise]
    batches = make_batches(recipe, 8)
    options: dict[str, Any] = {"autocast_dtype": autocast}

    def of_step(model: nn.Module, batch: Batch, step: int, eps: Tensor | None = None) -> Tensor:
        return ours(recipe, None if eps is None else lambda _batch, _step: eps)(model, batch, step)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(of_step, fullgraph=True, backend="aot_eager")

    def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
        return compiled(model, batch, step, None if taken is None else taken(batch, step))

    wanted = train(ours(recipe, taken), batches, **options)
    assert_same(train(loss, batches, **options), wanted, ROUNDING if autocast is None else BF16_ROUNDING)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_compiled_by_inductor() -> None:
    """The default back end of torch.compile, on a small loss without a network: it takes seconds when cold."""
    recipe = RECIPES["repa linear"]
    batch = make_batches(recipe, 1)[0]

    def loss(scale: Tensor, x0: Tensor, t: Tensor, ids: Tensor, stream: Tensor) -> Tensor:
        coef, key = recipe.coefficients(t), NoiseKey(SEED, stream, ids)
        return diffusion_loss(add_noise(x0, coef, key) * scale, x0, coef, key)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            scale = torch.tensor(0.3, device=DEVICE, requires_grad=True)
            inputs = (scale, batch.x0, batch.t, batch.ids, torch.tensor(step, device=DEVICE))
            wanted, got = loss(*inputs), compiled(*inputs)
            torch.testing.assert_close(got, wanted)
            (a,), (b,) = torch.autograd.grad(got, scale), torch.autograd.grad(wanted, scale)
            torch.testing.assert_close(a, b)


class Denoiser(LightningModule):
    """A user's module; `loss_of_batch` is in one spelling or the other."""

    def __init__(self, loss_of_batch: Any) -> None:
        super().__init__()
        self.network, self.loss_of_batch = make_network(), loss_of_batch

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = self.loss_of_batch(self.network, batch, self.global_step)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS["adamw"](self.parameters())


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lightning(autocast: torch.dtype | None, accumulate: int) -> None:
    """global_step counts steps of the optimizer: the micro-batches of one share the stream, not the ids."""
    recipe = RECIPES["sit velocity"]
    batches = make_batches(recipe, 20)
    wanted, got = (
        LightningTrainer(autocast, accumulate).fit(Denoiser(loss), batches)
        for loss in (theirs(recipe, key_noise), ours(recipe))
    )
    assert_same(got, wanted, ROUNDING if autocast is None else BF16_ROUNDING)
