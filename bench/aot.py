"""Compiles every Triton kernel for sm_80 (A100) and sm_90 (H100, H200) without a GPU or driver.

`python -m bench.aot` prints registers, spills, shared memory, cubin size and occupancy of each variant and exits with 1
if one spills or takes more shared memory than the architecture has. It must run in a process of its own without
TRITON_INTERPRET: `triton.jit` decides once, when a kernel is defined, whether it will be interpreted.

The variants are those of bench/variants/. `--save` writes the table to bench/results/aot.json, which is committed;
`python -m bench.report` makes a page of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.options import at_least
from bench.variants import op_names, variants_of
from erdfast.atomic import write_text

SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a program may use, by compute capability (CUDA programming guide, technical specifications)."""
SHARED_MEMORY_OF_SM = {80: 164 * 1024, 90: 228 * 1024}
RESERVED_SHARED_BYTES = 1024
"""That the system takes for itself in each program."""
REGISTERS_OF_SM, WARPS_OF_SM, PROGRAMS_OF_SM = 65536, 64, 32
REGISTER_UNIT, WARP_UNIT = 256, 4
"""Registers come to a warp in multiples of the first; each of the four parts of an SM holds a quarter of its warps."""
TABLE = Path(__file__).parent / "results" / "aot.json"


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
    num_warps: int
    programs_per_sm: int
    """That fit at once, bound by registers, shared memory, threads and the hardware's own limit."""
    warp_share: float
    """Of the SM's warps, that those programs make up."""

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
        signature, constants, aligned: see `Variant`; an argument in neither of the first two is the constant None.
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


def programs_per_sm(cc: int, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Occupancy as NVIDIA's calculator has it: how many programs an SM holds at once."""
    registers_of_warp = -(-max(registers, 1) * 32 // REGISTER_UNIT) * REGISTER_UNIT
    warps = REGISTERS_OF_SM // registers_of_warp // WARP_UNIT * WARP_UNIT
    shared = -(-shared_bytes // 128) * 128 + RESERVED_SHARED_BYTES
    return min(PROGRAMS_OF_SM, WARPS_OF_SM // num_warps, warps // num_warps, SHARED_MEMORY_OF_SM[cc] // shared)


def compile_variants(kernels: list[str], ccs: list[int], jobs: int = 1) -> Iterator[Report]:
    """Compiles the variants of the named ops for each compute capability, in `jobs` processes at a time."""
    if unknown := sorted(set(kernels) - set(op_names())):
        raise ValueError(f"no kernel is called {', '.join(unknown)}; choose from {', '.join(op_names())}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    tasks = [(op, i, cc) for op in kernels for i, v in enumerate(variants_of(op)) for cc in ccs if cc in v.ccs]
    if jobs == 1:
        yield from itertools.starmap(_compile, tasks)
        return
    # New processes: a forked copy of one that has imported PyTorch may hang in its threads.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile, *zip(*tasks, strict=True), chunksize=4)


def _compile(op: str, index: int, cc: int) -> Report:
    """One variant of an op, by its place: kernels cannot be sent to another process."""
    v = next(itertools.islice(variants_of(op), index, None))
    options = {"num_warps": v.num_warps, "num_stages": v.num_stages}
    measured = compile_kernel(v.fn, v.signature, v.constants, cc, aligned=v.aligned, **options)
    programs = programs_per_sm(cc, measured["registers"], measured["shared_bytes"], v.num_warps)
    return Report(
        kernel=v.kernel,
        name=v.name,
        cc=cc,
        **measured,
        num_warps=v.num_warps,
        programs_per_sm=programs,
        warp_share=programs * v.num_warps / WARPS_OF_SM,
    )


def save(reports: Sequence[Report]) -> None:
    """Write the table that is committed, one variant a line."""
    import triton

    rows = ",\n".join(f"    {json.dumps(asdict(report))}" for report in reports)
    write_text(TABLE, f'{{\n  "triton": "{triton.__version__}",\n  "rows": [\n{rows}\n  ]\n}}\n')


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compile the Triton kernels without a GPU and fail on register spills."
    )
    parser.add_argument("--kernel", nargs="+", default=op_names(), metavar="NAME", help=f"of {', '.join(op_names())}")
    parser.add_argument("--cc", nargs="+", type=int, default=[80, 90], choices=sorted(SHARED_MEMORY_LIMIT))
    parser.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parser.add_argument("--save", action="store_true", help=f"write {TABLE.relative_to(TABLE.parents[2])}: all kernels")
    parser.add_argument("--jobs", type=at_least(1), default=min(os.cpu_count() or 1, 8), help="processes that compile")
    args = parser.parse_args()
    if unknown := sorted(set(args.kernel) - set(op_names())):
        parser.error(f"no kernel is called {', '.join(unknown)}; choose from {', '.join(op_names())}")
    everything = args.kernel == op_names() and args.cc == [80, 90]
    if args.save and not everything:
        parser.error("--save takes all kernels and architectures: leave --kernel and --cc out")
    reports = []
    if not args.json:
        columns = (
            f"{'regs':>5} {'spill':>6} {'stack':>6} {'shared':>7} {'cubin':>7} {'load':>5} {'per SM':>7} {'warps':>6}"
        )
        print(f"{'kernel':15} {'variant':28} {'sm':>3} {columns}")
    for r in compile_variants(args.kernel, args.cc, args.jobs):
        reports.append(r)
        if args.json:
            print(json.dumps(asdict(r)), flush=True)
            continue
        local = f"{r.registers:5} {r.spill_bytes:6} {r.stack_bytes:6}"
        sizes = (
            f"{r.shared_bytes:7} {r.cubin_bytes:7} {r.widest_load_bytes:5} {r.programs_per_sm:7} {r.warp_share:6.0%}"
        )
        print(f"{r.kernel:15} {r.name:28} {r.cc:3} {local} {sizes}", flush=True)
    if args.save:
        save(reports)
    fits = all(report.fits for report in reports)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
