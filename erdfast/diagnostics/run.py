"""`diagnose run`: measure trained networks noise level by noise level, and put it on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from erdfast.data import GaussianMixture
from erdfast.data.dataset import format_shape
from erdfast.training.parallel import World
from erdfast.training.progress import progress_bar

from .allocation import allocate
from .features import TOKENS_PER_IMAGE
from .gradients import cosines, group_sizes, measure_gradients, whole_gradient
from .noise_level_losses import measure_levels
from .page import prepare_page
from .report import Report
from .run_figures import Measured, differ, draw_allocation, draw_cosines, draw_gradients, draw_losses, draw_ranks
from .subject import Levels, Subject, draw_images, levels_of, shared_logsnr


class Settings(NamedTuple):
    """How closely runs are looked at."""

    num_levels: int
    num_samples: int
    grad_samples: int
    batch_size: int
    seed: int


QUICK = Settings(num_levels=10, num_samples=128, grad_samples=16, batch_size=1 << 20, seed=1 << 63)
"""At most: for a look at small networks within a minute on two cores."""


def diagnose_runs(subjects: Sequence[Subject], settings: Settings, out: Path, about: Mapping[str, Any]) -> Path:
    """Measure all, write figures, numbers and the page; returns the page's path.

    Args:
        subjects: one or more, of different names.
        settings: numbers of levels and samples.
        out: folder of the page.
        about: what was run and where.

    Raises:
        ValueError: networks for images of different shapes, or without a noise level in common.
        ArithmeticError: a network's predictions or gradients are not finite.
        ImportError: matplotlib is missing.
        OSError: the folder cannot be written to.
    """
    first = subjects[0]
    for other in subjects[1:]:
        if other.model.input_shape != first.model.input_shape:
            shapes = [f"{s.name} is for {format_shape(s.model.input_shape)}" for s in (first, other)]
            raise ValueError(f"runs of different shapes cannot be compared: {', '.join(shapes)}")
    logsnr = shared_logsnr([subject.process for subject in subjects], settings.num_levels)
    levels = [levels_of(subject.process, logsnr) for subject in subjects]
    for subject, each in zip(subjects, levels, strict=True):
        if len(each.logsnr) < 2:
            raise ValueError(f"{subject.name} has one noise level between {logsnr[0]:.2f} and {logsnr[-1]:.2f} alone")
    prepare_page(out)
    total = 2 * sum(len(each.logsnr) for each in levels)
    with progress_bar(World(device=first.device), total=total, unit="level", desc="noise levels") as bar:
        runs = [_measure(subject, at, settings, bar) for subject, at in zip(subjects, levels, strict=True)]
    about = dict(about) | {name.replace("_", " "): value for name, value in settings._asdict().items()}
    report = Report(out, "Trained networks by noise level", about)
    _write(report, runs, settings)
    return report.close()


def _measure(subject: Subject, levels: Levels, settings: Settings, bar: tqdm) -> Measured:
    # The order is the same for all runs whose data are equally many; so are noise and times.
    images = draw_images(subject.dataset, settings.num_samples, settings.seed)
    options: dict[str, Any] = {"seed": settings.seed, "batch_size": settings.batch_size, "advance": bar.update}
    losses = measure_levels(subject, levels, images, **options)
    gradients = measure_gradients(subject, levels, num=settings.grad_samples, **options)
    return Measured(subject, levels, allocate(subject.process), losses, gradients)


# ---------------------------------------------------------------------- the page


def _write(report: Report, runs: Sequence[Measured], settings: Settings) -> None:
    report.heading("Runs", _about_levels(runs, settings))
    rows = summary_table(runs)
    report.table(rows, summary_caption(rows))
    report.heading(
        "Loss by noise level",
        "The mean squared error of the network's own target, not weighed, at single noise levels. Bars are standard "
        "errors over images and noise. "
        + (_FLOOR if any(run.has_floor for run in runs) else "The least possible error of these data is not known.")
        + (f" {_COMPARED}" if differ(runs) else ""),
    )
    report.figure("losses", draw_losses(runs), {"runs": _numbers(runs, "losses")}, "Error by noise level.")
    report.heading("Where training looks", _ALLOCATION)
    curves = {run.subject.name: _curves_of(run) for run in runs}
    report.figure("allocation", draw_allocation(runs), {"runs": curves}, "Weight, density of levels, and allocation M.")
    report.heading("Gradients", f"{_GRADIENTS} {_folded(runs)}")
    gradients = _numbers(runs, "gradients")
    report.figure("gradients", draw_gradients(runs), {"runs": gradients}, "Gradients by noise level.")
    maps = {run.subject.name: {"logsnr": run.levels.logsnr, "cosine": cosines(run.gradients)} for run in runs}
    report.figure("gradient_cosines", draw_cosines(runs), {"runs": maps}, _COSINES)
    report.heading("Effective ranks", _ranks_explained(settings.num_samples))
    ranks = {name: {k: v for k, v in numbers.items() if k.startswith(("rank", "logsnr"))} for name, numbers in
             _numbers(runs, "losses").items()}  # fmt: skip
    report.figure("ranks", draw_ranks(runs), {"runs": ranks}, "Effective rank of features and predictions.")


_SUMMARY = (
    "Errors are means over the times that the run itself draws: where runs draw other times, these do not compare, and "
    "the figures do. Weighted error: of w times the error. M and the noise scale are explained below."
)
LOST = "lost in noise"
_LOST_EXPLAINED = (
    f"A noise scale is {LOST} if the squared norm of the whole gradient, corrected for noise, is not above 0: more "
    "--grad-samples, without --quick, may bring it out."
)
_FLOOR = (
    "Dotted: the Bayes floor, the error of the best possible prediction E[y | x_t], which is known for this mixture "
    "(given the label where the network is). The excess is the mean squared distance from that prediction, so the "
    "noise of the target is not in it."
)
_COMPARED = (
    "The runs predict different things, or at other amplitudes; as errors of v on the variance-preserving process of "
    "the same log-SNR they can be compared."
)
_ALLOCATION = (
    "w multiplies a sample's error, p is the density of the times that are drawn. Their product M, here with integral "
    "1, says what share of the loss a noise level is given: of errors in the run's own target. Dotted: ERD's "
    "recoverability of that target, which M follows where levels are weighed as ERD's principle has it (allocation "
    "logsnr); with allocation time the weight follows it at each drawn time."
)
_GRADIENTS = (
    "g is the gradient of one sample's error with respect to the network's parameters, at one noise level; neither "
    "units nor labels are dropped. The mean gradient's norm is corrected for the noise that a finite mean has; where "
    "it is not above 0 there is no point. Bars are standard errors (jackknife). At one level the weight multiplies "
    "every gradient, so the signal-to-noise ratio is that of the weighted loss too. The table's noise scale is that "
    "of the whole loss, over all levels as they are drawn and weighed: the batch size at which signal and noise are "
    "equal. It has no standard error here: another --seed tells how far it can be trusted."
)
_COSINES = (
    "Cosine of the mean gradients of each two noise levels, corrected for noise: below 0 a step for one level is a "
    "step against the other. More --grad-samples bring out what is grey."
)


def _about_levels(runs: Sequence[Measured], settings: Settings) -> str:
    """What was measured, on what."""
    data = {_data_of(run.subject) for run in runs}
    groups, per_group = group_sizes(settings.grad_samples)
    same = "images, noise and levels" if len(data) == 1 else "noise and levels, but not images,"
    text = (
        f"Averaged weights, measured on {settings.num_samples:,} images and {groups * per_group:,} for gradients at "
        f"{len(runs[0].levels.logsnr)} noise levels, equally spaced in log-SNR over what all the schedules reach "
        f"within [-10, 10]: {same} are the same for all runs. Errors are those on the run's data, "
        f"which it may have been trained on ({'; '.join(sorted(data))}). The networks compute in "
        f"{' and '.join(sorted({run.subject.precision.name for run in runs}))}."
    )
    if len(data) > 1:
        text += " The runs' data differ: their errors do too, whatever the networks are."
    fewest = min(len(run.subject.dataset) for run in runs)
    if fewest < max(settings.num_samples, groups * per_group):
        text += f" There are only {fewest:,} images, which come again with other noise: standard errors are too small."
    if fewest < groups * per_group * len(runs[0].levels.logsnr):
        text += " Gradients of different levels share images, which their cosines and the noise scale take for signal."
    if assumed := [run.subject.name for run in runs if run.subject.published]:
        text += f" How errors of {', '.join(assumed)} were weighed is not known: they are taken as weighed equally."
    return text


def _data_of(subject: Subject) -> str:
    """What tells data apart: mixtures of different seeds are described alike."""
    seed = f", seed {subject.dataset.seed}" if isinstance(subject.dataset, GaussianMixture) else ""
    return f"{subject.data}: {subject.dataset.describe()}{seed}"


def _ranks_explained(num: int) -> str:
    return (
        "exp of the entropy of the singular values, after the mean row is taken off: how many directions the rows "
        "really have. Features are the tokens after the last block, before the final norm: their mean over an image "
        f"({num:,} rows), and {TOKENS_PER_IMAGE} single tokens of each. Predictions: one row per image. A rank is at "
        "most the number of rows less one, and the width."
    )


def _folded(runs: Sequence[Measured]) -> str:
    folded = [run for run in runs if run.gradients.kept < run.gradients.parameters]
    parts = [f"{r.gradients.parameters:,} of {r.subject.name} into {r.gradients.kept:,}" for r in folded]
    return f"Gradients were folded with random signs: {', '.join(parts)} numbers." if parts else ""


def summary_table(runs: Sequence[Measured]) -> list[list[str]]:
    """A row per run, below a head. Errors are means over the times as they are drawn."""
    head = ["run", "step", "parameters", "target", "schedule", "weighting", "times", "error", "weighted error"]
    known = any(run.has_floor for run in runs)
    head += ["Bayes floor", "excess"] if known else []
    head += ["error as one of v", "median log-SNR of M", "noise scale of the gradient"]
    return [head, *(_summary_row(run, known) for run in runs)]


def summary_caption(rows: Sequence[Sequence[str]]) -> str:
    """What stands with that table."""
    return f"{_SUMMARY} {_LOST_EXPLAINED}" if any(LOST in row for row in rows) else _SUMMARY


def _summary_row(run: Measured, known: bool) -> list[str]:
    subject, losses, at = run.subject, run.losses, run.levels.logsnr
    settings = subject.process.describe()

    def mean(values: Tensor, *, weighted: bool = False) -> str:
        return _short(run.allocation.average(at, values, weighted=weighted))

    whole = whole_gradient(run.gradients, run.allocation.probability(at), run.weight)
    row = [subject.name, f"{subject.step:,}" if subject.step else "", f"{run.gradients.parameters:,}"]
    row += [_target(subject), str(settings["schedule"]), _weighting(settings), _times(settings)]
    row += [mean(losses.loss), mean(losses.loss, weighted=True)]
    row += [mean(losses.floor), mean(losses.excess)] if run.has_floor else ["", ""] if known else []
    median = f"{run.allocation.median():.2f}".replace("-0.00", "0.00")
    return [*row, mean(losses.to_v * losses.loss), median, _short(whole.noise_scale) or LOST]


def _target(subject: Subject) -> str:
    """With what was learnt of it."""
    learnt = {name: value for name, value in subject.process.target_values().items() if value.ndim == 0}
    numbers = ", ".join(f"{name} = {float(value):.3f}" for name, value in learnt.items())
    return f"{subject.process.target_name} ({numbers})" if numbers else subject.process.target_name


def _weighting(settings: Mapping[str, Any]) -> str:
    """With what it is changed by."""
    parts = [str(settings["weighting"])]
    if settings["allocation"] != "time":
        parts.append(f"allocation {settings['allocation']}")
    if settings["loss_space"] != "target":
        parts.append(f"of errors in {settings['loss_space']}")
    if settings["as_sampling"]:
        parts.append("drawn")
    return ", ".join(parts)


def _times(settings: Mapping[str, Any]) -> str:
    if settings["time_sampler"] != "logit_normal":
        return str(settings["time_sampler"])
    return f"logit_normal({settings['logit_mean']:g}, {settings['logit_std']:g})"


def _numbers(runs: Sequence[Measured], what: str) -> dict[str, dict[str, Any]]:
    """Of all runs: the levels, and the fields of `losses` or `gradients` by name."""
    found = {}
    for run in runs:
        time = {"logsnr": run.levels.logsnr, "time": run.levels.time, "weight": run.weight}
        found[run.subject.name] = time | getattr(run, what)._asdict()
    return found


def _curves_of(run: Measured) -> dict[str, Any]:
    """At most a few hundred points of each curve of the allocation."""
    a = run.allocation
    every = max(len(a.logsnr) // 400, 1)
    curves = ("logsnr", "weight", "density", "share", "omega")
    return {name: getattr(a, name)[::every] for name in curves} | {"mean_weight": a.mean_weight}


def _short(value: float) -> str:
    return "" if not torch.isfinite(torch.tensor(value)) else f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
