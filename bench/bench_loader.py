"""Reading shuffled batches of VAE moments, 8x32x32 numbers a sample, from files in the page cache: samples a second.

    python -m bench.bench_loader
    python -m bench.bench_loader --rows 100000 --folder /data/scratch

Random data are written at the start, in the format of each side, below a temporary folder (20,000 rows: 1.3 GB). The
sides take turns in one process, each beginning with the next; a turn is some batches from a standing start, so that no
side profits from what it has read ahead while another was timed. A side is a median over turns. See
bench/loader_sides.py for what each side does. The goals are 100,000 samples a second on two cores, and twenty times
what reading HDF5 as ERD's code does gives. Written to bench/results/<device>/loader.json.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.device import device_name, environment
from bench.harness import RESULTS
from bench.loader_sides import SAMPLE_VALUES, SIDES, LoadOptions, Side, write_data
from bench.options import at_least
from bench.store import ResultFile, help_text, one_line
from bench.timing import ratio, summarize

OP = "loader"
OURS, ERD = "loader", "hdf5"
DEFAULT_ROWS, DEFAULT_ROUNDS, DEFAULT_BATCH = 20_000, 15, 256
BATCHES, SLOW_BATCHES = 64, 8
"""Of a turn: about 0.1 s of ours, and 0.3 to 1 s of the others."""
WARMUP = 2
"""Turns that are not counted: they start the workers and bring files into the page cache."""
QUICK_ROWS, QUICK_BATCH = 64, 8
GOAL_SAMPLES_PER_S, GOAL_OVER_ERD = 100_000, 20

Times = dict[str, list[float]]
"""Milliseconds a batch in each turn, by side."""


def time_turn(side: Side, number: int) -> float:
    """Milliseconds a batch, over one turn."""
    start = time.perf_counter()
    deque(side.turn(number), maxlen=0)
    return 1e3 * (time.perf_counter() - start) / side.batches


def measure(sides: Mapping[str, Side], rounds: int, warmup: int = WARMUP) -> Iterator[Times]:
    """Turns in a circle, beginning with another side each time; gives all that there is after each round."""
    times: Times = {name: [] for name in sides}
    names = list(sides)
    for number in range(warmup + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            ms = time_turn(sides[name], number)
            if number >= warmup:
                times[name].append(ms)
        if number >= warmup:
            yield times


def build(names: Sequence[str], options: LoadOptions) -> tuple[dict[str, Side], dict[str, str]]:
    """Sides, and why some cannot be had."""
    sides: dict[str, Side] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            sides[name] = SIDES[name](options)
        except Exception as error:
            failed[name] = one_line(error)
    return sides, failed


def make_rows(
    sides: Mapping[str, Side], times: Times, failed: Mapping[str, str], batch: int, workers: int
) -> list[dict[str, Any]]:
    """One row per side."""
    timings = {name: summarize(values) for name, values in times.items()}
    own = timings.get(OURS)
    rows: list[dict[str, Any]] = []
    for name, timing in timings.items():
        rate = batch / (1e-3 * timing.p50_ms)
        rows.append(
            {
                "case": f"batch {batch} of 8x32x32",
                "side": name,
                "samples_per_s": rate,
                "samples_per_s_p20": batch / (1e-3 * timing.p80_ms),
                "samples_per_s_p80": batch / (1e-3 * timing.p20_ms),
                "bytes_per_s": rate * SAMPLE_VALUES * sides[name].value_bytes,
                "workers": {OURS: 1, "gather": 0}.get(name, workers),
                "ours_over": None if own is None or name == OURS else ratio(timing, own),
                "timing": asdict(timing),
            }
        )
    return rows + [{"case": f"batch {batch} of 8x32x32", "side": name, "failed": why} for name, why in failed.items()]


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """For people."""
    for row in rows:
        if "failed" in row:
            print(f"{row['side']:12} not measured: {row['failed']}")
            continue
        spread = f"{row['samples_per_s_p20']:,.0f}-{row['samples_per_s_p80']:,.0f}"
        text = (
            f"{row['side']:12} {row['samples_per_s']:9,.0f} samples/s ({spread})  {row['bytes_per_s'] / 1e9:.2f} GB/s"
        )
        if over := row["ours_over"]:
            text += f"  {OURS} {over['median']:.1f}x ({over['low']:.1f}-{over['high']:.1f})"
        print(text)


def goals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for each goal that these rows can tell about."""
    by_side = {row["side"]: row for row in rows if "failed" not in row}
    lines = []
    if OURS in by_side:
        rate = by_side[OURS]["samples_per_s"]
        verdict = "met" if rate >= GOAL_SAMPLES_PER_S else "MISSED"
        lines.append(f"goal, at least {GOAL_SAMPLES_PER_S:,} samples/s: {rate:,.0f}, {verdict}")
    if OURS in by_side and ERD in by_side:
        over = by_side[ERD]["ours_over"]["median"]
        verdict = "met" if over >= GOAL_OVER_ERD else "MISSED"
        lines.append(f"goal, at least {GOAL_OVER_ERD}x HDF5 opened per sample: {over:.1f}x, {verdict}")
    return lines


def head(args: argparse.Namespace) -> dict[str, Any]:
    """What a result says about all of its rows."""
    where = environment() | {name: _version(name) for name in ("h5py", "safetensors")}
    where |= {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
    return {"op": "loader", "environment": where, "rows_of_data": args.rows, "batch": args.batch}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing(args: argparse.Namespace) -> list[str]:
    """What a run with these options lacks of a full one."""
    lacking = [f"side {side}" for side in SIDES if side not in args.sides]
    for name, wanted in (("rounds", DEFAULT_ROUNDS), ("rows", DEFAULT_ROWS)):
        if getattr(args, name) < wanted:
            lacking.append(f"{wanted - getattr(args, name)} of {wanted} {name}")
    if args.batch != DEFAULT_BATCH:
        lacking.append(f"batch {DEFAULT_BATCH}")
    return lacking


def run(args: argparse.Namespace, file: ResultFile | None) -> list[dict[str, Any]]:
    """Write the data, measure, save as rounds come in."""
    described = head(args)
    slow = min(SLOW_BATCHES, max(1, args.rows // args.batch))
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="erdfast-loader-") as name:
        write_data(Path(name), args.rows)
        options = LoadOptions(
            folder=Path(name),
            rows=args.rows,
            batch=args.batch,
            workers=args.workers,
            batches=slow if args.quick else BATCHES,
            slow_batches=slow,
        )
        sides, failed = build(args.sides, options)
        rows: list[dict[str, Any]] = []
        try:
            for times in measure(sides, args.rounds):
                rows = make_rows(sides, times, failed, args.batch, args.workers)
                if file is not None:  # as they come: a run may be cut short
                    file.write(described, rows, finished=False)
        finally:
            for side in sides.values():
                side.close()
    if file is not None and rows:
        print(f"written: {file.write(described, rows, finished=not failed)}")
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=at_least(1), default=DEFAULT_ROWS, help="samples that are written")
    parser.add_argument("--folder", type=Path, help="where the temporary folder is made; by default as TMPDIR says")
    parser.add_argument("--batch", type=at_least(1), default=DEFAULT_BATCH)
    parser.add_argument("--workers", type=at_least(0), default=2, help="processes of each DataLoader")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--rounds", type=at_least(1), default=DEFAULT_ROUNDS, help="counted turns of each side")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--overwrite", action="store_true", help="let this run replace a full one whatever it lacks")
    parser.add_argument("--no-save", dest="save", action="store_false", help="print only")
    parser.add_argument("--quick", action="store_true", help="few rows and one turn: does it run? not saved")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.batch, args.rounds, args.save = QUICK_ROWS, QUICK_BATCH, 1, False
    if args.batch > args.rows:
        parser.error(f"--batch: {args.batch} samples are more than the {args.rows} of --rows")
    args.file = None
    if args.save:
        path = args.results / device_name() / f"{OP}.json"
        try:
            args.file = ResultFile(path, missing=missing(args), overwrite=args.overwrite)
        except ValueError as error:
            parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, save. Exits with 1 if a side could not be measured."""
    args = parse(argv)
    rows = run(args, args.file)
    if args.quick:
        print(f"ran: {', '.join(row['side'] for row in rows if 'failed' not in row)}")
    else:
        print_rows(rows)
        print("\n".join(goals(rows)))
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
