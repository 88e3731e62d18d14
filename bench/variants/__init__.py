"""Which specialisations of each Triton kernel are compiled ahead of time: one module an op, with a function `variants`.

A new kernel adds a module here, and nothing else: `bench.aot` and the tests find it by its name.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

DTYPES = ("fp32", "bf16", "fp16")


class Variant(NamedTuple):
    """One specialisation of a kernel, as a launch would ask for it."""

    kernel: str
    name: str
    fn: Any
    """The `triton.jit` function."""
    signature: dict[str, str]
    """Type of each run-time argument: "*bf16", "i32", "fp32" ...; all other arguments are compile-time
    constants."""
    constants: dict[str, Any]
    """Value of each constant; those not named are None, as a launcher passes for an absent tensor."""
    aligned: tuple[str, ...]
    """Pointers to 16 bytes and integers that are multiples of 16."""
    num_warps: int
    num_stages: int = 3
    ccs: tuple[int, ...] = (80, 90)
    """The compute capabilities that a launch uses it on."""


def pointers(**types: str | None) -> dict[str, str]:
    """The signature of pointer arguments: `pointers(x="bf16")` is {"x_ptr": "*bf16"}; None leaves one out."""
    return {f"{name}_ptr": f"*{kind}" for name, kind in types.items() if kind is not None}


def op_names() -> list[str]:
    """The ops that have a module here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def variants_of(op: str) -> Iterator[Variant]:
    """All variants of an op's kernels, backward and reductions included."""
    return importlib.import_module(f"bench.variants.{op}").variants()
