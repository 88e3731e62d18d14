"""Compiles every Triton kernel for sm_80 (A100) and sm_90 (H100, H200) without a GPU or driver: `python -m
bench.aot`.

Prints registers, spills, shared memory and cubin size of each variant and exits with 1 if one spills or takes
more shared memory than the architecture has. Must run in a process of its own without TRITON_INTERPRET:
`triton.jit` decides once, when a kernel is defined, whether it will be interpreted.

A new kernel adds a function that yields its variants to `KERNELS`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a program may use, by compute capability (CUDA programming guide, technical specifications)."""

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


@dataclass(frozen=True, kw_only=True)
class Report:
    """What ptxas says about one variant for one architecture."""

    kernel: str
    name: str
    cc: int
    registers: int
    """Per thread."""
    stack_bytes: int
    spill_bytes: int
    """Stores and loads together."""
    shared_bytes: int
    cubin_bytes: int
    widest_load_bytes: int
    """Of the vector loads from global memory: 16 is what the memory system wants."""

    @property
    def fits(self) -> bool:
        return self.spill_bytes == 0 and self.shared_bytes <= SHARED_MEMORY_LIMIT[self.cc]


def compile_kernel(
    fn: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    cc: int,
    *,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> dict[str, int]:
    """Compiles a `triton.jit` function for compute capability `cc` (80 or 90) and reads what ptxas reports.

    Args:
        signature, constants, aligned: see `Variant`; an argument in neither of the first two is the constant
            None.
        options: num_warps, num_stages ...

    Returns:
        The fields of `Report` that are measured.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    names = fn.arg_names
    source = ASTSource(
        fn=fn,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(i,): constants.get(name) for i, name in enumerate(names) if name not in signature},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=options)
    ptx = compiled.asm["ptx"]
    log = _ptxas_log(get_ptxas(cc).path, ptx)

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "shared_bytes": compiled.metadata.shared,
        "cubin_bytes": len(compiled.asm["cubin"]),
        "widest_load_bytes": _widest_load(ptx),
    }


def _ptxas_log(ptxas: str, ptx: str) -> str:
    target = re.search(r"\.target (sm_\w+)", ptx)
    assert target is not None, "PTX without a .target line"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [ptxas, "-v", f"-arch={target[1]}", str(path), "-o", str(path.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _widest_load(ptx: str) -> int:
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    # A single 64-bit load is a seed, a stream or a sample id; no element is that wide.
    return max((int(count or 1) * int(bits) // 8 for count, bits in loads if (count, bits) != ("", "64")), default=0)


def _pointers(**types: str | None) -> dict[str, str]:
    return {f"{name}_ptr": f"*{kind}" for name, kind in types.items() if kind is not None}


_INTEGERS = {"n": "i32", "quarter": "i32", "chunks": "i32"}
_SINGLE = {"n": 1, "quarter": 1, "chunks": 1}
"""Samples of one element: Triton turns arguments that equal 1 into constants."""
_SCALARS = (
    "alpha_ptr",
    "sigma_ptr",
    "c_x_ptr",
    "c_eps_ptr",
    "w_ptr",
    "seed_ptr",
    "stream_ptr",
    "ids_ptr",
    "grad_scale_ptr",
)


def _aligned(signature: dict[str, str], sizes: bool) -> tuple[str, ...]:
    """As a launch finds it: tensors aligned, the pointers to scalars not looked at, sizes if they are
    multiples of 16."""
    tensors = [name for name, kind in signature.items() if kind.startswith("*") and name not in _SCALARS]
    return (*tensors, *(("n", "quarter") if sizes else ()))


class Case(NamedTuple):
    label: str
    dtype: str
    """Of the output, or of pred and the gradient."""
    x0: str
    keyed: bool
    moments: bool
    sizes_aligned: bool


def _cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for keyed in (True, False):
            for moments in (False, True):
                label = f"{dtype} {'key' if keyed else 'noise'}{' moments' * moments}"
                yield Case(label, dtype, dtype, keyed, moments, True)
    yield Case("bf16/fp32 key", "bf16", "fp32", True, False, True)
    yield Case("fp32 key odd n", "fp32", "fp32", True, False, False)


def _noise_inputs(case: Case) -> dict[str, str]:
    key = "i64" if case.keyed or case.moments else None
    return _pointers(x0=case.x0, noise=None if case.keyed else "fp32", seed=key, stream=key, ids=key)


def add_noise_variants() -> Iterator[Variant]:
    from erdfast.kernels.add_noise import add_noise_kernel
    from erdfast.kernels.layout import MAX_BLOCK, partition

    warps = partition(4 * MAX_BLOCK).num_warps
    for case in _cases():
        signature = _pointers(out=case.dtype, alpha="fp32", sigma="fp32") | _noise_inputs(case)
        signature |= {"moments_scale": "fp32"} | _INTEGERS
        constants = {"KEYED": case.keyed, "MOMENTS": case.moments, "BLOCK": MAX_BLOCK}
        names = _aligned(signature, case.sizes_aligned)
        yield Variant("add_noise", case.label, add_noise_kernel, signature, constants, names, warps)
    case = Case("fp32 key n = 1", "fp32", "fp32", True, False, False)
    signature = _pointers(out="fp32", alpha="fp32", sigma="fp32") | _noise_inputs(case) | {"moments_scale": "fp32"}
    constants = {"KEYED": True, "MOMENTS": False, "BLOCK": MAX_BLOCK} | _SINGLE
    names = _aligned(signature, case.sizes_aligned)
    yield Variant("add_noise", case.label, add_noise_kernel, signature, constants, names, warps)


def diffusion_loss_variants() -> Iterator[Variant]:
    for case in _cases():
        yield _diffusion_loss_variant(case)
    for moments in (False, True):
        case = Case(f"bf16 key{' moments' * moments}", "bf16", "bf16", True, moments, True)
        yield _diffusion_loss_variant(case, " sums only", grad=False)
        yield _diffusion_loss_variant(case, " grad only", sums=False)
        yield _diffusion_loss_variant(case, " 8 steps", steps=8)


def _diffusion_loss_variant(case: Case, label: str = "", *, sums=True, grad=True, steps=1) -> Variant:
    from erdfast.kernels.diffusion_loss import diffusion_loss_kernel
    from erdfast.kernels.layout import MAX_BLOCK, partition

    signature = _pointers(pred=case.dtype, c_x="fp32", c_eps="fp32", w="fp32") | _noise_inputs(case)
    signature |= _pointers(sums="fp32" if sums else None)
    signature |= _pointers(grad=case.dtype, grad_scale="fp32") if grad else {}
    signature |= {"moments_scale": "fp32", "grad_unit": "fp32"} | _INTEGERS
    constants = {"KEYED": case.keyed, "MOMENTS": case.moments, "STEPS": steps, "BLOCK": MAX_BLOCK}
    names = _aligned(signature, case.sizes_aligned)
    warps = partition(4 * MAX_BLOCK).num_warps
    name = case.label + label
    return Variant("diffusion_loss", name, diffusion_loss_kernel, signature, constants, names, warps)


def reduction_variants() -> Iterator[Variant]:
    from erdfast.kernels.diffusion_loss import SCALE_BLOCK, add_partials_kernel, scale_kernel
    from erdfast.kernels.layout import MAX_CHUNKS

    signature = _pointers(sums="fp32", partials="fp32") | {"chunks": "i32"}
    names = ("sums_ptr", "partials_ptr")
    yield Variant("add_partials", "", add_partials_kernel, signature, {"BLOCK": MAX_CHUNKS}, names, 4)
    for dtype in DTYPES:
        signature = _pointers(values=dtype, scale="fp32") | {"numel": "i32"}
        names = ("values_ptr", "numel")
        yield Variant("scale", dtype, scale_kernel, signature, {"BLOCK": SCALE_BLOCK}, names, 8)


KERNELS: dict[str, Callable[[], Iterator[Variant]]] = {
    "add_noise": add_noise_variants,
    "diffusion_loss": diffusion_loss_variants,
    "reduction": reduction_variants,
}


def compile_variants(kernels: list[str], ccs: list[int]) -> Iterator[Report]:
    """Compiles the variants of the named entries of KERNELS for each compute capability."""
    if unknown := sorted(set(kernels) - set(KERNELS)):
        raise ValueError(f"no kernel is called {', '.join(unknown)}; choose from {', '.join(KERNELS)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    for name in kernels:
        for v in KERNELS[name]():
            for cc in ccs:
                measured = compile_kernel(v.fn, v.signature, v.constants, cc, aligned=v.aligned, num_warps=v.num_warps)
                yield Report(kernel=v.kernel, name=v.name, cc=cc, **measured)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels without a GPU and fail on register spills."
    )
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), metavar="NAME", help=f"of {', '.join(KERNELS)}")
    parser.add_argument("--cc", nargs="+", type=int, default=[80, 90], choices=sorted(SHARED_MEMORY_LIMIT))
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    args = parser.parse_args()
    fits = True
    if not args.json:
        columns = f"{'regs':>5} {'spill':>6} {'stack':>6} {'shared':>7} {'cubin':>7} {'load':>5}"
        print(f"{'kernel':15} {'variant':28} {'sm':>3} {columns}")
    for r in compile_variants(args.kernel, args.cc):
        fits &= r.fits
        if args.json:
            print(json.dumps(asdict(r)), flush=True)
            continue
        local = f"{r.registers:5} {r.spill_bytes:6} {r.stack_bytes:6}"
        sizes = f"{r.shared_bytes:7} {r.cubin_bytes:7} {r.widest_load_bytes:5}"
        print(f"{r.kernel:15} {r.name:28} {r.cc:3} {local} {sizes}", flush=True)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
