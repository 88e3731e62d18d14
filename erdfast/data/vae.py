"""Pictures to VAE moments and latents to pictures, by diffusers' AutoencoderKL from a local folder. Needs diffusers,
at use."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from erdfast.tensor_files import checksum
from erdfast.typed_json import read_object

from .dataset import Dataset, Shape, format_shape, unit_to_uint8
from .source import SD_VAE_SCALE, Affine, VaeUnits, edm2_units, factor_units


class Scaling(NamedTuple):
    """How moments come to the network's scale: `affine` before they are stored, `moments_scale` at every draw."""

    affine: Affine | None
    moments_scale: float
    note: str


class Autoencoder:
    """A variational autoencoder, read for use alone.

    Args:
        folder: what `AutoencoderKL.save_pretrained` wrote: config.json and a safetensors file. Nothing is downloaded,
            and pickled weights are refused.
        device: where it computes.
        dtype: in which.

    Raises:
        ImportError: without diffusers. ValueError: the folder holds no such VAE; says why.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        try:
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        except ImportError as error:
            raise ImportError("pictures from and to latents need diffusers: run `pip install erdfast[vae]`") from error
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no config.json: expected a folder that AutoencoderKL.save_pretrained wrote"
            )
        try:
            _check_config(read_object((folder / "config.json").read_text()))
            vae, report = cast(Any, AutoencoderKL).from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
            )
            if lacking := [*report["missing_keys"], *report["mismatched_keys"]]:  # diffusers would draw them at random
                raise ValueError(f"{len(lacking)} tensors are missing or of another shape, {lacking[0]} for one")
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{folder}: the VAE cannot be loaded: {' '.join(str(error).split())}") from error
        self.folder, self.device, self.dtype = folder, device, dtype
        self.vae = vae.to(device).eval().requires_grad_(False)
        self.factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        """Pixels per latent, to a side."""
        self.channels: int = vae.config["latent_channels"]
        files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        self.fingerprint = f"{dtype} " + " ".join(f"{checksum(file):08x}" for file in files)
        """Another for another VAE, or another precision."""

    def units(self, scale: str) -> VaeUnits:
        """Of `scale`: "sd", the VAE's own scaling factor (0.18215 if it has none) and shift; "edm2"; "stored"."""
        if scale == "edm2":
            return edm2_units(self.channels)
        if scale == "stored":
            return factor_units(1.0, self.channels)
        factor = float(self.vae.config["scaling_factor"] or SD_VAE_SCALE)
        return factor_units(factor, self.channels, shift=self.vae.config.get("shift_factor") or 0.0)


class Encoder(Autoencoder):
    """Its encoder: the posterior's mean and standard deviation.

    Args:
        folder, device, dtype: see Autoencoder.
        scale: "sd": pictures in [-1, 1], the VAE's own scaling factor (0.18215 if it has none) and shift; "edm2":
            pictures in [0, 1], whitened to std 0.5; "stored": as "sd", but without a factor.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, scale: str) -> None:
        super().__init__(folder, device, dtype)
        self.network_units = self.units(scale)
        self.scaling = self._scaling(scale)

    def _scaling(self, scale: str) -> Scaling:
        affine = self.network_units.affine
        if scale == "edm2":
            return Scaling(affine, 1.0, "given to the VAE in [0, 1], whitened to std 0.5 (EDM2)")
        if scale == "stored":
            return Scaling(None, 1.0, "as the VAE gives them")
        factor, shift = float(affine.scale[0]), self.vae.config.get("shift_factor")
        if not shift:
            factor = float(self.vae.config["scaling_factor"] or SD_VAE_SCALE)  # in full precision
            return Scaling(None, factor, f"posterior draws times {factor:g}")
        return Scaling(affine, 1.0, f"less {shift:g}, times {factor:g}")

    @torch.inference_mode()
    def moments(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => (B, 2C, H/f, W/f) float32 on the CPU: mean and standard deviation, scaled.

        Raises:
            ArithmeticError: the VAE's result is not finite (its own weights overflow in float16, for example).
        """
        x = x.to(self.device, self.dtype, non_blocking=True)
        posterior = self.vae.encode((x + 1) / 2 if self.network_units.zero_to_one else x).latent_dist
        moments = torch.cat([posterior.mean, posterior.std], dim=1).float().cpu()
        _check_finite(moments, f"the VAE's latents are not finite in {self.dtype}")
        affine = self.scaling.affine
        return moments if affine is None else affine.apply(moments, moments=True)


class Decoder(Autoencoder):
    """Its decoder: from the network's values to pictures.

    Args:
        folder, device, dtype: see Autoencoder.
        units: of the values, as `Dataset.vae_units` tells them; or a scale as `Autoencoder.units` takes it; None is
            "sd", the VAE's own scaling factor and shift.
        batch: pictures at a time: at 256 pixels each of them takes about 0.3 GB in the widest layers.

    Raises:
        ValueError: units for another number of channels.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        units: VaeUnits | str | None = None,
        batch: int = 16,
    ) -> None:
        super().__init__(folder, device, dtype)
        self.network_units = units if isinstance(units, VaeUnits) else self.units(units or "sd")
        self.batch = batch
        known = self.network_units.affine.scale.shape[0]
        if known != self.channels:
            raise ValueError(f"{folder}: this VAE's latents have {self.channels} channels, the data's {known}")
        scale, bias = self.network_units.affine
        self._scale, self._bias = scale.to(device), bias.to(device)

    def shape(self, latent: Shape) -> Shape:
        """Of the pictures: (3, H*f, W*f).

        Raises:
            ValueError: another number of channels.
        """
        if latent[0] != self.channels:
            raise ValueError(
                f"{self.folder}: this VAE's latents have {self.channels} channels, not those of {format_shape(latent)}"
            )
        return 3, latent[1] * self.factor, latent[2] * self.factor

    @torch.inference_mode()
    def pictures(self, x: Tensor) -> np.ndarray:
        """(B, C, H, W) in the network's units => (B, H*f, W*f, 3) uint8; values beyond the range are clipped.

        Raises:
            ArithmeticError: the VAE's result is not finite. ValueError: another number of channels.
        """
        self.shape((x.shape[1], x.shape[2], x.shape[3]))
        parts = [self._decode(part) for part in x.split(self.batch)]
        return np.concatenate(parts)

    def _decode(self, x: Tensor) -> np.ndarray:
        latents = (x.to(self.device, torch.float32) - self._bias) / self._scale
        pictures = self.vae.decode(latents.to(self.dtype)).sample.float()
        _check_finite(pictures, f"the VAE's pictures are not finite in {self.dtype}")
        return unit_to_uint8((pictures if self.network_units.zero_to_one else (pictures + 1) / 2).cpu())


def open_decoder(
    folder: Path, dataset: Dataset, device: torch.device, dtype: torch.dtype, latent_scale: str = "auto"
) -> Decoder:
    """The decoder for what a network learnt from `dataset`.

    Args:
        folder, device, dtype: see Autoencoder.
        dataset: what the network was trained on.
        latent_scale: auto: as the data say; or how the network's values come from the VAE's own: see
            `Autoencoder.units`.

    Raises:
        ValueError: the data do not say it, or are no latents of this VAE.
        ImportError: without diffusers.
    """
    if getattr(dataset, "kind", "") == "pixels":
        raise ValueError(f"--vae {folder} is for latents, and these data are pictures: {dataset.describe()}")
    units = dataset.vae_units if latent_scale == "auto" else latent_scale
    if units is None:
        raise ValueError(
            f"the data do not say how their latents come from a VAE's ({dataset.describe()}): choose --latent-scale sd "
            "(times the VAE's own scaling factor), edm2 or stored (as the VAE gives them)"
        )
    decoder = Decoder(folder, device, dtype, units)
    decoder.shape(dataset.shape)
    return decoder


def _check_config(config: dict[str, Any]) -> None:
    """Raise ValueError for another class, which diffusers would read all the same, or numbers that are none."""
    name = config.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise ValueError(f"config.json is of a {name}, not of an AutoencoderKL")
    for key, least in (("scaling_factor", 0.0), ("shift_factor", -math.inf)):
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and least < value < math.inf):
            raise ValueError(f"{key} in config.json is {value!r}")


def _check_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise ArithmeticError(f"{what}; choose fp32")
