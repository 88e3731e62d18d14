"""The layers of the ADM UNet, each as a plan (sizes and costs, from which accounting adds up) and as a module.

B batch, C channels, Y x X image, L = Y*X tokens, E width of the time and label embedding, H heads, K head width. Names
of parameters are those of the published checkpoints.

The residual stream has the dtype of the convolutions, as the published half-precision training had it; norms compute
in float32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erdfast.models.backbone import Heads
from erdfast.models.layers import plain
from erdfast.ops.attention import attention_qkv
from erdfast.ops.dropout import dropout
from erdfast.ops.source import NoiseKey

GROUPS = 32
"""Of every norm."""
Grid = tuple[int, int]
"""Rows and columns of an image."""
Scale = Literal["same", "down", "up"]
"""What a layer does to both sides of an image: nothing, half, twice."""


# ---------------------------------------------------------------------------- costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A convolution or matrix product, for one image."""

    kind: str
    rows: int
    """Pixels of the result; 1 for what an image meets once."""
    inputs: int
    outputs: int
    """Channels of a row."""
    taps: int = 1
    """Pixels of the kernel."""
    stride: int = 1
    """Pixels of the input per pixel of the result, in each direction."""

    @property
    def multiplications(self) -> int:
        """Each with its addition."""
        return self.rows * self.inputs * self.outputs * self.taps

    @property
    def results(self) -> int:
        """Numbers that it writes."""
        return self.rows * self.outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a layer does to one image. All that is no product is in numbers, of each time that it happens."""

    products: tuple[Product, ...] = ()
    attentions: tuple[Heads, ...] = ()
    low: int = 0
    """Kept for backward in the dtype of the convolutions."""
    wide: int = 0
    """Kept for backward in float32."""
    normed: tuple[int, ...] = ()
    """Through a norm and its SiLU."""
    modulated: tuple[int, ...] = ()
    """Scaled and shifted by the embedding."""
    summed: tuple[int, ...] = ()
    """Results of residual sums."""
    copied: tuple[int, ...] = ()
    """Read and written again without arithmetic worth counting: joined; resampled, the mean of before and after."""
    dropped: tuple[int, ...] = ()
    """Through dropout."""

    def __add__(self, other: Cost) -> Cost:
        names = [field.name for field in dataclasses.fields(Cost)]
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def multiplications(self) -> int:
        """Of products and attention, each with its addition."""
        attention = sum(2 * heads.num_heads * heads.width * heads.tokens**2 for heads in self.attentions)
        return sum(product.multiplications for product in self.products) + attention

    @property
    def kept_bytes(self) -> int:
        """For backward, in bf16."""
        return 2 * self.low + 4 * self.wide

    @property
    def product_results(self) -> int:
        """Numbers that products and attention write."""
        attention = sum(heads.num_heads * heads.width * heads.tokens for heads in self.attentions)
        return sum(product.results for product in self.products) + attention


def both(numbers: int) -> Cost:
    """Kept by a norm in float32, and by another op as it is.

    Under autocast that is two tensors, of 6 bytes together; in fp32 they are one, of 4.
    """
    return Cost(low=-numbers, wide=2 * numbers)


def resized(grid: Grid, scale: Scale) -> Grid:
    """Rows and columns after `scale`."""
    rows, columns = grid
    return {"same": grid, "down": (rows // 2, columns // 2), "up": (2 * rows, 2 * columns)}[scale]


def resize(x_BCYX: Tensor, scale: Scale) -> Tensor:
    """Means of 2x2 pixels, or every pixel four times."""
    if scale == "same":
        return x_BCYX
    return F.avg_pool2d(x_BCYX, 2) if scale == "down" else F.interpolate(x_BCYX, scale_factor=2.0, mode="nearest")


def layout_of(x_BCYX: Tensor) -> torch.memory_format:
    """channels_last or contiguous."""
    last = x_BCYX.is_contiguous(memory_format=torch.channels_last) and not x_BCYX.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def convolution(grid: Grid, inputs: int, outputs: int, side: int = 3, stride: int = 1) -> Product:
    """A convolution whose result has `grid` pixels."""
    return Product(
        kind=f"{side}x{side}", rows=math.prod(grid), inputs=inputs, outputs=outputs, taps=side**2, stride=stride
    )


# ---------------------------------------------------------------------------- layers


class GroupNorm32(nn.GroupNorm):
    """A norm over 32 groups of channels, in float32 (float64 for float64); the result has the dtype of its input."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, Y, X) => the same; channels_last stays so, which PyTorch's own on a GPU does not see to."""
        wide = torch.promote_types(input.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        out = F.group_norm(input.to(wide), self.num_groups, weight, bias, self.eps)
        return out.to(input.dtype, memory_format=layout_of(input))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResBlockPlan:
    """A residual block."""

    inputs: int
    outputs: int
    """Channels."""
    grid: Grid
    """Of the input."""
    scale: Scale
    embedding: int
    """Width E of the embedding."""
    scale_shift: bool
    """Whether the embedding scales and shifts the second norm's result; else it is added before that norm."""
    dropout: float
    """Share of numbers that training drops."""

    def build(self) -> ResBlock:
        """The module."""
        return ResBlock(self)

    def cost(self) -> Cost:
        """Kept are: the inputs of both norms and SiLUs, of all convolutions and of the scaling."""
        after = resized(self.grid, self.scale)
        into, resampled = self.inputs * math.prod(self.grid), self.inputs * math.prod(after)
        out = self.outputs * math.prod(after)
        modulation = self.outputs * (2 if self.scale_shift else 1)
        products = [
            convolution(after, self.inputs, self.outputs),
            convolution(after, self.outputs, self.outputs),
            Product(kind="modulation", rows=1, inputs=self.embedding, outputs=modulation),
        ]
        stream = Cost(wide=into)
        branch = Cost(low=into + resampled) + Cost(low=(3 if self.scale_shift else 2) * out, wide=out)
        if self.inputs != self.outputs:
            products.append(convolution(after, self.inputs, self.outputs, side=1))
            stream = both(into)
        if self.scale == "down":  # means keep what they are taken of
            stream, branch = both(into), branch + Cost(low=into)
        done = Cost(
            products=tuple(products),
            low=self.embedding + self.outputs,
            normed=(into, out),
            modulated=(out,) if self.scale_shift else (),
            summed=(out,),
            copied=() if self.scale == "same" else ((into + resampled) // 2,) * 2,
            dropped=(out,) if self.dropout else (),
        )
        return done + stream + branch


class ResBlock(nn.Module):
    """Norm, SiLU, [resampling,] convolution; norm and modulation by the embedding, SiLU, dropout, convolution; sum."""

    def __init__(self, plan: ResBlockPlan) -> None:
        super().__init__()
        self.plan = plan
        inputs, outputs = plan.inputs, plan.outputs
        self.in_layers = nn.Sequential(GroupNorm32(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        modulation = outputs * (2 if plan.scale_shift else 1)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(plan.embedding, modulation))
        # The place of the published dropout is taken, so that the convolution has its published name.
        self.out_layers = nn.Sequential(
            GroupNorm32(outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def init_weights(self) -> None:
        """The last convolution is zero: the block starts as its skip connection."""
        for parameter in self.out_layers[3].parameters():
            nn.init.zeros_(parameter)

    def forward(
        self, x_BCYX: Tensor, embedding_BE: Tensor, key: NoiseKey | None = None, place: Tensor | None = None
    ) -> Tensor:
        norm, activation, convolution = self.in_layers
        branch = convolution(resize(activation(norm(x_BCYX)), self.plan.scale))
        norm, activation, _, convolution = self.out_layers
        modulation = self.emb_layers(embedding_BE).to(branch.dtype)[:, :, None, None]
        if self.plan.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            branch = activation(norm(branch) * (1 + scale) + shift)
        else:
            branch = activation(norm(branch + modulation))
        if key is not None:
            assert place is not None
            branch = dropout(branch, self.plan.dropout, key, place)
        return self.skip_connection(resize(x_BCYX, self.plan.scale)) + convolution(branch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Self-attention of the pixels."""

    channels: int
    grid: Grid
    num_heads: int
    new_order: bool
    """Of the channels of `qkv`: (3, H, K) if new, else (H, 3, K)."""
    backend: str

    def build(self) -> AttentionBlock:
        """The module."""
        return AttentionBlock(self)

    def cost(self) -> Cost:
        """Kept are: the norm's input; the inputs of qkv and proj_out, q, k and v."""
        C, L = self.channels, math.prod(self.grid)
        return Cost(
            products=(
                Product(kind="qkv", rows=L, inputs=C, outputs=3 * C),
                Product(kind="proj", rows=L, inputs=C, outputs=C),
            ),
            attentions=(Heads(self.num_heads, L, C // self.num_heads),),
            low=5 * C * L,
            wide=C * L,
            normed=(C * L,),
            summed=(C * L,),
        )


class AttentionBlock(nn.Module):
    """Norm, attention over all pixels, sum: (B, C, Y, X) => the same."""

    def __init__(self, plan: AttentionPlan) -> None:
        super().__init__()
        self.plan = plan
        self.norm = GroupNorm32(plan.channels)
        # As published, convolutions of one pixel; they are called as such only by who watches them.
        self.qkv = nn.Conv1d(plan.channels, 3 * plan.channels, 1)
        self.proj_out = nn.Conv1d(plan.channels, plan.channels, 1)

    def init_weights(self) -> None:
        """The projection is zero: the block starts as the identity."""
        for parameter in self.proj_out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        B, C, Y, X = x_BCYX.shape
        H, K = self.plan.num_heads, C // self.plan.num_heads
        qkv_BLN = pointwise(self.qkv, self.norm(x_BCYX).flatten(2).transpose(1, 2))
        if self.plan.new_order:
            qkv_BL3HK = qkv_BLN.reshape(B, Y * X, 3, H, K)
        else:
            qkv_BL3HK = qkv_BLN.reshape(B, Y * X, H, 3, K).transpose(2, 3)
        attended_BLC = attention_qkv(qkv_BL3HK, backend=self.plan.backend).reshape(B, Y * X, C)
        return x_BCYX + pointwise(self.proj_out, attended_BLC).transpose(1, 2).reshape(B, C, Y, X)


def pointwise(convolution: nn.Module, x_BLC: Tensor) -> Tensor:
    """A convolution of one pixel, with channels last: (B, L, C) => (B, L, C')."""
    if not plain(convolution, nn.Conv1d):
        return convolution(x_BLC.transpose(1, 2)).transpose(1, 2)
    return F.linear(x_BLC, convolution.weight.squeeze(2), convolution.bias)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResamplePlan:
    """Half or twice the image without a residual block."""

    channels: int
    grid: Grid
    """Of the input."""
    scale: Scale
    learned: bool
    """With a convolution."""

    def build(self) -> Downsample | Upsample:
        """The module."""
        return Downsample(self) if self.scale == "down" else Upsample(self)

    def cost(self) -> Cost:
        """Kept is the input of the convolution or of the means."""
        before, after = math.prod(self.grid), math.prod(resized(self.grid, self.scale))
        down = self.scale == "down"
        product = convolution(resized(self.grid, self.scale), self.channels, self.channels, stride=2 if down else 1)
        return Cost(
            products=(product,) if self.learned else (),
            low=self.channels * (before if down else after if self.learned else 0),
            copied=() if down and self.learned else (self.channels * (before + after) // 2,),
        )


class Downsample(nn.Module):
    """Half the image: (B, C, Y, X) => (B, C, Y/2, X/2), by a convolution or by means."""

    def __init__(self, plan: ResamplePlan) -> None:
        super().__init__()
        channels = plan.channels
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if plan.learned else nn.AvgPool2d(2)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.op(x_BCYX)


class Upsample(nn.Module):
    """Twice the image: (B, C, Y, X) => (B, C, 2Y, 2X), every pixel four times, then a convolution or none."""

    def __init__(self, plan: ResamplePlan) -> None:
        super().__init__()
        self.conv = nn.Conv2d(plan.channels, plan.channels, 3, padding=1) if plan.learned else nn.Identity()

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return self.conv(resize(x_BCYX, "up"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StemPlan:
    """The convolution that meets the image first."""

    inputs: int
    outputs: int
    grid: Grid

    def build(self) -> nn.Conv2d:
        """The module."""
        return nn.Conv2d(self.inputs, self.outputs, 3, padding=1)

    def cost(self) -> Cost:
        """Kept is its input."""
        return Cost(
            products=(convolution(self.grid, self.inputs, self.outputs),), low=self.inputs * math.prod(self.grid)
        )


LayerPlan = StemPlan | ResBlockPlan | AttentionPlan | ResamplePlan


# ---------------------------------------------------------------------------- blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Layers between two skips."""

    layers: tuple[LayerPlan, ...]
    inputs: int
    """Channels of the stream at its input."""
    skip: int
    """Channels of the earlier block's result that is joined to the stream; 0: none."""
    grid: Grid
    """Of the input."""

    def cost(self) -> Cost:
        """Of its layers, and of joining the skip."""
        joined = Cost(copied=((self.inputs + self.skip) * math.prod(self.grid),) if self.skip else ())
        return sum((layer.cost() for layer in self.layers), joined)


class UNetBlock(nn.Module):
    """One block: a unit of sharding, compiling and recomputing. The skip comes from outside.

    With dropout it also takes the key, and a place for each of its residual blocks, of which it has two at most.
    """

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        for index, layer in enumerate(plan.layers):
            self.add_module(str(index), layer.build())

    def forward(
        self,
        x_BCYX: Tensor,
        embedding_BE: Tensor,
        skip_BCYX: Tensor | None = None,
        key: NoiseKey | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        if skip_BCYX is not None:
            x_BCYX = torch.cat([x_BCYX, skip_BCYX], dim=1)
        left = iter(() if places is None else places)
        for layer in self.children():
            if isinstance(layer, ResBlock):
                x_BCYX = layer(x_BCYX, embedding_BE, key, next(left, None))
            else:
                x_BCYX = layer(x_BCYX)
        return x_BCYX
