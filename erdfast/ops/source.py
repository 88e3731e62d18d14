"""The inputs that the two central ops share: clean data (or moments to draw it from) and noise (or the key to it)."""

from __future__ import annotations

from collections.abc import Sequence
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
    """(B,) int64, on the device of the data, such as the index in the data set; None numbers the samples of the batch
    0, 1, ... Equal keys give equal noise: ids or streams must differ between a step's processes and micro-batches."""


class Moments(NamedTuple):
    """A VAE posterior to draw x0 from in the op: x0 = scale * (mean + std * eta), eta ~ N(0, 1) from the same key."""

    tensor: Tensor
    """(B, 2C, H, W), contiguous or channels-last: C channels of means, then C channels of standard deviations."""
    scale: float = 1.0
    """What latents are multiplied by, 0.18215 for the Stable Diffusion VAE."""


class Coefficients(NamedTuple):
    """Five numbers per sample for `add_noise` and `diffusion_loss`, without a Process: (B,) float32 each, or one number
    for all samples."""

    alpha: Tensor | float
    """x_t = alpha*x0 + sigma*eps"""
    sigma: Tensor | float
    c_x: Tensor | float
    """The network's target is c_x*x0 + c_eps*eps."""
    c_eps: Tensor | float
    w: Tensor | float = 1.0
    """Weight of a sample's mean squared error."""


class CoefficientsLike(Protocol):
    """What the ops read of a process's coefficients: (B,) each, float32 for the compiled back ends; or one number."""

    @property
    def alpha(self) -> Tensor | float: ...
    @property
    def sigma(self) -> Tensor | float: ...
    @property
    def c_x(self) -> Tensor | float: ...
    @property
    def c_eps(self) -> Tensor | float: ...
    @property
    def w(self) -> Tensor | float: ...


class Source(NamedTuple):
    """Checked inputs of one call. Exactly one of `noise` and (`seed`, `stream`) is given, except that moments with
    explicit noise need both. An int stays one: the compiled CPU code needs no tensor of it."""

    x0: Tensor
    noise: Tensor | None
    seed: int | Tensor | None
    stream: int | Tensor | None
    sample_ids: Tensor | None
    """None numbers the samples, where there is a seed."""
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

    def key_tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(seed, stream, sample ids) as tensors on the device of the data: 0-d int64 twice, (B,) int64."""
        if self.seed is None or self.stream is None:
            return None, None, None
        ids, device = self.sample_ids, self.x0.device
        seed, stream = philox.scalar("seed", self.seed, 64, device), philox.scalar("stream", self.stream, 32, device)
        return seed, stream, torch.arange(self.batch, device=device) if ids is None else ids


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
    shape, device, dtype = _sample_shape(data, is_moments=scale is not None), data.device, data.dtype
    _check_noise(key, noise, needs_key=scale is not None)
    for name, tensor in (("x0", data), ("noise", noise), ("pred", extra)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} is {tensor.dtype}; it must be a floating-point tensor")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x0 on {device}; they must share a device")
        if name != "x0" and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, x0 has {tuple(shape)}; they must be equal")
        if tensor.dtype not in KERNEL_DTYPES:
            dtype = tensor.dtype
    chosen = resolve_backend(backend, device, dtype)
    if chosen != "reference":
        for name, tensor in (("x0", data), ("noise", noise), ("pred", extra)):
            if tensor is not None and sample_layout(tensor) is None:
                raise ValueError(
                    f"{name} with shape {tuple(tensor.shape)} and strides {tensor.stride()}: its samples are neither "
                    "contiguous nor channels-last; call .contiguous() on it: the op makes no silent copies"
                )
    return Source(data, noise, *_key_parts(key, shape[0], device), scale, shape, chosen)


class Layout(NamedTuple):
    """Where the elements of a batch of samples lie."""

    stride: int
    """Elements from one sample to the next."""
    pixel: int
    """0 where a sample's elements lie in order; in a channels-last sample the elements from one pixel to the next: its
    channels, or more where it is a slice of them."""


def sample_layout(tensor: Tensor) -> Layout | None:
    """The layout of a (B, C, ...) tensor whose samples are dense, at any distance; None for any other.

    So data[::2] and the first half of a network's channels are taken as they are.
    """
    if tensor.is_contiguous():
        return Layout(tensor.shape[1:].numel(), 0)
    batch_stride, *strides = tensor.stride()
    sizes = tensor.shape[1:]
    if _is_dense(sizes, strides, 1):
        return Layout(batch_stride, 0)
    pixel = next((stride for size, stride in zip(sizes[:0:-1], strides[:0:-1], strict=True) if size > 1), 0)
    if pixel >= sizes[0] and strides[0] == 1 and _is_dense(sizes[1:], strides[1:], pixel):
        return Layout(batch_stride, pixel)
    return None


def _is_dense(sizes: Sequence[int], strides: Sequence[int], unit: int) -> bool:
    """Whether elements follow one another in order, `unit` apart; the stride of a dimension of one means nothing."""
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != unit:
            return False
        unit *= size
    return True


def sample_layouts(*tensors: Tensor | None, drawn: bool) -> list[Layout]:
    """The layouts of tensors that `make_source` has accepted, (0, 0) for None.

    Where nothing is drawn and all are channels-last alike, the order of elements does not matter: they pass as lying
    in order.
    """
    layouts = [Layout(0, 0) if t is None else sample_layout(t) for t in tensors]
    if not drawn and all(t is None or (p and p.pixel == t.shape[1]) for p, t in zip(layouts, tensors, strict=True)):
        return [Layout(p.stride, 0) for p in layouts if p]
    return [p for p in layouts if p]


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None, shape: torch.Size | None = None) -> Tensor:
    """An uninitialised tensor without gaps: channels-last if the (B, C, ...) `tensor` is, else contiguous."""
    shape, layout = tensor.shape if shape is None else shape, sample_layout(tensor)
    dtype = dtype or tensor.dtype
    if layout is None or not layout.pixel:
        return torch.empty(shape, dtype=dtype, device=tensor.device)
    return torch.empty((shape[0], *shape[2:], shape[1]), dtype=dtype, device=tensor.device).movedim(-1, 1)


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


def _check_noise(key: NoiseKey | None, noise: Tensor | None, needs_key: bool) -> None:
    if (key is None) == (noise is None) and not (needs_key and key is not None):
        raise ValueError("give either a NoiseKey or noise=..., not " + ("neither" if key is None else "both"))
    if needs_key and key is None:
        raise ValueError("moments are drawn from a NoiseKey: give key as well as noise")


def _key_parts(
    key: NoiseKey | None, batch: int, device: torch.device
) -> tuple[int | Tensor | None, int | Tensor | None, Tensor | None]:
    if key is None:
        return None, None, None
    seed, stream, ids = key
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        seed = philox.scalar("seed", seed, 64, device)
    if type(stream) is not int or not 0 <= stream < 1 << 32:
        stream = philox.scalar("stream", stream, 32, device)
    if ids is not None:
        if ids.dtype != torch.int64 or ids.shape != (batch,):
            raise ValueError(
                f"sample_ids is {ids.dtype} with shape {tuple(ids.shape)}; it must be int64 with shape ({batch},)"
            )
        ids = ids.contiguous()
    for name, value in (("seed", seed), ("stream", stream), ("sample_ids", ids)):
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(f"{name} is on {value.device}, x0 on {device}; they must share a device")
    return seed, stream, ids


def column(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, ..., 1): broadcasts over samples even where B equals another dimension."""
    return coefficient.reshape(-1, *[1] * (like.dim() - 1))


def read_coefficients(source: Source, coef: CoefficientsLike, *names: str) -> list[Tensor]:
    """The named coefficients, (B,) each on the data's device, float32 for a compiled back end.

    Raises:
        ValueError: one is missing, or has another shape, dtype or device.
    """
    values = []
    for name in names:
        value = getattr(coef, name, None)
        if isinstance(value, (int, float)):
            dtype = torch.float32 if source.backend != "reference" else torch.get_default_dtype()
            value = torch.full((source.batch,), value, dtype=dtype, device=source.x0.device)
        elif not isinstance(value, Tensor):
            problem = "has no" if value is None else f"has a {type(value).__name__} as"
            raise ValueError(
                f"coef, a {type(coef).__name__}, {problem} {name}; it needs {', '.join(names)}: (B,) tensors"
            )
        elif value.shape != (source.batch,) or value.device != source.x0.device:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} on {value.device}; "
                f"it must be ({source.batch},) on {source.x0.device}"
            )
        elif source.backend != "reference" and value.dtype != torch.float32:
            raise ValueError(
                f"{name} is {value.dtype}; the {source.backend} back end takes float32 coefficients: "
                "call .float() on the times that they come from"
            )
        values.append(value)
    return values


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
    seed, stream, ids = source.key_tensors()

    def draw(domain: str) -> Tensor:
        assert seed is not None
        assert stream is not None
        assert ids is not None
        flat = philox.normal(seed, stream, ids, source.numel, domain)
        return flat.reshape(source.shape).to(dtype)

    if source.moments_scale is not None:
        mean, std = x0.chunk(2, dim=1)
        x0 = source.moments_scale * (mean + std * draw("posterior"))
    return x0, draw("noise") if eps is None else eps.to(dtype)
