"""`erdfast.diagnose targets`: how predictable eps, x0, v, u, score and k are from x_t, by noise level and schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from erdfast.process.coefficients import choose
from erdfast.process.schedule import SCHEDULES, Schedule

from .data_sample import Sample, draw_sample, row_groups
from .page import prepare_page
from .report import Report
from .target_estimates import (
    LEAST_SAMPLES,
    MOST_SAMPLES,
    DataEstimates,
    Draws,
    Estimate,
    draw_noise,
    estimate,
    estimate_target,
    known_errors,
    root,
    summarise_draws,
    x0_errors,
)
from .target_statistics import (
    TARGETS,
    Place,
    Statistics,
    build_schedule,
    factors,
    gaussian_statistics,
    places_at,
    places_in_time,
    preserves_variance,
    reached,
)
from .target_table import Row, bounded_row, comparison, plain_row, table_places

LOGSNR = tuple(range(-12, 13, 2))
"""Levels of the estimates."""
LINE_POINTS = 200

ABOUT = """\
A network is trained to predict y = c_x*x0 + c_eps*eps from x_t = alpha*x0 + sigma*eps. Three numbers say how hard
that is, without any network: the correlation of y and x_t; the size of E[y | x_t], which is what the best network
says, about its mean, which needs no x_t; and the mean of Var(y | x_t), which no network can predict. All are per
element; the square of the second and the third add up to the variance of y. Lines are closed forms for Gaussian data
with independent elements of variance 1, as in section 3 of the article "Analysis of the Stability of Diffusion Model
Training"; k is k*x0 - (1-k)*eps."""
BOUNDS = """\
The error of the best prediction of x0 from x_t, E Var(x0 | x_t), is a function of the log-SNR alone, and conditional
means and variances of all targets follow from it. Of data that are only known by samples it can be bracketed. Below:
what the best prediction would leave if the samples were all there is, which is too little on average. Above: what the
same prediction leaves of a sample that was left out of them with its copies; what a linear prediction leaves, fitted
to one half of the samples and tested on the other; and what the best prediction with one factor for all elements
leaves, s^2/(1 + s^2 SNR), so that no target keeps more than its own variance. All are predictions that anyone can
make, so the best one leaves no more."""
MARKERS = """\
Filled markers in the figures are the lowest of the three upper bounds of the conditional variance, hence a lower bound
of the conditional mean; hollow markers are the other side."""
EXACT = """\
For a mixture of Gaussians the posterior is known, and so are all three numbers, up to the sampling of x_t: markers in
the figures are these. The bounds that are made for any data are shown beside it."""
ANY_DATA = """\
The correlation needs no more of the data than their variance s^2: for any distribution it is (c_x*alpha*s^2 +
c_eps*sigma) / sqrt((c_x^2*s^2 + c_eps^2)(alpha^2*s^2 + sigma^2)), so that data of variance 1 have the Gaussian's to
all digits."""
TABLE = """\
Low, middle and high SNR as a trend in words, beside the article's table. Trends are those of sizes, whatever the sign.
Uniform: the largest of three is at most 1.5 times the smallest; zero: below 0.02. The net effect is unstable if the
conditional variance at high SNR is above 1 and ten times that in the middle; biased if the predictable share of the
target's variance differs by more than half between low and high; weak if that share is below 0.1 throughout. Where
there are a lower and an upper bound, the words are those of the filled markers; open: within the bounds and twice
their standard errors the article may be right or wrong. It supposes alpha^2 + sigma^2 = 1 and data of variance 1:
others may differ from it for that alone."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """How predictable eps, x0, v, u, score and k are from x_t, by noise level."""

    out: Path
    """Folder of the figures, their numbers and index.html."""
    data: str | None = None
    """digits, mixture, mixture:CxHxW, or a file or folder, for estimates; without it, closed forms alone."""
    schedules: tuple[str, ...] = tuple(SCHEDULES)
    """Any of cosine, ddpm_linear, sd_linear, logsnr_linear, flow, vp, gvp, logsnr_uniform."""
    k: float = 0.5
    """Of the target k: 0 is -eps, 0.5 v on flow up to a scale, 1 is x0."""
    num_samples: int = 2000
    """Samples of the data that are used, at most; the time grows with their square, and the bounds draw together."""
    latent_scale: Literal["auto", "stored", "sd", "edm2"] = "auto"
    """How stored latents are brought to the network's scale; see erdfast.train."""
    seed: int = 0
    """Of the choice of samples and of the noise."""

    def validate(self) -> None:
        """Raise ValueError for an unknown name or a number out of range."""
        for name in self.schedules:
            choose(SCHEDULES, name, "schedule")
        if not self.schedules or len(set(self.schedules)) < len(self.schedules):
            raise ValueError(f"schedules {' '.join(self.schedules)!r}: name one or more, each once")
        if not 0.0 <= self.k <= 1.0:
            raise ValueError(f"k is {self.k}; it must lie between 0 and 1")
        if not LEAST_SAMPLES <= self.num_samples <= MOST_SAMPLES:
            raise ValueError(f"num_samples is {self.num_samples}; it must be from {LEAST_SAMPLES} to {MOST_SAMPLES:,}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2^63")


class Measured(NamedTuple):
    """What is known of a data set."""

    described: str
    variance: float
    """s^2: mean over the elements of their variance."""
    mean: float
    """Root mean square of the mean sample."""
    copies: int
    """Samples that are equal to an earlier one."""
    draws: Draws
    errors: dict[str, Tensor]
    """Squared errors of x0 by prediction, (L, M) each, at LOGSNR."""
    known: dict[str, Tensor]
    """Of the least error: exact, or lower and upper; (L, M) each."""

    @property
    def shown(self) -> str:
        """What markers of the conditional variance are."""
        return "exact" if "exact" in self.known else "upper"


class Curves(NamedTuple):
    """Of one schedule: by target, closed forms over time, and estimates at those of LOGSNR that it reaches."""

    place: Place
    gaussian: dict[str, Statistics]
    at: Place
    estimates: dict[str, DataEstimates]
    """Empty without data."""


def run_targets(options: Targets, about: Mapping[str, Any]) -> None:
    """Write the page.

    Raises:
        ValueError: data that cannot be read or used.
        ImportError: matplotlib, or a package that the data need, is missing.
        OSError: the page cannot be written.
    """
    from . import target_figures as figures

    sample = None if options.data is None else draw_data(options)
    prepare_page(options.out)
    data = None if sample is None else measure_data(sample, options.seed)
    about = dict(about) | ({} if data is None else {"data": data.described})
    report = Report(options.out, "How predictable targets are", about)
    curves = {name: curves_of(build_schedule(name), options.k, data) for name in options.schedules}
    numbers = {name: curve_numbers(curve) for name, curve in curves.items()}
    report.heading("Three numbers by noise level", ABOUT)
    if data is not None:
        write_data(report, data)
    figure = figures.draw_by_logsnr(curves, data)
    report.figure("by_logsnr", figure, {"k": options.k, "schedules": numbers}, figures.LOGSNR_CAPTION)
    for kind in ("discrete", "continuous"):
        some = {name: curve for name, curve in curves.items() if SCHEDULES[name].discrete == (kind == "discrete")}
        if some:
            own = {name: numbers[name] for name in some}
            figure = figures.draw_by_time(some, data)
            caption = figures.TIME_CAPTION.format(kind=kind)
            report.figure(f"by_time_{kind}", figure, {"k": options.k, "schedules": own}, caption)
    report.heading("The article's table, as computed", TABLE)
    for name in tabled(options.schedules):
        report.table(gaussian_table(name, curves[name], options.k), f"Gaussian data of variance 1, {name}")
        if data is not None:
            report.table(data_table(curves[name]), f"{data.described}, {name}")
    print(f"written: {report.close()}")


def write_data(report: Report, data: Measured) -> None:
    """What the data are, and how well their least error is known."""
    from . import target_figures as figures

    text = f"{data.described}; variance per element {data.variance:.4g}, root mean "
    text += f"square of the mean sample {data.mean:.4g}. {ANY_DATA}"
    report.heading("The data", text)
    text = f"{BOUNDS} {EXACT if data.shown == 'exact' else MARKERS}"
    copies = f" {data.copies:,} samples are copies of others." if data.copies else " No two samples are identical."
    report.heading("The least error of x0", text + copies)
    errors = {name: estimate(values)._asdict() for name, values in data.errors.items()}
    numbers = {"logsnr": LOGSNR, "variance": data.variance, "errors": errors}
    report.figure("least_error", figures.draw_errors(data), numbers, figures.ERRORS_CAPTION)


def tabled(schedules: tuple[str, ...]) -> list[str]:
    """The first schedule that preserves the variance, for all of them, and those that do not."""
    preserving = [name for name in schedules if preserves_variance(build_schedule(name))]
    return [name for name in schedules if name not in preserving[1:]]


def draw_data(options: Targets) -> Sample:
    """Samples of the data that `options` name.

    Raises:
        ValueError: data that cannot be read, or too few; names the data.
    """
    assert options.data is not None
    return draw_sample(
        options.data,
        options.num_samples,
        seed=options.seed,
        latent_scale=options.latent_scale,
        at_least=LEAST_SAMPLES,
    )


def measure_data(sample: Sample, seed: int) -> Measured:
    """Everything that the data give, whatever the schedule; `seed` is that of the noise and of the halves."""
    x, logsnr = sample.x.double(), torch.tensor(LOGSNR, dtype=torch.float64)
    eps = draw_noise(x, seed)
    errors = x0_errors(sample, eps, logsnr, seed)
    draws = summarise_draws(x, eps)
    copies = x.shape[0] - int(row_groups(sample.x).max()) - 1
    mean = float(x.mean(0).square().mean().sqrt())
    return Measured(sample.described, float(draws.data.mean()), mean, copies, draws, errors, known_errors(errors))


def curves_of(schedule: Schedule, k: float, data: Measured | None) -> Curves:
    """Closed forms and, with data, estimates on one schedule."""
    logsnr = torch.tensor(LOGSNR, dtype=torch.float64)
    here = reached(schedule, logsnr)
    place, at = places_in_time(schedule, LINE_POINTS), places_at(schedule, logsnr[here])
    gaussian = {target: gaussian_statistics(place, factors(target, place, k)) for target in TARGETS}
    estimates = {}
    if data is not None:
        known = {name: errors[here] for name, errors in data.known.items()}
        for target in TARGETS:
            estimates[target] = estimate_target(data.draws, known, at, factors(target, at, k))
    return Curves(place, gaussian, at, estimates)


def curve_numbers(curves: Curves) -> dict[str, Any]:
    """What is drawn of one schedule, for JSON."""
    found: dict[str, Any] = {
        "time": curves.place.time,
        "logsnr": curves.place.logsnr,
        "gaussian": {target: values._asdict() for target, values in curves.gaussian.items()},
    }
    if curves.estimates:
        found["estimates"] = {
            "time": curves.at.time,
            "logsnr": curves.at.logsnr,
            "targets": {target: _estimate_numbers(values) for target, values in curves.estimates.items()},
        }
    return found


def _estimate_numbers(values: DataEstimates) -> dict[str, Any]:
    return {
        "correlation": values.correlation._asdict(),
        "mean": {name: root(square)._asdict() for name, square in values.mean_square.items()},
        "variance": {name: value._asdict() for name, value in values.variance.items()},
    }


# ---------------------------------------------------------------------- tables


def gaussian_table(name: str, curves: Curves, k: float) -> list[list[str]]:
    """The closed forms at three levels."""
    at = places_at(build_schedule(name), curves.at.logsnr[table_places(curves.at.logsnr)])
    found = {}
    for target in TARGETS:
        values = gaussian_statistics(at, factors(target, at, k))
        found[target] = {quantity: plain_row(value) for quantity, value in values._asdict().items()}
    return comparison(found, at.logsnr)


def data_table(curves: Curves) -> list[list[str]]:
    """The estimates at three levels; trends by the better upper bound of the variance where there is no exact value."""
    where = table_places(curves.at.logsnr)
    found = {target: _data_rows(values, where) for target, values in curves.estimates.items()}
    return comparison(found, curves.at.logsnr[where])


def _data_rows(values: DataEstimates, where: Tensor) -> dict[str, Row]:
    def cut(estimates: Mapping[str, Estimate]) -> list[tuple[Tensor, Tensor]]:
        ordered = [estimates[name] for name in ("exact", "lower", "upper") if name in estimates]
        return [(found.value[where], found.error[where]) for found in ordered]

    return {
        "correlation": bounded_row(cut({"exact": values.correlation})),
        "mean": bounded_row(cut({name: root(square) for name, square in values.mean_square.items()})),
        "variance": bounded_row(cut(values.variance), down=True),
    }
