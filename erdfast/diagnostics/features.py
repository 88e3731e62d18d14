"""The features of a network: what its readout is given (see `Backbone.readout`), as rows for an effective rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erdfast.models import Backbone

TOKENS_PER_IMAGE = 4
"""Of those that are looked at one by one: neighbours are alike, and other images tell more."""


class FeatureProbe:
    """Keeps the features of the newest forward pass, while it is entered.

    Args:
        model: the network.
    """

    def __init__(self, model: Backbone) -> None:
        self._module = model.readout()
        self._features: Tensor | None = None

    def __enter__(self) -> FeatureProbe:
        self._hook = self._module.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        self._features = None

    def _keep(self, _module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0].detach()

    @property
    def features(self) -> Tensor:
        """(B, L, D): one row per token, or per place of an image."""
        assert self._features is not None, "no forward pass yet"
        return self._features if self._features.ndim == 3 else self._features.flatten(2).transpose(1, 2)


class Rows(NamedTuple):
    """Of a batch, (., D) float32 on the CPU."""

    pooled: Tensor
    """One per image: the mean of its tokens."""
    tokens: Tensor
    """`TOKENS_PER_IMAGE` per image, or as many as there are."""


def feature_rows(features: Tensor, first: int) -> Rows:
    """Rows for effective ranks.

    Tokens are taken at equal distances, from a place that moves by one with each image: all places occur.

    Args:
        features: (B, L, D).
        first: number of the first image among all that are looked at.
    """
    batch, length, width = features.shape
    per_image = min(TOKENS_PER_IMAGE, length)
    images = torch.arange(batch, device=features.device)[:, None]
    places = (first + images + torch.arange(per_image, device=features.device) * (length // per_image)) % length
    return Rows(features.float().mean(1).cpu(), features[images, places].float().reshape(-1, width).cpu())
