"""The weighting experiment's tables and its list of claims, from its results and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from erdfast.atomic import write_text
from erdfast.diagnostics.report import markdown_table
from erdfast.process import Process

from .weighting_cells import LOGSNRS, TARGETS, WEIGHTINGS
from .weighting_claims import claims
from .weighting_figures import draw_excess, draw_samples, draw_training, title_of
from .weighting_statistics import (
    BANDS,
    BASELINE,
    Ratio,
    Result,
    excess_in,
    final_excess,
    final_frechet,
    last,
    mean_and_spread,
    of_study,
    ratio,
    sample_value,
    select,
    studies,
)

EXPLAINED = """\
Every network is trained with AdamW at a constant rate and measured by its averaged weights; samples of a mixture are
drawn given the label, without guidance, by EDM's Heun sampler, those of digits with guidance 2 where they are
recognised. Noise levels: `cosine`, 1000 times. Excess: the mean squared distance from the best possible prediction
E[target | x_t, label], which is known, over the Bayes floor at that noise level: the same number whatever the space;
0.1 is a loss 10% above the least possible. Averages over noise levels are geometric, over log-SNR 8 to -8 (low noise:
above 2.5, high noise: below -2.5). Frechet distance: from the mixture's own mean and covariance, in the directions in
which modes differ and the length of the rest. Mode imbalance: total variation between the 40 modes' shares and equal
ones. Recognised: samples whose most likely class is the one asked for. (+-) is the standard deviation over seeds. A
ratio is the geometric mean of a weighting's number over that of `constant` with the same seed; in brackets one standard
deviation of the seeds around it. Frechet distances are of finite samples: perfect ones are not at 0 either, which draws
ratios near that to 1. Seeds are few: what differs by less than their spread is not told
apart.
"""
ALLOCATION = """\
Share of the weight, summed over the 1000 times of `cosine`, by log-SNR (beyond -8, a part of high noise, nothing is
measured). Effective times: (sum w)^2 / sum w^2 over 1000, the share of the samples that count; largest: weight over
mean weight. Adam takes no notice of a weight's scale, but it does of rare, large ones: where few times are effective,
gradients are noisy and steps after a large one are small, so that what is seen is no test of the allocation alone.
Rows of one target that are equal are the same weighting up to its scale; erd_sampled allocates like erd, and
erd_logsnr_sampled like erd_logsnr, both by drawing times instead.
"""


def write_report(results: dict[str, Any], out: Path) -> list[str]:
    """The figures and weighting.md beside results.json; returns the files' names.

    Raises:
        ImportError: matplotlib is missing.
    """
    cells = results["cells"]
    names = []
    mixtures = [cell for cell in cells if cell["data"] != "digits"]
    if mixtures:
        draw_excess(mixtures, out / "weighting_excess.png")
        names.append("weighting_excess.png")
    draw_samples(cells, out / "weighting_samples.png")
    draw_training(cells, out / "weighting_training.png")
    names += ["weighting_samples.png", "weighting_training.png"]
    write_text(out / "weighting.md", render(results, names))
    return [*names, "weighting.md"]


def render(results: dict[str, Any], figures: Sequence[str] = ()) -> str:
    """All tables as Markdown."""
    cells = results["cells"]
    where = results["environment"]
    parts = [
        "# What a loss weighting changes\n",
        f"`{where['command']}`: {len(cells)} of {results['planned']} trainings; summed up by "
        f"erdfast {where['erdfast']}, torch {where['torch']}, {where['device']}, {results['date']}, "
        f"commit `{where['commit']}`."
        + (f" Diverged, and left out: {', '.join(results['diverged'])}." if results.get("diverged") else "")
        + "\n",
        EXPLAINED,
        *(f"![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in figures),
        "## What the documents claim and what was seen\n",
        markdown_table([["claim", "from", "seen"], *claims(cells)]),
        "## Against no weighting\n",
        ratio_table(cells),
        "## Where the weight lies\n",
        ALLOCATION,
        allocation_table(),
    ]
    for study in studies(cells):
        own = of_study(cells, study)
        first = own[0]
        counts = {len(select(own, target=c["target"], weighting=c["weighting"])) for c in own}
        seeds = " to ".join(map(str, sorted({min(counts), max(counts)})))
        parts.append(f"## {title_of(study)}\n")
        parts.append(
            f"{first['steps']:,} steps of {first['batch']} samples, {seeds} seed{'' if seeds == '1' else 's'}, "
            f"{first['samples']} samples drawn.\n"
        )
        for target in TARGETS:
            chosen = select(own, target=target)
            if chosen:
                parts += [f"### {target}\n", study_table(chosen)]
    return "\n".join(parts)


def allocation_table() -> str:
    """Where each weighting puts its weight: from the process alone."""
    rows = [["target", "weighting", *(b for b in BANDS if b != "all"), "beyond -8", "effective times", "largest"]]
    for target in TARGETS:
        for name, options in WEIGHTINGS.items():
            if options.get("as_sampling"):
                continue
            process = Process("cosine", target, **options)
            t = torch.arange(process.schedule.num_timesteps or 0)
            weight = process.coefficients(t, dtype=torch.float64).w
            logsnr, total = process.logsnr(t).tolist(), float(weight.sum())
            inside = [[BANDS[band](at) for at in logsnr] for band in BANDS if band != "all"]
            masks = [*inside, [at < LOGSNRS[-1] for at in logsnr]]
            shares = [float(weight[torch.tensor(mask)].sum()) / total for mask in masks]
            effective = total**2 / float(weight.square().sum()) / len(t)
            largest = float(weight.max()) * len(t) / total
            rows.append([target, name, *(f"{x:.3f}" for x in [*shares, effective]), f"{largest:.3g}"])
    return markdown_table(rows)


def study_table(cells: Sequence[Result]) -> str:
    """One study and target: a row for each weighting."""
    mixture = cells[0]["data"] != "digits"
    columns = sample_columns(cells[0])
    bands = BANDS if mixture else {}
    rows = [["weighting", *(f"excess, {band}" for band in bands), *columns]]
    for weighting in WEIGHTINGS:
        own = [last(cell) for cell in select(cells, weighting=weighting)]
        if own:
            excess = [with_spread([excess_in(point, band) for point in own]) for band in bands]
            rows.append([weighting, *excess, *(with_spread([read(p) for p in own]) for read in columns.values())])
    perfect = [last(cell)["samples"]["perfect"] for cell in select(cells, weighting=cells[0]["weighting"])]
    if mixture:
        at_best = [with_spread([p[name] for p in perfect]) for name in ("frechet", "mode_imbalance", "recognised")]
        best = [*at_best[:1] * (len(columns) - 2), *at_best[1:]]
    else:
        best = [with_spread([p["frechet"] for p in perfect]), ""]
    rows.append(
        ["perfect samples" if mixture else "one half of the digits against the other", *["0"] * len(bands), *best]
    )
    return markdown_table(rows)


def sample_columns(cell: Result) -> dict[str, Callable[[Result], float]]:
    """Title and number of what is known of a study's samples."""
    steps = [name for name in last(cell)["samples"] if name != "perfect"]
    columns: dict[str, Callable[[Result], float]] = {
        f"Frechet, {name} steps": lambda point, name=name: sample_value(point, "frechet", name) for name in steps
    }
    if cell["data"] != "digits":
        columns["mode imbalance"] = lambda point: sample_value(point, "mode_imbalance", steps[-1])
    columns["recognised"] = lambda point: sample_value(point, "recognised", steps[-1])
    return columns


def ratio_table(cells: Sequence[Result]) -> str:
    """Excess and Frechet distance of every weighting over those of `constant`, by study and target."""
    others = [weighting for weighting in WEIGHTINGS if weighting != BASELINE]
    rows = [["study", "target", "of", *others]]
    for study in studies(cells):
        for target in TARGETS:
            own = select(of_study(cells, study), target=target)
            measures: dict[str, Callable[[Result], float]] = {"Frechet": final_frechet}
            if study[0] != "digits":
                measures = {"excess": final_excess} | measures
            for name, measure in measures.items():
                found = [ratio(own, weighting, measure) for weighting in others]
                if any(found):
                    rows.append([title_of(study), target, name, *map(format_ratio, found)])
    return markdown_table(rows)


def format_ratio(value: Ratio | None) -> str:
    """0.62 (0.58-0.66)."""
    if value is None:
        return ""
    return f"{value.value:.2f}" + (f" ({value.low:.2f}-{value.high:.2f})" if value.count > 1 else "")


def with_spread(values: Sequence[float]) -> str:
    """Three digits and, with several seeds, their standard deviation."""
    middle, spread = mean_and_spread(values)
    return f"{middle:.3g}" + (f" (+-{spread:.2g})" if len(values) > 1 else "")
