"""The losses of other people's trainers in their own spelling, and the five numbers that say the same.

Every `loss` is written from the formula of a published trainer; the noise is an argument where the trainer draws it.
Two conventions of time meet here: in SiT's code t = 1 is data, in REPA's and in diffusers' large times are noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erdfast.ops import Coefficients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (4, 8, 8)
NUM_TIMESTEPS = 1000


class Network(nn.Module):
    """A perceptron of the noisy sample and its time. `learn_sigma`, as SiT: the first half of twice the channels."""

    def __init__(self, width: int = 48, learn_sigma: bool = False) -> None:
        super().__init__()
        features = math.prod(SHAPE)
        self.learn_sigma = learn_sigma
        self.time = nn.Linear(1, width)
        self.inward = nn.Linear(features, width)
        self.outward = nn.Linear(width, features * (2 if learn_sigma else 1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        unit = t.to(x.dtype) if t.is_floating_point() else t.to(x.dtype) / NUM_TIMESTEPS
        hidden = F.silu(self.inward(x.flatten(1)) + self.time(unit[:, None]))
        pred = self.outward(hidden).unflatten(1, (-1, *SHAPE[1:]))
        return pred.chunk(2, dim=1)[0] if self.learn_sigma else pred


Loss = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(network, x0, t, eps) => mean loss, 0-d."""


class Recipe(NamedTuple):
    times: Callable[[Tensor], Tensor]
    """Uniform numbers in [0, 1), (B,) => times."""
    loss: Loss
    coefficients: Callable[[Tensor], Coefficients]


def column(t: Tensor) -> Tensor:
    """(B,) => (B, 1, 1, 1)."""
    return t.view(-1, 1, 1, 1)


def mean_flat(x: Tensor) -> Tensor:
    return x.mean(dim=(1, 2, 3))


# SiT: x_t = t*x0 + (1-t)*eps. Its losses of noise and score carry weights made of the drift's variance.


def sit_velocity(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    x_t = column(t) * x0 + (1 - column(t)) * eps
    return mean_flat((model(x_t, t) - (x0 - eps)) ** 2).mean()


def sit_noise(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Predicts the noise, weighted as a velocity."""
    sigma = 1 - column(t)
    drift_variance = sigma**2 / column(t) + sigma
    pred = model(column(t) * x0 + sigma * eps, t)
    return mean_flat((drift_variance / sigma) ** 2 * (pred - eps) ** 2).mean()


def sit_score(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Predicts the score, weighted as a likelihood."""
    sigma = 1 - column(t)
    drift_variance = sigma**2 / column(t) + sigma
    pred = model(column(t) * x0 + sigma * eps, t)
    return mean_flat(drift_variance / sigma**2 * (pred * sigma + eps) ** 2).mean()


def sit_velocity_coefficients(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(alpha=t, sigma=1 - t, c_x=one, c_eps=-one, w=one)


def sit_noise_coefficients(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(alpha=t, sigma=1 - t, c_x=0 * one, c_eps=one, w=t**-2)


def sit_score_coefficients(t: Tensor) -> Coefficients:
    """The score of x_t is -eps/sigma; (sigma*pred + eps)^2 = sigma^2 * (pred + eps/sigma)^2."""
    sigma = 1 - t
    return Coefficients(alpha=t, sigma=sigma, c_x=torch.zeros_like(t), c_eps=-1 / sigma, w=sigma / t)


# REPA: large times are noise, the velocity is d x_t/dt.


def repa_linear(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    x_t = (1 - column(t)) * x0 + column(t) * eps
    return mean_flat((model(x_t, t) - (eps - x0)) ** 2).mean()


def repa_cosine(model: nn.Module, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    angle, rate = column(t) * (math.pi / 2), math.pi / 2
    x_t = torch.cos(angle) * x0 + torch.sin(angle) * eps
    velocity = -rate * torch.sin(angle) * x0 + rate * torch.cos(angle) * eps
    return mean_flat((model(x_t, t) - velocity) ** 2).mean()


def repa_linear_coefficients(t: Tensor) -> Coefficients:
    one = torch.ones_like(t)
    return Coefficients(alpha=1 - t, sigma=t, c_x=-one, c_eps=one, w=one)


def repa_cosine_coefficients(t: Tensor) -> Coefficients:
    rate = math.pi / 2
    alpha, sigma = torch.cos(rate * t), torch.sin(rate * t)
    return Coefficients(alpha, sigma, c_x=-rate * sigma, c_eps=rate * alpha, w=torch.ones_like(t))


# diffusers: a scheduler that owns alphas_cumprod, F.mse_loss, and weights of the user.


class Scheduler:
    """What training touches of a diffusers scheduler ("scaled_linear", 1,000 steps)."""

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_TIMESTEPS) ** 2
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._amplitudes(original_samples, timesteps)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = self._amplitudes(sample, timesteps)
        return alpha * noise - sigma * sample

    def _amplitudes(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """In the dtype of the samples, as theirs are."""
        alphas_cumprod = self.alphas_cumprod.to(like)[timesteps]
        return column(alphas_cumprod**0.5), column((1 - alphas_cumprod) ** 0.5)


SCHEDULER = Scheduler()


def snr_weights(timesteps: Tensor, prediction: str, gamma: float | None) -> Tensor:
    """The weights of the text-to-image example, Min-SNR with gamma; of the unconditional one for `sample`: SNR. (B,)"""
    alphas_cumprod = SCHEDULER.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction == "sample":
        return snr
    if gamma is None:
        return torch.ones_like(snr)
    if prediction == "v_prediction":
        snr = snr + 1
    return snr.clamp(max=gamma) / snr


def diffusers_loss(prediction: str, gamma: float | None = None) -> Loss:
    def loss(model: nn.Module, latents: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        pred = model(SCHEDULER.add_noise(latents, noise, timesteps), timesteps)
        targets = {
            "epsilon": noise,
            "v_prediction": SCHEDULER.get_velocity(latents, noise, timesteps),
            "sample": latents,
        }
        if gamma is None and prediction != "sample":
            return F.mse_loss(pred, targets[prediction])
        error = F.mse_loss(pred, targets[prediction], reduction="none")
        return (mean_flat(error) * snr_weights(timesteps, prediction, gamma)).mean()

    return loss


def diffusers_coefficients(prediction: str, gamma: float | None = None) -> Callable[[Tensor], Coefficients]:
    def coefficients(timesteps: Tensor) -> Coefficients:
        alphas_cumprod = SCHEDULER.alphas_cumprod.to(timesteps.device)[timesteps]
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        targets = {"epsilon": (zero, one), "v_prediction": (-sigma, alpha), "sample": (one, zero)}
        return Coefficients(alpha, sigma, *targets[prediction], w=snr_weights(timesteps, prediction, gamma))

    return coefficients


def real_times(uniform: Tensor) -> Tensor:
    """Away from both ends, where weights of noise and score diverge."""
    return 0.1 + 0.8 * uniform


def integer_times(uniform: Tensor) -> Tensor:
    """Without the first 50, where the SNR is far above 100."""
    return (50 + (NUM_TIMESTEPS - 50) * uniform).long()


def _diffusers(prediction: str, gamma: float | None = None) -> Recipe:
    return Recipe(integer_times, diffusers_loss(prediction, gamma), diffusers_coefficients(prediction, gamma))


RECIPES: dict[str, Recipe] = {
    "sit velocity": Recipe(real_times, sit_velocity, sit_velocity_coefficients),
    "sit noise": Recipe(real_times, sit_noise, sit_noise_coefficients),
    "sit score": Recipe(real_times, sit_score, sit_score_coefficients),
    "repa linear": Recipe(real_times, repa_linear, repa_linear_coefficients),
    "repa cosine": Recipe(real_times, repa_cosine, repa_cosine_coefficients),
    "diffusers epsilon": _diffusers("epsilon"),
    "diffusers epsilon min-snr": _diffusers("epsilon", 5.0),
    "diffusers v": _diffusers("v_prediction"),
    "diffusers v min-snr": _diffusers("v_prediction", 5.0),
    "diffusers sample": _diffusers("sample"),
}
