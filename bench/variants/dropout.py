"""Variants of kernels/dropout.py; backward is forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.variants import DTYPES, Variant, pointers

CHANNELS = (96, 192, 768)
"""Of channels-last images: 192 and 768 are ADM's of ImageNet at 64 pixels; the eighths of 96 and 192 fill no block."""
KEY = ("seed", "stream", "ids", "place")


def variants() -> Iterator[Variant]:
    """Samples in order, of an even, an odd and the least size, and channels-last ones."""
    from erdfast.kernels.dropout import (
        MAX_BLOCK,
        MIN_BLOCK,
        channel_block,
        dropout_channels_last_kernel,
        dropout_kernel,
    )

    for dtype in DTYPES:
        tensors = pointers(out=dtype, x=dtype)
        inputs = tensors | pointers(**dict.fromkeys(KEY, "i64")) | {"scale": "fp32", "dropped": "i32"}
        sizes = dict.fromkeys(("n", "eighth", "chunks"), "i32")
        single: dict[str, Any] = dict.fromkeys(sizes, 1)  # Triton makes constants of ones
        for label, signature, constants, aligned, block in (
            (dtype, inputs | sizes, {}, (*tensors, "n", "eighth"), MAX_BLOCK),
            (f"{dtype} odd n", inputs | sizes, {}, tuple(tensors), MAX_BLOCK),
            (f"{dtype} n = 1", inputs, single, tuple(tensors), MIN_BLOCK),
        ):
            constants = constants | {"BLOCK": block}
            yield Variant("dropout", label, dropout_kernel, signature, constants, aligned, block // 128)
        signature = inputs | dict.fromkeys(("pixels", "chunks"), "i32")
        for channels in CHANNELS:
            block = channel_block(channels // 8)
            constants = {"EIGHTH": channels // 8, "CHANNELS": block, "PIXELS": MAX_BLOCK // block}
            label, aligned = f"{dtype} channels-last {channels}", (*tensors, "pixels")
            yield Variant(
                "dropout", label, dropout_channels_last_kernel, signature, constants, aligned, MAX_BLOCK // 128
            )
