"""Renders tables from the committed results, and from nothing else: `python -m bench.report`.

- README.md: what lies between the lines `<!-- bench:OP:DEVICE -->` and `<!-- /bench -->` becomes the table of
  bench/results/DEVICE/OP.json. With `<!-- bench:OP:DEVICE:WORDS -->` only rows whose case and pass contain every word.
  OP step_model: what bench/step_model.py predicts from all results of the device.
- bench/results/DEVICE/README.md: all tables of a device; budget.md beside it: the budget of training steps.
- bench/results/README.md: what the compiler says about the Triton kernels (bench/results/aot.json).

A result that is missing or damaged, or a marker that is none, ends it with one line and code 2; nothing is written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.budget_page import budget_page
from bench.harness import ALONE, NOT_COMPILED, RESULTS
from bench.step_model import table as step_model_table
from bench.store import PARTIAL
from erdfast.atomic import write_text

README = Path(__file__).parent.parent / "README.md"
OPENING = re.compile(r"<!-- bench:(\w+):([\w.-]+)(?::([^>]*?))? -->")
CLOSING = "<!-- /bench -->"
MEANT = re.compile(r"<!--\s*/?\s*bench\b")
"""What looks like one of the two must be one."""
PASS_NAMES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
COMPILED, EAGER = "compile", "eager"

LACKING = " Not a full run: dtypes, cases, sides or rounds are missing."

Row = Mapping[str, Any]


class ReportError(ValueError):
    """A result or marker that cannot be rendered; the message is for whoever has to mend it."""


# ---------------------------------------------------------------------------- results of the harness


def op_table(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Rows of one op: time, share of the ceiling, ratios, memory; a column that no row fills is left out."""
    rows = [row for row in result["rows"] if all(word in f"{row['case']} {row['pass']}".split() for word in words)]
    if not rows:
        raise ReportError(f"no row of {result['op']} has all of: {' '.join(words)}")
    sides = list(dict.fromkeys(side for row in rows for side in row["over"]))
    sides.sort(key=lambda side: (side != EAGER, side != COMPILED))  # these two first, the rest as they come
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row["case"],
        "pass": lambda row: PASS_NAMES[row["pass"]],
        "ms": lambda row: milliseconds(row["timings"][0]["fused"]["p50_ms"]),
        "ms alone": lambda row: alone(row["timings"][0]),
        "of ceiling": lambda row: "" if row["share"] is None else f"{row['share']:.0%}",
    }
    for side in sides:
        columns[f"over {_side(side)}"] = lambda row, side=side: spread(row["over"].get(side))
    columns["peak memory"] = lambda row: memory(row.get("peak_bytes"))
    columns["kept for backward"] = lambda row: memory(row.get("kept_bytes"))
    columns["back end"] = lambda row: NOT_COMPILED.get(row.get("backend", ""), "")
    return table(columns, rows) + "\n\n" + footnote(result, rows)


def table(columns: Mapping[str, Callable[[Row], str]], rows: Sequence[Row]) -> str:
    """Markdown, without the columns that are empty in every row."""
    cells = {title: [cell(row) for row in rows] for title, cell in columns.items()}
    cells = {title: values for title, values in cells.items() if any(values)}
    lines = [[*cells], ["---"] * len(cells), *zip(*cells.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def footnote(result: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What was measured where, by what, and what readers of these rows must know."""
    where, ceilings = result["environment"], result["ceilings"]
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "driver") if where.get(name)]
    rates = [f"copies {ceilings['copy_bytes_per_s'] / 1e9:,.0f} GB/s"]
    rates += [f"{name} products {flops / 1e12:,.3g} TFLOP/s" for name, flops in ceilings["matmul_flops_per_s"].items()]
    rounds = rows[0]["timings"][0]["fused"]["rounds"]
    remarks = [
        f"{where['device']} ({', '.join(rates)}), {', '.join(versions)}, {where['date']}, commit `{where['commit']}`; "
        f"medians of {rounds} interleaved rounds, in brackets the ratios of opposite 20% and 80% quantiles."
    ]
    if any(ALONE in row["timings"][0] for row in rows):
        remarks.append("Alone: the fused side in rounds without the others.")
    above = [row for row in rows if row["share"] is not None and round(100 * row["share"]) > 100]
    if any(not row.get("flops") for row in above):
        remarks.append(
            "More than 100% of the ceiling: the data of a small case comes in part from the caches, and a large copy, "
            "which is the ceiling, also fetches the lines that it overwrites; what updates in place does not."
        )
    if any(row.get("flops") for row in above):
        remarks.append(
            "More than 100% of the ceiling with matrix products: the ceiling is one large square product, or a copy of "
            "arrays far larger than the caches, and this size runs faster than those."
        )
    if any(row.get("backend") in NOT_COMPILED for row in rows):
        remarks.append("Where a back end is named, both sides are PyTorch's code: no result of a kernel of ours.")
    return " ".join(remarks) + ("" if result.get("complete", True) else LACKING) + "\n"


def alone(timings: Mapping[str, Any]) -> str:
    """Milliseconds of the fused side without neighbours; empty in results that lack it."""
    return milliseconds(timings[ALONE]["p50_ms"]) if ALONE in timings else ""


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
    rows = _chosen(result, words)
    columns: dict[str, Callable[[Row], str]] = {
        "step": lambda row: row["case"],
        "side": lambda row: row["side"],
        "images/s": lambda row: f"{row['images_per_s']:,.0f}",
        "ms": lambda row: milliseconds(row["timing"]["p50_ms"]),
        "MFU": lambda row: "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        "peak memory": lambda row: "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:,.1f} GB",
        "reserved": lambda row: f"{reserved / 1e9:,.1f} GB" if (reserved := row.get("reserved_bytes")) else "",
        f"speed of {result.get('base', 'ours')}": lambda row: spread(row["ours_over"]),
    }
    where = result["environment"]
    versions = [f"{name} {where[name]}" for name in ("torch", "triton", "driver") if where.get(name)]
    lines = [
        table(columns, rows),
        "",
        f"{where['device']}, {', '.join(versions)}, {where['date']}, commit `{where['commit']}`; medians over blocks "
        "of steps, interleaved; MFU against the data sheet's dense bf16 peak."
        + ("" if result.get("complete", True) else LACKING),
    ]
    return "\n".join(lines) + "\n"


def loader_table(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Rows of bench_loader: one per way of reading."""
    rows = _chosen(result, words)
    columns: dict[str, Callable[[Row], str]] = {
        "side": lambda row: row["side"],
        "samples/s": lambda row: f"{row['samples_per_s']:,.0f}",
        "20%-80%": lambda row: f"{row['samples_per_s_p20']:,.0f}-{row['samples_per_s_p80']:,.0f}",
        "GB/s": lambda row: f"{row['bytes_per_s'] / 1e9:.2g}",
        "workers": lambda row: str(row["workers"]),
        "speed of loader": lambda row: spread(row["ours_over"]),
    }
    where = result["environment"]
    versions = [f"{name} {where[name]}" for name in ("torch", "h5py", "safetensors") if where.get(name)]
    lines = [
        table(columns, rows),
        "",
        f"{where['device']} ({where['processor'] or 'unknown'}), {where['cores']} cores, load {where['load_before']:g} "
        f"before, {', '.join(versions)}, "
        f"{where['date']}, commit `{where['commit']}`; {result['batch']} samples a batch, shuffled, of "
        f"{result['rows_of_data']:,} in the page cache; medians of {rows[0]['timing']['rounds']} interleaved turns. "
        "bench/loader_sides.py says what each side does." + ("" if result.get("complete", True) else LACKING),
    ]
    return "\n".join(lines) + "\n"


def profile_table(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Rows of profile_step: where the time of a step goes, by class of kernel."""
    parts = []
    for row in result["rows"]:
        entries = [{"class": name, "ms": ms, "share": ms / row["ms"]} for name, ms in row["classes"].items()]
        columns: dict[str, Callable[[Row], str]] = {
            f"{row['case']}, {row['side']}": lambda entry: entry["class"],
            "ms": lambda entry: milliseconds(entry["ms"]),
            "share": lambda entry: f"{entry['share']:.1%}",
        }
        waits = "" if row["host_waits"] is None else f", {len(row['host_waits'])} waits of the host"
        parts += [table(columns, entries), "", f"{milliseconds(row['ms'])} ms, {row['launches']:.0f} launches{waits}."]
    where = result["environment"]
    return "\n".join([*parts, "", f"{where['device']}, torch {where['torch']}, {where['date']}."]) + "\n"


def accuracy_table(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """Rows of step_accuracy: what a step's options do to its loss and gradients."""
    rows = _chosen(result, words)
    columns: dict[str, Callable[[Row], str]] = {
        "step": lambda row: row["case"],
        "side": lambda row: row["side"],
        "precision": lambda row: row["precision"],
        "loss": lambda row: f"{row['loss']:.5f}",
        "its error": lambda row: f"{row['loss_error']:+.1e}" if row["gradient_error"] else "",
        "gradient's error": lambda row: f"{row['gradient_error']:.1e}" if row["gradient_error"] else "",
        "worst parameter": lambda row: f"{row['worst']} {row['worst_error']:.1e}" if row["gradient_error"] else "",
    }
    where = result["environment"]
    text = f"{where['device']}, torch {where['torch']}, {where['date']}, commit `{where['commit']}`; compile "
    text += f"{result['compile']}; see bench/step_accuracy.py." + ("" if result.get("complete", True) else LACKING)
    return f"{table(columns, rows)}\n\n{text}\n"


def _chosen(result: Mapping[str, Any], words: Sequence[str]) -> list[Row]:
    """Rows that were measured and whose case and side have all words."""
    measured = [row for row in result["rows"] if "failed" not in row]
    rows = [row for row in measured if all(word in f"{row['case']} {row['side']}".split() for word in words)]
    if not rows:
        raise ReportError(f"no row of {result['op']} has all of: {' '.join(words)}")
    return rows


TABLES: dict[str, Callable[[Mapping[str, Any], Sequence[str]], str]] = {
    "train_step": train_step_table,
    "profile_step": profile_table,
    "step_accuracy": accuracy_table,
    "loader": loader_table,
}
"""Results that are not rows of the harness."""


def render_result(result: Mapping[str, Any], words: Sequence[str] = ()) -> str:
    """The table of one result file."""
    return TABLES.get(result["op"], op_table)(result, words)


def load(path: Path) -> dict[str, Any]:
    """A result file; files without rows are no results of benchmarks.

    Raises:
        ReportError: it is missing or damaged.
    """
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise ReportError(f"{_shown(path)} is missing; {_remedy(path)}") from None
    except (OSError, ValueError) as error:
        raise ReportError(f"{_shown(path)} is damaged ({error}); {_remedy(path)}") from None
    if not isinstance(result, dict):
        raise ReportError(f"{_shown(path)} is damaged (no object); {_remedy(path)}")
    return result


def render_file(path: Path, words: Sequence[str] = ()) -> str:
    """The table of one result file.

    Raises:
        ReportError: it is missing or damaged, or no row has the words.
    """
    result = load(path)
    try:
        return render_result(result, words)
    except ReportError as error:
        raise ReportError(f"{_shown(path)}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ReportError(f"{_shown(path)} is no result of a benchmark ({reason}); {_remedy(path)}") from error


def _shown(path: Path) -> str:
    return f"bench/results/{path.relative_to(RESULTS)}"


def _remedy(path: Path) -> str:
    """What writes a result."""
    if path.stem == "aot":
        return "`python -m bench.aot --save` writes it"
    if path.stem.startswith("accuracy"):
        return "`python -m bench.step_accuracy` writes it"
    if path.stem.startswith("profile"):
        return "`python -m bench.profile_step` writes it"
    op = "train_step" if path.stem.startswith("train_step") else path.stem
    return f"`python -m bench.bench_{op}` writes it"


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
        "What ptxas says about a sample of the variants that launches ask for (bench/variants: the presets' sizes, the",
        "dtypes and odd sizes), without a GPU (`python -m bench.aot --save`, rendered by `python -m bench.report`;",
        "aot.json has each variant). Registers, shared memory and threads bound the programs that an SM holds and so",
        "the share of its warps; ranges are over these variants.",
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
    """README with all marked tables made anew.

    Raises:
        ReportError: a marker that is none, has no end, or whose result cannot be rendered; the message has its text.
    """
    lines: list[str] = []
    opened: str | None = None
    for line in text.splitlines(keepends=True):
        marker = line.strip()
        if not MEANT.search(line):
            if opened is None:
                lines.append(line)
            continue
        match = OPENING.fullmatch(marker)
        if opened is None and match is not None:
            op, device, words = match.groups()
            try:
                filled = _filling(op, RESULTS / device, (words or "").split())
            except ValueError as error:
                raise ReportError(f"README.md, {marker}: {error}") from error
            lines += [line, filled]
            opened = marker
        elif opened is not None and marker == CLOSING:
            lines.append(line)
            opened = None
        elif opened is not None:
            raise ReportError(f"README.md, {opened}: there must be a line {CLOSING} before {marker}")
        else:
            raise ReportError(
                f"README.md, {marker}: a marker is a line <!-- bench:OP:DEVICE --> or, with words that "
                f"choose rows, <!-- bench:OP:DEVICE:WORDS -->, and {CLOSING} ends what it has opened"
            )
    if opened is not None:
        raise ReportError(f"README.md, {opened}: there is no line {CLOSING} after it")
    return "".join(lines)


def _filling(op: str, folder: Path, words: Sequence[str]) -> str:
    """What a marker asks for."""
    return step_model_table(folder) if op == "step_model" else render_file(folder / f"{op}.json", words)


def device_page(folder: Path) -> str | None:
    """All results of one device; None if it has none."""
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.endswith(PARTIAL)]
    tables = {path.stem: render_file(path) for path in paths if "rows" in load(path)}
    if not tables:
        return None
    parts = [f"# Measured on {folder.name}\n\nRendered by `python -m bench.report` from the JSON files beside it.\n"]
    parts += [f"## {name}\n\n{text}" for name, text in tables.items()]
    return "\n".join(parts)


def pages() -> Iterator[tuple[Path, str]]:
    """Every file that is rendered, with what it should say."""
    yield README, render(README.read_text())
    for folder in sorted(path for path in RESULTS.iterdir() if path.is_dir()):
        if (page := device_page(folder)) is not None:
            yield folder / "README.md", page
        try:
            budget = budget_page(folder)
        except ValueError as error:
            raise ReportError(f"bench/results/{error}") from error
        if budget is not None:
            yield folder / "budget.md", budget
    if (RESULTS / "aot.json").exists():
        yield RESULTS / "README.md", aot_page(load(RESULTS / "aot.json"))


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite them, all or none."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    try:
        rendered = list(pages())
    except ReportError as error:
        print(f"bench.report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    for path, text in rendered:
        write_text(path, text)
        print(f"written: {path.relative_to(README.parent)}")


if __name__ == "__main__":
    main()
