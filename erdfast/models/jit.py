"""JiT: a transformer on large patches of pixels (Li & He, "Back to basics: let denoising generative models denoise").

Patches pass through a bottleneck; copies of the label's embedding join the sequence as tokens on the way; a share of
numbers may be dropped in the middle half of the blocks. Parameter names are those of the published checkpoints. Shapes:
B batch, L tokens, D width (see layers.py).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from erdfast.models.backbone import Accounting
from erdfast.models.dit import AdaLNTransformer
from erdfast.models.layers import Stream, joined, patch_tokens
from erdfast.models.rope_layers import RopeBlock, RopeConfig, RopeFinalLayer, RopeTables
from erdfast.ops.dropout import PLACES
from erdfast.ops.source import NoiseKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class JiTConfig(RopeConfig):
    """Configuration of a JiT."""

    backbone: ClassVar[str] = "jit"

    input_shape: tuple[int, int, int] = (3, 256, 256)
    """(C, H, W) of the input: channels, height, width, of pixels."""
    patch_size: int = 16
    """Side of a patch, in input elements; divides height and width."""
    bottleneck: int = 128
    """Numbers to which a patch is reduced before it becomes a token."""
    context_length: int = 32
    """Tokens that the label becomes, behind which the patches follow. A network without classes has none."""
    context_start: int = 4
    """The first block that sees them, counted from 0."""
    dropout: float = 0.0
    """Share of numbers that training drops in the middle half of the blocks: of what attention gives, and of the hidden
    layer. (0.2 in the published H, 0 in B and L.)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("bottleneck", self.bottleneck)
        if self.context_length < 0:
            raise ValueError(f"context_length must be at least 0, not {self.context_length}")
        if self.context_length and not 0 <= self.context_start < self.depth:
            raise ValueError(f"context_start must be a block, 0 to {self.depth - 1}, not {self.context_start}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.dropout and not 4 <= self.depth <= PLACES // 2:
            raise ValueError(
                f"dropout, of the middle half of the blocks, needs a depth of 4 to {PLACES // 2}, not {self.depth}"
            )

    @property
    def context_tokens(self) -> int:
        """Tokens before the patches, from block `context_start` on."""
        return self.context_length if self.num_classes else 0

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """The patches, and from `context_start` on the label's tokens before them."""
        late = [i >= self.context_start for i in range(self.depth)]
        return tuple(self.tokens + self.context_tokens * seen for seen in late)

    def block_dropout(self, index: int) -> float:
        """Of one block: `dropout` in the middle half."""
        quarter = self.depth // 4
        return self.dropout if quarter <= index < 3 * quarter else 0.0

    def build(self) -> JiT:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        return JiT(self)

    def accounting(self) -> Accounting:
        """Tokens, weights and activations of one image in training."""
        patch_in = self.input_shape[0] * self.patch_size**2
        return self.rope_accounting(
            patch_weights=self.bottleneck * (patch_in + self.width),
            compute_activations=self.tokens * (patch_in + self.bottleneck),  # the patches and their reduction
        )


class BottleneckPatchEmbed(nn.Module):
    """Patches through two Linears without anything in between: (B, C, Y, X) => (B, L, D)."""

    def __init__(self, channels: int, bottleneck: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj1 = nn.Conv2d(channels, bottleneck, kernel_size=patch_size, stride=patch_size, bias=False)
        self.proj2 = nn.Conv2d(bottleneck, width, kernel_size=1)

    def forward(self, image_BCYX: Tensor) -> Tensor:
        reduced_BLN = patch_tokens(self.proj1, image_BCYX.to(self.proj1.weight.dtype), self.patch_size)
        return patch_tokens(self.proj2, reduced_BLN.transpose(1, 2).unsqueeze(3), 1)


class JiT(AdaLNTransformer):
    """The network; see `Backbone.forward` for inputs and output.

    `time` is in [0, 1] and 1 is noise, as continuous schedules have it. The network was published with 1 for data: it
    embeds 1 - time. What it puts out is left as it is.

    With dropout a training step must say which numbers are dropped: `forward(x, time, y, key=NoiseKey(seed, step,
    ids))` drops the same ones of a sample in any batch and in any process.
    """

    config: JiTConfig

    def __init__(self, config: JiTConfig) -> None:
        sizes = (config.input_shape[0], config.bottleneck, config.width, config.patch_size)
        super().__init__(config, BottleneckPatchEmbed(*sizes))
        self.context_tokens, self.context_start = config.context_tokens, config.context_start
        self.has_dropout = any(config.block_dropout(i) for i in range(config.depth))
        self.feat_rope = RopeTables(config.grid, config.head_width)
        if self.context_tokens:
            self.in_context_posemb = nn.Parameter(torch.empty(1, self.context_tokens, config.width))
            self.feat_rope_incontext = RopeTables(config.grid, config.head_width, self.context_tokens)
        self.blocks = nn.ModuleList(
            RopeBlock(config, qk_norm=True, dropout=config.block_dropout(i)) for i in range(config.depth)
        )
        self.final_layer = RopeFinalLayer(config.width, config.patch_size**2 * config.out_channels)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As a DiT; 0.02 for the positions of the label's tokens."""
        super().init_weights()
        if self.context_tokens:
            nn.init.normal_(self.in_context_posemb, std=0.02)

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, *, key: NoiseKey | None = None) -> Tensor:
        """(B, C, H, W), (B,), (B,) or None => (B, C, H, W). `key` is for training with dropout, and needed there.

        Raises:
            ValueError: a shape or dtype is wrong, or there is dropout and no key.
        """
        self.check_inputs(x, time, y)
        dropping = self._dropping(x, key)
        stream = Stream(self.patches(x))
        condition_BD, label_BD = self.conditions(1 - time, y)
        rope = self.feat_rope()
        for i, block in enumerate(self.blocks):
            if label_BD is not None and self.context_tokens and i == self.context_start:
                stream = Stream(self._with_context(joined(stream), label_BD))
                rope = self.feat_rope_incontext()
            stream = block(stream, condition_BD, rope, *dropping.get(i, ()))
        return self.image(joined(stream)[:, self.context_tokens :], condition_BD)

    def _with_context(self, x_BLD: Tensor, label_BD: Tensor) -> Tensor:
        context = label_BD.unsqueeze(1) + self.in_context_posemb
        return torch.cat([context.to(x_BLD.dtype), x_BLD], dim=1)

    def _dropping(self, x: Tensor, key: NoiseKey | None) -> dict[int, tuple[NoiseKey, Tensor]]:
        """What the blocks that drop numbers are told, by their index."""
        if not (self.training and self.has_dropout):
            return {}
        if key is None:
            raise ValueError(
                f"training with dropout {self.config.dropout} needs key=NoiseKey(seed, stream=step, sample_ids=ids), "
                "from which it is drawn; or call eval()"
            )
        # Tensors, for which blocks are not compiled one by one as they would be for numbers.
        places = torch.arange(2 * len(self.blocks), device=x.device).view(-1, 2).unbind()
        return {i: (key, places[i]) for i in range(len(places)) if self.config.block_dropout(i)}
