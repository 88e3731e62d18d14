"""add_noise and diffusion_loss against the losses of other people's trainers, spelled as they spell them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from tests.other_trainers.loops import (
    OPTIMIZERS,
    assert_same,
    flat,
    key_noise,
    key_of,
    make_batches,
    make_network,
    ours,
    own_noise,
    theirs,
    train,
)
from tests.other_trainers.losses import DEVICE, RECIPES, SCHEDULER, SHAPE, Recipe, column

ROUNDING = 2e-6
"""Of a few float32 operations in another order, also after 20 steps."""

NOISES: dict[str, Any] = {"own noise": (own_noise, own_noise), "key": (key_noise, None)}
"""What theirs and ours are given; None is a key."""


@pytest.fixture(params=RECIPES.values(), ids=list(RECIPES))
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return request.param


@pytest.mark.parametrize("noise", NOISES)
def test_loss_and_gradients_against_their_spelling_in_float64(recipe: Recipe, noise: str) -> None:
    batch, (given, taken) = make_batches(recipe, 1)[0], NOISES[noise]
    exact = batch._replace(x0=batch.x0.double(), t=batch.t.double() if batch.t.is_floating_point() else batch.t)
    reference, model = make_network().double(), make_network()
    wanted = theirs(recipe, lambda _, step: given(batch, step).double())(reference, exact, 0)
    got = ours(recipe, taken)(model, batch, 0)
    assert (got.shape, got.dtype) == ((), torch.float32)
    wanted.backward()
    got.backward()
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=ROUNDING)
    a, b = (flat([parameter.grad for parameter in network.parameters()]) for network in (model, reference))
    assert float((a - b).abs().max() / b.abs().max()) < ROUNDING


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("noise", NOISES)
def test_twenty_steps_both_ways(recipe: Recipe, noise: str, optimizer: str) -> None:
    batches, (given, taken) = make_batches(recipe, 20), NOISES[noise]
    wanted = train(theirs(recipe, given), batches, optimizer)
    assert_same(train(ours(recipe, taken), batches, optimizer), wanted, ROUNDING)


@pytest.mark.parametrize("change", ["c_x", "c_eps", "w", "alpha"])
def test_a_wrong_number_would_be_noticed(change: str) -> None:
    right = RECIPES["diffusers v min-snr"]

    def coefficients(t: Tensor) -> Any:
        coef = right.coefficients(t)
        return coef._replace(**{change: getattr(coef, change) * 1.0001})

    batches = make_batches(right, 20)
    wanted = train(theirs(right, own_noise), batches)
    with pytest.raises(AssertionError, match="differ by"):
        assert_same(train(ours(right._replace(coefficients=coefficients), own_noise), batches), wanted, ROUNDING)


def test_the_noise_of_a_key_as_a_tensor() -> None:
    """What README says of `add_noise(zeros, alpha 0, sigma 1)`: the noise itself, whatever is done with it."""
    recipe = RECIPES["repa linear"]
    batch = make_batches(recipe, 1, size=64)[0]
    eps, coef, key = key_noise(batch, 7), recipe.coefficients(batch.t), key_of(batch, 7)
    torch.testing.assert_close(
        add_noise(batch.x0, coef, key), add_noise(batch.x0, coef, noise=eps), rtol=0.0, atol=1e-6
    )
    assert abs(float(eps.mean())) < 0.03
    assert float(eps.var()) == pytest.approx(1.0, abs=0.05)


def test_the_same_key_twice_is_the_same_noise() -> None:
    """Micro-batches and ranks of one step need ids of their own; without ids they all see the same noise."""
    recipe = RECIPES["repa linear"]
    first, second = make_batches(recipe, 2)
    coef = recipe.coefficients(first.t)

    def noisy(ids: Tensor | None) -> Tensor:
        return add_noise(first.x0, coef, NoiseKey(0, stream=3, sample_ids=ids))

    assert torch.equal(noisy(None), noisy(None))
    assert torch.equal(noisy(None), noisy(torch.arange(len(first.x0), device=DEVICE)))
    assert not torch.equal(noisy(first.ids), noisy(second.ids))


def test_an_output_that_is_half_of_the_channels() -> None:
    """SiT and DiT return the first half of twice the channels: a view, which is read where it lies."""
    recipe = RECIPES["sit velocity"]
    batches = make_batches(recipe, 20)
    with_variance = [make_network(learn_sigma=True) for _ in range(2)]
    wanted = train(theirs(recipe, key_noise), batches, network=with_variance[0])
    assert_same(train(ours(recipe), batches, network=with_variance[1]), wanted, ROUNDING)
    assert not with_variance[0](batches[0].x0, batches[0].t).is_contiguous()


@pytest.mark.parametrize("noise", NOISES)
def test_channels_last(noise: str) -> None:
    """A UNet in that memory format: data, noise and prediction all have it; the numbers do not change."""
    recipe, (given, taken) = RECIPES["diffusers epsilon min-snr"], NOISES[noise]
    batch, model = make_batches(recipe, 1)[0], make_network()
    last = batch._replace(x0=batch.x0.contiguous(memory_format=torch.channels_last))

    class ChannelsLast(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.is_contiguous(memory_format=torch.channels_last)
            return model(x, t).contiguous(memory_format=torch.channels_last)

    wanted = theirs(recipe, given)(model, batch, 0)
    coef = recipe.coefficients(batch.t)
    source: dict[str, Any] = {"key": key_of(batch, 0)}
    if taken is not None:
        source = {"noise": taken(last, 0).contiguous(memory_format=torch.channels_last)}
    pred = ChannelsLast()(add_noise(last.x0, coef, **source), batch.t)
    got = diffusion_loss(pred, last.x0, coef, **source)
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=ROUNDING)


def test_a_term_beside_the_loss() -> None:
    """REPA adds the projection of hidden features, with a factor."""
    recipe = RECIPES["repa linear"]
    batches = make_batches(recipe, 20)

    def with_term(loss_of_batch: Any) -> Any:
        def loss(model: Any, batch: Any, step: int) -> Tensor:
            return 0.7 * loss_of_batch(model, batch, step) + 0.5 * model.inward(batch.x0.flatten(1)).square().mean()

        return loss

    wanted = train(with_term(theirs(recipe, key_noise)), batches)
    assert_same(train(with_term(ours(recipe)), batches), wanted, ROUNDING)


def test_a_callers_mean_changes_nothing() -> None:
    """SiT and REPA return one loss a sample, and their callers take the mean."""
    recipe = RECIPES["sit velocity"]
    batch = make_batches(recipe, 1)[0]
    loss = ours(recipe)(make_network(), batch, 0)
    assert torch.equal(loss.mean(), loss)


def test_perturbed_input() -> None:
    """diffusers' --input_perturbation: the network sees more noise than it has to predict."""
    recipe = RECIPES["diffusers epsilon min-snr"]
    batch, model = make_batches(recipe, 1)[0], make_network()
    noise, coef = own_noise(batch, 0), recipe.coefficients(batch.t)
    more = noise + 0.1 * own_noise(batch, 1)
    pred = model(SCHEDULER.add_noise(batch.x0, more, batch.t), batch.t)
    wanted = ((pred - noise).square().mean(dim=(1, 2, 3)) * coef.w).mean()
    got = diffusion_loss(model(add_noise(batch.x0, coef, noise=more), batch.t), batch.x0, coef, noise=noise)
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=ROUNDING)


def test_a_mask_of_samples_is_a_weight() -> None:
    recipe = RECIPES["repa linear"]
    batch, model = make_batches(recipe, 1)[0], make_network()
    noise, coef = own_noise(batch, 0), recipe.coefficients(batch.t)
    keep = torch.arange(len(batch.x0), device=DEVICE) % 3 != 0
    some = batch._replace(x0=batch.x0[keep], t=batch.t[keep])
    wanted = theirs(recipe, lambda _batch, _step: noise[keep])(model, some, 0)
    weights = coef.w * keep * (len(keep) / keep.sum())
    pred = model(add_noise(batch.x0, coef, noise=noise), batch.t)
    got = diffusion_loss(pred, batch.x0, coef._replace(w=weights), noise=noise)
    assert float(got.detach()) == pytest.approx(float(wanted.detach()), rel=ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_coefficients_are_not_rounded_to_the_dtype_of_latents(dtype: torch.dtype) -> None:
    """A scheduler computes alpha and sigma in the latents' dtype, the op in float32: its x_t is rounded once."""
    recipe = RECIPES["diffusers epsilon"]
    latents = make_batches(recipe, 1, size=256)[0].x0.to(dtype)
    t = torch.arange(0, 1000, 4, device=DEVICE).long()[: len(latents)]
    latents = latents[: len(t)].contiguous()
    noise = torch.randn(len(t), *SHAPE, device=DEVICE).to(dtype)
    alphas_cumprod = SCHEDULER.alphas_cumprod.to(DEVICE)[t].double()
    exact = column(alphas_cumprod.sqrt()) * latents.double() + column((1 - alphas_cumprod).sqrt()) * noise.double()

    def error(x_t: Tensor) -> float:
        assert x_t.dtype == dtype
        return float(((x_t.double() - exact) / exact.abs().clamp_min(2.0**-6)).abs().max())

    unit = torch.finfo(dtype).eps / 2
    assert error(add_noise(latents, recipe.coefficients(t), noise=noise)) < 1.05 * unit
    assert error(SCHEDULER.add_noise(latents, noise, t)) > 3 * unit


def test_coefficients_in_half_precision_are_refused() -> None:
    """SiT draws its times in the dtype of the data."""
    recipe = RECIPES["sit velocity"]
    batch = make_batches(recipe, 1)[0]
    with pytest.raises(ValueError, match=r"alpha is torch\.float16; .* float32 coefficients"):
        add_noise(batch.x0.half(), recipe.coefficients(batch.t.half()), key_of(batch, 0))
