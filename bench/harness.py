"""What a benchmark is: cases with several implementations ("sides") of one op, measured interleaved and kept as JSON.

A benchmark file has `OP`, `cases(device, dtypes)` and `main`, which calls `run_cases`. Each case is timed forward,
backward and both, on random inputs that rotate through enough sets to exceed the caches. A row of the result says how
the fused side does against each other side (ratio of medians, with low and high from opposite quantiles), how much of
the least possible time it takes (`share`: bytes over the measured copy rate or operations over the measured matrix
rate, whichever is longer), and what memory it needs. The fused side is also timed alone, in rounds of its own on the
same rotating inputs: what lies between that and its time among the others is its neighbours' pressure on caches and
pages.

Eager and fused are measured beside each other before torch.compile has run in the process, and torch.compile beside
fused afterwards: on a CPU, what the compiler allocates teaches glibc to keep memory, which flatters eager code, whose
temporaries are fresh pages in a process of its own. On a GPU the allocator is PyTorch's, and one pass holds all sides.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from erdfast.ops.backend import resolve_backend

from .device import ROOT, Ceilings, default_device, device_name, environment, measure_ceilings
from .options import at_least
from .store import ResultFile, help_text, one_line
from .timing import Prepare, Timing, interleave, ratio

RESULTS = ROOT / "bench" / "results"
PASSES = ("forward", "backward", "both")
ROTATION_BYTES = 256 << 20
"""Inputs rotate through sets of this size together: five times the L2 of an H100."""
MAX_SETS = 8
DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_DTYPES = ("float32", "bfloat16")
DEFAULT_ROUNDS = 31
QUICK_ROUNDS = 3
ALONE = "alone"
"""Beside the sides of a row's first timings: the fused side without neighbours."""
NOT_COMPILED = {
    "reference": "reference (no compiled code on this device)",
    "auto": "auto (PyTorch's own, unless a table of measurements names another)",
}
"""Back ends by which the fused side is no kernel of ours, with what a reader must know."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One size of one op."""

    name: str
    """Such as "128x258x1152 bfloat16"; names the rows of one op apart."""
    fields: dict[str, Any]
    """Shape, dtype (of the matrix products, if they matter), options: goes into the row as it is."""
    make_inputs: Callable[[int], tuple]
    """i => one set of random inputs; those that need gradients have requires_grad=True."""
    sides: dict[str, Callable[..., Any]]
    """ "eager", "fused" and optional others; each maps the inputs to a tensor or a tuple."""
    passes: tuple[str, ...] = ("forward", "backward")
    """What is timed; with "backward" also "both", forward and backward as one. ("both",) alone is possible."""
    bytes: dict[str, int]
    """Least traffic per pass; "both" is the sum of the others unless given."""
    flops: dict[str, int] = field(default_factory=dict)
    """Operations per pass, where matrix products matter."""
    compile: bool = True
    """Add the side "compile", torch.compile of eager."""
    backend: str | None = None
    """What runs the fused side, where the benchmark knows it: of `backend_of`, or "auto" of attention."""

    def all_passes(self) -> tuple[str, ...]:
        """In the order of PASSES."""
        wanted = {*self.passes, *(("both",) if "backward" in self.passes else ())}
        if unknown := wanted - set(PASSES):
            raise ValueError(f"{self.name}: no pass is called {', '.join(unknown)}; choose from {', '.join(PASSES)}")
        return tuple(name for name in PASSES if name in wanted)

    def work(self, kind: str, amounts: Mapping[str, int]) -> int:
        """`amounts` (bytes or flops) of a pass; those of "both" add up."""
        return amounts[kind] if kind in amounts else sum(amounts.values()) if kind == "both" else 0


Cases = Callable[[str, Sequence[torch.dtype]], Iterable[Case]]


def backend_of(op: str, device: str, dtype: torch.dtype, backends: tuple[str, ...] = ("reference", "triton")) -> str:
    """The back end that an op takes by default; "reference" where it has no compiled code for the device."""
    return resolve_backend(None, torch.device(device), dtype, op=op, backends=backends)


class Measurement:
    """A case's inputs and sides, and how a pass of a side is called."""

    def __init__(self, case: Case, device: str, *, compiled: bool | None) -> None:
        """compiled: False leaves torch.compile out, True measures only it and fused, None takes all sides."""
        self.case, self.device = case, device
        self.sides = dict(case.sides)
        if compiled:
            self.sides = {"fused": self.sides["fused"]}
        torch._dynamo.reset()  # each case compiles its own: of one function no more than eight sizes
        if case.compile and compiled is not False:
            self.sides = {"compile": torch.compile(case.sides["eager"], dynamic=False), **self.sides}
        self.sets = [case.make_inputs(0)]
        size = sum(t.nbytes for t in _tensors(self.sets[0]))
        count = min(max(math.ceil(ROTATION_BYTES / max(size, 1)), 1), MAX_SETS)
        self.sets += [case.make_inputs(i) for i in range(1, count)]
        self._derivatives: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def prepare(self, side: str, kind: str) -> Prepare:
        """For `interleave`: call number => what is timed."""
        function = self.sides[side]

        def forward(i: int) -> Callable[[], object]:
            return partial(function, *self.sets[i % len(self.sets)])

        def backward(i: int) -> Callable[[], object]:
            index = i % len(self.sets)
            leaves, gradients = self._derivative(function, index)
            outputs = _differentiable(function(*self.sets[index]))
            return partial(torch.autograd.grad, outputs, leaves, gradients, allow_unused=True)

        def both(i: int) -> Callable[[], object]:
            index = i % len(self.sets)
            inputs, (leaves, gradients) = self.sets[index], self._derivative(function, index)
            return lambda: torch.autograd.grad(_differentiable(function(*inputs)), leaves, gradients, allow_unused=True)

        return {"forward": forward, "backward": backward, "both": both}[kind]

    def _derivative(self, function: Callable[..., Any], index: int) -> tuple[list[Tensor], list[Tensor]]:
        """What is differentiated for, and the outputs' gradients: 1 of a loss, else random, the same each time.

        Found out before the clock runs: to look through the inputs takes longer than some ops.
        """
        if index not in self._derivatives:
            leaves = [t for t in _tensors(self.sets[index]) if t.requires_grad]
            outputs = _differentiable(function(*self.sets[index]))
            make = [torch.ones_like if out.dim() == 0 else torch.randn_like for out in outputs]
            self._derivatives[index] = leaves, [m(out.detach()) for m, out in zip(make, outputs, strict=True)]
        return self._derivatives[index]

    def drop_failing(self) -> dict[str, str]:
        """Try every pass of every side once; sides that raise are left out and named with the reason."""
        failed = {}
        for side in list(self.sides):
            try:
                for kind in self.case.all_passes():
                    self.prepare(side, kind)(0)()
            except Exception as error:
                failed[side] = one_line(error)
                del self.sides[side]
        return failed

    def time(self, kind: str, rounds: int) -> dict[str, Timing]:
        """All sides, interleaved."""
        sides = {side: self.prepare(side, kind) for side in self.sides}
        return interleave(sides, rounds, device=self.device)

    def time_alone(self, kind: str, rounds: int) -> Timing:
        """The fused side in rounds of its own."""
        return interleave({ALONE: self.prepare("fused", kind)}, rounds, device=self.device)[ALONE]

    def peak_bytes(self, side: str, kind: str) -> int | None:
        """The most that a call allocates beyond what was there before; None on a CPU, where nobody counts all of it."""
        if self.device != "cuda":
            return None
        work = self.prepare(side, kind)(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before

    def kept_bytes(self, side: str) -> int:
        """What the forward pass keeps for the backward pass beyond inputs, parameters and outputs, on any device."""
        inputs = self.sets[0]
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            base = tensor if tensor._base is None else tensor._base
            if not (base.is_leaf and base.requires_grad):
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = self.sides[side](*inputs)
        known = {t.untyped_storage().data_ptr() for t in [*_tensors(inputs), *_tensors(output)]}
        return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)


def _differentiable(output: Any) -> list[Tensor]:
    """Of a tensor or a tuple."""
    outputs = [output] if isinstance(output, Tensor) else output
    return [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


# ---------------------------------------------------------------------------- rows


def measure(case: Case, device: str, rounds: int, *, compiled: bool | None) -> dict[str, Any]:
    """What one process run of a case gives: per pass the timings, and the memory of each side."""
    missing = {"eager", "fused"} - set(case.sides)
    if missing:
        raise ValueError(f"{case.name} has no side called {' or '.join(sorted(missing))}")
    run = Measurement(case, device, compiled=compiled)
    failed = run.drop_failing()
    if "fused" in failed or (not compiled and "eager" in failed):
        raise RuntimeError("; ".join(f"{side}: {reason}" for side, reason in failed.items()))
    kinds = case.all_passes()
    differentiable = "both" in kinds
    return {
        "failed": failed,
        "timings": {kind: run.time(kind, rounds) for kind in kinds},
        # Once is enough: the run with torch.compile has the same fused side.
        ALONE: {} if compiled else {kind: run.time_alone(kind, rounds) for kind in kinds},
        "peak_bytes": {kind: {side: run.peak_bytes(side, kind) for side in run.sides} for kind in kinds},
        "kept_bytes": {side: run.kept_bytes(side) for side in run.sides} if differentiable else {},
    }


def make_rows(case: Case, runs: Sequence[Mapping[str, Any]], ceilings: Ceilings | None) -> list[dict[str, Any]]:
    """One row per pass from the runs of a case: a side is compared with the fused side of its own run."""
    dtype = str(_plain(case.fields.get("dtype", "bfloat16")))
    rows = []
    for kind in case.all_passes():
        timings: list[dict[str, Timing]] = [run["timings"][kind] for run in runs]
        fused = timings[0]["fused"]
        num_bytes, flops = case.work(kind, case.bytes), case.work(kind, case.flops)
        floor_s = None if ceilings is None else ceilings.floor_s(num_bytes, flops, dtype)
        peaks = {side: peak for run in runs for side, peak in run["peak_bytes"][kind].items() if peak is not None}
        row = {
            "case": case.name,
            "pass": kind,
            "fields": {name: _plain(value) for name, value in case.fields.items()},
            "bytes": num_bytes,
            "flops": flops,
            "bytes_per_s": num_bytes / (1e-3 * fused.p50_ms),
            "flops_per_s": flops / (1e-3 * fused.p50_ms),
            "share": None if floor_s is None else floor_s / (1e-3 * fused.p50_ms),
            "over": {s: ratio(t, beside["fused"]) for beside in timings for s, t in beside.items() if s != "fused"},
            "peak_bytes": peaks or None,
            "kept_bytes": {side: kept for run in runs for side, kept in run["kept_bytes"].items()} or None,
            "timings": [_timings(run, kind) for run in runs],
        }
        if case.backend is not None:
            row["backend"] = case.backend
        if failed := {side: reason for run in runs for side, reason in run["failed"].items()}:
            row["failed"] = failed
        rows.append(row)
    return rows


def _timings(run: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Of all sides of a run, and of the fused one alone if that was measured."""
    alone = {ALONE: run[ALONE][kind]} if kind in run[ALONE] else {}
    return {side: asdict(timing) for side, timing in (run["timings"][kind] | alone).items()}


def _plain(value: Any) -> Any:
    """For JSON: dtypes by name."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def print_row(row: Mapping[str, Any]) -> None:
    """One line for people."""
    timings = row["timings"][0]
    parts = [f"{row['case']:34} {row['pass']:8} {timings['fused']['p50_ms']:9.3f} ms"]
    if ALONE in timings:
        parts.append(f"alone {timings[ALONE]['p50_ms']:9.3f} ms")
    if row["share"] is not None:
        parts.append(f"{100 * row['share']:4.0f}% of ceiling")
    if elements := row["fields"].get("elements"):
        rates = {
            side: f"{1e-3 * elements / timings[side]['p50_ms']:,.0f}" for side in ("fused", ALONE) if side in timings
        }
        alone = f" (alone {rates[ALONE]})" if ALONE in rates else ""
        parts.append(f"{rates['fused']}{alone} million elements/s")
    parts += [f"{r['median']:5.2f}x {side} ({r['low']:.2f}-{r['high']:.2f})" for side, r in row["over"].items()]
    if row.get("backend") in NOT_COMPILED:
        parts.append(f"by {NOT_COMPILED[row['backend']]}")
    print("  ".join(parts), flush=True)
    for side, reason in row.get("failed", {}).items():
        print(f"    {side} left out: {reason}")


# ---------------------------------------------------------------------------- running


def run_cases(op: str, cases: Cases, doc: str | None, argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The command line of a benchmark: measure, print, write bench/results/<device>/<op>.json as rows come in.

    Exits with 1 after all cases if one could not be measured.
    """
    options = _parse(op, doc, argv)
    device = default_device()
    torch.manual_seed(0)
    ceilings = None if options.quick else measure_ceilings(device)  # a few calls of a toy size have no ceiling
    print(f"{op} on {device_name()}: {_describe(ceilings, options.dtypes)}", flush=True)
    dtypes = [getattr(torch, name) for name in options.dtypes]
    size = "cpu" if options.quick else device
    chosen = [case for case in cases(size, dtypes) if options.only in case.name]
    if not chosen:
        raise SystemExit(f"no case of {op} has {options.only!r} in its name")
    if options.quick:
        chosen = chosen[:1]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    file, head = options.file, {"op": op, "environment": environment(), "ceilings": ceilings and asdict(ceilings)}
    for case, runs in _runs(chosen, size, options, failures):
        new = make_rows(case, runs, ceilings)
        rows += new
        for row in new:
            print_row(row)
        if file is not None:
            file.write(head, rows, finished=False)
    if file is not None and rows:
        print(f"written: {file.write(head, rows, finished=not failures)}")
    if failures:
        raise SystemExit("\n".join(["not measured:", *failures]))
    return rows


def _runs(
    cases: Sequence[Case], device: str, options: argparse.Namespace, failures: list[str]
) -> Iterable[tuple[Case, list[dict[str, Any]]]]:
    """Each case with its runs; on a CPU all of eager precedes all of torch.compile (see the top of this file)."""

    def attempt(case: Case, compiled: bool | None) -> dict[str, Any] | None:
        try:
            return measure(case, device, options.rounds, compiled=compiled)
        except Exception as error:
            failures.append(f"  {case.name}: {error}")
            return None

    if device == "cuda":
        for case in cases:
            if (run := attempt(case, None if options.compile else False)) is not None:
                yield case, [run]
        return
    first = [(case, attempt(case, False)) for case in cases]
    for case, run in first:
        if run is None:
            continue
        second = attempt(case, True) if options.compile and case.compile else None
        yield case, [run] if second is None else [run, second]


def _describe(ceilings: Ceilings | None, dtypes: Sequence[str]) -> str:
    """The ceilings in words, and which are lacking."""
    if ceilings is None:
        return "does it run? Times of so few calls mean nothing"
    measured = ceilings.matmul_flops_per_s
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in measured.items())
    text = f"copies {ceilings.copy_bytes_per_s / 1e9:.1f} GB/s, matrix products in TFLOP/s: {rates}"
    if lacking := [name for name in dtypes if name not in measured]:
        text += f"; not measured for {', '.join(lacking)}: no share of the ceiling where those products matter"
    return text


def _parse(op: str, doc: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=doc, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=at_least(1), default=DEFAULT_ROUNDS, help="timed calls of each side")
    parser.add_argument("--dtypes", nargs="+", default=list(DEFAULT_DTYPES), choices=DTYPES)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with this in their name; not saved")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="no side torch.compile of eager")
    parser.add_argument("--no-save", dest="save", action="store_false", help="print only")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--overwrite", action="store_true", help="let this run replace a full one whatever it lacks")
    parser.add_argument("--quick", action="store_true", help="one small case and few calls: does it run? not saved")
    options = parser.parse_args(argv)
    if options.quick:
        options.rounds = min(options.rounds, QUICK_ROUNDS)
    options.file = None
    if options.save and not options.only and not options.quick:
        path = options.results / device_name() / f"{op}.json"
        try:
            options.file = ResultFile(path, missing=_missing(options), overwrite=options.overwrite)
        except ValueError as error:
            parser.error(str(error))
    return options


def _missing(options: argparse.Namespace) -> list[str]:
    """What a run with these options lacks of a full one."""
    lacking = [name for name in DEFAULT_DTYPES if name not in options.dtypes]
    if not options.compile:
        lacking.append("torch.compile")
    if options.rounds < DEFAULT_ROUNDS:
        lacking.append(f"{DEFAULT_ROUNDS - options.rounds} of {DEFAULT_ROUNDS} rounds")
    return lacking
