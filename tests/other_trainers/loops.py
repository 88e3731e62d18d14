"""Training loops in the shape of Accelerate's and Lightning's, and the random batches and noise that go into them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from tests.other_trainers.losses import DEVICE, SHAPE, Coefficients, Network, Recipe

SEED = 2**63 + 11


class Batch(NamedTuple):
    x0: Tensor
    t: Tensor
    ids: Tensor
    """Indices in the data set, (B,) int64."""


Noise = Callable[[Batch, int], Tensor]
LossOfBatch = Callable[[nn.Module, Batch, int], Tensor]
"""(network, batch, step) => loss."""


def make_batches(recipe: Recipe, count: int, size: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(count):
        x0 = torch.randn(size, *SHAPE, generator=generator).to(DEVICE)
        uniform = torch.rand(size, generator=generator).to(DEVICE)
        batches.append(Batch(x0, recipe.times(uniform), torch.arange(i * size, (i + 1) * size, device=DEVICE)))
    return batches


def make_network(**options: Any) -> Network:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Network(**options).to(DEVICE)


def own_noise(batch: Batch, step: int) -> Tensor:
    """A tensor that the trainer draws."""
    return torch.randn(batch.x0.shape, generator=torch.Generator().manual_seed(step)).to(DEVICE)


def key_of(batch: Batch, step: int) -> NoiseKey:
    return NoiseKey(SEED, stream=step, sample_ids=batch.ids)


def key_noise(batch: Batch, step: int) -> Tensor:
    """The noise of a key as a tensor: x_t of nothing, with alpha = 0 and sigma = 1."""
    zero, one = torch.zeros_like(batch.ids, dtype=torch.float32), torch.ones_like(batch.ids, dtype=torch.float32)
    only_noise = Coefficients(alpha=zero, sigma=one, c_x=zero, c_eps=zero, w=zero)
    return add_noise(torch.zeros_like(batch.x0), only_noise, key_of(batch, step))


def theirs(recipe: Recipe, noise: Noise) -> LossOfBatch:
    return lambda model, batch, step: recipe.loss(model, batch.x0, batch.t, noise(batch, step))


def ours(recipe: Recipe, noise: Noise | None = None) -> LossOfBatch:
    """With the trainer's noise, or with a key."""

    def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
        coef = recipe.coefficients(batch.t)
        if noise is None:
            source: dict[str, Any] = {"key": key_of(batch, step)}
        else:
            source = {"noise": noise(batch, step)}
        pred = model(add_noise(batch.x0, coef, **source), batch.t)
        return diffusion_loss(pred, batch.x0, coef, **source)

    return loss


class Accelerator:
    """What training loops touch of Accelerate: accumulate, autocast, backward, sync_gradients, the optimizer's step."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        autocast_dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,  # pyright: ignore[reportPrivateImportUsage]
        gradient_accumulation_steps: int = 1,
    ) -> None:
        self.optimizer, self.dtype, self.scaler = optimizer, autocast_dtype, scaler
        self.steps, self.micro_steps, self.sync_gradients = gradient_accumulation_steps, 0, False

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        self.micro_steps += 1
        self.sync_gradients = self.micro_steps % self.steps == 0
        yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def backward(self, loss: Tensor) -> None:
        loss = loss / self.steps
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        """Of the optimizer, where the gradients are complete."""
        if not self.sync_gradients:
            return
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4),
}
"""AdamW's usual eps of 1e-8 turns the sign of rounding errors into whole steps; 1e-4 does not."""


class Trajectory(NamedTuple):
    losses: Tensor
    """Of every batch."""
    gradients: Tensor
    """Of all parameters after the first batch, in one row, as the optimizer would find them."""
    parameters: Tensor
    """All of them after the last batch, in one row."""
    moved: float
    """How far the parameter that changed most is from its start."""
    scales: list[float]
    """Of the loss, after every batch; empty without a scaler."""


def flat(tensors: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors if tensor is not None])


def train(
    loss_of_batch: LossOfBatch,
    batches: Sequence[Batch],
    optimizer: str = "sgd",
    network: nn.Module | None = None,
    **options: Any,
) -> Trajectory:
    """One pass over the batches in Accelerate's shape; options are those of `Accelerator`."""
    model = network or make_network()
    parameters = list(model.parameters())
    accelerator = Accelerator(OPTIMIZERS[optimizer](parameters), **options)
    losses, gradients, scales, start = [], torch.empty(0), [], flat(parameters)
    for step, batch in enumerate(batches):
        with accelerator.accumulate():
            with accelerator.autocast():
                loss = loss_of_batch(model, batch, step)
            accelerator.backward(loss)
            if step == 0:
                gradients = flat([parameter.grad for parameter in parameters])
            accelerator.step()
        losses.append(loss.detach())
        if accelerator.scaler is not None:
            scales.append(accelerator.scaler.get_scale())
    end = flat(parameters)
    return Trajectory(torch.stack(losses), gradients, end, float((end - start).abs().max()), scales)


def assert_same(got: Trajectory, wanted: Trajectory, tolerance: float) -> None:
    """Losses, gradients and parameters differ by at most `tolerance` of the largest; and training went somewhere."""
    assert wanted.moved > 10 * tolerance
    for name in ("losses", "gradients", "parameters"):
        a, b = getattr(got, name).double(), getattr(wanted, name).double()
        finite = torch.isfinite(b)
        assert torch.equal(torch.isfinite(a), finite), name
        error = float((a - b)[finite].abs().max() / b[finite].abs().max())
        assert error <= tolerance, f"{name} differ by {error:.2e}, allowed is {tolerance:.2e}"
    assert got.scales == wanted.scales


class LightningTrainer:
    """What a LightningModule meets in `fit`: training_step, configure_optimizers, a global_step that counts."""

    def __init__(self, autocast_dtype: torch.dtype | None = None, accumulate_grad_batches: int = 1) -> None:
        self.dtype, self.accumulate = autocast_dtype, accumulate_grad_batches

    def fit(self, module: Any, batches: Sequence[Any]) -> Trajectory:
        optimizer, parameters = module.configure_optimizers(), list(module.parameters())
        losses, gradients, start = [], torch.empty(0), flat(parameters)
        for batch_idx, batch in enumerate(batches):
            with torch.autocast(DEVICE, dtype=self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                output = module.training_step(batch, batch_idx)
            loss = output["loss"] if isinstance(output, dict) else output
            (loss / self.accumulate).backward()
            losses.append(loss.detach())
            if batch_idx == 0:
                gradients = flat([parameter.grad for parameter in parameters])
            if (batch_idx + 1) % self.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                module.global_step += 1
        end = flat(parameters)
        return Trajectory(torch.stack(losses), gradients, end, float((end - start).abs().max()), [])


class LightningModule(nn.Module):
    """The names that user code reads from its base class."""

    def __init__(self) -> None:
        super().__init__()
        self.global_step = 0
        self.logged: dict[str, list[Tensor]] = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def log(self, name: str, value: Tensor) -> None:
        self.logged.setdefault(name, []).append(value.detach())
