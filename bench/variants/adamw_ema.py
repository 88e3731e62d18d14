"""Variants of kernels/adamw_ema.py."""

from __future__ import annotations

from collections.abc import Iterator

from bench.variants import DTYPES, Variant, pointers


def variants() -> Iterator[Variant]:
    """The update with its averages and copies, what precedes it, and the norm in its two stages."""
    for grad in DTYPES:
        yield _update(grad, f"{grad} grad")
    yield _update("fp32", "2 averages, bf16 copy", emas=2, copy="bf16", found_inf=True)
    yield _update("fp16", "no average, fp16 copy", emas=0, copy="fp16", found_inf=True)
    yield _prepare("plain")
    yield _prepare("scaled and clipped", grad_scale="fp32", found_inf="fp32", norm="fp32")
    for grad in DTYPES:
        yield _sum_squares(grad, steps=1)
    yield _sum_squares("fp32", steps=256)  # 500 million parameters
    yield _norm()


def _dtype(name: str):
    import triton.language as tl

    return {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[name]


def _update(grad: str, name: str, *, emas=1, copy: str | None = None, found_inf=False) -> Variant:
    from erdfast.kernels.adamw_ema import BLOCK, adamw_ema_kernel

    signature = pointers(
        table="i64", owner="i32", grads="i64", scalars="fp32", settings="fp64", found_inf="fp32" if found_inf else None
    )
    signature |= {"tensors": "i32", "groups": "i32"}
    constants = {"GRAD": _dtype(grad), "EMAS": emas, "COPY": copy and _dtype(copy), "BLOCK": BLOCK}
    aligned = ("table_ptr", "owner_ptr", "grads_ptr", "scalars_ptr", "settings_ptr")
    return Variant("adamw_ema", name, adamw_ema_kernel, signature, constants, aligned, 8)


def _prepare(name: str, **scalars: str) -> Variant:
    from erdfast.kernels.adamw_ema import prepare_kernel

    signature = pointers(scalars="fp32", table="i64", grads="i64", settings="fp64", **scalars)
    signature |= {"max_norm": "fp32", "tensors": "i32"}
    aligned = ("scalars_ptr", "table_ptr", "grads_ptr", "settings_ptr")
    return Variant("prepare_update", name, prepare_kernel, signature, {"BLOCK": 128}, aligned, 4)


def _sum_squares(grad: str, steps: int) -> Variant:
    from erdfast.kernels.adamw_ema import BLOCK, sum_squares_kernel

    signature = pointers(partials="fp32", table="i64", owner="i32", grads="i64") | {"tensors": "i32", "blocks": "i32"}
    constants = {"GRAD": _dtype(grad), "STEPS": steps, "BLOCK": BLOCK}
    aligned = ("partials_ptr", "table_ptr", "owner_ptr", "grads_ptr")
    return Variant("grad_norm", f"{grad} {steps} steps", sum_squares_kernel, signature, constants, aligned, 8)


def _norm() -> Variant:
    from erdfast.kernels.adamw_ema import NORM_PROGRAMS, norm_kernel

    signature = pointers(norm="fp32", partials="fp32") | {"programs": "i32"}
    aligned = ("norm_ptr", "partials_ptr")
    return Variant("grad_norm", "second stage", norm_kernel, signature, {"BLOCK": NORM_PROGRAMS}, aligned, 4)
