"""A whole training step, from gathering a batch to the averaged weights: PyTorch, torch.compile, this package, others.

    python -m bench.bench_train_step --model dit_b2 --batch 128 --sides eager compile ours ours_compile
    python -m bench.bench_train_step --model uvit_h2 --batch 128 --erd ~/ERD --uvit ~/U-ViT
    python -m bench.bench_train_step --model uvit_h2 --batch 128 --compare kernels

Each side lives in a process of its own, so that none profits from another's allocator, compiler or imports; blocks of
steps take turns on the device. The first steps, and the first of every block, are not counted. A side is a median over
steps: images per second, MFU (erdfast.models.flops over the data sheet's dense bf16 peak) and peak memory. Written to
bench/results/<device>/train_step_<model>_<batch>.json. See bench/step_sides.py for what each side does.

--compare sets our compiled step beside itself with something changed, in train_step_<model>_<batch>_<what>.json:
kernels    one after the other, each op of the network without this package's kernel
graph      forward and backward as one CUDA graph
full       one compiled graph from the data to the loss; tuned: with kernels chosen by measurement
fp8        the products of the blocks in float8
segments   memory in segments that can grow
What they do to loss and gradients says bench.step_accuracy. All sides hold their memory at the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.device import ROOT, default_device, device_name, environment
from bench.harness import RESULTS
from bench.options import at_least
from bench.peers import PEERS
from bench.report import milliseconds
from bench.step_sides import DEFAULT_COMPILE, ENVIRONMENT, SIDES, VARIANTS, StepOptions, build, replaced_sides
from bench.store import ResultFile, help_text, one_line
from bench.timing import ratio, summarize
from erdfast import presets
from erdfast.models.flops import training_flops
from erdfast.training.precision import resolve_precision
from erdfast.training.speed import peak_flops

OURS, COMPILED = "ours", "ours_compile"
DEFAULT_SIDES = ("eager", "compile", OURS, COMPILED)
OTHERS, KERNELS = "others", "kernels"
OPTIONS = {name.removeprefix("ours_"): name for name in VARIANTS if name not in (OURS, COMPILED)}
"""What can be changed of our compiled step, and the side that does it."""
DEFAULT_BLOCKS, DEFAULT_STEPS = 5, 10


# ---------------------------------------------------------------------------- a side's own process


def work(side: str, options: StepOptions, orders: TextIO, answers: TextIO) -> None:
    """Build a side, then run as many steps as each line of `orders` says; answers are lines of JSON."""
    device = torch.device(default_device())
    torch.manual_seed(0)
    try:
        step = build(side, options, device)
        for line in orders:
            times = time_steps(step, int(line), device)
            memory: dict[str, int | None] = {"peak_bytes": None, "reserved_bytes": None}
            if device.type == "cuda":
                allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                memory = {"peak_bytes": allocated, "reserved_bytes": reserved}
                torch.cuda.empty_cache()  # the other sides share the device
            print(json.dumps({"ms": times, **memory}), file=answers, flush=True)
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) and str(error) else one_line(error)
        print(json.dumps({"failed": reason}), file=answers, flush=True)


def time_steps(step: Any, count: int, device: torch.device) -> list[float]:
    """Milliseconds from the end of one step to the end of the next, without waiting in between on a GPU."""
    if device.type == "cpu":
        ends = [time.perf_counter()]
        for _ in range(count):
            step()
            ends.append(time.perf_counter())
        return [1e3 * (end - start) for start, end in itertools.pairwise(ends)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in itertools.pairwise(events)]


class Worker:
    """The process of one side."""

    def __init__(self, side: str, options: StepOptions) -> None:
        self.side, self.failed = side, ""
        self.times: list[float] = []
        self.memory: dict[str, int | None] = {"peak_bytes": None, "reserved_bytes": None}
        command = [sys.executable, "-m", "bench.bench_train_step", "--work", side, json.dumps(asdict(options))]
        surroundings = os.environ | ENVIRONMENT.get(side, {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=surroundings
        )

    def run(self, steps: int, discard: int) -> None:
        """Run a block; `discard` steps at its beginning are not counted."""
        if self.failed:
            return
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it failed while it was being built, and has said why
            print(steps + discard, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": "the process ended without a word"}
        self.failed = answer.get("failed", "")
        if not self.failed:
            self.times += answer["ms"][discard:]
            self.memory = {name: answer[name] for name in self.memory}

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------- the comparison


def measure(
    sides: Sequence[str], options: StepOptions, *, blocks: int, steps: int, warmup: int
) -> Iterator[list[Worker]]:
    """Blocks of steps in turn, beginning with another side each time; gives all that there is after each turn."""
    workers = [Worker(side, options) for side in sides]
    try:
        for worker in workers:
            worker.run(0, warmup)
        for block in range(blocks):
            first = block % len(workers)
            for worker in [*workers[first:], *workers[:first]]:
                worker.run(steps, discard=1)
            yield workers
    finally:
        for worker in workers:
            worker.close()


def make_rows(workers: Sequence[Worker], options: StepOptions, base: str = OURS) -> list[dict[str, Any]]:
    """One row per side; `base`: the side that the others are compared with."""
    device = torch.device(default_device())
    flops, peak = training_flops(presets.model_config(options.model)) * options.batch, peak_flops(device)
    timings = {worker.side: summarize(worker.times) for worker in workers if worker.times and not worker.failed}
    own = timings.get(base)
    rows = []
    for worker in workers:
        timing = timings.get(worker.side)
        row: dict[str, Any] = {"case": f"{options.model} batch {options.batch}", "side": worker.side}
        if timing is None:
            rows.append(row | {"failed": worker.failed})
            continue
        seconds = 1e-3 * timing.p50_ms
        rows.append(
            row
            | {
                "images_per_s": options.batch / seconds,
                "mfu": None if peak is None else flops / seconds / peak,
                **worker.memory,
                "ours_over": None if own is None or worker.side == base else ratio(timing, own),
                "timing": asdict(timing),
            }
        )
    return rows


def print_rows(rows: Sequence[dict[str, Any]], base: str = OURS) -> None:
    """For people."""
    for row in rows:
        if "failed" in row:
            print(f"{row['side']:13} not measured: {row['failed']}")
            continue
        timing, over = row["timing"], row["ours_over"]
        spread = f"{milliseconds(timing['p20_ms'])}-{milliseconds(timing['p80_ms'])}"
        text = f"{row['side']:13} {row['images_per_s']:9,.1f} images/s  {timing['p50_ms']:9.1f} ms ({spread})"
        text += "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
        text += "" if row["peak_bytes"] is None else f"  {row['peak_bytes'] / 1e9:.1f} GB"
        text += "" if over is None else f"  {base} {over['median']:.2f}x ({over['low']:.2f}-{over['high']:.2f})"
        print(text)


def head() -> dict[str, Any]:
    """What a result says about all of its rows."""
    device = torch.device(default_device())
    where = environment() | {"precision": resolve_precision("auto", device).name}
    return {"op": "train_step", "environment": where}


def default_sides(compare: str, model: str) -> list[str]:
    """Of a comparison with others, or of our compiled step with itself changed; the first of these is the base."""
    if compare == OTHERS:
        return list(DEFAULT_SIDES)
    return [COMPILED, *(replaced_sides(model) if compare == KERNELS else [OPTIONS[compare]])]


def missing(args: argparse.Namespace) -> list[str]:
    """What a run with these options lacks of a full one."""
    lacking = [f"side {side}" for side in default_sides(args.compare, args.model) if side not in args.sides]
    if args.compile != DEFAULT_COMPILE:
        lacking.append(f"compile {DEFAULT_COMPILE}")
    for name, wanted in (("blocks", DEFAULT_BLOCKS), ("steps", DEFAULT_STEPS)):
        if getattr(args, name) < wanted:
            lacking.append(f"{wanted - getattr(args, name)} of {wanted} {name}")
    return lacking


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--work"]:
        answers, sys.stdout = sys.stdout, sys.stderr  # their code may print
        work(arguments[1], StepOptions(**json.loads(arguments[2])), sys.stdin, answers)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="dit_b2", choices=list(presets.MODELS), metavar="PRESET")
    parser.add_argument("--batch", type=at_least(1), default=128, help="images per step")
    parser.add_argument(
        "--compare", default=OTHERS, choices=[OTHERS, KERNELS, *OPTIONS], help="what with what; see above (%(default)s)"
    )
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), help="by default those of --compare")
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PATH", help="a checkout of their repository, measured as well")
    parser.add_argument(
        "--compile",
        default=DEFAULT_COMPILE,
        choices=["block", "full", "max-autotune"],
        help="of ours_compile and what is compared with it; see erdfast.train (%(default)s)",
    )
    parser.add_argument("--blocks", type=at_least(1), default=DEFAULT_BLOCKS, help="turns of each side")
    parser.add_argument("--steps", type=at_least(1), default=DEFAULT_STEPS, help="counted steps of a block")
    parser.add_argument("--warmup", type=at_least(0), default=5, help="steps before the first block")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--overwrite", action="store_true", help="let this run replace a full one whatever it lacks")
    parser.add_argument("--no-save", dest="save", action="store_false", help="print only")
    args = parser.parse_args(arguments)
    paths = {name: getattr(args, name) for name in PEERS if getattr(args, name)}
    options = StepOptions(model=args.model, batch=args.batch, compile=args.compile, paths=paths)
    base, name = (OURS, "") if args.compare == OTHERS else (COMPILED, f"_{args.compare}")
    if name and paths:
        given = ", ".join(f"--{peer}" for peer in paths)
        parser.error(f"--compare {args.compare} is about our own step: leave out {given}")
    args.sides = list(dict.fromkeys(args.sides or default_sides(args.compare, args.model)))
    if name and base not in args.sides:
        parser.error(f"--compare {args.compare} compares with {base}: name it among --sides")
    sides = [*args.sides, *paths]
    path = args.results / device_name() / f"train_step_{args.model}_{args.batch}{name}.json"
    try:
        file = ResultFile(path, missing=missing(args), overwrite=args.overwrite) if args.save else None
    except ValueError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    described = head() | {"base": base, "compile": args.compile}
    turns = measure(sides, options, blocks=args.blocks, steps=args.steps, warmup=args.warmup)
    for turn, workers in enumerate(turns, start=1):
        rows = make_rows(workers, options, base)
        lost = [row["side"] for row in rows if "failed" in row and row["side"] in SIDES]
        if file is not None:  # as they come: the time of a machine may run out
            file.write(described, rows, finished=turn == args.blocks and not lost)
    print_rows(rows, base)
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
