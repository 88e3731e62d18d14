"""`erdfast.diagnose dimension`: what k the linear theory of k-Diff asks for, and the dimension of data that it needs.

The theory and its check by training; then estimates of the dimension, of the data given or of manifolds on which it is
known, and the k that follows from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from erdfast.process import Process

from .data_sample import Sample, distinct_rows, draw_sample
from .intrinsic_dimension import (
    ESTIMATORS,
    Estimate,
    components_for,
    estimates_by_size,
    least_points,
    levina_bickel,
    neighbour_distances,
    participation_ratio,
    spectrum,
)
from .linear_theory import (
    averages_of,
    best_k,
    k_star,
    layer_loss,
    optimal_gains,
    optimal_loss,
    subspace_variances,
    train_layer,
)
from .manifold_data import MANIFOLDS
from .page import prepare_page
from .report import Report

AMBIENT = 256
"""D of the theory's figures, where d/D is all that counts."""
DIMS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""d of the figure of k*."""
CURVE_DIMS = (4, 16, 64, 128, 192, 256)
"""d of the figure of losses."""
CURVE_MEASURES = ("target", "velocity_floor")
MEASURES: dict[str, tuple[str, dict[str, Any]]] = {
    "target": ("error in the target (theorem 3.2)", {}),
    "velocity": ("velocity error (algorithm 1)", {"loss_space": "u"}),
    "velocity_floor": ("velocity error, floor 0.05", {"loss_space": "u", "kappa_clip": 0.05}),
    "velocity_pixels": (
        "velocity error, floor 0.05, times of JiT",
        {"loss_space": "u", "kappa_clip": 0.05, "time_sampler": "logit_normal", "logit_mean": 0.8, "logit_std": 0.8},
    ),
}
"""Ways to measure the error of a k target on `flow`, with uniform times unless it says otherwise: title and options."""
TRAINED = ((12, 2, "target"), (12, 6, "target"), (12, 2, "velocity_pixels"))
"""(D, d, measure) of the layers trained as a check."""
CALIBRATION = {"subspace": (1, 2, 4, 8, 16, 32, 64), "torus": (1, 2, 4, 8, 16)}
CALIBRATION_AMBIENT, CALIBRATION_POINTS = 64, 2000
MOST_NEIGHBOURS = 100
"""Of the figure over the number of neighbours."""

THEORY = """\
A linear layer that serves all times is trained to predict k*x0 - (1-k)*eps from x_t on `flow`; the data fill a
d-dimensional subspace of D dimensions with unit variance (k-Diff, section 3). Its least loss is a sum of d problems
along the subspace and D-d across it (eq. 12), least at k* = D/(D+d) if the error is measured in the target itself and
the times are uniform (eq. 14), or of any distribution that treats t and 1-t alike. Measured as a velocity, as k-Diff
trains, the same theory gives another k*: it is the least point of each curve, found numerically."""
TRAINED_TEXT = """\
One layer and k, both learnt by Adam from 0 and 0.5 on fresh samples: 1,000 steps of 512, the rate falling to 0.
Losses are exact averages over samples, noise and times, of the layer that was reached."""
CAVEAT = """\
D/(D+d) holds for Gaussian data on a linear subspace and an error in the target. On curved data of D = 64 dimensions,
learnt targets follow the rank of the linear span rather than d: on a torus with d = 4, which spans 16 dimensions,
D/(D+d) = 0.941 and D/(D+16) = 0.800, while a small network learnt k = 0.783 with the error in the target and 0.856
with that of the velocity; with d = 16, which spans all 64 (0.800 against 0.500), it learnt 0.506 and 0.512 (`python
-m erdfast.experiments.manifold`, three seeds). On the digits a U-ViT learnt 0.849 (`--recipe digits_k`). Nor is the
learnt k the one with the least error: on manifolds of four dimensions x0 prediction had less. So D/(D+d) says in
which direction k goes, and on curved data it is an upper end."""
ESTIMATORS_TEXT = """\
two-NN takes the ratio of the distances to the second and the first neighbour, without its largest values;
Levina-Bickel the distances to a range of neighbours, averaged as MacKay and Ghahramani say. Both suppose a flat set
of constant density up to the farthest neighbour used. From about ten dimensions on no number of points is dense
enough: they then say too little; and where the set bends within that distance, too much. The participation ratio of
the covariance, (sum v)^2 / sum v^2, is linear: it counts the span and cannot see that a set is curved. (+-) is the
standard error, from the spread over disjoint parts of the points; it knows nothing of these biases."""


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Intrinsic dimension of data, and the learnable target k that it suggests."""

    out: Path
    """Folder of the figures, their numbers and index.html."""
    data: str | None = None
    """digits, mixture, mixture:CxHxW, or a file or folder; without it, manifolds of known dimension."""
    num_samples: int = 10_000
    """Samples of the data that are used, at most."""
    neighbours: tuple[int, int] = (10, 20)
    """Levina-Bickel: from which to which number of neighbours."""
    discard: float = 0.1
    """two-NN: share of the largest ratios that are left out."""
    latent_scale: Literal["auto", "stored", "sd", "edm2"] = "auto"
    """How stored latents are brought to the network's scale; see erdfast.train."""
    seed: int = 0
    """Of the choice of samples and of all that is drawn."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        first, last = self.neighbours
        if not 2 <= first <= last:
            raise ValueError(f"neighbours are {first} to {last}; they must rise and start at 2 or more")
        if not 0.0 <= self.discard < 1.0:
            raise ValueError(f"discard is {self.discard}; it must be at least 0 and below 1")
        if self.num_samples < least_points(last):
            raise ValueError(f"num_samples is {self.num_samples}; {last} neighbours need {least_points(last)} or more")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and below 2^63")


def run_dimension(options: Dimension, about: Mapping[str, Any]) -> None:
    """Write the page.

    Raises:
        ValueError: data that cannot be read or used.
        ImportError: matplotlib, scikit-learn, or a package that the data need is missing.
        OSError: the page cannot be written.
    """
    from . import dimension_figures as figures

    drawn = None if options.data is None else draw_data(options)
    prepare_page(options.out)
    data = None if drawn is None else measure_data(options, drawn)
    about = dict(about) | ({} if data is None else {"data": data.described})
    report = Report(options.out, "Dimension of data and the k of k-Diff", about)
    report.heading("Where the linear theory puts k", THEORY)
    with one_thread():
        losses, optima, trained = loss_curves(), optimal_ks(), trained_table(options.seed)
    report.figure("loss_over_k", figures.draw_losses(losses), losses, figures.LOSSES_CAPTION)
    report.figure("k_over_dimension", figures.draw_optima(optima, data), optima, figures.OPTIMA_CAPTION)
    report.heading("Checked by training", TRAINED_TEXT)
    report.table(trained)
    if data is None:
        found = calibrate(options)
        report.heading("Estimators where the dimension is known", ESTIMATORS_TEXT)
        report.figure("calibration", figures.draw_calibration(found), found, figures.CALIBRATION_CAPTION)
        report.table(calibration_table(found))
    else:
        report.heading("The data", f"{data.described}. {data.duplicates_said} {ESTIMATORS_TEXT}")
        report.table(data_table(data))
        numbers = {"by_size": data.by_size, "by_neighbours": data.by_neighbours}
        report.figure("estimators", figures.draw_estimators(data, options.neighbours), numbers, figures.SIZE_CAPTION)
        report.figure("spectrum", figures.draw_spectrum(data), {"variances": data.variances}, figures.SPECTRUM_CAPTION)
    report.heading("How far to trust it", CAVEAT)
    print(f"written: {report.close()}")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """For many operations on few numbers: where a machine is shared, each would wait for the slower of two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------- theory


def build_process(measure: str, k: float = 0.5) -> Process:
    """`flow` with the learnable target `k` and one of MEASURES."""
    return Process("flow", "k", "constant", k_init=k, **MEASURES[measure][1])


def loss_curves() -> dict[str, Any]:
    """Delta*/D over k, for each measure of the figure and each d, with its least point."""
    ks = [i / 200 for i in range(1, 200)]
    curves = {}
    for measure in CURVE_MEASURES:
        with torch.no_grad():
            found = [averages_of(build_process(measure, k)) for k in ks]
        curves[measure] = {
            str(d): {
                "loss": [float(optimal_loss(one, subspace_variances(AMBIENT, d))) / AMBIENT for one in found],
                "k_star": best_k(build_process(measure), subspace_variances(AMBIENT, d)),
            }
            for d in CURVE_DIMS
        }
    return {"ambient": AMBIENT, "k": ks, "curves": curves}


def optimal_ks() -> dict[str, Any]:
    """k* over d for each of MEASURES."""
    found = {
        measure: [best_k(build_process(measure), subspace_variances(AMBIENT, d)) for d in DIMS] for measure in MEASURES
    }
    return {"ambient": AMBIENT, "intrinsic": list(DIMS), "k_star": found}


def trained_table(seed: int) -> list[list[str]]:
    """k, loss and layer of trained layers beside those of the theory."""
    rows = [["error measured", "D", "d", "k learnt", "k*", "loss", "Delta*", "|W - W*|/|W*|"]]
    for ambient, intrinsic, measure in TRAINED:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(ambient, ambient, generator=generator, dtype=torch.float64)).Q
        process, variances = build_process(measure), subspace_variances(ambient, intrinsic)
        best = best_k(process, variances)
        with torch.no_grad():
            least = float(optimal_loss(averages_of(build_process(measure, best)), variances))
        root = basis[:, :intrinsic]
        trained = train_layer(process, root, learn_k=True, seed=seed)
        with torch.no_grad():
            found = averages_of(process)
        wanted = basis @ torch.diag(optimal_gains(found, variances)) @ basis.T
        reached, away = layer_loss(found, trained.layer, root @ root.T), (trained.layer - wanted).norm() / wanted.norm()
        numbers = [f"{trained.k:.4f}", f"{best:.4f}", f"{float(reached):.5f}", f"{least:.5f}", f"{float(away):.3f}"]
        rows.append([MEASURES[measure][0], str(ambient), str(intrinsic), *numbers])
    return rows


# ---------------------------------------------------------------------- estimators


class Measured(NamedTuple):
    """What is known of a data set."""

    described: str
    ambient: int
    duplicates: int
    """Rows left out because they occurred before."""
    by_size: dict[int, dict[str, Estimate]]
    by_neighbours: list[float]
    """Levina-Bickel with 2, 3, ... neighbours."""
    variances: Tensor
    """(D,) float64 eigenvalues of the covariance, the largest first."""

    @property
    def estimates(self) -> dict[str, Estimate]:
        """On all points."""
        return self.by_size[max(self.by_size)]

    @property
    def duplicates_said(self) -> str:
        """A sentence on identical rows."""
        if not self.duplicates:
            return "No two samples are identical."
        return (
            f"{self.duplicates:,} samples are copies of others and are left out of the distances, where they would be "
            "neighbours at distance 0; the covariance has them."
        )


class Drawn(NamedTuple):
    """Samples that are enough for estimates."""

    sample: Sample
    points: Tensor
    """Its distinct rows."""


def draw_data(options: Dimension) -> Drawn:
    """Samples of the data that `options` name.

    Raises:
        ValueError: data that cannot be read, or too few distinct samples; names the data.
    """
    assert options.data is not None
    (first, last), needed = options.neighbours, least_points(options.neighbours[1])
    few, remedy = f"estimates need {needed:,} or more", f"with smaller --neighbours than {first} {last}, fewer will do"
    try:
        sample = draw_sample(
            options.data,
            options.num_samples,
            seed=options.seed,
            latent_scale=options.latent_scale,
            at_least=needed,
        )
    except ValueError as error:
        if not str(error).endswith(few):
            raise
        # What draws samples does not know which option asks for so many.
        raise ValueError(f"{error}; {remedy}") from error
    points = distinct_rows(sample.x)
    if len(points) < needed:
        raise ValueError(f"data {options.data}: {len(points):,} distinct samples are too few, {few}; {remedy}")
    return Drawn(sample, points)


def measure_data(options: Dimension, drawn: Drawn) -> Measured:
    """Everything on the data.

    Raises:
        ValueError: the estimators have no answer; names the data.
    """
    sample, points = drawn
    try:
        by_size = estimates_by_size(points, options.neighbours, discard=options.discard, seed=options.seed)
        distances = neighbour_distances(points, min(MOST_NEIGHBOURS, points.shape[0] - 1))
    except ValueError as error:
        raise ValueError(f"data {options.data}: {error}") from error
    found, width = spectrum(sample.x), sample.x.shape[1]
    variances = torch.cat([found, found.new_zeros(width - found.shape[0])])
    duplicates = sample.x.shape[0] - points.shape[0]
    return Measured(sample.described, width, duplicates, by_size, levina_bickel(distances)[1:].tolist(), variances)


def data_table(data: Measured) -> list[list[str]]:
    """Dimensions and the k that each suggests; then the k of the linear theory for the data's own covariance."""
    rows = [["", "d", "d/D", "k"]]
    ratio = Estimate(participation_ratio(data.variances), float("nan"))
    for name, (value, error) in {**data.estimates, "participation ratio of the covariance": ratio}.items():
        spread = f" (+-{error:.2g})" if error == error else ""
        k = f"{k_star(data.ambient, value):.3f}, D/(D+d)"
        rows.append([name, f"{value:.3g}{spread}", f"{value / data.ambient:.3g}", k])
    for share in (0.9, 0.99):
        count = components_for(data.variances, share)
        rows.append([f"components with {share:.0%} of the variance", str(count), f"{count / data.ambient:.3g}", ""])
    for measure, (title, _) in MEASURES.items():
        with one_thread():
            k = f"{best_k(build_process(measure), data.variances):.3f}"
        rows.append([f"linear theory with the data's covariance, {title}", "", "", k])
    return rows


def calibrate(options: Dimension) -> dict[str, Any]:
    """The estimators on manifolds of known dimension, and the rank of their span."""
    rows = [_calibrate_one(kind, dim, options) for kind, dims in CALIBRATION.items() for dim in dims]
    return {"ambient": CALIBRATION_AMBIENT, "points": CALIBRATION_POINTS, "rows": rows}


def _calibrate_one(kind: str, dim: int, options: Dimension) -> dict[str, Any]:
    manifold = MANIFOLDS[kind](CALIBRATION_AMBIENT, dim, options.seed)
    x = manifold.draw(CALIBRATION_POINTS, torch.Generator().manual_seed(options.seed + 1))
    by_size = estimates_by_size(x, options.neighbours, discard=options.discard, seed=options.seed)
    found: dict[str, Any] = {name: list(value) for name, value in by_size[CALIBRATION_POINTS].items()}
    return {
        "manifold": kind,
        "d": dim,
        "rank": manifold.rank,
        **found,
        "participation ratio": participation_ratio(spectrum(x)),
    }


def calibration_table(found: Mapping[str, Any]) -> list[list[str]]:
    """One row per manifold."""
    rows = [["data", "d", "rank", *ESTIMATORS, "participation ratio", "D/(D+d)", "by two-NN MLE", "D/(D+rank)"]]
    ambient = found["ambient"]
    for row in found["rows"]:
        values = [f"{row[name][0]:.2f} (+-{row[name][1]:.2f})" for name in ESTIMATORS]
        ks = [f"{k_star(ambient, d):.3f}" for d in (row["d"], row["two-NN MLE"][0], row["rank"])]
        ratio = f"{row['participation ratio']:.1f}"
        rows.append([row["manifold"], str(row["d"]), str(row["rank"]), *values, ratio, *ks])
    return rows
