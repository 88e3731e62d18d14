"""The manifold experiment's figure and tables, from its results and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from erdfast.atomic import write_text
from erdfast.cells import mean_and_spread
from erdfast.cells import select as select_settings
from erdfast.diagnostics.linear_theory import k_star
from erdfast.diagnostics.manifold_data import MANIFOLDS
from erdfast.diagnostics.report import markdown_table
from erdfast.figure_style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]
CURVES = {
    ("mlp", "u"): ("MLP, velocity loss with the floor 0.05 (algorithm 1)", BLUE, "o-"),
    ("mlp", "u_unclipped"): ("MLP, velocity loss without a floor", PURPLE, "D:"),
    ("mlp", "target"): ("MLP, loss in the target (theorem 3.2)", GREEN, "s--"),
    ("linear", "target"): ("one linear layer, loss in the target", ORANGE, "^-."),
}
"""Title, colour and line of a learnt k, by network and loss."""
METRICS = {
    "x0_error": "x0 error",
    "x0_excess": "x0 excess",
    "x0_excess_middle": "x0 excess, middle times",
    "u_excess": "velocity excess",
    "off_manifold": "off the manifold",
    "frechet": "Frechet distance",
}
EXPLAINED = """\
Errors are squared norms over all D dimensions, averaged over 32 equal steps of time and 1,024 held-out samples: the
same samples, noise and times for every target. Excess: the squared distance from the best possible prediction
E[x0 | x_t], which is known; middle times: t in [0.25, 0.75] alone, where no conversion divides by a small number.
Velocity excess: the same in the velocity, with the sampler's floor. Samples: 2,048 by 25 steps of Heun's method, their
mean squared distance from the manifold and their Frechet distance from the data's mean and covariance. All by the
averaged weights; (+-) is the standard deviation over seeds.
"""


def write_report(results: dict[str, Any], out: Path) -> None:
    """manifold.png and manifold.md beside results.json.

    Raises:
        ImportError: matplotlib or Pillow is missing.
    """
    draw(results["cells"], out / "manifold.png")
    write_text(out / "manifold.md", render(results))


def select(cells: Iterable[Result], **wanted: Any) -> list[Result]:
    """The cells of these settings; `learnt=True` or False chooses by whether k was learnt."""
    learnt = wanted.pop("learnt", None)
    return [cell for cell in select_settings(cells, **wanted) if learnt is None or (cell["k"] is None) == learnt]


def over_seeds(cells: Sequence[Result], name: str) -> tuple[float, float]:
    """Mean and standard deviation (0 of one)."""
    return mean_and_spread([cell[name] for cell in cells])


def dims_of(cells: Iterable[Result]) -> list[int]:
    """In order, each once."""
    return sorted({cell["dim"] for cell in cells})


# ---------------------------------------------------------------------- the figure


def draw(cells: Sequence[Result], path: Path) -> None:
    """Above: where k settles, by manifold. Below: error over fixed k, with the learnt k."""
    kinds = [kind for kind in MANIFOLDS if select(cells, manifold=kind)]
    grids = sorted({(cell["manifold"], cell["dim"]) for cell in select(cells, learnt=False)})
    figure = new_figure(14.0, 9.0)
    figure.suptitle(f"Learnable target on data of known dimension in D = {cells[0]['ambient']}", fontsize=13)
    above, below = (figure.add_subfigure(part) for part in figure.add_gridspec(2, 1, height_ratios=[1.15, 1.0]))
    for axes, kind in zip(np.ravel(above.subplots(1, len(kinds))), kinds, strict=True):
        _draw_settled(axes, select(cells, manifold=kind), kind)
    for axes, (kind, dim) in zip(np.ravel(below.subplots(1, len(grids))), grids, strict=True):
        _draw_grid(axes, select(cells, manifold=kind, dim=dim, network="mlp", loss="u"), kind, dim)
    save_figure(path, figure)


def _draw_settled(axes: Axes, cells: Sequence[Result], kind: str) -> None:
    ambient, dims = cells[0]["ambient"], dims_of(cells)
    fine = np.geomspace(dims[0], dims[-1], 100)
    axes.plot(fine, [k_star(ambient, d) for d in fine], color=BLACK, linewidth=2.2, label="k* = D/(D + d)")
    rank = MANIFOLDS[kind](ambient, 1, 0).rank
    if rank > 1:
        curve = [k_star(ambient, rank * d) for d in fine]
        axes.plot(fine, curve, color=GREY, linewidth=2.2, linestyle="--", label=f"D/(D + rank), rank {rank}d")
    for (network, loss), (title, color, style) in CURVES.items():
        own = select(cells, network=network, loss=loss, learnt=True)
        if own:
            points = [over_seeds(select(own, dim=d), "k_end") for d in dims_of(own)]
            values, errors = zip(*points, strict=True)
            axes.errorbar(dims_of(own), values, errors, fmt=style, color=color, capsize=3, linewidth=1.6, label=title)
    axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(dims, [str(d) for d in dims])
    axes.set_title(f"Where k settles: {kind}", loc="left", fontsize=11)
    axes.set_xlabel("intrinsic dimension d")
    axes.set_ylabel("k (0 is eps, 0.5 v, 1 x0)")
    axes.set_ylim(0.4, 1.03)
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    tidy(axes)


def _draw_grid(axes: Axes, cells: Sequence[Result], kind: str, dim: int) -> None:
    fixed, learnt = select(cells, learnt=False), select(cells, learnt=True)
    ks = sorted({cell["k"] for cell in fixed})
    lines = (("x0_excess", BLUE, "o-"), ("x0_excess_middle", GREEN, "s--"), ("off_manifold", ORANGE, "^:"))
    for name, color, style in lines:
        points = [over_seeds([cell for cell in fixed if cell["k"] == k], name)[0] for k in ks]
        if min(points) > 1e-9:  # data that fill the space have nothing to be off from
            axes.plot(ks, points, style, color=color, linewidth=1.8, markersize=5, label=METRICS[name])
            axes.plot(*(over_seeds(learnt, n)[0] for n in ("k_end", name)), "*", color=color, markersize=15)
    settled = over_seeds(learnt, "k_end")[0]
    axes.axvline(settled, color=GREY, linewidth=1.2, label=f"learnt k = {settled:.3f} (stars)")
    axes.axvline(k_star(cells[0]["ambient"], dim), color=BLACK, linestyle="--", linewidth=1.2, label="k*")
    axes.set_yscale("log")
    axes.set_title(f"Errors over fixed k: {kind}, d = {dim}", loc="left", fontsize=11)
    axes.set_xlabel("k (0 is eps, 0.5 v, 1 x0)")
    axes.set_ylabel("squared distance, sum over D")
    axes.legend(frameon=False, fontsize=8.5)
    tidy(axes)


# ---------------------------------------------------------------------- the tables


def render(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    cells = results["cells"]
    where, first = results["environment"], cells[0]
    seeds = len({cell["seed"] for cell in cells})
    parts = [
        "# Where a learnable target settles\n",
        f"`{where['command']}`: {len(cells)} trainings of {first['steps']:,} steps of {first['batch']} samples, "
        f"{seeds} seed{'s' if seeds > 1 else ''}; erdfast {where['erdfast']}, torch {where['torch']}, "
        f"{where['device']}, {results['date']}, commit `{where['commit']}`.\n",
        "![k and errors](manifold.png)\n",
        "## k at the end of training\n",
        _settled_table(cells),
        "## Fixed targets and the learnt one, MLP, velocity loss with the floor 0.05\n",
        EXPLAINED,
    ]
    for kind, dim in sorted({(cell["manifold"], cell["dim"]) for cell in select(cells, learnt=False)}):
        own = select(cells, manifold=kind, dim=dim, network="mlp", loss="u")
        parts += [f"### {kind}, d = {dim}\n", _grid_table(own)]
    return "\n".join(parts)


def _settled_table(cells: Sequence[Result]) -> str:
    curves = [key for key in CURVES if select(cells, network=key[0], loss=key[1], learnt=True)]
    rows = [["data", "d", "rank", "D/(D+d)", "D/(D+rank)", *(CURVES[key][0] for key in curves)]]
    for kind in MANIFOLDS:
        for dim in dims_of(select(cells, manifold=kind)):
            ambient = cells[0]["ambient"]
            rank = MANIFOLDS[kind](ambient, dim, 0).rank
            row = [kind, str(dim), str(rank), f"{k_star(ambient, dim):.3f}", f"{k_star(ambient, rank):.3f}"]
            for network, loss in curves:
                own = select(cells, manifold=kind, dim=dim, network=network, loss=loss, learnt=True)
                row.append(_with_spread(over_seeds(own, "k_end"), lambda x: f"{x:.3f}") if own else "")
            rows.append(row)
    return markdown_table(rows)


def _grid_table(cells: Sequence[Result]) -> str:
    rows = [["k", *METRICS.values()]]
    groups = [(f"{k:.3f}", select(cells, k=k)) for k in sorted({cell["k"] for cell in select(cells, learnt=False)})]
    learnt = select(cells, learnt=True)
    groups.append((f"learnt, {over_seeds(learnt, 'k_end')[0]:.3f}", learnt))
    for name, own in groups:
        rows.append([name, *(_with_spread(over_seeds(own, metric), _short) for metric in METRICS)])
    bayes = over_seeds(learnt, "bayes")[0]
    return markdown_table(rows) + f"\nThe least possible x0 error is {_short(bayes)} on these samples.\n"


def _with_spread(value: tuple[float, float], text: Callable[[float], str]) -> str:
    return f"{text(value[0])} (+-{text(value[1])})" if value[1] else text(value[0])


def _short(value: float) -> str:
    """Three digits; what is rounding of 0 is 0."""
    return "0" if abs(value) < 1e-9 else f"{value:.0f}" if math.fabs(value) >= 1000 else f"{value:.3g}"
