"""DiT: a transformer with adaptive layer norm (Peebles & Xie, "Scalable diffusion models with transformers").

Parameter names are those of the published checkpoints. Shapes: B batch, L tokens, D width, E time features;
the suffix of a tensor's name is its shape (see layers.py).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from erdfast.models.backbone import Accounting, Backbone, TransformerConfig
from erdfast.models.layers import (
    Attention,
    FixedTable,
    Mlp,
    PatchEmbed,
    Stream,
    TimeFeatures,
    joined,
    modulated,
    sincos_table,
    unpatchify,
    xavier_uniform,
)
from erdfast.ops.modulated_norm import modulated_norm

TIME_FEATURES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Configuration of a DiT."""

    backbone: ClassVar[str] = "dit"

    learn_sigma: bool = False
    """Also predict a variance: the output has 2C channels, of which the first C are the prediction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, as the sine-cosine position table needs")

    @property
    def out_channels(self) -> int:
        """C, or 2C with learn_sigma."""
        return self.input_shape[0] * (2 if self.learn_sigma else 1)

    def build(self) -> DiT:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        return DiT(self)

    def accounting(self) -> Accounting:
        """Tokens, weights and activations of one image in training."""
        D, M, L = self.width, self.mlp_width, self.tokens
        patch_in = self.input_shape[0] * self.patch_size**2
        patch_out = self.out_channels * self.patch_size**2
        # Of a block the backward needs: both norms' inputs and outputs; the inputs of qkv, proj, fc1 and fc2,
        # q, k and v, the hidden layer before its GELU, and both branches before their gates.
        return self.transformer_accounting(
            weights_per_token=self.depth * (4 * D * D + 2 * D * M) + D * (patch_in + patch_out),
            weights_per_image=TIME_FEATURES * D + D * D + (6 * self.depth + 2) * D * D,
            compute_activations=L * (self.depth * (8 * D + 2 * M) + D),
            residual_activations=L * (self.depth * 4 * D + 2 * D),
        )


class TimeEmbedding(nn.Module):
    """(B,) => (B, D): sine-cosine features, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.features = TimeFeatures(TIME_FEATURES)
        self.mlp = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time_B: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(self.features(time_B).to(dtype))


class LabelEmbedding(nn.Module):
    """(B,) => (B, D); the last row of the table is the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class AdaLNTransformer(Backbone):
    """What DiT and its descendants have in common: all but the patch embedding, the blocks and the final layer.

    A subclass adds `blocks`, `final_layer` (with a `linear`) and calls `init_weights`.
    """

    config: TransformerConfig
    blocks: nn.ModuleList
    final_layer: nn.Module

    def __init__(self, config: TransformerConfig, x_embedder: nn.Module) -> None:
        super().__init__(config)
        width = config.width
        self.grid, self.patch_size = config.grid, config.patch_size
        self.x_embedder = x_embedder
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(config.num_classes, width) if config.num_classes else None
        # A parameter without gradient, not a buffer: the published checkpoints and counts contain it as one.
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_patches, width), requires_grad=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Xavier for matrices, 0.02 for the embeddings of time and label, zero for modulations and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                xavier_uniform(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, FixedTable):
                module.init_weights()
        for module in self.x_embedder.modules():
            if isinstance(module, nn.Conv2d):
                xavier_uniform(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.pos_embed.copy_(sincos_table(self.grid, self.config.width, device=self.pos_embed.device))
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # With zero gates every block starts as the identity.
        for module in [*self.blocks, self.final_layer]:
            for parameter in module.get_submodule("adaLN_modulation").parameters():
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.final_layer.get_parameter("linear.weight"))

    def blocks_for_sharding(self) -> list[nn.Module]:
        """The blocks in order."""
        return list(self.blocks)

    def readout(self) -> nn.Module:
        """The final layer."""
        return self.final_layer

    def patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) => (B, L, D), with their positions."""
        return self.x_embedder(x) + self.pos_embed

    def conditions(self, time: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B,), (B,) or None => the condition of every modulation (B, D), and of it the label's part."""
        time_BD = self.t_embedder(time, self.pos_embed.dtype)
        if self.y_embedder is None:
            return time_BD, None
        label_BD = self.y_embedder(y)
        return time_BD + label_BD, label_BD

    def image(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        """The final layer's patches as (B, C_out, H, W)."""
        return unpatchify(self.final_layer(x_BLD, condition_BD), self.grid, self.patch_size)


class DiTBlock(nn.Module):
    """Attention and MLP, each with a modulated norm before and a gate behind (adaLN-Zero)."""

    norm2_eps = 1e-6
    """Of the norm before the MLP; that before attention has the op's."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = Attention(width, config.num_heads, qkv_bias=True, backend=config.attention)
        self.mlp = Mlp(width, config.mlp_width, approximate="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, stream: Stream, condition_BD: Tensor) -> Stream:
        modulation = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x_BLD, normed_BLD = modulated(stream, attn_shift, attn_scale)
        stream = Stream(x_BLD, self.attn(normed_BLD), attn_gate)
        x_BLD, normed_BLD = modulated(stream, mlp_shift, mlp_scale, eps=self.norm2_eps)
        return Stream(x_BLD, self.mlp(normed_BLD), mlp_gate)


class FinalLayer(nn.Module):
    """Modulated norm and a Linear to the numbers of a patch."""

    def __init__(self, width: int, patch_numbers: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch_numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BLD: Tensor, condition_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.adaLN_modulation(condition_BD).chunk(2, dim=1)
        return self.linear(modulated_norm(x_BLD, shift_BD, scale_BD))


class DiT(AdaLNTransformer):
    """The network; see `Backbone.forward` for inputs and output."""

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, PatchEmbed(config.input_shape[0], config.width, config.patch_size))
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.width, config.patch_size**2 * config.out_channels)
        self.init_weights()

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,), (B,) or None => (B, C_out, H, W)."""
        self.check_inputs(x, time, y)
        stream = Stream(self.patches(x))
        condition_BD, _ = self.conditions(time, y)
        for block in self.blocks:
            stream = block(stream, condition_BD)
        return self.image(joined(stream), condition_BD)
