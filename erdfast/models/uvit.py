"""U-ViT: a transformer over [label, time, patches] with long skips (Bao et al., "All are worth words").

Parameter names are those of the published checkpoints. Shapes: B batch, L tokens, D width; the suffix of a
tensor's name is its shape (see layers.py).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from erdfast.models.backbone import Accounting, Backbone, TransformerConfig
from erdfast.models.layers import (
    Attention,
    Mlp,
    PatchEmbed,
    Stream,
    TimeFeatures,
    join_skip,
    joined,
    normed,
    unpatchify,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UViTConfig(TransformerConfig):
    """Configuration of a U-ViT. The depth is odd: a middle block, and as many blocks before as after it."""

    backbone: ClassVar[str] = "uvit"

    conv: bool = True
    """End with a 3x3 convolution on the image (the published 256-pixel ImageNet checkpoints have none)."""
    mlp_time_embed: bool = False
    """Put the time features through Linear, SiLU, Linear before they become a token."""
    qkv_bias: bool = False
    """Biases in the Linear that makes queries, keys and values."""
    time_offset: float = 0.0
    """Added to the time: 1 for the published checkpoints, which count 1 to 1000 where we count 0 to 999."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth % 2 == 0:
            raise ValueError(f"depth must be odd (one middle block between two equal halves), not {self.depth}")
        if self.width % 2:
            raise ValueError(f"width must be even, because the time token is sines and cosines, not {self.width}")

    @property
    def extra_tokens(self) -> int:
        """Tokens before the patches: time, and the label of a conditional network."""
        return 2 if self.num_classes else 1

    @property
    def tokens(self) -> int:
        """[label, time, patches]."""
        return self.extra_tokens + self.num_patches

    def build(self) -> UViT:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        return UViT(self)

    def accounting(self) -> Accounting:
        """Tokens, weights and activations of one image in training."""
        D, M, L = self.width, self.mlp_width, self.tokens
        channels, height, width = self.input_shape
        skips = self.depth // 2
        conv = 9 * channels**2 * height * width if self.conv else 0
        # Of a block the backward needs: the inputs of both norms; the inputs of qkv, proj, fc1 and fc2, q, k
        # and v, and the hidden layer before its GELU. A skip adds the joined input of its Linear.
        return self.transformer_accounting(
            weights_per_token=self.depth * (4 * D * D + 2 * D * M)
            + skips * 2 * D * D
            + 2 * D * channels * self.patch_size**2,
            weights_per_image=(8 * D * D if self.mlp_time_embed else 0) + conv,
            compute_activations=L * (self.depth * (6 * D + 2 * M) + skips * 2 * D + D),
            residual_activations=L * (self.depth * 2 * D + D),
        )


class UViTBlock(nn.Module):
    """Pre-norm attention and MLP; a block of the second half first joins its partner's output."""

    shares_sum = True
    """The sum that comes in is kept for a partner: recomputing must not keep its parts as well."""

    def __init__(self, config: UViTConfig, *, skip: bool = False) -> None:
        super().__init__()
        width = config.width
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.num_heads, qkv_bias=config.qkv_bias, backend=config.attention)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.mlp_width, approximate="none")
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(self, stream: Stream, skip_BLD: Tensor | None = None) -> tuple[Stream, Tensor | None]:
        """(what goes on, the sum that came in): a block of the first half leaves the latter to its partner."""
        if self.skip_linear is not None:
            assert skip_BLD is not None
            stream = Stream(join_skip(self.skip_linear, joined(stream), skip_BLD))
        x_BLD, normed_BLD = normed(self.norm1, stream)
        entered_BLD = x_BLD if self.skip_linear is None else None
        x_BLD, normed_BLD = normed(self.norm2, Stream(x_BLD, self.attn(normed_BLD)))
        return Stream(x_BLD, self.mlp(normed_BLD)), entered_BLD


class UViT(Backbone):
    """The network; see `Backbone.forward` for inputs and output."""

    config: UViTConfig

    def __init__(self, config: UViTConfig) -> None:
        super().__init__(config)
        channels, width, half = config.input_shape[0], config.width, config.depth // 2
        self.grid, self.patch_size, self.extra_tokens = config.grid, config.patch_size, config.extra_tokens
        self.patch_embed = PatchEmbed(channels, width, config.patch_size)
        self.time_features = TimeFeatures(width)
        self.time_embed = nn.Identity()
        if config.mlp_time_embed:
            self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.label_emb = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.extra_tokens + config.num_patches, width))
        self.in_blocks = nn.ModuleList(UViTBlock(config) for _ in range(half))
        self.mid_block = UViTBlock(config)
        self.out_blocks = nn.ModuleList(UViTBlock(config, skip=True) for _ in range(half))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, kernel_size=3, padding=1) if config.conv else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Truncated normal of 0.02 for matrices and positions; PyTorch's own for convolutions and labels."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv2d | nn.Embedding):
                module.reset_parameters()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.time_features.init_weights()

    def blocks_for_sharding(self) -> list[nn.Module]:
        """First half, middle block, second half."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def readout(self) -> nn.Module:
        """The final norm."""
        return self.norm

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,), (B,) or None => (B, C, H, W)."""
        self.check_inputs(x, time, y)
        stream, skips = Stream(self._tokens(x, time, y)), []
        for block in [*self.in_blocks, self.mid_block]:
            stream, entered_BLD = block(stream)
            skips.append(entered_BLD)
        del skips[0]  # what comes into a block is what the one before put out
        for block in self.out_blocks:
            stream, _ = block(stream, skips.pop())
        # The norm acts on each token alone, so that the tokens that are not decoded need none.
        _, normed_BLD = normed(self.norm, Stream(joined(stream)[:, self.extra_tokens :]))
        return self.final_layer(unpatchify(self.decoder_pred(normed_BLD), self.grid, self.patch_size))

    def _tokens(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        """[label, time, patches] with their positions, (B, L, D), in the dtype of the weights."""
        dtype = self.pos_embed.dtype
        time = time + self.config.time_offset if self.config.time_offset else time
        time_BD = self.time_embed(self.time_features(time).to(dtype))
        tokens = [time_BD.unsqueeze(1), self.patch_embed(x)]
        if self.label_emb is not None:
            assert y is not None  # check_inputs has seen to it
            tokens.insert(0, self.label_emb(y).unsqueeze(1))
        # Under autocast the products come in a lower dtype; the stream starts in that of the weights.
        return torch.cat([token.to(dtype) for token in tokens], dim=1) + self.pos_embed
