"""Pictures to VAE moments, by diffusers' AutoencoderKL from a local folder. Needs diffusers, at use."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from erdfast.tensor_files import checksum

from .source import SD_VAE_SCALE, Affine, edm2_whitening


class Scaling(NamedTuple):
    """How moments come to the network's scale: `affine` before they are stored, `moments_scale` at every draw."""

    affine: Affine | None
    moments_scale: float
    note: str


class Encoder:
    """A variational autoencoder's encoder: its posterior's mean and standard deviation.

    Args:
        folder: what `AutoencoderKL.save_pretrained` wrote: config.json and a safetensors file. Nothing is downloaded,
            and pickled weights are refused.
        device: where it computes.
        dtype: in which.
        scale: "sd": pictures in [-1, 1], the VAE's own scaling factor (0.18215 if it has none) and shift; "edm2":
            pictures in [0, 1], whitened to std 0.5; "stored": as "sd", but without a factor.

    Raises:
        ImportError: without diffusers. ValueError: the folder holds no such VAE; says why.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, scale: str) -> None:
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        except ImportError as error:
            raise ImportError("encoding pictures needs diffusers: run `pip install erdfast[vae]`") from error
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no config.json: expected a folder that AutoencoderKL.save_pretrained wrote"
            )
        try:
            vae: Any = AutoencoderKL.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, torch_dtype=dtype
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder}: the VAE cannot be loaded: {' '.join(str(error).split())}") from error
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.device, self.dtype, self.zero_to_one = device, dtype, scale == "edm2"
        self.factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        """Pixels per latent, to a side."""
        self.channels: int = vae.config["latent_channels"]
        self.scaling = self._scaling(scale)
        files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        self.fingerprint = f"{dtype} " + " ".join(f"{checksum(file):08x}" for file in files)
        """Another for another VAE, or another precision."""

    def _scaling(self, scale: str) -> Scaling:
        if scale == "edm2":
            return Scaling(edm2_whitening(self.channels), 1.0, "given to the VAE in [0, 1], whitened to std 0.5 (EDM2)")
        if scale == "stored":
            return Scaling(None, 1.0, "as the VAE gives them")
        factor = float(self.vae.config["scaling_factor"] or SD_VAE_SCALE)
        shift = self.vae.config.get("shift_factor")
        if not shift:
            return Scaling(None, factor, f"posterior draws times {factor:g}")
        whole = torch.full((self.channels, 1, 1), factor)
        return Scaling(Affine(whole, -shift * whole), 1.0, f"less {shift:g}, times {factor:g}")

    @torch.inference_mode()
    def moments(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => (B, 2C, H/f, W/f) float32 on the CPU: mean and standard deviation, scaled.

        Raises:
            ArithmeticError: the VAE's result is not finite (its own weights overflow in float16, for example).
        """
        x = x.to(self.device, self.dtype, non_blocking=True)
        posterior = self.vae.encode((x + 1) / 2 if self.zero_to_one else x).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()
        if not bool(torch.isfinite(moments).all()):
            raise ArithmeticError(f"the VAE's latents are not finite in {self.dtype}; choose --precision fp32")
        affine = self.scaling.affine
        return moments if affine is None else affine.apply(moments, moments=True)
