"""What a training step of a network must do, op by op: operations, and the bytes that each op moves (see roofline.py).

Bytes are given twice: with this package's fusions, each tensor moved once per op, and as eager PyTorch moves them,
kernel by kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from erdfast import presets
from erdfast.models import (
    ADMUNetConfig,
    BackboneConfig,
    DiTConfig,
    JiTConfig,
    LightningDiTConfig,
    TransformerConfig,
    UViTConfig,
)
from erdfast.models.adm_unet import make_plan
from erdfast.models.backbone import Heads
from erdfast.models.dit import TIME_FEATURES
from erdfast.models.flops import parameter_count
from erdfast.models.rope_layers import RopeConfig
from erdfast.models.unet_layers import Cost, Product

LOW = 2
"""Bytes of a bf16 number."""
BF16 = {"dtype": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device can do at most."""

    name: str
    flops_per_s: float
    """Dense bf16 products."""
    bytes_per_s: float
    """Memory, read and written."""
    source: str
    """Where the two come from."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of op of a step, at one size."""

    op: str
    """Of this package where it has one; "linear" for a product with weights."""
    detail: str
    count: int
    """Times per step; the rest is for all of them together."""
    flops: int = 0
    """Of matrix products."""
    fused_bytes: int
    eager_bytes: int
    fields: Mapping[str, Any] | None = None
    """By which a measurement is found: the fields of a row of bench/results/<device>/<op>.json."""
    measured_ms: float | None = None
    """Forward and backward, all `count` of them."""
    column_sums: int = 0
    """Numbers of the results' gradients that a bias sums up over rows: a pass of its own, see `bias_sums`."""

    def floor_ms(self, machine: Machine, *, fused: bool = True) -> float:
        """The least time."""
        num_bytes = self.fused_bytes if fused else self.eager_bytes
        return 1e3 * max(self.flops / machine.flops_per_s, num_bytes / machine.bytes_per_s)

    def bound(self, machine: Machine) -> str:
        """What limits it."""
        return "compute" if self.flops / machine.flops_per_s > self.fused_bytes / machine.bytes_per_s else "memory"


# ---------------------------------------------------------------------------- ops at a size


def linear(detail: str, count: int, rows: int, inputs: int, outputs: int, *, bias: bool = True) -> Work:
    """Product with weights: forward, gradient of the input, gradient of the weights; each reads two and writes one."""
    tensors = rows * inputs + inputs * outputs + rows * outputs
    num_bytes = 3 * LOW * count * tensors
    flops = 6 * count * rows * inputs * outputs
    return Work(
        op="linear",
        detail=detail,
        count=count,
        flops=flops,
        fused_bytes=num_bytes,
        eager_bytes=num_bytes,
        fields={"shape": [rows, inputs, outputs]} | BF16,
        column_sums=count * rows * outputs if bias else 0,
    )


def bias_sums(works: Iterable[Work]) -> Work:
    """Gradients of biases read those of the results once more; forward, a Linear adds the bias as it multiplies."""
    biased = [work for work in works if work.column_sums]
    num_bytes = LOW * sum(work.column_sums for work in biased)
    count = sum(work.count for work in biased)
    return Work(op="bias", detail="sums of gradients", count=count, fused_bytes=num_bytes, eager_bytes=num_bytes)


def self_attention(config: TransformerConfig, batch: int, tokens: int, count: int) -> Work:
    """Of a transformer's blocks that see so many tokens."""
    return attention(Heads(config.num_heads, tokens, config.head_width), batch, count)


def attention(heads: Heads, batch: int, count: int) -> Work:
    """q, k, v in, out: 4 tensors; backward reads those and the gradient, writes three."""
    elements = batch * heads.tokens * heads.num_heads * heads.width
    num_bytes = count * LOW * elements * (4 + 8)
    return Work(
        op="attention",
        detail=f"{heads.num_heads} heads of {heads.width}, {heads.tokens} tokens",
        count=count,
        flops=count * 12 * elements * heads.tokens,
        fused_bytes=num_bytes,
        eager_bytes=num_bytes,
        fields={"batch": batch, "heads": heads.num_heads, "tokens": heads.tokens, "width": heads.width} | BF16,
    )


def convolution(product: Product, batch: int, count: int) -> Work:
    """As `linear`, every pixel read once. Eager adds a convolution's bias in a pass of its own, 2+2."""
    rows, weights = batch * product.rows, product.inputs * product.outputs * product.taps
    tensors = rows * product.stride**2 * product.inputs + weights + rows * product.outputs
    num_bytes = 3 * LOW * count * tensors
    results = batch * count * product.rows * product.outputs
    op = "linear" if product.taps == 1 else "convolution"
    return Work(
        op=op,
        detail=f"{product.kind}: {product.inputs} to {product.outputs}, {product.rows} rows",
        count=count,
        flops=6 * batch * count * product.multiplications,
        fused_bytes=num_bytes,
        eager_bytes=num_bytes + (2 * LOW * results if op == "convolution" else 0),
        fields={"shape": [rows, product.inputs, product.outputs]} | BF16 if op == "linear" else None,
        column_sums=results,
    )


def norms(count: int, shape: tuple[int, int, int], *, modulated: bool, residual: bool = False) -> Work:
    """Norm and modulation, with the residual before it (`residual`) or without. x, r: float32; branch, y: bf16.

    Fused, forward: reads x, branch; writes r, y. Backward: reads r, dr, dy (and branch, for the gate); writes dx,
    dbranch. Eager, forward: [gate: 2+2], add: 4+2+4, norm: 4+4, [scale: 4+4, shift: 4+4], cast: 4+2. Backward: cast:
    2+4, norm: 4+4+4 (and 8 for its weights, or, modulated: sums and products for shift and scale 4, 4+4, 4+4+4, 4), add
    dr: 4+4+4, cast to the branch: 4+2, [gate: 2+2, 2+2+2, 2]. Without the residual dr is added elsewhere, if at all.
    """
    elements = shape[0] * shape[1] * shape[2]
    forward, backward = (8 + 16 + 6, 6 + 12 + 28) if modulated else (8 + 6, 6 + 20)
    fused, eager = 6 + 10, forward + backward
    if residual:
        fused = 12 + (18 if modulated else 16)
        eager += 12 + ((4 + 10 + 6 + 12) if modulated else 10 + 6)
    prefix = ("gated residual, " if modulated else "residual, ") if residual else ""
    kind = {(True, True): "middle", (True, False): "first", (False, True): "uvit"}.get((modulated, residual))
    return Work(
        op="modulated_norm",
        detail=prefix + ("modulated norm" if modulated else "norm"),
        count=count,
        fused_bytes=count * fused * elements,
        eager_bytes=count * eager * elements,
        fields=None if kind is None else {"shape": list(shape), "kind": kind} | BF16,
    )


def gradient_sums(count: int, shape: tuple[int, int, int]) -> Work:
    """What autograd adds where the residual stream branches off into a norm without a residual: 4+4+4."""
    num_bytes = 12 * count * shape[0] * shape[1] * shape[2]
    return Work(op="sum", detail="the stream's gradients", count=count, fused_bytes=num_bytes, eager_bytes=num_bytes)


def residuals(count: int, shape: tuple[int, int, int], *, gated: bool) -> Work:
    """The residual that ends a block: reads x and the branch, writes r; backward reads dr, writes dbranch.

    Gated, backward also reads the branch. Eager has kernels of their own for the gate: 2+2; 2+2, 2+2+2, 2.
    """
    elements = count * shape[0] * shape[1] * shape[2]
    fused, eager = (10 + 8, 4 + 10 + 6 + 12) if gated else (10 + 6, 10 + 6)
    return Work(
        op="modulated_norm" if gated else "residual",
        detail="gated residual" if gated else "",
        count=count,
        fused_bytes=fused * elements,
        eager_bytes=eager * elements,
        fields={"shape": list(shape), "kind": "end"} | BF16 if gated else None,
    )


def activation(config: TransformerConfig, rows: int) -> Work:
    """GELU: reads and writes once; backward reads two, writes one. Eager has one kernel for each as well."""
    num_bytes = config.depth * LOW * 5 * rows * config.mlp_width
    approximate = "tanh" if isinstance(config, DiTConfig) else "none"
    return Work(
        op="gelu",
        detail=approximate,
        count=config.depth,
        fused_bytes=num_bytes,
        eager_bytes=num_bytes,
        fields={"shape": [rows, config.mlp_width], "approximate": approximate} | BF16,
    )


def rotations(config: RopeConfig, batch: int, tokens: int, count: int, *, normed: bool) -> Work:
    """q and k turned, and normed before that. In numbers moved per number of one of q, k and v:

    Fused: reads 2, writes 2; backward reads 5 (3 without the norm), writes 3 (kernels/qk_norm_rope.py). Eager, each of
    q and k forward: [norm 1+1], two products and half turned round 1+1 each, sum 2+1; backward the same, [norm 2+1],
    and one gradient of q, k and v: 3+3.
    """
    elements = count * batch * tokens * config.width
    fused, eager = (12, 52) if normed else (10, 42)
    return Work(
        op="qk_norm_rope",
        detail="norm and rotation" if normed else "rotation",
        count=count,
        fused_bytes=LOW * fused * elements,
        eager_bytes=LOW * eager * elements,
        fields={"shape": [batch, tokens, config.num_heads, config.head_width]} | BF16 if normed else None,
    )


def gates(config: RopeConfig, rows: int, count: int) -> Work:
    """SwiGLU's gate, per number of its result. Fused: reads 2, writes 1; backward reads 3, writes 2.

    Eager: silu 1+1, product 2+1; backward of the product 2+1 twice, of silu 2+1, and both halves joined 2+2.
    """
    elements = count * rows * config.mlp_width
    return Work(
        op="swiglu",
        detail="",
        count=count,
        fused_bytes=LOW * 8 * elements,
        eager_bytes=LOW * 18 * elements,
        fields={"shape": [rows, config.mlp_width]} | BF16,
    )


def drops(config: JiTConfig, batch: int) -> Work:
    """Dropout reads and writes once, and so does backward. Eager, which is PyTorch's own, also a mask of a byte."""
    tokens = [t for i, t in enumerate(config.block_tokens) if config.block_dropout(i)]
    numbers = batch * sum(tokens) * (config.width + config.mlp_width)
    return Work(
        op="dropout",
        detail=f"{config.dropout:g} of attention and gate",
        count=2 * len(tokens),
        fused_bytes=4 * LOW * numbers,
        eager_bytes=(4 * LOW + 2) * numbers,
    )


def joins(count: int, shape: tuple[int, int, int]) -> Work:
    """The sum before a skip's Linear and what surrounds its products, per element of x.

    Fused: sum and cast 4+2+2, cast of the skip 4+2, backward 2+4+2 and 2+4, sum of the skip's gradients 4+4+4. Eager:
    sum 4+2+4, joined in float32 8+8, cast 8+4, and backward cast 4+8, split 8+8, branch 4+2, sum of gradients 4+4+4.
    """
    fused, eager = 8 + 6 + 8 + 6 + 12, 10 + 16 + 12 + 12 + 16 + 6 + 12
    fused, eager = (each * count * shape[0] * shape[1] * shape[2] for each in (fused, eager))
    return Work(
        op="skip_linear", detail="residual, around its products", count=count, fused_bytes=fused, eager_bytes=eager
    )


def noise_and_loss(config: BackboneConfig, batch: int) -> Work:
    """Fused: x0 in, x_t out; pred and x0 in, gradient out. Eager: randn; two products, sum, cast; same for y; error."""
    channels, height, width = config.input_shape
    elements = batch * channels * height * width
    eager = 4 + (8 + 8 + 12 + 6) + (8 + 8 + 12) + (2 + 4 + 4) + (4 + 4 + 4) + (4 + 4 + 4 + 2)
    return Work(
        op="diffusion_loss",
        detail="with add_noise",
        count=1,
        fused_bytes=(4 + 2 + 2 + 4 + 2) * elements,
        eager_bytes=eager * elements,
        fields={"shape": [batch, channels, height, width], "noise": "drawn", "work": "all"} | BF16,
    )


def optimizer(config: BackboneConfig) -> tuple[Work, Work]:
    """AdamW and EMA: 36 bytes a parameter in one pass, 80 + 12 by foreach; casts of weights and gradients."""
    count = parameter_count(config)
    name = next((name for name, preset in presets.MODELS.items() if preset == config), None)
    update = Work(
        op="adamw_ema",
        detail="one average",
        count=1,
        fused_bytes=36 * count,
        eager_bytes=92 * count,
        fields={"model": name, "clip": False},
    )
    casts = Work(
        op="casts", detail="weights to bf16, gradients back", count=1, fused_bytes=12 * count, eager_bytes=12 * count
    )
    return update, casts


# ---------------------------------------------------------------------------- networks


def _block_products(config: TransformerConfig, rows: int, *, qkv_bias: bool = True) -> Iterator[Work]:
    D, M = config.width, config.mlp_width
    yield linear("qkv", config.depth, rows, D, 3 * D, bias=qkv_bias)
    for detail, inputs, outputs in (("proj", D, D), ("fc1", D, M), ("fc2", M, D)):
        yield linear(detail, config.depth, rows, inputs, outputs)


def _dit(config: DiTConfig, batch: int) -> Iterator[Work]:
    D, T = config.width, config.num_patches
    rows, shape = batch * T, (batch, T, D)
    patch = config.patch_size**2
    yield from _block_products(config, rows)
    yield linear("adaLN, per image", 1, batch, D, (6 * config.depth + 2) * D)
    yield linear("patches in", 1, rows, config.input_shape[0] * patch, D)
    yield linear("patches out", 1, rows, D, config.out_channels * patch)
    yield linear("time in, per image", 1, batch, TIME_FEATURES, D)
    yield linear("time out, per image", 1, batch, D, D)
    yield self_attention(config, batch, T, config.depth)
    yield from _stream(config.depth, shape, modulated=True)
    yield norms(1, shape, modulated=True)
    yield activation(config, rows)


def _stream(count: int, shape: tuple[int, int, int], *, modulated: bool) -> Iterator[Work]:
    """Of `count` blocks: two norms each, all but the first of which make the sum before them, and a sum at the end."""
    yield norms(1, shape, modulated=modulated)
    yield norms(2 * count - 1, shape, modulated=modulated, residual=True)
    yield gradient_sums(1, shape)
    yield residuals(1, shape, gated=modulated)


def _uvit(config: UViTConfig, batch: int) -> Iterator[Work]:
    D, T = config.width, config.num_patches + config.extra_tokens
    rows, shape, skips = batch * T, (batch, T, D), config.depth // 2
    channels, height, width = config.input_shape
    patch = channels * config.patch_size**2
    yield from _block_products(config, rows, qkv_bias=config.qkv_bias)
    yield linear("skip, of the stream", skips, rows, D, D)
    yield linear("skip, of the other", skips, rows, D, D, bias=False)
    yield linear("patches in", 1, rows, patch, D)
    yield linear("patches out", 1, rows, D, patch)
    if config.conv:
        yield linear("convolution", 1, batch * height * width, 9 * channels, channels)
    if config.mlp_time_embed:
        yield linear("time, per image", 1, batch, D, 8 * D)
    yield self_attention(config, batch, T, config.depth)
    yield from _stream(config.depth - skips, shape, modulated=False)
    # A block of the second half begins with the sum (in `joins`), and its first norm finds the skip's already made.
    yield norms(skips + 1, shape, modulated=False)
    yield norms(skips, shape, modulated=False, residual=True)
    yield gradient_sums(skips, shape)
    yield activation(config, rows)
    yield joins(skips, shape)


def _rope_blocks(config: RopeConfig, batch: int, tokens: int, count: int, *, qk_norm: bool) -> Iterator[Work]:
    D, W, rows, shape = config.width, config.mlp_width, batch * tokens, (batch, tokens, config.width)
    for detail, inputs, outputs in (("qkv", D, 3 * D), ("proj", D, D), ("w12", D, 2 * W), ("w3", W, D)):
        yield linear(detail, count, rows, inputs, outputs)
    yield self_attention(config, batch, tokens, count)
    yield rotations(config, batch, tokens, count, normed=qk_norm)
    yield from _stream(count, shape, modulated=True)
    yield gates(config, rows, count)


def _rope(config: RopeConfig, batch: int, *, qk_norm: bool) -> Iterator[Work]:
    """All but the patch embedding."""
    D, T = config.width, config.num_patches
    for tokens in sorted(set(config.block_tokens)):
        yield from _rope_blocks(config, batch, tokens, config.block_tokens.count(tokens), qk_norm=qk_norm)
    yield linear("adaLN, per image", 1, batch, D, (6 * config.depth + 2) * D)
    yield linear("patches out", 1, batch * T, D, config.out_channels * config.patch_size**2)
    yield linear("time in, per image", 1, batch, TIME_FEATURES, D)
    yield linear("time out, per image", 1, batch, D, D)
    yield norms(1, (batch, T, D), modulated=True)


def _lightningdit(config: LightningDiTConfig, batch: int) -> Iterator[Work]:
    yield from _rope(config, batch, qk_norm=config.qk_norm)
    rows, patch = batch * config.num_patches, config.input_shape[0] * config.patch_size**2
    yield linear("patches in", 1, rows, patch, config.width)


def _jit(config: JiTConfig, batch: int) -> Iterator[Work]:
    yield from _rope(config, batch, qk_norm=True)
    rows, patch = batch * config.num_patches, config.input_shape[0] * config.patch_size**2
    yield linear("patches to bottleneck", 1, rows, patch, config.bottleneck, bias=False)
    yield linear("bottleneck in", 1, rows, config.bottleneck, config.width)
    if config.dropout:
        yield drops(config, batch)


def _adm_unet(config: ADMUNetConfig, batch: int) -> Iterator[Work]:
    """Stream and branches: bf16. Norms compute in float32, for which eager has kernels of their own.

    Norm and SiLU, fused: reads twice (a group must be summed up first), writes; backward reads x and dy twice, writes.
    Eager: casts 2+4, 4+2, norm 4+4+4, SiLU 2+2; backward SiLU 2+2+2, casts 2+4, 4+2, norm 5 * 4. Modulation, fused: in
    the same passes. Eager: 2+2, 2+2; backward 2, 2+2+2, 2, 2+2. Sums: 2+2+2, and as much for the gradients. Dropout as
    in `drops`.
    """
    plan = make_plan(config)
    cost = sum((block.cost() for block in plan.blocks), plan.around(config))
    for product, count in Counter(cost.products).items():
        yield convolution(product, batch, count)
    for heads, count in Counter(cost.attentions).items():
        yield attention(heads, batch, count)
    for op, detail, numbers, fused, eager in _passes(cost):
        through = batch * sum(numbers)
        if through:
            yield Work(
                op=op, detail=detail, count=len(numbers), fused_bytes=fused * through, eager_bytes=eager * through
            )


def _passes(cost: Cost) -> Iterator[tuple[str, str, tuple[int, ...], int, int]]:
    """(op, detail, numbers each time, bytes per number fused, and eager), forward and backward."""
    yield "norm", "group norm, SiLU", cost.normed, 6 + 10, 28 + 38
    yield "modulation", "within the norm if fused", cost.modulated, 0, 8 + 14
    yield "residual", "", cost.summed, 6 + 6, 6 + 6
    yield "copies", "joined skips, resampled images", cost.copied, 4 + 4, 4 + 4
    yield "dropout", "", cost.dropped, 4 * LOW, 4 * LOW + 2


NETWORKS = {
    DiTConfig: _dit,
    UViTConfig: _uvit,
    LightningDiTConfig: _lightningdit,
    JiTConfig: _jit,
    ADMUNetConfig: _adm_unet,
}


def step_budget(config: BackboneConfig, batch: int) -> list[Work]:
    """Every op of one training step (forward, backward, optimiser, EMA) with its operations and bytes.

    Raises:
        ValueError: this kind of network is not described here.
    """
    if type(config) not in NETWORKS:
        known = ", ".join(kind.backbone for kind in NETWORKS)
        raise ValueError(f"no budget is written for {config.backbone}; there is one for {known}")
    works = [*NETWORKS[type(config)](config, batch)]
    return [*works, bias_sums(works), noise_and_loss(config, batch), *optimizer(config)]
