"""README's diffs, run: the lines before and the lines after give the same loss and gradients on the same noise."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erdfast.ops import add_noise
from tests.other_trainers.loops import (
    OPTIMIZERS,
    SEED,
    Batch,
    LightningModule,
    LightningTrainer,
    Trajectory,
    assert_same,
    key_noise,
    key_of,
    make_batches,
    make_network,
    own_noise,
    train,
)
from tests.other_trainers.losses import DEVICE, RECIPES, SCHEDULER

README = Path(__file__).parents[2] / "README.md"
ROUNDING = 5e-6


def section() -> str:
    _, _, rest = README.read_text().partition("## In your own trainer\n")
    return rest.partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section(), flags=re.MULTILINE | re.DOTALL)


def sides(word: str) -> tuple[str, str]:
    """The only diff with this word in it: (before, after) as Python."""
    found = [block for block in blocks("diff") if word in block]
    assert len(found) == 1, f"section 'In your own trainer' of README needs one diff with {word!r}, not {len(found)}"
    lines = [line or " " for line in found[0].splitlines()]
    assert {line[0] for line in lines} == {" ", "+", "-"}
    before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    return before, after


def run(code: str, **names: Any) -> dict[str, Any]:
    """All names after README's imports and then `code`, which finds these names."""
    (imports,) = blocks("python")
    space: dict[str, Any] = {"torch": torch, "F": F, **names}
    exec(imports, space)
    exec(code, space)
    return space


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tensor, Tensor | None], None]:
    """Sets what the code draws next: times, and noise where it draws noise."""

    def set_draws(t: Tensor, noise: Tensor | None) -> None:
        monkeypatch.setattr(torch, "rand", lambda *_args, **_options: t)
        monkeypatch.setattr(torch, "randint", lambda *_args, **_options: t)
        monkeypatch.setattr(torch, "randn_like", lambda *_args, **_options: noise)

    return set_draws


def test_every_diff_is_run_and_short() -> None:
    diffs = blocks("diff")
    assert len(diffs) == 3
    assert all(len(diff.splitlines()) <= 22 for diff in diffs)


def test_training_losses(draws: Any) -> None:
    batches = make_batches(RECIPES["repa linear"], 20)
    noises = [key_noise(batch, step) for step, batch in enumerate(batches)]

    def trajectory(code: str, noises: list[Any]) -> Trajectory:
        training_losses = run(code, seed=SEED)["training_losses"]

        def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
            draws(batch.t, noises[step])
            return training_losses(lambda x, t, _y: model(x, t), batch.x0, None, batch.ids, step)["loss"].mean()

        return train(loss, batches)

    before, after = sides("def training_losses")
    assert_same(trajectory(after, [None] * 20), trajectory(before, noises), ROUNDING)


def test_diffusers_loop(draws: Any) -> None:
    batches = make_batches(RECIPES["diffusers epsilon min-snr"], 20)

    def trajectory(code: str) -> Trajectory:
        def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
            draws(batch.t, own_noise(batch, step))
            backward = []
            space = run(
                code,
                latents=batch.x0,
                timesteps=batch.t,
                prompt_embeds=None,
                noise_scheduler=SCHEDULER,
                unet=lambda x, t, _embeds: SimpleNamespace(sample=model(x, t)),
                accelerator=SimpleNamespace(backward=backward.append),
            )
            assert backward == [space["loss"]]
            return space["loss"]

        return train(loss, batches)

    before, after = sides("noise_scheduler.add_noise")
    assert_same(trajectory(after), trajectory(before), ROUNDING)


def cosine_alphas_cumprod(steps: int) -> Tensor:
    """Of Nichol & Dhariwal's schedule, betas at most 0.999."""
    times = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    return torch.cumprod(1 - (1 - level[1:] / level[:-1]).clamp(max=0.999), 0).to(DEVICE)


def test_lightning_module(draws: Any) -> None:
    batches = make_batches(RECIPES["diffusers v"], 20)
    noises = [key_noise(batch, step) for step, batch in enumerate(batches)]

    def fit(code: str, noises: list[Any]) -> tuple[Any, Trajectory]:
        space = run(
            code,
            L=SimpleNamespace(LightningModule=LightningModule),
            cosine_alphas_cumprod=lambda steps: cosine_alphas_cumprod(steps).float(),
        )

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = make_network()

            def forward(self, x: Tensor, t: Tensor, _y: Any) -> Tensor:
                return self.network(x, t)

        class Denoiser(space["Denoiser"]):
            def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
                draws(batch.t, noises[batch_idx])
                return super().training_step((batch.x0, None, batch.ids), batch_idx)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return OPTIMIZERS["sgd"](self.parameters())

        module = Denoiser(Net(), SEED).to(DEVICE)
        return module, LightningTrainer().fit(module, batches)

    before, after = sides("LightningModule")
    (old, wanted), (new, got) = fit(before, noises), fit(after, [None] * 20)
    assert_same(got, wanted, ROUNDING)
    assert new.state_dict().keys() == old.state_dict().keys(), "a Process adds nothing to checkpoints"
    torch.testing.assert_close(torch.stack(new.logged["mse"]), got.losses)


def test_the_noise_of_a_key() -> None:
    (code,) = re.findall(r"`(add_noise\(torch\.zeros_like.*?)`", section())
    recipe = RECIPES["repa linear"]
    batch = make_batches(recipe, 1)[0]
    coef, key = recipe.coefficients(batch.t), key_of(batch, 0)
    eps = eval(code, {"torch": torch, "add_noise": add_noise, "x0": batch.x0, "t": batch.t, "coef": coef, "key": key})
    assert torch.equal(eps, key_noise(batch, 0))
