"""The inputs that the two central ops share: clean data (or moments to draw it from) and noise (or the key to it)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from erdfast import philox

from .backend import KERNEL_DTYPES, resolve_backend


class NoiseKey(NamedTuple):
    """Noise as a function: sample `sample_ids[b]` has the same noise in any batch, on any device, in any process."""

    seed: int | Tensor
    """0 <= seed < 2^64, or an int64 tensor with one element (no recompilation, no synchronisation when it changes)."""
    stream: int | Tensor = 0
    """0 <= stream < 2^32, usually the training step; or an int64 tensor with one element."""
    sample_ids: Tensor | None = None
    """(B,) int64, on the device of the data; None numbers the samples of the batch 0, 1, ..."""


class Moments(NamedTuple):
    """A VAE posterior to draw x0 from in the op: x0 = scale * (mean + std * eta), eta ~ N(0, 1) from the same key."""

    tensor: Tensor
    """(B, 2C, H, W) contiguous: C channels of means, then C channels of standard deviations."""
    scale: float = 1.0
    """What latents are multiplied by, 0.18215 for the Stable Diffusion VAE."""


class CoefficientsLike(Protocol):
    """What the ops read of a process's coefficients: (B,) each, float32 for the compiled back ends."""

    @property
    def alpha(self) -> Tensor: ...
    @property
    def sigma(self) -> Tensor: ...
    @property
    def c_x(self) -> Tensor: ...
    @property
    def c_eps(self) -> Tensor: ...
    @property
    def w(self) -> Tensor: ...


class Source(NamedTuple):
    """Checked inputs of one call. Exactly one of `noise` and (`seed`, `stream`, `sample_ids`) is given, except that
    moments with explicit noise need both."""

    x0: Tensor
    noise: Tensor | None
    seed: Tensor | None
    stream: Tensor | None
    sample_ids: Tensor | None
    moments_scale: float | None
    shape: torch.Size
    backend: str

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def numel(self) -> int:
        """Elements of one sample."""
        return self.shape[1:].numel()


def make_source(
    x0: Tensor | Moments,
    key: NoiseKey | None,
    noise: Tensor | None,
    backend: str | None,
    extra: Tensor | None = None,
) -> Source:
    """Check the inputs and choose the back end; `extra` is another tensor of the data's shape (the prediction).

    Raises:
        ValueError: what is wrong, with the shapes and dtypes at fault.
    """
    data, scale = (x0.tensor, float(x0.scale)) if isinstance(x0, Moments) else (x0, None)
    _check_types(data, key, noise, extra)
    shape = _sample_shape(data, is_moments=scale is not None)
    _check_noise(shape, key, noise, needs_key=scale is not None)
    tensors = {"x0": data, "noise": noise, "pred": extra}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; it must be a floating-point tensor")
        if tensor.device != data.device:
            raise ValueError(f"{name} is on {tensor.device}, x0 on {data.device}; they must share a device")
        if name != "x0" and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x0 has {tuple(shape)}; they must be equal")
    dtype = data.dtype
    for tensor in (noise, extra):
        if tensor is not None and tensor.dtype not in KERNEL_DTYPES:
            dtype = tensor.dtype
    chosen = resolve_backend(backend, data.device, dtype)
    if chosen != "reference":
        for name, tensor in tensors.items():
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(
                    f"{name} with shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous; "
                    "call .contiguous() on it: the op makes no silent copies"
                )
    seed, stream, ids = _key_tensors(key, shape[0], data.device)
    return Source(data, noise, seed, stream, ids, scale, shape, chosen)


def _check_types(data: object, key: object, noise: object, pred: object) -> None:
    for name, value in {"x0": data, "noise": noise, "pred": pred}.items():
        if not isinstance(value, Tensor) and (name == "x0" or value is not None):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor")
    if key is not None and not isinstance(key, NoiseKey):
        raise ValueError(
            f"key is a {type(key).__name__}; it must be a NoiseKey (an explicit eps is given as noise=...)"
        )
    if isinstance(key, NoiseKey) and key.sample_ids is not None and not isinstance(key.sample_ids, Tensor):
        raise ValueError(f"sample_ids is a {type(key.sample_ids).__name__}; it must be an int64 tensor")


def _sample_shape(data: Tensor, is_moments: bool) -> torch.Size:
    if data.dim() < 2 or data.numel() == 0:
        raise ValueError(f"x0 has shape {tuple(data.shape)}; it must be (B, ...) with at least one element a sample")
    if not is_moments:
        return data.shape
    if data.shape[1] % 2:
        raise ValueError(f"moments have shape {tuple(data.shape)}; dimension 1 must be even: means, then deviations")
    return torch.Size((data.shape[0], data.shape[1] // 2, *data.shape[2:]))


def _check_noise(shape: torch.Size, key: NoiseKey | None, noise: Tensor | None, needs_key: bool) -> None:
    if (key is None) == (noise is None) and not (needs_key and key is not None):
        raise ValueError("give either a NoiseKey or noise=..., not " + ("neither" if key is None else "both"))
    if needs_key and key is None:
        raise ValueError("moments are drawn from a NoiseKey: give key as well as noise")
    if key is not None and key.sample_ids is not None:
        ids = key.sample_ids
        if ids.dtype != torch.int64 or ids.shape != (shape[0],):
            raise ValueError(
                f"sample_ids is {ids.dtype} with shape {tuple(ids.shape)}; it must be int64 with shape ({shape[0]},)"
            )


def _key_tensors(
    key: NoiseKey | None, batch: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if key is None:
        return None, None, None
    ids = torch.arange(batch, device=device) if key.sample_ids is None else key.sample_ids
    if ids.device != device:
        raise ValueError(f"sample_ids is on {ids.device}, x0 on {device}; they must share a device")
    seed = philox.scalar("seed", key.seed, 64, device)
    stream = philox.scalar("stream", key.stream, 32, device)
    for name, value in (("seed", seed), ("stream", stream)):
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, x0 on {device}; they must share a device")
    return seed, stream, ids.contiguous()


def column(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1): broadcasts over samples even where B equals another dimension."""
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))


def check_coefficients(source: Source, **coefficients: Tensor) -> None:
    """Raise ValueError unless each coefficient is (B,) on the data's device, and float32 for a compiled back end."""
    for name, value in coefficients.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}; it must be a tensor of shape ({source.batch},)")
        if value.shape != (source.batch,) or value.device != source.x0.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; "
                f"it must be ({source.batch},) on {source.x0.device}"
            )
        if source.backend != "reference" and value.dtype != torch.float32:
            raise ValueError(f"{name} is {value.dtype}; the {source.backend} back end takes float32 coefficients")


def refuse_gradients(**inputs: Tensor | None) -> None:
    """Raise ValueError if one of the inputs, for which the compiled back ends have no gradient, wants one."""
    for name, tensor in inputs.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"gradients for {name} need backend='reference'; detach it otherwise")


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    """What the reference computes in: float64 if any input is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in inputs) else torch.float32


def reference_x0_eps(source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x0 and eps as tensors in `dtype`: the definition that the compiled back ends follow."""
    x0, eps = source.x0.to(dtype), source.noise

    def draw(domain: str) -> Tensor:
        assert source.seed is not None
        assert source.stream is not None
        assert source.sample_ids is not None
        flat = philox.normal(source.seed, source.stream, source.sample_ids, source.numel, domain)
        return flat.reshape(source.shape).to(dtype)

    if source.moments_scale is not None:
        mean, std = x0.chunk(2, dim=1)
        x0 = source.moments_scale * (mean + std * draw("posterior"))
    return x0, draw("noise") if eps is None else eps.to(dtype)
