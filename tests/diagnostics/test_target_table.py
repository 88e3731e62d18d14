"""The article's table as computed: words for three numbers, and where they differ from the article's."""

from __future__ import annotations

import pytest
import torch

from erdfast.diagnostics.target_statistics import QUANTITIES, TARGETS
from erdfast.diagnostics.target_table import TRENDS, bounded_row, comparison, net_effect, plain_row, table_places, trend
from erdfast.diagnostics.targets import build_schedule, curves_of, gaussian_table


def three(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ((0.01, -0.005, 0.0), "zero"),
        ((1.0, 1.41, 1.05), "uniform"),
        ((-1.0, -0.7, -0.05), "falls"),
        ((0.05, 0.7, 1.0), "rises"),
        ((0.05, 0.99, 1.0), "rises"),
        ((1.1, 2.0, 1.1), "peaks"),
        ((-0.7, 0.0, 0.7), "dips"),
        ((0.1, 1.0, 0.95), "rises"),
    ],
)
def test_trends(values, word):
    assert trend(three(*values)) == word


@pytest.mark.parametrize(
    ("mean", "variance", "word"),
    [
        ((1.0, 0.7, 0.05), (0.0, 0.5, 1.0), "biased toward low SNR"),
        ((0.05, 0.7, 1.0), (1.0, 0.5, 0.0), "biased toward high SNR"),
        ((0.0, 0.0, 0.0), (1.0, 0.5, 1.0), "balanced but weak"),
        ((1.0, 1.0, 1.0), (0.002, 1.0, 400.0), "unstable at high SNR"),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), "balanced"),
        ((0.3, 1.0, 0.3), (1.0, 0.5, 1.0), "strongest in the middle"),
        ((1.0, 0.0, 1.0), (1.0, 2.0, 1.0), "weakest in the middle"),
        ((1.0, 0.7, 0.05), (1e-5, 0.001, 0.05), "biased toward low SNR"),
    ],
)
def test_net_effects(mean, variance, word):
    assert net_effect(three(*mean), three(*variance)) == word


@pytest.mark.parametrize("schedule", ["cosine", "sd_linear", "vp", "gvp", "logsnr_uniform"])
def test_the_article_is_right_where_the_variance_is_preserved(schedule):
    rows = gaussian_table(schedule, curves_of(build_schedule(schedule), 0.5, None), 0.5)
    verdicts = [row[-1] for row in rows if row[0] in ("eps", "x0", "v", "score")]
    assert verdicts == ["agrees"] * 16


def test_on_flow_it_is_wrong_on_the_variance_of_v_alone():
    rows = gaussian_table("flow", curves_of(build_schedule("flow"), 0.5, None), 0.5)
    assert [row[:2] for row in rows if row[-1] == "differs"] == [["v", "conditional variance"]]
    (row,) = (row for row in rows if row[:2] == ["v", "conditional variance"])
    assert row[2:7] == ["0.91", "0.5", "0.91", TRENDS["dips"], TRENDS["uniform"]]


def test_a_target_of_which_the_article_says_nothing_has_no_verdict():
    rows = gaussian_table("flow", curves_of(build_schedule("flow"), 0.5, None), 0.5)
    assert {row[-1] for row in rows if row[0] in ("u", "k")} == {""}


def test_rows():
    sides = [(three(0.5, 1, 2), three(0.01, 0, 0)), (three(1, 2, 3),) * 2]
    row = bounded_row(sides, down=True)
    assert row.text == ("0.5 (+-0.01) to 1 (+-1)", "1 to 2 (+-2)", "2 to 3 (+-3)")
    assert row.values.tolist() == [1, 2, 3]
    assert plain_row(three(1e-17, 123.456, -0.5)).text == ("0", "123", "-0.5")
    found = {target: dict.fromkeys(QUANTITIES, plain_row(three(1, 1, 1))) for target in TARGETS}
    rows = comparison(found, three(-6, 0, 6))
    assert {len(row) for row in rows} == {8}
    assert len(rows) == 1 + 4 * len(TARGETS)


def test_bounds_that_allow_several_words_leave_the_claim_open():
    """Of v, the article says that the variance is uniform: so it is between these bounds only perhaps."""
    zero = three(0, 0, 0)
    wide = bounded_row([(three(0.1, 0.1, 0.1), zero), (three(1, 1, 1), zero)], down=True)
    far = bounded_row([(three(1, 0.1, 0.9), zero), (three(1, 0.2, 1), zero)], down=True)
    plain = plain_row(three(0, 0, 0))
    rows = {"correlation": plain, "mean": plain}
    verdicts = {}
    for name, row in (("wide", wide), ("far", far)):
        found = {target: rows | {"variance": row} for target in TARGETS}
        (line,) = (line for line in comparison(found, three(-6, 0, 6)) if line[:2] == ["v", "conditional variance"])
        verdicts[name] = line[5:]
    assert verdicts["wide"] == ["uniform, but not for certain", "uniform", "open"]
    assert verdicts["far"] == ["dips in the middle", "uniform", "differs"]


def test_what_may_be_sampling_alone_leaves_the_claim_open():
    """Of v, the article says that the correlation is zero."""
    values, verdicts = three(0.001, 0.06, -0.01), []
    for error in (0.08, 0.001):
        row = bounded_row([(values, three(error, error, error))])
        rows = {"correlation": row, "mean": plain_row(three(1, 1, 1)), "variance": plain_row(three(1, 1, 1))}
        line = next(line for line in comparison(dict.fromkeys(TARGETS, rows), three(-6, 0, 6)) if line[0] == "v")
        verdicts.append(line[5:])
    assert verdicts[0] == ["peaks in the middle, but not for certain", "zero", "open"]
    assert verdicts[1] == ["peaks in the middle", "zero", "differs"]


def test_ends_keep_to_one_side_of_zero():
    row = bounded_row([(three(0.1, -0.1, 0.0), three(0.2, 0.2, 0.0))])
    assert row.ends is not None
    assert torch.stack(row.ends).T.flatten().tolist() == pytest.approx([0.0, 0.5, -0.5, 0.0, 0.0, 0.0])
    assert row.values.tolist() == [0.1, -0.1, 0.0]


def test_levels_that_are_not_reached_give_way_to_the_nearest():
    assert table_places(three(-4, -2, 0, 2, 4)).tolist() == [0, 2, 4]
    assert table_places(torch.arange(-12.0, 13.0, 2.0).double()).tolist() == [3, 6, 9]
