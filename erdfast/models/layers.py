"""Layers that the backbones share.

B batch, C channels, Y x X image, P patch size, L tokens, D width, H heads, K head width, M hidden width of an
MLP, E width of the time features. A suffix names a tensor's shape: x_BLD is (B, L, D).

The memory-bound steps between the matrix products are ops (`erdfast.ops`), for which modules only hold parameters,
as long as they are `plain`; others are called.
Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erdfast.ops.attention import attention_qkv, check_attention_backend
from erdfast.ops.gelu import gelu, linear_gelu
from erdfast.ops.modulated_norm import gated_residual, modulated_norm, residual_norm
from erdfast.ops.skip_linear import skip_linear

Kind = TypeVar("Kind", bound=nn.Module)


def plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether an op may take the module's parameters in place of a call, which nobody would notice.

    Not so for a subclass (fp8, LoRA), a `forward` set on the module itself (accelerate), or hooks (pruning, probes).
    """
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return type(module) is kind and "forward" not in module.__dict__ and not any(len(kept) for kept in hooks)


class Stream(NamedTuple):
    """The residual stream r = x + gate * branch on its way to a norm, which is the first to need the sum.

    A norm that makes it is one pass over memory, and one in backward; a sum that ends the block before, the norm, and
    in backward the sum of their gradients are 16 bytes more for each number of the stream.
    """

    x_BLD: Tensor
    branch_BLD: Tensor | None = None
    """What attention or MLP made of the stream; None where x is all of it."""
    gate_BD: Tensor | None = None
    """None for 1."""


def joined(stream: Stream) -> Tensor:
    """r, where no norm follows."""
    x_BLD, branch_BLD, gate_BD = stream
    if branch_BLD is None:
        return x_BLD
    return x_BLD + branch_BLD if gate_BD is None else gated_residual(x_BLD, gate_BD, branch_BLD)


def normed(norm: nn.Module, stream: Stream) -> tuple[Tensor, Tensor]:
    """(r, norm(r)) for a stream without gate."""
    if not plain(norm, nn.LayerNorm):
        r_BLD = joined(stream)
        return r_BLD, norm(r_BLD)
    return modulated(stream, weight=norm.weight, bias=norm.bias, eps=norm.eps)


def modulated(stream: Stream, *modulation: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(r, norm(r) * (1 + scale) + shift); `modulation`: shift and scale (B, D); the options of `modulated_norm`."""
    x_BLD, branch_BLD, gate_BD = stream
    if branch_BLD is None:
        return x_BLD, modulated_norm(x_BLD, *modulation, **options)
    return residual_norm(x_BLD, branch_BLD, gate_BD, *modulation, **options)


def join_skip(linear: nn.Module, x_BLD: Tensor, skip_BLD: Tensor) -> Tensor:
    """The Linear(2D -> D) of a long skip: its first D inputs take x, the other D the skip."""
    if not plain(linear, nn.Linear):
        return linear(torch.cat([x_BLD, skip_BLD.to(x_BLD.dtype)], dim=-1))
    return skip_linear(x_BLD, skip_BLD, linear.weight, linear.bias)


def patchify(image_BCYX: Tensor, patch_size: int) -> Tensor:
    """(B, C, Y, X) => (B, L, C*P*P), rows of patches first; Y and X are multiples of P."""
    B, C, Y, X = image_BCYX.shape
    P = patch_size
    grid = image_BCYX.reshape(B, C, Y // P, P, X // P, P)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, (Y // P) * (X // P), C * P * P)


def unpatchify(patches_BLN: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """(B, L, P*P*C) => (B, C, Y, X). Unlike in `patchify`, the channel is a patch's fastest index."""
    rows, columns = grid
    P = patch_size
    B, _, N = patches_BLN.shape
    C = N // (P * P)
    image = patches_BLN.reshape(B, rows, columns, P, P, C).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(B, C, rows * P, columns * P)


def patch_tokens(conv: nn.Module, image_BCYX: Tensor, patch_size: int) -> Tensor:
    """A convolution whose stride is its kernel, as tokens: (B, C, Y, X) => (B, L, D)."""
    # It is a matrix product. Spelled so, its backward needs no choice of a convolution algorithm and is deterministic.
    if not plain(conv, nn.Conv2d):
        return conv(image_BCYX).flatten(2).transpose(1, 2).contiguous()
    return F.linear(patchify(image_BCYX, patch_size), conv.weight.flatten(1), conv.bias)


class PatchEmbed(nn.Module):
    """Non-overlapping patches, each through one Linear: (B, C, Y, X) => (B, L, D).

    The weight has the shape (D, C, P, P) and the initialisation of the convolution in the published models.
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, image_BCYX: Tensor) -> Tensor:
        return patch_tokens(self.proj, image_BCYX.to(self.proj.weight.dtype), self.patch_size)


class Attention(nn.Module):
    """Multi-head self-attention: (B, L, D) => (B, L, D)."""

    def __init__(self, width: int, num_heads: int, *, qkv_bias: bool, backend: str = "auto") -> None:
        super().__init__()
        check_attention_backend(backend)
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        qkv_BL3HK = self.qkv(x_BLD).reshape(B, L, 3, self.num_heads, D // self.num_heads)
        return self.proj(attention_qkv(qkv_BL3HK, backend=self.backend).reshape(B, L, D))


class Mlp(nn.Module):
    """Linear(D -> M), GELU, Linear(M -> D); `approximate` is "none" (exact, U-ViT) or "tanh" (DiT)."""

    def __init__(self, width: int, hidden: int, *, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        if plain(self.fc1, nn.Linear):
            hidden_BLM = linear_gelu(x_BLD, self.fc1.weight, self.fc1.bias, self.approximate)
        else:
            hidden_BLM = gelu(self.fc1(x_BLD), self.approximate)
        return self.fc2(hidden_BLM)


class FixedTable(nn.Module):
    """Holds tables that are computed, not trained: float32 buffers that are in no checkpoint and that no cast lowers.

    A subclass registers them with `add_table` and fills them in `init_weights`, which it calls itself.
    """

    def add_table(self, name: str, *shape: int) -> None:
        """A float32 buffer without values yet."""
        self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=False)

    def init_weights(self) -> None:
        """Fill the tables, for instance after a model built on the meta device got its memory."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedTable:
        super()._apply(fn, recurse)
        lowered = [(name, table) for name, table in self.named_buffers() if table.dtype != torch.float32]
        for name, table in lowered:
            self._buffers[name] = torch.empty_like(table, dtype=torch.float32)
        if lowered:
            self.init_weights()
        return self


class TimeFeatures(FixedTable):
    """Sine-cosine features of the time: (B,) => (B, E) float32, cosines first, E even.

    The frequencies are 10000^(-i/(E/2)), i < E/2. At time 999 a bf16 frequency would be off by two radians.
    """

    frequencies: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        if features % 2:
            raise ValueError(f"the number of time features must be even, not {features}")
        self.features = features
        self.add_table("frequencies", features // 2)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill the table."""
        half = self.features // 2
        index = torch.arange(half, dtype=torch.float32, device=self.frequencies.device)
        self.frequencies.copy_(torch.exp(-math.log(10000.0) * index / half))

    def forward(self, time_B: Tensor) -> Tensor:
        angles = time_B.float().unsqueeze(1) * self.frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def sincos_table(grid: tuple[int, int], width: int, *, device: torch.device | None = None) -> Tensor:
    """The fixed position table of DiT: (1, rows*columns, width) float32, width a multiple of 4.

    The first half of a row encodes the column, the second half the row; each half is sines then cosines.
    """
    if width % 4:
        raise ValueError(f"a sine-cosine position table needs a width that is a multiple of 4, not {width}")
    rows, columns = grid
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def encode(positions: int) -> Tensor:
        angles = torch.arange(positions, dtype=torch.float64, device=device).unsqueeze(1) * omega
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)

    by_column = encode(columns).expand(rows, columns, width // 2)
    by_row = encode(rows).unsqueeze(1).expand(rows, columns, width // 2)
    return torch.cat([by_column, by_row], dim=2).reshape(1, rows * columns, width).float()


def xavier_uniform(weight: Tensor) -> None:
    """Glorot's uniform initialisation in place, of a weight (out, ...) read as the matrix (out, the rest)."""
    fan_out, fan_in = weight.shape[0], weight[0].numel()
    bound = math.sqrt(6 / (fan_in + fan_out))
    nn.init.uniform_(weight, -bound, bound)
