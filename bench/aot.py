"""Compiles every Triton kernel for sm_80 (A100) and sm_90 (H100, H200) without a GPU or driver: `python -m
bench.aot`.

Prints registers, spills, shared memory and cubin size of each variant and exits with 1 if one spills or takes
more shared memory than the architecture has. Must run in a process of its own without TRITON_INTERPRET:
`triton.jit` decides once, when a kernel is defined, whether it will be interpreted.

The variants are those of bench/variants/.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.variants import op_names, variants_of

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a program may use, by compute capability (CUDA programming guide, technical specifications)."""


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


def compile_variants(kernels: list[str], ccs: list[int]) -> Iterator[Report]:
    """Compiles the variants of the named ops for each compute capability."""
    if unknown := sorted(set(kernels) - set(op_names())):
        raise ValueError(f"no kernel is called {', '.join(unknown)}; choose from {', '.join(op_names())}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    for name in kernels:
        for v in variants_of(name):
            for cc in ccs:
                options = {"num_warps": v.num_warps, "num_stages": v.num_stages}
                measured = compile_kernel(v.fn, v.signature, v.constants, cc, aligned=v.aligned, **options)
                yield Report(kernel=v.kernel, name=v.name, cc=cc, **measured)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels without a GPU and fail on register spills."
    )
    parser.add_argument("--kernel", nargs="+", default=op_names(), metavar="NAME", help=f"of {', '.join(op_names())}")
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
