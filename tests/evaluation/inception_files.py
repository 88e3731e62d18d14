"""Made-up Inception weights and pictures on disk, shared by the tests of this folder."""

from __future__ import annotations

import json
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from erdfast.evaluation.inception import InceptionFeatures, InceptionNetwork
from tests.parity import load_parity


@cache
def published_outputs() -> dict[str, np.ndarray]:
    """The arrays of inception.npz."""
    return load_parity("inception")


@cache
def made_up_weights() -> dict[str, Tensor]:
    """The state_dict that goes with them, by the rule of their README."""
    arrays, state = published_outputs(), {}
    for name, shape in json.loads(str(arrays["state"])):
        random = np.random.RandomState(zlib.crc32(name.encode()) ^ int(arrays["seed"]))
        value = random.randn(*shape).astype(np.float32)
        value = value * np.float32(1.4 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1)
        if name.endswith("running_var") or (len(shape) == 1 and name.endswith("weight")):
            value = np.abs(value) + np.float32(1.0)
        state[name] = torch.from_numpy(value)
    return state


def save_weights(path: Path) -> Path:
    """As a .pth file."""
    torch.save(made_up_weights(), path)
    return path


def save_pictures(path: Path, count: int, seed: int = 0, side: int = 16, **others: np.ndarray) -> Path:
    """An npz of ADM's kind."""
    pictures = np.random.RandomState(seed).randint(0, 256, (count, side, side, 3), dtype=np.uint8)
    np.savez(path, arr_0=pictures, arr_1=np.arange(count), **others)  # pyright: ignore[reportArgumentType]
    return path


class SmallNetwork(InceptionNetwork):
    """In the place of the real one, with few features: random projections of the pictures' means over a 2x2 grid."""

    pool_features, spatial_features, num_logits = 6, 5, 4

    def __init__(self) -> None:
        nn.Module.__init__(self)
        generator = torch.Generator().manual_seed(0)
        self._pool, self._spatial = (torch.randn(12, size, generator=generator) for size in (6, 5))
        self._fc = torch.randn(6, 4, generator=generator)

    def forward(self, images: Tensor) -> InceptionFeatures:
        """(B, 3, H, W) uint8 => features."""
        means = nn.functional.adaptive_avg_pool2d(images.float() / 64.0, 2).flatten(1)
        return InceptionFeatures(torch.tanh(means @ self._pool), means @ self._spatial)

    def logits_unbiased(self, pool: Tensor) -> Tensor:
        """(B, 6) => (B, 4)."""
        return pool @ self._fc


def use_small_network(monkeypatch) -> None:
    """Where files of pictures are measured, and pictures during training."""
    from erdfast.evaluation import measurement, reference
    from erdfast.training import measures

    monkeypatch.setattr(measures, "load_inception", lambda _path, _device: SmallNetwork())
    monkeypatch.setattr(measurement, "load_inception", lambda _path, _device: SmallNetwork())
    monkeypatch.setattr(reference, "POOL_FEATURES", 6)
    monkeypatch.setitem(reference.STATISTICS, "fid", ("mu", "sigma", 6))
    monkeypatch.setitem(reference.STATISTICS, "sfid", ("mu_s", "sigma_s", 5))
