"""What LightningDiT and JiT share: a DiT's block with rotary positions, RMSNorm and SwiGLU.

Parameter names are those of the published checkpoints. Shapes: B batch, L tokens, D width, H heads, K head width, W
hidden width of a SwiGLU; the suffix of a tensor's name is its shape (see layers.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from erdfast.models.backbone import Accounting, TransformerConfig
from erdfast.models.dit import TIME_FEATURES
from erdfast.models.layers import Attention, FixedTable, Stream, joined, modulated, plain
from erdfast.ops.attention import attention
from erdfast.ops.dropout import dropout
from erdfast.ops.qk_norm_rope import Rope, qk_norm_rope, rope_tables
from erdfast.ops.source import NoiseKey
from erdfast.ops.swiglu import swiglu

EPS = 1e-6
"""Added to the mean square in every RMSNorm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig(TransformerConfig):
    """Fields and costs of the backbones that are made of `RopeBlock`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, as the sine-cosine position table needs")
        if self.head_width % 4:
            raise ValueError(
                f"width {self.width} over num_heads {self.num_heads} is {self.head_width}, not a multiple of 4, "
                "as rotary positions of rows and columns need"
            )

    @property
    def mlp_width(self) -> int:
        """Hidden width of a SwiGLU: two thirds of the ratio's, so that its three matrices weigh as much as two."""
        return 2 * int(self.width * self.mlp_ratio) // 3

    def rope_accounting(self, *, patch_weights: int, compute_activations: int = 0) -> Accounting:
        """The accounting of RopeBlocks with a patch embedding of `patch_weights` numbers.

        Args:
            compute_activations: what is kept besides the blocks and the final layer.
        """
        D, W, L = self.width, self.mlp_width, self.tokens
        patch_out = self.out_channels * self.patch_size**2
        through = sum(self.block_tokens)
        # Of a block the backward needs: both norms' inputs; the inputs of qkv, proj, w12 and w3; q and k before and
        # after norm and rotation, and v; the output of w12, and both branches before their gates. What the fused ops
        # recompute is not in it: their references keep more.
        return self.transformer_accounting(
            weights_per_token=patch_weights + D * patch_out,
            weights_per_image=through * (4 * D * D + 3 * D * W)
            + TIME_FEATURES * D
            + D * D
            + (6 * self.depth + 2) * D * D,
            compute_activations=through * (10 * D + 3 * W) + L * D + compute_activations,
            residual_activations=through * 2 * D + L * D,
            hidden_products=2 * W,
            recomputed_bytes=26 * D + 6 * W,  # DiT's norms, and q, k and the gate, each read and written
        )


class RopeTables(FixedTable):
    """Cosines and sines of the tokens' rotary positions; `extra_tokens` before the grid are not turned."""

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: tuple[int, int], head_width: int, extra_tokens: int = 0) -> None:
        super().__init__()
        self.grid, self.head_width, self.extra_tokens = grid, head_width, extra_tokens
        for name in ("cos", "sin"):
            self.add_table(name, extra_tokens + grid[0] * grid[1], head_width // 2)
        self.init_weights()

    def init_weights(self) -> None:
        """Fill the tables."""
        options = {"extra_tokens": self.extra_tokens, "device": self.cos.device}
        cos, sin = rope_tables(self.grid, self.head_width, **options)
        self.cos.copy_(cos)
        self.sin.copy_(sin)

    def forward(self) -> Rope:
        return self.cos, self.sin


class RopeAttention(Attention):
    """Attention whose queries and keys are turned by their positions, and normed before that with `qk_norm`."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, backend: str = "auto") -> None:
        super().__init__(width, num_heads, qkv_bias=True, backend=backend)
        self.q_norm = nn.RMSNorm(width // num_heads, eps=EPS) if qk_norm else None
        self.k_norm = nn.RMSNorm(width // num_heads, eps=EPS) if qk_norm else None

    def forward(self, x_BLD: Tensor, rope: Rope) -> Tensor:
        qkv_BLN = self.qkv(x_BLD)
        weights: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            if plain(self.q_norm, nn.RMSNorm) and plain(self.k_norm, nn.RMSNorm):
                weights = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
            else:
                qkv_BLN = self._normed(self.q_norm, self.k_norm, qkv_BLN)
        q, k, v = qk_norm_rope(qkv_BLN, self.num_heads, **weights, eps=EPS, rope=rope)
        return self.proj(attention(q, k, v, backend=self.backend).transpose(1, 2).reshape(x_BLD.shape))

    def _normed(self, q_norm: nn.Module, k_norm: nn.Module, qkv_BLN: Tensor) -> Tensor:
        """The norms as modules of their own, in place of the op's."""
        B, L, N = qkv_BLN.shape
        q, k, v = qkv_BLN.view(B, L, 3, self.num_heads, N // (3 * self.num_heads)).unbind(2)
        return torch.stack([q_norm(q).to(v.dtype), k_norm(k).to(v.dtype), v], dim=2).view(B, L, N)


class SwiGlu(nn.Module):
    """Linear(D -> 2W), SwiGLU's gate, Linear(W -> D)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_BLD: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """`drop` changes the hidden layer."""
        hidden_BLW = swiglu(self.w12(x_BLD))
        return self.w3(hidden_BLW if drop is None else drop(hidden_BLW))


class RopeBlock(nn.Module):
    """Attention and SwiGLU, each with a modulated RMSNorm before and a gate behind.

    Args:
        qk_norm: RMSNorm of the heads of q and k.
        dropout: share of numbers dropped from the attention's output and from the hidden layer, where a key is given.
    """

    def __init__(self, config: RopeConfig, *, qk_norm: bool, dropout: float = 0.0) -> None:
        super().__init__()
        width = config.width
        self.dropout = dropout
        self.norm1 = nn.RMSNorm(width, eps=EPS)
        self.attn = RopeAttention(width, config.num_heads, qk_norm=qk_norm, backend=config.attention)
        self.norm2 = nn.RMSNorm(width, eps=EPS)
        self.mlp = SwiGlu(width, config.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self,
        stream: Stream,
        condition_BD: Tensor,
        rope: Rope,
        key: NoiseKey | None = None,
        places: Tensor | None = None,
    ) -> Stream:
        """With `key`, numbers are dropped at `places`, (2,) int64 unlike any other block's."""
        modulation = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x_BLD, normed_BLD = _modulated(self.norm1, stream, attn_shift, attn_scale)
        branch_BLD = self.attn(normed_BLD, rope)
        drop = None
        if key is not None and places is not None:
            branch_BLD = dropout(branch_BLD, self.dropout, key, places[0])
            drop = functools.partial(dropout, rate=self.dropout, key=key, place=places[1])
        x_BLD, normed_BLD = _modulated(self.norm2, Stream(x_BLD, branch_BLD, attn_gate), mlp_shift, mlp_scale)
        return Stream(x_BLD, self.mlp(normed_BLD, drop), mlp_gate)


class RopeFinalLayer(nn.Module):
    """Modulated RMSNorm and a Linear to the numbers of a patch."""

    def __init__(self, width: int, patch_numbers: int) -> None:
        super().__init__()
        self.norm_final = nn.RMSNorm(width, eps=EPS)
        self.linear = nn.Linear(width, patch_numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.adaLN_modulation(condition_BD).chunk(2, dim=1)
        return self.linear(_modulated(self.norm_final, Stream(x_BLD), shift_BD, scale_BD)[1])


def _modulated(norm: nn.Module, stream: Stream, shift_BD: Tensor, scale_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(r, norm(r) * (1 + scale) + shift)."""
    if not plain(norm, nn.RMSNorm):
        r_BLD = joined(stream)
        return r_BLD, norm(r_BLD) * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)
    return modulated(stream, shift_BD, scale_BD, weight=norm.weight, norm="rms", eps=EPS)
