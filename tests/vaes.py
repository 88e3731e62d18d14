"""A VAE small enough for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch


def save_tiny_vae(folder: Path, **config) -> Path:
    """Four latent channels and two pixels per latent, as diffusers saves it; skips the test without diffusers."""
    pytest.importorskip("diffusers")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    made = cast(Any, AutoencoderKL)(  # whose annotations know tuples of one alone
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        **config,
    )
    made.save_pretrained(str(folder))
    return folder
