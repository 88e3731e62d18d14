"""Renders tables from the committed results, and from nothing else: `python -m bench.report`.

- README.md: what lies between `<!-- bench:OP:DEVICE -->` and `<!-- /bench -->` becomes the table of
  bench/results/DEVICE/OP.json. With `<!-- bench:OP:DEVICE:WORDS -->` only rows whose case and pass contain every word.
- bench/results/DEVICE/README.md: all tables of a device.
- bench/results/README.md: what the compiler says about the Triton kernels (bench/results/aot.json).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness import RESULTS

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- bench:(\w+):(\w+)(?::([^>]*?))? -->\n).*?(<!-- /bench -->)", re.DOTALL)
PASS_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
COMPILED, EAGER = "compile", "eager"

Row = Mapping[str, Any]


# ---------------------------------------------------------------------------- results of the harness


def op_table(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Rows of one op: time, share of the ceiling, ratios, memory; a column that no row fills is left out."""
    rows = [row for row in result["rows"] if all(word in f"{row['case']} {row['pass']}".split() for word in words)]
    if not rows:
        raise ValueError(f"no row of {result['op']} has all of: {' '.join(words)}")
    sides = list(dict.fromkeys(side for row in rows for side in row["over"]))
    sides.sort(key=lambda side: (side != EAGER, side != COMPILED))  # these two first, the rest as they come
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "pass": lambda row: PASS_NAMES[row["pass"]],
        "ms": lambda row: milliseconds(row["timings"][0]["fused"]["p50_ms"]),
        "of ceiling": lambda row: f"{row['share']:.0%}",
    }
    for side in sides:
        columns[f"over {_side(side)}"] = lambda row, side=side: spread(row["over"].get(side))
    columns["peak memory"] = lambda row: memory(row.get("peak_bytes"))
    columns["kept for backward"] = lambda row: memory(row.get("kept_bytes"))
    return table(columns, rows) + "\n\n" + footnote(result)


def table(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """Markdown, without the columns that are empty in every row."""
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    cells = {title: values for title, values in cells.items() if any(values)}
    lines = [[*cells], ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(result: Mapping[str, Any]) -> str:
    """What was measured where, by what."""
    where, ceilings = result["environment"], result["ceilings"]
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "driver") if where.get(name)]
    rates = [f"copies {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s"]
    rates += [f"{name} products {flops / 1e12:,.3g} TFLOP/s" for name, flops in ceilings["matmul_flops_per_s"].items()]
    rounds = result["rows"][0]["timings"][0]["fused"]["rounds"]
    partial = "" if result.get("complete", True) else " The run was cut short."
    return (
        f"{where['device']} ({', '.join(rates)}), {', '.join(versions)}, {where['date']}, commit `{where['commit']}`; "
        f"medians of {rounds} interleaved rounds, in brackets the ratios of opposite 20% and 80% quantiles.{partial}\n"
    )


def spread(ratio: Mapping[str, float] | None) -> str:
    """ "7.2x (6.8-7.9)"; empty if there is none."""
    return "" if ratio is None else f"{ratio['median']:.1f}x ({ratio['low']:.1f}-{ratio['high']:.1f})"


def milliseconds(value: float) -> str:
    """Three digits: 0.0123, 4.56, 789."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def memory(sides: Mapping[str, int] | None) -> str:
    """ "12.0 MB (eager 48.0)" """
    if not sides or "fused" not in sides:
        return ""
    eager = f" (eager {sides[EAGER] / 1e6:,.1f})" if EAGER in sides else ""
    return f"{sides['fused'] / 1e6:,.1f} MB{eager}"


def _side(side: str) -> str:
    return "torch.compile" if side == COMPILED else side


# ---------------------------------------------------------------------------- whole training steps


def train_step_table(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Rows of bench_train_step: one per network, batch and side."""
    measured = [row for row in result["rows"] if "failed" not in row]
    rows = [row for row in measured if all(word in f"{row['case']} {row['side']}".split() for word in words)]
    if not rows:
        raise ValueError(f"no row of {result['op']} has all of: {' '.join(words)}")
    columns: dict[str, Callable[[Row], str]] = {
        "step": lambda row: row["case"],
        "side": lambda row: row["side"],
        "images/s": lambda row: f"{row['images_per_s']:,.0f}",
        "ms": lambda row: milliseconds(row["timing"]["p50_ms"]),
        "MFU": lambda row: "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "peak memory": lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:,.1f} GB",
        "speed of ours": lambda row: spread(row["ours_over"]),
    }
    where = result["environment"]
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "driver") if where.get(name)]
    lines = [
        table(columns, rows),
        "",
        f"{where['device']}, {', '.join(versions)}, {where['date']}, commit `{where['commit']}`; medians over blocks "
        "of steps, interleaved; MFU against the data sheet's dense bf16 peak.",
    ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[Mapping[str, Any], Sequence[str]], str]] = {"train_step": train_step_table}
"""Results that are not rows of the harness."""


def render_result(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """The table of one result file."""
    return TABLES.get(result["op"], op_table)(result, words)


def load(path: Path) -> dict[str, Any]:
    """A result file; files without rows are no results of benchmarks."""
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------- what the compiler says


def aot_page(result: Mapping[str, Any]) -> str:
    """bench/results/README.md: one line per kernel and architecture; a range is over its variants."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in result["rows"]:
        groups.setdefault((row["kernel"], row["cc"]), []).append(row)
    columns: dict[str, Callable[[Row], str]] = {
        "kernel": lambda group: f"`{group['key'][0]}`",
        "sm": lambda group: str(group["key"][1]),
        "variants": lambda group: str(len(group["rows"])),
        "registers": lambda group: between(group["rows"], "registers"),
        "spilled bytes": lambda group: between(group["rows"], "spill_bytes"),
        "shared memory": lambda group: between(group["rows"], "shared_bytes"),
        "programs per SM": lambda group: between(group["rows"], "programs_per_sm"),
        "share of warps": lambda group: between(group["rows"], "warp_share", "{:.0%}"),
    }
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "What ptxas says about every variant that a launch may ask for, without a GPU (`python -m bench.aot --save`,",
        "rendered by `python -m bench.report`; aot.json has each variant). Registers, shared memory and threads bound",
        "the programs that an SM holds and so the share of its warps; ranges are over the variants.",
        "",
        table(columns, [{"key": key, "rows": rows} for key, rows in groups.items()]),
        "",
        f"triton {result['triton']}.",
    ]
    return "\n".join(lines) + "\n"


def between(rows: Sequence[Row], name: str, form: str = "{:,}") -> str:
    """ "32-86", or one number."""
    low, high = (form.format(pick(row[name] for row in rows)) for pick in (min, max))
    return low if low == high else f"{low}-{high}"


# ---------------------------------------------------------------------------- pages


def render(text: str) -> str:
    """README with all marked tables made anew."""

    def fill(match: re.Match[str]) -> str:
        opening, op, device, words, closing = match.groups()
        return opening + render_result(load(RESULTS / device / f"{op}.json"), (words or "").split()) + closing

    return MARKED.sub(fill, text)


def device_page(folder: Path) -> str | None:
    """All results of one device; None if it has none."""
    results = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
    results = {name: result for name, result in results.items() if "rows" in result}
    if not results:
        return None
    parts = [f"# Measured on {folder.name}\n\nRendered by `python -m bench.report` from the JSON files beside it.\n"]
    parts += [f"## {name}\n\n{render_result(result)}" for name, result in results.items()]
    return "\n".join(parts)


def pages() -> Iterator[tuple[Path, str]]:
    """Every file that is rendered, with what it should say."""
    yield README, render(README.read_text())
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if (page := device_page(folder)) is not None:
            yield folder / "README.md", page
    if (RESULTS / "aot.json").exists():
        yield RESULTS / "README.md", aot_page(load(RESULTS / "aot.json"))


def main() -> None:
    """Rewrite them."""
    for path, text in pages():
        path.write_text(text)
        print(f"written: {path.relative_to(README.parent)}")


if __name__ == "__main__":
    main()
