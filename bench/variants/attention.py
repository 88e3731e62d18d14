"""Variants of kernels/attention.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from bench.variants import Variant, pointers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Shape(NamedTuple):
    """Self-attention over `tokens` with heads of `width`."""

    dtype: str
    tokens: int
    width: int
    align: int = 8

    @property
    def label(self) -> str:
        return f"{self.dtype} {self.tokens}x{self.width}{' odd strides' * (self.align == 1)}"


SHAPES = (
    Shape("bf16", 258, 72),  # U-ViT-H
    Shape("bf16", 256, 72),  # DiT-XL
    Shape("bf16", 258, 64),  # U-ViT-S, M, L
    Shape("bf16", 256, 64),  # DiT-S, B, L
    Shape("bf16", 258, 96),
    Shape("bf16", 258, 128),
    Shape("fp16", 258, 72),
    Shape("fp32", 258, 72),
    Shape("bf16", 37, 20, align=1),
)


def variants() -> Iterator[Variant]:
    """Forward, delta and backward at the shapes of the presets, with the tiles of each architecture."""
    from erdfast.kernels.attention import config

    for shape in SHAPES:
        yield _delta(shape)
        tiles = {cc: config(shape.width, DTYPES[shape.dtype], cc) for cc in (80, 90)}
        for c in sorted(set(tiles.values())):
            ccs = tuple(cc for cc in tiles if tiles[cc] == c)
            yield _forward(shape, c, ccs)
            yield _backward(shape, c, ccs)


def _strides(*names: str) -> dict[str, str]:
    return {f"{name}_{dim}": "i32" for name in names for dim in "bhl"} | {"heads": "i32"}


def _constants(shape: Shape) -> dict[str, Any]:
    from erdfast.kernels.attention import head_tiles

    main, rest = head_tiles(shape.width)
    return {"ALIGN": shape.align, "QUERIES": shape.tokens, "WIDTH": shape.width, "MAIN": main, "REST": rest}


def _variant(
    kernel: str, shape: Shape, fn: Any, signature: dict[str, str], constants: dict[str, Any], *rest
) -> Variant:
    names = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Variant(kernel, shape.label, fn, signature, constants, names, *rest)


def _forward(shape: Shape, c: Any, ccs: tuple[int, ...]) -> Variant:
    from erdfast.kernels.attention import attention_forward_kernel, tail

    signature = pointers(out=shape.dtype, lse="fp32", q=shape.dtype, k=shape.dtype, v=shape.dtype)
    signature |= _strides("q", "k", "v", "o") | {"scale": "fp32"}
    constants = _constants(shape) | {"KEYS": shape.tokens, "ROWS": c.rows, "TILE": c.tile, "UPCAST": False}
    constants |= {"TAIL": tail(shape.tokens, c.tile)}
    launch = (c.num_warps, c.num_stages, ccs)
    return _variant("attention", shape, attention_forward_kernel, signature, constants, *launch)


def _delta(shape: Shape) -> Variant:
    from erdfast.kernels.attention import DELTA_ROWS, attention_delta_kernel

    signature = pointers(delta="fp32", out=shape.dtype, dout=shape.dtype) | _strides("o", "do")
    return _variant("attn_delta", shape, attention_delta_kernel, signature, _constants(shape) | {"ROWS": DELTA_ROWS}, 4)


def _backward(shape: Shape, c: Any, ccs: tuple[int, ...]) -> Variant:
    from erdfast.kernels.attention import attention_backward_kernel, tail

    signature = pointers(**dict.fromkeys(("dq", "dk", "dv", "dout", "q", "k", "v"), shape.dtype))
    signature |= pointers(lse="fp32", delta="fp32") | _strides("q", "k", "v", "do", "dq", "dk")
    signature |= {"scale": "fp32", "dscale": "fp32"}
    constants = _constants(shape) | {"KEYS": shape.tokens, "ROWS": c.rows, "TILE": c.tile, "UPCAST": False}
    constants |= {"QUERY_TAIL": tail(shape.tokens, c.tile), "KEY_TAIL": tail(shape.tokens, c.tile)}
    launch = (c.num_warps, c.num_stages, ccs)
    return _variant("attn_backward", shape, attention_backward_kernel, signature, constants, *launch)
