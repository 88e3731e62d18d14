"""What a reader finds in a file or folder, before it is checked, and the scales that latents come in."""

from __future__ import annotations

import pickle
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .dataset import spread
from .rows import Rows

SD_VAE_SCALE = 0.18215
"""Brings the Stable Diffusion VAE's latents to about unit variance (Rombach et al., 2022)."""
SCALES = ("auto", "stored", "sd", "edm2")
"""How stored latents are brought to the network's scale: not at all, times 0.18215, or whitened as EDM2 does."""
_EDM2_MEAN, _EDM2_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
"""Of the Stable Diffusion VAE's latents of ImageNet pictures given in [0, 1], per channel (Karras et al., 2024)."""
_EDM2_FINAL_STD = 0.5

DAMAGE = (
    ValueError,
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    OverflowError,
    TypeError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    tokenize.TokenError,  # NumPy, of a header whose brackets stay open
    pickle.UnpicklingError,  # PyTorch's restricted reader refuses a file with it
)
"""What the readers raise when a header, a directory of parts or a number in it makes no sense."""


Result = TypeVar("Result")


def guarded(path: Path, read: Callable[[], Result]) -> Result:
    """What `read` returns; whatever a damaged file makes it raise becomes a ValueError that names the file, once."""
    try:
        return read()
    except DAMAGE as error:
        text = str(error) or type(error).__name__
        raise ValueError(text if text.startswith(f"{path}: ") else f"{path}: cannot be read: {text}") from error


class Affine(NamedTuple):
    """x * scale + bias per channel, each (C, 1, 1) float32; of moments, deviations take the scale alone."""

    scale: Tensor
    bias: Tensor

    def apply(self, x: Tensor, *, moments: bool) -> Tensor:
        """(B, C or 2C, H, W) => the same, float32."""
        if not moments:
            return x.float() * self.scale + self.bias
        mean, std = x.float().chunk(2, dim=1)
        return torch.cat([mean * self.scale + self.bias, std * self.scale], dim=1)


class VaeUnits(NamedTuple):
    """How the network's values come from a VAE's own latents, and which range of pictures that VAE was given."""

    affine: Affine
    zero_to_one: bool = False
    """Pictures in [0, 1] in place of [-1, 1]."""


def factor_units(factor: float, channels: int, shift: float = 0.0) -> VaeUnits:
    """(latent - shift) * factor in every channel."""
    scale = torch.full((channels, 1, 1), factor)
    return VaeUnits(Affine(scale, -shift * scale))


def edm2_units(channels: int) -> VaeUnits:
    """EDM2's: of pictures in [0, 1], whitened.

    Raises:
        ValueError: other than four channels.
    """
    return VaeUnits(edm2_whitening(channels), zero_to_one=True)


class Source(NamedTuple):
    """What a file holds."""

    rows: Rows
    labels: Tensor | None
    kind: str
    """pixels, latents or moments (mean and standard deviation of the VAE's posterior)."""
    note: str
    """How the values are scaled, for people."""
    affine: Affine | None = None
    moments_scale: float | None = None
    """With moments: the factor of their draws."""
    flipped: Rows | None = None
    """Mirror images of `rows`, where they are stored."""
    class_names: tuple[str, ...] = ()
    num_classes: int | None = None
    """Where the format says it; otherwise the largest label plus 1."""
    scale: str = "stored"
    """Of `SCALES`: what this format's own code does; auto is for formats that more than one project writes."""
    units: VaeUnits | None = None
    """Of what `affine` and `moments_scale` make of the rows; None where the data do not say it."""


def rescaled(source: Source, asked: str) -> Source:
    """The source with its values brought to the network's scale as `asked`; auto does what the format's code does.

    Raises:
        ValueError: unknown, or it does not suit the data.
    """
    if asked not in SCALES:
        raise ValueError(f"unknown latent_scale {asked!r}; choose from {', '.join(SCALES)}")
    if asked == "auto" and (source.scale == "stored" or source.kind == "pixels"):
        return source._replace(moments_scale=source.moments_scale or 1.0) if source.kind == "moments" else source
    if source.kind == "pixels":
        raise ValueError(f"latent_scale {asked} is for latents, and these are pixels")
    chosen = source.scale if asked == "auto" else asked
    if len(source.rows.shape) != 3:
        raise ValueError(f"latents must be (N, C, H, W), got (N, {', '.join(map(str, source.rows.shape))})")
    if chosen == "auto":
        chosen = _guess(source)
    moments, channels = source.kind == "moments", _channels(source)
    factor = SD_VAE_SCALE if chosen == "sd" else 1.0
    after = edm2_units(channels) if chosen == "edm2" else factor_units(factor, channels)
    source = source._replace(units=_units_after(source, chosen, after), affine=None, note="as stored")
    source = source._replace(moments_scale=1.0 if moments else None)
    if chosen == "edm2":
        note = f"given to the VAE in [0, 1], whitened to std {_EDM2_FINAL_STD} (EDM2)"
        return source._replace(affine=after.affine, note=note)
    if chosen == "sd" and moments:
        return source._replace(moments_scale=factor, note=f"posterior draws times {factor}")
    if chosen == "sd":
        return source._replace(affine=after.affine, note=f"times {factor}")
    return source


def _units_after(source: Source, chosen: str, after: VaeUnits) -> VaeUnits | None:
    """Of the rows as they are stored, brought to a scale by `after`."""
    if source.scale != "stored" or source.affine is not None:  # this format holds what the VAE gave
        return after
    if source.units is None:  # whoever asks for a scale says that these rows are what the VAE gave
        return None if chosen == "stored" else after
    (scale, bias), drawn = source.units.affine, source.moments_scale or 1.0
    factor, shift = after.affine
    return source.units._replace(affine=Affine(scale / drawn * factor, bias / drawn * factor + shift))


def edm2_whitening(channels: int) -> Affine:
    """EDM2's standard deviation of 0.5 and mean of 0 per channel.

    Raises:
        ValueError: other than four channels.
    """
    if channels != len(_EDM2_MEAN):
        raise ValueError(f"latent_scale edm2 is for {len(_EDM2_MEAN)} channels, these latents have {channels}")
    scale = _EDM2_FINAL_STD / torch.tensor(_EDM2_STD).view(-1, 1, 1)
    return Affine(scale, -torch.tensor(_EDM2_MEAN).view(-1, 1, 1) * scale)


def _channels(source: Source) -> int:
    return source.rows.shape[0] // (2 if source.kind == "moments" else 1)


def _guess(source: Source) -> str:
    """EDM2 and REPA write equal files of different values: EDM2's mean, of bright pictures, is far from 0."""
    if _channels(source) != len(_EDM2_MEAN):
        return "sd"
    mean = source.rows.take(spread(len(source.rows)))[:, :4].float().mean(dim=(0, 2, 3))
    edm2 = torch.tensor(_EDM2_MEAN)
    return "edm2" if float((mean - edm2).norm()) < float(mean.norm()) else "sd"
