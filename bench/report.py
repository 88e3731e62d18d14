"""Renders the tables of README.md from the committed results, and from nothing else.

`python -m bench.report` rewrites what lies between `<!-- bench:OP:DEVICE -->` and `<!-- /bench -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.harness import RESULTS

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- bench:(\w+):(\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)

WORK_NAMES = {
    "add_noise": "`add_noise`",
    "loss": "noise, loss and gradient",
    "both": "both: all around the network",
}


def diffusion_loss(results: dict[str, Any]) -> str:
    """The table of bench_diffusion_loss."""
    environment = results["environment"]
    lines = [
        "| work | shape | dtype | noise | million elements/s | share of copy rate | over eager | over torch.compile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["results"]:
        share = row["fused_gb_per_s"] / row["copy_gb_per_s"]
        lines.append(
            f"| {WORK_NAMES[row['work']]} | {'x'.join(map(str, row['shape']))} | {row['dtype']} | {row['noise']} "
            f"| {row['fused_million_elements_per_s']:,.0f} | {share:.0%} "
            f"| {spread(row['over_eager'])} | {spread(row['over_compile'])} |"
        )
    rounds = results["results"][0]["timings"]["beside_eager"]["fused"]["rounds"]
    lines += [
        "",
        f"{environment['device']}, torch {environment['torch']}, {environment['date']}, "
        f"commit `{environment['commit']}`; "
        f"medians of {rounds} interleaved rounds, in brackets the ratios of opposite 20% and 80% quantiles.",
    ]
    return "\n".join(lines) + "\n"


def spread(ratio: dict[str, float]) -> str:
    """ "7.2x (6.8-7.9)" """
    return f"{ratio['median']:.1f}x ({ratio['low']:.1f}-{ratio['high']:.1f})"


TABLES = {"diffusion_loss": diffusion_loss}


def render(text: str) -> str:
    """README with all marked tables made anew."""

    def table(match: re.Match[str]) -> str:
        path = RESULTS / match[3] / f"{match[2]}.json"
        return match[1] + TABLES[match[2]](json.loads(path.read_text())) + match[4]

    return MARKED.sub(table, text)


def main() -> None:
    """Rewrite README.md."""
    README.write_text(render(README.read_text()))
    print(f"written: {README.name}")


if __name__ == "__main__":
    main()
