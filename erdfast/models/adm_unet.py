"""ADM's UNet: residual blocks and attention at several sizes of the image (Dhariwal & Nichol, "Diffusion models beat
GANs on image synthesis").

Parameter names are those of the published checkpoints. One plan of the network, made from the configuration, is what
both the modules and the accounting follow. Shapes and layers: see unet_layers.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from erdfast.models.backbone import Accounting, Backbone, BackboneConfig
from erdfast.models.layers import TimeFeatures
from erdfast.models.unet_layers import (
    GROUPS,
    AttentionBlock,
    AttentionPlan,
    BlockPlan,
    Cost,
    Grid,
    GroupNorm32,
    LayerPlan,
    Product,
    ResamplePlan,
    ResBlock,
    ResBlockPlan,
    Scale,
    StemPlan,
    UNetBlock,
    convolution,
)
from erdfast.ops.dropout import PLACES
from erdfast.ops.source import NoiseKey

MINOR_SHARE = 0.1
"""Of the operations: products that together do less are not looked at for how much of a GPU they occupy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADMUNetConfig(BackboneConfig):
    """Configuration of an ADM UNet. Level i of the network sees the image at 1/2^i of its sides."""

    backbone: ClassVar[str] = "adm_unet"

    model_channels: int
    """Channels that `channel_mult` multiplies, and the number of time features."""
    num_res_blocks: int
    """Residual blocks of a level on the way down; one more on the way up."""
    channel_mult: tuple[float, ...]
    """Channels of each level over `model_channels`, the largest image first; one half is possible."""
    attention_resolutions: tuple[int, ...]
    """Factors by which the image is smaller where attention follows each residual block: (2, 4, 8) for the sizes 32, 16
    and 8 of a 64 pixel image. As in the published network; its command line named the sizes."""
    num_heads: int = 1
    """Heads of every attention, if `num_head_channels` is None."""
    num_head_channels: int | None = None
    """Channels of a head; wide levels then have more heads."""
    new_attention_order: bool = False
    """Order of the channels of `qkv`: whole queries, keys and values if True, else head by head. It is a matter of
    loading published weights alone."""
    use_scale_shift_norm: bool = True
    """The embedding of time and label scales and shifts (else: only shifts) within residual blocks."""
    resblock_updown: bool = True
    """Residual blocks change the size of the image; else convolutions do, or means."""
    conv_resample: bool = True
    """Without `resblock_updown`: by convolutions; else means on the way down, repeated pixels on the way up."""
    dropout: float = 0.0
    """Share of numbers that training drops in residual blocks, before the last convolution."""
    learn_sigma: bool = False
    """Also predict a variance: the output has 2C channels, of which the first C are the prediction."""
    null_class: bool = True
    """Whether the table of labels has a last row for no label, as guidance needs it; published weights have none."""
    channels_last: bool = False
    """Keep images in memory with their channels next to each other, as the half-precision convolutions of GPUs want
    them. It should pay in eager bf16 or fp16 on a GPU, which then need not be converted around each convolution (it has
    not been measured here); torch.compile chooses by itself. Outputs are the same up to rounding. Parameters stay as
    they are, since FSDP takes no others: each convolution converts its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model_channels", "num_res_blocks", "num_heads"):
            self.require_positive(name, getattr(self, name))
        if not self.channel_mult:
            raise ValueError("channel_mult must name at least one level")
        for mult, channels in zip(self.channel_mult, self.channels, strict=True):
            if channels < 1 or channels != mult * self.model_channels or channels % GROUPS:
                raise ValueError(
                    f"channel_mult {mult:g} times model_channels {self.model_channels} must be a multiple of {GROUPS}, "
                    f"the groups of a norm, not {mult * self.model_channels:g}"
                )
        if self.model_channels % 2:
            raise ValueError(f"model_channels must be even (sines and cosines of the time), not {self.model_channels}")
        for name, value in zip(("height", "width"), self.input_shape[1:], strict=True):
            if value % self.factors[-1]:
                raise ValueError(
                    f"the input's {name} {value} is not divisible by {self.factors[-1]}, as the {len(self.factors)} "
                    "levels of channel_mult need"
                )
        self._check_attention()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        blocks = (2 * self.num_res_blocks + 2) * len(self.channel_mult)
        if self.dropout and blocks > PLACES // 2:
            raise ValueError(f"dropout is for up to {PLACES // 2} blocks; this network has {blocks}")

    def _check_attention(self) -> None:
        for factor in self.attention_resolutions:
            if factor not in self.factors:
                sizes = ", ".join(f"{f} ({'x'.join(map(str, self.grid(f)))})" for f in self.factors)
                raise ValueError(f"attention_resolutions are factors, with their images: {sizes}; not {factor}")
        if self.num_head_channels is not None:
            self.require_positive("num_head_channels", self.num_head_channels)
        attended = [c for f, c in zip(self.factors, self.channels, strict=True) if f in self.attention_resolutions]
        for channels in {*attended, self.channels[-1]}:
            name = "num_heads" if self.num_head_channels is None else "num_head_channels"
            divisor = self.num_head_channels or self.num_heads
            if channels % divisor:
                raise ValueError(f"attention of {channels} channels is not divisible by {name} {divisor}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each level."""
        return tuple(int(mult * self.model_channels) for mult in self.channel_mult)

    @property
    def factors(self) -> tuple[int, ...]:
        """By which the image of each level is smaller than the input."""
        return tuple(2**level for level in range(len(self.channel_mult)))

    @property
    def embedding(self) -> int:
        """Width of the embedding of time and label."""
        return 4 * self.model_channels

    @property
    def out_channels(self) -> int:
        """C, or 2C with learn_sigma."""
        return self.input_shape[0] * (2 if self.learn_sigma else 1)

    @property
    def label_rows(self) -> int:
        """Rows of the table of labels; 0: there is none."""
        return self.num_classes + int(self.null_class) if self.num_classes else 0

    def grid(self, factor: int) -> Grid:
        """Rows and columns of the image that is smaller by `factor`."""
        return self.input_shape[1] // factor, self.input_shape[2] // factor

    def heads(self, channels: int) -> int:
        """Heads of an attention of so many channels."""
        return self.num_heads if self.num_head_channels is None else channels // self.num_head_channels

    def build(self) -> ADMUNet:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        return ADMUNet(self)

    def accounting(self) -> Accounting:
        """Added up over the plan's layers."""
        plan = make_plan(self)
        blocks, around = [block.cost() for block in plan.blocks], plan.around(self)
        inside = sum(blocks, Cost())
        total = inside + around
        return Accounting(
            products=total.multiplications,
            compute_activations=total.low,
            residual_activations=total.wide,
            blocks=len(blocks),
            block_inputs=sum(block.inputs * math.prod(block.grid) for block in plan.blocks),
            block_products=inside.product_results,
            # In bf16: norms read twice and write once, sums read two and write one, copies read and write.
            recomputed_bytes=6 * sum(inside.normed) + 6 * sum(inside.summed) + 4 * sum(inside.copied),
            smallest_product=_smallest_that_matters(total.products),
            attentions=tuple(dict.fromkeys(total.attentions)),
            low_stream=True,
            unsaved_share=(max(cost.kept_bytes for cost in blocks) + around.kept_bytes) / total.kept_bytes,
        )


def _smallest_that_matters(products: tuple[Product, ...]) -> int:
    """Numbers in the result of a product, such that smaller ones do less than MINOR_SHARE of the operations."""
    left = MINOR_SHARE * sum(product.multiplications for product in products)
    for product in sorted(products, key=lambda product: product.results):
        left -= product.multiplications
        if left <= 0:
            return product.results
    raise AssertionError("all products together do all operations")


# ---------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetPlan:
    """All blocks, in running order."""

    inputs: tuple[BlockPlan, ...]
    """The first is the stem; the result of each is a skip."""
    middle: BlockPlan
    outputs: tuple[BlockPlan, ...]
    """Each is joined by the newest skip that is left."""

    @property
    def blocks(self) -> tuple[BlockPlan, ...]:
        """The units of sharding, compiling and recomputing: all but the stem."""
        return *self.inputs[1:], self.middle, *self.outputs

    def around(self, config: ADMUNetConfig) -> Cost:
        """What is outside the blocks: stem, embedding of the time, and the final norm, SiLU and convolution."""
        E, grid = config.embedding, config.grid(1)
        numbers = config.channels[0] * math.prod(grid)
        products = (
            Product(kind="time", rows=1, inputs=config.model_channels, outputs=E),
            Product(kind="time", rows=1, inputs=E, outputs=E),
            convolution(grid, config.channels[0], config.out_channels),
        )
        final = Cost(products=products, low=2 * numbers + 4 * E, wide=numbers, normed=(numbers,))
        return self.inputs[0].cost() + final


def make_plan(config: ADMUNetConfig) -> UNetPlan:
    """The network, block by block."""
    planner, levels = _Planner(config), len(config.channels)
    inputs, skips = [planner.stem()], [config.channels[0]]
    for level in range(levels):
        inputs += [planner.block(level) for _ in range(config.num_res_blocks)]
        skips += [config.channels[level]] * config.num_res_blocks
        if level < levels - 1:
            inputs.append(planner.halving(level))
            skips.append(config.channels[level])
    middle = planner.middle(levels - 1)
    outputs = []
    for level in reversed(range(levels)):
        outputs += [planner.block(level, skips.pop()) for _ in range(config.num_res_blocks)]
        outputs.append(planner.block(level, skips.pop(), doubling=level > 0))
    return UNetPlan(inputs=tuple(inputs), middle=middle, outputs=tuple(outputs))


class _Planner:
    """Plans blocks in running order: knows how many channels the stream has."""

    def __init__(self, config: ADMUNetConfig) -> None:
        self.config = config
        self.channels = config.channels[0]

    def stem(self) -> BlockPlan:
        inputs, grid = self.config.input_shape[0], self.config.grid(1)
        layer = StemPlan(inputs=inputs, outputs=self.channels, grid=grid)
        return BlockPlan(layers=(layer,), inputs=inputs, skip=0, grid=grid)

    def block(self, level: int, skip: int = 0, *, doubling: bool = False) -> BlockPlan:
        """A residual block to the level's channels, with its attention; then twice the image."""
        inputs, grid = self.channels, self._grid(level)
        self.channels = self.config.channels[level]
        layers: list[LayerPlan] = [self._residual(inputs + skip, grid)]
        if self.config.factors[level] in self.config.attention_resolutions:
            layers.append(self._attention(grid))
        if doubling:
            layers.append(self._resampling(grid, "up"))
        return BlockPlan(layers=tuple(layers), inputs=inputs, skip=skip, grid=grid)

    def halving(self, level: int) -> BlockPlan:
        """Half the image."""
        grid = self._grid(level)
        return BlockPlan(layers=(self._resampling(grid, "down"),), inputs=self.channels, skip=0, grid=grid)

    def middle(self, level: int) -> BlockPlan:
        """Attention between two residual blocks."""
        grid = self._grid(level)
        layers = (self._residual(self.channels, grid), self._attention(grid), self._residual(self.channels, grid))
        return BlockPlan(layers=layers, inputs=self.channels, skip=0, grid=grid)

    def _grid(self, level: int) -> Grid:
        return self.config.grid(self.config.factors[level])

    def _residual(self, inputs: int, grid: Grid, scale: Scale = "same") -> ResBlockPlan:
        config = self.config
        return ResBlockPlan(
            inputs=inputs,
            outputs=self.channels,
            grid=grid,
            scale=scale,
            embedding=config.embedding,
            scale_shift=config.use_scale_shift_norm,
            dropout=config.dropout,
        )

    def _attention(self, grid: Grid) -> AttentionPlan:
        config = self.config
        return AttentionPlan(
            channels=self.channels,
            grid=grid,
            num_heads=config.heads(self.channels),
            new_order=config.new_attention_order,
            backend=config.attention,
        )

    def _resampling(self, grid: Grid, scale: Scale) -> LayerPlan:
        if self.config.resblock_updown:
            return self._residual(self.channels, grid, scale)
        return ResamplePlan(channels=self.channels, grid=grid, scale=scale, learned=self.config.conv_resample)


# ---------------------------------------------------------------------------- network


class ADMUNet(Backbone):
    """The network; see `Backbone.forward` for inputs and output.

    With dropout a training step must say which numbers are dropped: `forward(x, time, y, key=NoiseKey(seed, step,
    ids))` drops the same ones of a sample in any batch and in any process.
    """

    config: ADMUNetConfig

    def __init__(self, config: ADMUNetConfig) -> None:
        super().__init__(config)
        if not config.null_class:
            self.null_class = None
        self.has_dropout = config.dropout > 0
        plan, E = make_plan(config), config.embedding
        self.time_features = TimeFeatures(config.model_channels)
        self.time_embed = nn.Sequential(nn.Linear(config.model_channels, E), nn.SiLU(), nn.Linear(E, E))
        self.label_emb = nn.Embedding(config.label_rows, E) if config.label_rows else None
        self.input_blocks = nn.ModuleList(UNetBlock(block) for block in plan.inputs)
        self.middle_block = UNetBlock(plan.middle)
        self.output_blocks = nn.ModuleList(UNetBlock(block) for block in plan.outputs)
        channels = config.channels[0]
        self.out = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1)
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """PyTorch's own for all layers, then zero for the last of each residual block, attention and the network."""
        self.time_features.init_weights()
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.GroupNorm | nn.Embedding):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, ResBlock | AttentionBlock):
                module.init_weights()
        for parameter in self.out[2].parameters():
            nn.init.zeros_(parameter)

    def blocks_for_sharding(self) -> list[nn.Module]:
        """All but the stem: down, middle, up."""
        return [*list(self.input_blocks)[1:], self.middle_block, *self.output_blocks]

    def readout(self) -> nn.Module:
        """The last norm, SiLU and convolution."""
        return self.out

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None, *, key: NoiseKey | None = None) -> Tensor:
        """(B, C, H, W), (B,), (B,) or None => (B, C_out, H, W). `key` is for training with dropout, and needed there.

        Raises:
            ValueError: a shape or dtype is wrong, or there is dropout and no key.
        """
        self.check_inputs(x, time, y)
        dropping = self._dropping(x, key)
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        stream = x.to(self.get_parameter("out.0.weight").dtype, memory_format=layout)
        embedding = self._embedding(time, y)
        skips = [self.input_blocks[0](stream, embedding)]
        for block in self.input_blocks[1:]:
            skips.append(block(skips[-1], embedding, None, *next(dropping)))
        stream = self.middle_block(skips[-1], embedding, None, *next(dropping))
        for block in self.output_blocks:
            stream = block(stream, embedding, skips.pop(), *next(dropping))
        return self.out(stream)

    def _embedding(self, time: Tensor, y: Tensor | None) -> Tensor:
        """(B,), (B,) or None => (B, E)."""
        embedding = self.time_embed(self.time_features(time).to(self.get_parameter("out.0.weight").dtype))
        if self.label_emb is None:
            return embedding
        assert y is not None  # check_inputs has seen to it
        return embedding + self.label_emb(y)

    def _dropping(self, x: Tensor, key: NoiseKey | None) -> Iterator[tuple[NoiseKey | Tensor, ...]]:
        """What each block is told about dropout, in running order."""
        if not (self.training and self.has_dropout):
            return itertools.repeat(())
        if key is None:
            raise ValueError(
                f"training with dropout {self.config.dropout} needs key=NoiseKey(seed, stream=step, sample_ids=ids), "
                "from which it is drawn; or call eval()"
            )
        # Tensors, for which equal blocks are not compiled one by one as they would be for numbers.
        places = torch.arange(2 * len(self.blocks_for_sharding()), device=x.device).view(-1, 2).unbind()
        return ((key, place) for place in places)
