"""LightningDiT: a DiT with rotary positions, SwiGLU and RMSNorm (Yao et al., "Reconstruction vs. generation").

Parameter names are those of the published checkpoints, which also hold the tables `feat_rope.freqs_cos` and
`feat_rope.freqs_sin`; here they are computed. Shapes: B batch, L tokens, D width (see layers.py).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor, nn

from erdfast.models.backbone import Accounting
from erdfast.models.dit import AdaLNTransformer
from erdfast.models.layers import PatchEmbed, Stream, joined
from erdfast.models.rope_layers import RopeBlock, RopeConfig, RopeFinalLayer, RopeTables


@dataclasses.dataclass(frozen=True, kw_only=True)
class LightningDiTConfig(RopeConfig):
    """Configuration of a LightningDiT."""

    backbone: ClassVar[str] = "lightningdit"

    input_shape: tuple[int, int, int] = (32, 16, 16)
    """(C, H, W) of the input: channels, height, width. VA-VAE's latents of 256 pixel images by default."""
    patch_size: int = 1
    """Side of a patch, in input elements; divides height and width."""
    qk_norm: bool = False
    """RMSNorm of the heads of queries and keys before they are turned (off in the published networks)."""

    def build(self) -> LightningDiT:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        return LightningDiT(self)

    def accounting(self) -> Accounting:
        """Tokens, weights and activations of one image in training."""
        return self.rope_accounting(patch_weights=self.width * self.input_shape[0] * self.patch_size**2)


class LightningDiT(AdaLNTransformer):
    """The network; see `Backbone.forward` for inputs and output.

    `time` is in [0, 1] and 1 is noise, as continuous schedules have it. The network was published with 1 for data: it
    embeds 1 - time. What it puts out is left as it is.
    """

    config: LightningDiTConfig

    def __init__(self, config: LightningDiTConfig) -> None:
        super().__init__(config, PatchEmbed(config.input_shape[0], config.width, config.patch_size))
        self.feat_rope = RopeTables(config.grid, config.head_width)
        self.blocks = nn.ModuleList(RopeBlock(config, qk_norm=config.qk_norm) for _ in range(config.depth))
        self.final_layer = RopeFinalLayer(config.width, config.patch_size**2 * config.out_channels)
        self.init_weights()

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """(B, C, H, W), (B,), (B,) or None => (B, C, H, W)."""
        self.check_inputs(x, time, y)
        stream = Stream(self.patches(x))
        condition_BD, _ = self.conditions(1 - time, y)
        rope = self.feat_rope()
        for block in self.blocks:
            stream = block(stream, condition_BD, rope)
        return self.image(joined(stream), condition_BD)
