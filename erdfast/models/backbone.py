"""What every backbone has in common: fields of its configuration, checks of its inputs, its accounting.

A new backbone is one file with a configuration and a module derived from the two classes here, and rows in
the preset table. Names of shapes: see layers.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from erdfast.ops.attention import check_attention_backend


class Heads(NamedTuple):
    """The shape of one attention."""

    num_heads: int
    tokens: int
    width: int
    """Of a head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accounting:
    """What one image costs, in the units from which operations, memory and time are computed."""

    products: int
    """Multiplications, each with its addition, of a forward pass in matrix products, convolutions and attention."""
    compute_activations: int
    """Numbers that the backward needs, stored in the dtype of the matrix products."""
    residual_activations: int
    """Numbers that the backward needs, stored in the dtype of the residual stream and norms."""
    blocks: int
    """Units of sharding, compiling and recomputing."""
    block_inputs: int
    """Numbers of the residual stream at the inputs of all blocks: what full recomputing keeps."""
    block_products: int
    """Numbers that matrix products and attention write inside all blocks: what selective recomputing keeps besides."""
    recomputed_bytes: int
    """What selective recomputing reads and writes again, in all blocks."""
    smallest_product: int
    """Numbers in the result of the smallest product that matters: from it follows how many tiles a GPU can share."""
    attentions: tuple[Heads, ...]
    """The different shapes of attention."""
    low_stream: bool = False
    """Whether the residual stream between blocks is in the dtype of the matrix products, and not in float32."""
    unsaved_share: float = 0.0
    """Share of the activations (in bf16) that recomputing does not save: those of the block that keeps most, and of
    what is around the blocks. 0: all blocks keep as much, and what is around them next to nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Fields that every backbone has. Frozen: `dataclasses.replace` makes another, `build` makes the network.

    Raises ValueError on construction if a value is impossible.
    """

    backbone: ClassVar[str]
    """The name under which the configuration is described: a key of BACKBONES."""

    input_shape: tuple[int, int, int] = (4, 32, 32)
    """(C, H, W) of the input: channels, height, width. Latents of 256 pixel images by default."""
    num_classes: int = 1000
    """Number of classes; label `num_classes` is the null class of guidance. 0: an unconditional network."""
    attention: str = "auto"
    """Back end of the attention op: a name of ATTENTION_BACKENDS."""

    def __post_init__(self) -> None:
        # JSON knows lists only; a configuration read back from it must equal the one written.
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if not isinstance(self.input_shape, tuple) or len(self.input_shape) != 3:
            raise ValueError(f"input_shape is (channels, height, width), not {self.input_shape}")
        for name, value in zip(("channels", "height", "width of the input"), self.input_shape, strict=True):
            self.require_positive(name, value)
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0 (0: unconditional), not {self.num_classes}")
        check_attention_backend(self.attention)

    @staticmethod
    def require_positive(name: str, value: int) -> None:
        """ValueError for a size below 1."""
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.input_shape[0]

    def build(self) -> Backbone:
        """The network with freshly drawn weights, on the default device (`with torch.device(...)`)."""
        raise NotImplementedError

    def accounting(self) -> Accounting:
        """Operations and activations of one image in training."""
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Plain values, with the backbone's name, from which `config_from_dict` rebuilds this."""
        values = dataclasses.asdict(self)
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {"backbone": self.backbone, **lists}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig(BackboneConfig):
    """Fields of the backbones that are transformers over patches."""

    patch_size: int = 2
    """Side of a patch, in input elements; divides height and width."""
    width: int
    """Channels of a token."""
    depth: int
    """Number of transformer blocks."""
    num_heads: int
    """Attention heads; divides the width."""
    mlp_ratio: float = 4.0
    """Hidden width of an MLP over the width."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch_size", "width", "depth", "num_heads"):
            self.require_positive(name, getattr(self, name))
        for name, value in zip(("height", "width"), self.input_shape[1:], strict=True):
            if value % self.patch_size:
                raise ValueError(f"the input's {name} {value} is not divisible by patch_size {self.patch_size}")
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not divisible by num_heads {self.num_heads}")
        if self.mlp_width < 1:
            raise ValueError(f"mlp_ratio must give a hidden width of at least 1, not {self.mlp_ratio}")

    @property
    def grid(self) -> tuple[int, int]:
        """Patches in a column and in a row of the input."""
        return self.input_shape[1] // self.patch_size, self.input_shape[2] // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens that pass through the blocks: the patches, unless a backbone adds others."""
        return self.num_patches

    @property
    def block_tokens(self) -> tuple[int, ...]:
        """Tokens of each block, in running order."""
        return (self.tokens,) * self.depth

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of an MLP."""
        return int(self.width * self.mlp_ratio)

    def transformer_accounting(
        self,
        *,
        weights_per_token: int,
        weights_per_image: int,
        compute_activations: int,
        residual_activations: int,
        hidden_products: int | None = None,
        recomputed_bytes: int | None = None,
    ) -> Accounting:
        """The accounting of `depth` blocks of attention and an MLP.

        Per token and block, D wide and M in the MLP, matrix products write 3 D (qkv), D (attention), D (its
        projection), M (or `hidden_products`, where the first Linear is wider than M) and D; selective recomputing reads
        and writes (18 D + 4 M) bytes, or `recomputed_bytes`.

        Args:
            weights_per_token: numbers in the matrices that each of `tokens` tokens is multiplied with.
            weights_per_image: other multiplications of an image: time embedding, modulation, convolution.
        """
        T, D, M = self.tokens, self.width, self.mlp_width
        through = sum(self.block_tokens)
        return Accounting(
            products=T * weights_per_token + weights_per_image + 2 * D * sum(t**2 for t in self.block_tokens),
            compute_activations=compute_activations,
            residual_activations=residual_activations,
            blocks=self.depth,
            block_inputs=through * D,
            block_products=through * (6 * D + (hidden_products or M)),
            recomputed_bytes=through * (recomputed_bytes or 18 * D + 4 * M),
            smallest_product=T * D,
            attentions=tuple(Heads(self.num_heads, t, self.head_width) for t in sorted(set(self.block_tokens))),
        )


class Backbone(nn.Module):
    """Base of the networks: (x, time, y) => prediction.

    Weights may be float32 (with or without autocast) or of a lower dtype. Time features are computed in
    float32 always.
    """

    has_dropout: bool = False
    """Whether training drops numbers: `forward` then also takes `key`, a NoiseKey that says which."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        # The label of guidance; whoever trains without dropping labels sets it to None.
        self.null_class: int | None = config.num_classes or None
        self.input_shape = config.input_shape
        self.out_channels = config.out_channels

    def forward(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """The prediction for a batch.

        Args:
            x: (B, C, H, W), floating point; converted to the dtype of the weights.
            time: (B,) float32, as `Coefficients.time` holds it. (Not lower: bf16 has no number between 996
                and 1000.)
            y: (B,) int64 or int32 in 0..num_classes, where num_classes is the null class (if `null_class` is not
                None); None if and only if the network is unconditional. The values are not checked: that would
                make the host wait for the device.

        Returns:
            (B, C_out, H, W).

        Raises:
            ValueError: a shape or dtype is not as above.
        """
        raise NotImplementedError

    def init_weights(self) -> None:
        """Draw all parameters anew as published and fill the tables: for a model from the meta device.

        Works on plain tensors, so before sharding. Draws from the default generator of each parameter's
        device.
        """
        raise NotImplementedError

    def blocks_for_sharding(self) -> list[nn.Module]:
        """The blocks in running order: the units of sharding, compiling and recomputing.

        Transformers' blocks take and give a `Stream` (layers.py), not a tensor: for features hook `readout()`.
        """
        raise NotImplementedError

    def readout(self) -> nn.Module:
        """The module that turns the features of an image into the prediction: its first input are the features.

        They are what the last block made, before the final norm: (B, L, D), the patches' tokens alone, or
        (B, D, H, W). A forward pre-hook sees them.
        """
        raise NotImplementedError

    def check_inputs(self, x: Tensor, time: Tensor, y: Tensor | None) -> None:
        """Raise ValueError unless shapes and dtypes are those of `forward`; never looks at values."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.input_shape:
            raise ValueError(f"x must be (B, {', '.join(map(str, self.input_shape))}), not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating point, not {x.dtype}")
        if tuple(time.shape) != (x.shape[0],):
            raise ValueError(f"time must be ({x.shape[0]},), one number per sample, not {tuple(time.shape)}")
        if time.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"time must be float32, not {time.dtype}, which rounds it (under FSDP2 mixed precision set "
                "cast_forward_inputs=False)"
            )
        if self.num_classes == 0:
            if y is not None:
                raise ValueError("this network is unconditional (num_classes=0): call it with y=None")
            return
        if y is None:
            labels = f"0..{self.num_classes}, the last being the null class"
            if self.null_class is None:
                labels = f"0..{self.num_classes - 1}; it has no null class"
            raise ValueError(f"this network needs labels y (B,) in {labels}")
        if tuple(y.shape) != (x.shape[0],) or y.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"y must be ({x.shape[0]},) int64 or int32, not {tuple(y.shape)} {y.dtype}")
