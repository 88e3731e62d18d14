"""A Linear whose three products run in float8: e4m3 for the input and the weight, e5m2 for the gradient.

    q(t) = round(t / s_t),   s_t = max|t| / max(format)          one scale per tensor, taken from the tensor itself
    out  = s_x s_w q(x) q(W)^T + b
    dx   = s_g s_w q(g) q(W),   dW = s_g s_x q(g)^T q(x),   db = sum g

Sums are float32. Rounding errs by at most 1/16 of an element in e4m3 (448 is the largest number) and 1/8 in e5m2
(57344); what is below 2^-6 (2^-14) of the scale errs by at most 2^-10 (2^-17) of it.

One scale per tensor, not per row: the products of the backward pass sum over rows, so that row scales would need a
second rounding along the other axis; and a rounded tensor is transposed as bytes, a quarter of the traffic.

Plain PyTorch in an autograd.Function, not a custom op: torch.compile then fuses the maximum, the scaling and the cast
with one another. For the backward pass the rounded input is kept, a byte per element, and the weight itself, which
exists anyway (FSDP gathers it again) and is rounded again with its old scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_BACKENDS = ("reference", "scaled_mm")
FP8_MULTIPLE = 16
"""torch._scaled_mm takes matrices whose inner and last sizes are multiples of this: 16 bytes of float8."""
FP8_CAPABILITY = (8, 9)
"""The first GPUs with float8 products: Ada (8.9), Hopper (9.0)."""
_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`F.linear(x, weight, bias)` with products in float8.

    Args:
        x: (..., D), at least one row, D a multiple of 16; float32, bfloat16 or float16.
        weight: (M, D), M a multiple of 16; one of these dtypes, not necessarily x's.
        bias: (M,) or None, likewise.
        backend: "scaled_mm" is torch._scaled_mm, fast on GPUs of compute capability 8.9 or later (a CPU emulates it);
            "reference" rounds to float8 and multiplies in float32, anywhere. By default scaled_mm.

    Returns:
        (..., M), in the dtype of F.linear: that of autocast where it is on, else x's. Differentiable once. A number
        that is not finite makes all of the result NaN.

    Raises:
        ValueError: an unknown back end, none given on a device without float8 products, or shapes, dtypes or devices
            that do not fit.
    """
    if backend is None and (reason := fp8_reason(x.device)):
        raise ValueError(f"fp8_linear needs {reason}; backend='reference' emulates it, slowly")
    if backend is not None and backend not in FP8_BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(FP8_BACKENDS)}")
    _check(x, weight, bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.reshape(-1, x.shape[-1])
    out = _Fp8Linear.apply(rows, weight, bias, dtype, backend or "scaled_mm")
    return out.view(*x.shape[:-1], weight.shape[0])  # pyright: ignore[reportOptionalMemberAccess]


def fp8_reason(device: torch.device) -> str | None:
    """What a device lacks for products in float8; None where it has them."""
    needed = "a GPU of compute capability 8.9 or later (Ada, Hopper or newer)"
    if device.type != "cuda":
        return f"{needed}, not a {'CPU' if device.type == 'cpu' else device.type}"
    if torch.version.hip is not None:
        return f"{needed}, under CUDA and not ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    return None if (major, minor) >= FP8_CAPABILITY else f"{needed}; this one has {major}.{minor}"


def fp8_fits(weight: Tensor) -> bool:
    """Whether a (M, D) weight has sizes that float8 products take."""
    return all(size % FP8_MULTIPLE == 0 for size in weight.shape)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or x.numel() == 0:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"fp8_linear needs x (..., D) with at least one row and weight (M, D), not {shapes}")
    if not fp8_fits(weight):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; float8 needs multiples of {FP8_MULTIPLE}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; weight {tuple(weight.shape)} needs ({weight.shape[0]},)")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; fp8_linear takes float32, bfloat16 and float16")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, but x on {x.device}")


class _Float8(NamedTuple):
    """A matrix rounded to float8: data * scale."""

    data: Tensor
    """(R, C) contiguous."""
    scale: Tensor
    """0-d float32."""

    def transposed(self) -> _Float8:
        """(C, R'), contiguous; R' is R up to the next multiple of 16, filled with zeros, which add nothing."""
        data = self.data
        missing = -data.shape[0] % FP8_MULTIPLE
        if missing:  # as bytes, of which 0 is the number 0: float8 itself cannot be padded everywhere
            data = F.pad(data.view(torch.uint8), (0, 0, 0, missing)).view(data.dtype)
        return _Float8(data.t().contiguous(), self.scale)


def _scale(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """By which to divide a matrix so that its largest number is the format's: 0-d float32.

    Not below the smallest normal number: it and its reciprocal are finite, and zeros stay zeros.
    """
    amax = torch.linalg.vector_norm(matrix, float("inf")).float()
    return (amax / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)


def _round(matrix: Tensor, scale: Tensor, dtype: torch.dtype) -> _Float8:
    """matrix / scale in a float8 format."""
    largest = torch.finfo(dtype).max
    # Multiplying may carry the largest number a rounding above the format's, of which some versions make NaN.
    scaled = (matrix.float() * scale.reciprocal()).clamp(-largest, largest)
    return _Float8(scaled.to(dtype).contiguous(), scale)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
        x_8, weight_8 = _round(x, _scale(x, _E4M3), _E4M3), _round(weight, _scale(weight, _E4M3), _E4M3)
        ctx.save_for_backward(*x_8, weight, weight_8.scale)
        ctx.x_dtype, ctx.bias_dtype, ctx.backend = x.dtype, None if bias is None else bias.dtype, backend
        return _product(x_8, weight_8, bias, dtype, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError("fp8_linear is differentiable once; use F.linear for second derivatives")
        (grad,) = grads
        x_data, x_scale, weight, weight_scale = ctx.saved_tensors
        grad_8 = _round(grad, _scale(grad, _E5M2), _E5M2)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight_8 = _round(weight, weight_scale, _E4M3)
            grad_x = _product(grad_8, weight_8.transposed(), None, ctx.x_dtype, ctx.backend)
        if ctx.needs_input_grad[1]:
            columns = grad_8.transposed(), _Float8(x_data, x_scale).transposed()
            grad_weight = _product(*columns, None, weight.dtype, ctx.backend)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _product(a: _Float8, b: _Float8, bias: Tensor | None, dtype: torch.dtype, backend: str) -> Tensor:
    """a b^T + bias for a (R, C) and b (S, C), the layout that Hopper's float8 products take: (R, S)."""
    if backend == "reference":
        with torch.autocast(a.data.device.type, enabled=False):
            out = a.data.float() @ b.data.float().t() * (a.scale * b.scale)
            return (out if bias is None else out + bias.float()).to(dtype)
    inside = bias is not None and dtype != torch.float32  # the epilogue has no float32 bias
    out = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        a.data,
        b.data.t(),
        scale_a=a.scale,
        scale_b=b.scale,
        bias=bias.to(dtype) if bias is not None and inside else None,
        out_dtype=dtype,
        use_fast_accum=False,  # Hopper's fast sums keep 14 bits
    )
    return out if bias is None or inside else out + bias
