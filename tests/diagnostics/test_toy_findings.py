"""What the toy's numbers are said to show: each claim on numbers for which the answer is plain."""

from __future__ import annotations

from typing import Any

import pytest

from erdfast.diagnostics.toy_data import PROCESSES, TARGETS
from erdfast.diagnostics.toy_findings import (
    CLAIMS,
    Trained,
    claims_table,
    gather,
    judge,
    rank_correlation,
    summary_table,
)
from erdfast.diagnostics.toy_measures import KERNEL_TIMES


def whole(**changes: Any) -> dict[str, Any]:
    """A cell of all times in which every claim but that of a U holds for x0."""
    times = len(KERNEL_TIMES)
    falling = [[100.0 * 0.7**n, 1.0, 1.0] for n in range(times)]
    own = {
        "floors": [1.0 + n for n in range(40)],
        "errors": {"loss": [2.0] * 40, "excess": [1.0 / (n + 1) for n in range(40)]},
        "phases": [{"contaminated": 0.1}, {"contaminated": 0.5}, {"contaminated": 0.9}],
        "features": [{"spread": 1.0}, {"spread": 0.3}],
        "kernels": {
            "trained": {"top": falling, "rank": [10.0 - n / 3 for n in range(times)]},
            "start": {"top": [[2.0, 1.0, 1.0]] * times, "rank": [3.0] * times},
            "grams": [{"within": 0.9, "between": 0.1}, {"within": 0.9, "between": 0.8}],
        },
    }
    return own | changes


def trained(target: str = "x0", **changes: Any) -> Trained:
    part = {"errors": {"loss": [1.0] * 8, "excess": [0.01] * 8}, "early_errors": {"excess": [0.05] * 8}}
    return Trained("flow", target, whole(**changes), [part] * 5)


def kernels(**changes: Any) -> dict[str, Any]:
    return {"kernels": whole()["kernels"] | changes}


def spectrum(tops: list[float], ranks: list[float] | None = None) -> dict[str, Any]:
    """At five of KERNEL_TIMES, the rest like their neighbours: the ends, 0.05 and 0.95, and the middle."""
    at = [0, 1, *[2] * 17, 3, 4]
    ranks = ranks or [1.0] * 5
    return kernels(trained={"top": [[tops[n], 1.0, 1.0] for n in at], "rank": [ranks[n] for n in at]})


U = [8.0, 6.0, 2.0, 5.0, 7.0]
FALL = [50.0, 40.0, 20.0, 4.0, 3.0]
CASES = [
    ("excess", trained(), -1.0, True),
    ("excess", trained(errors={"loss": [], "excess": list(range(40))}), 1.0, False),
    ("bins", trained(errors={"loss": [], "excess": [0.04] * 40}), 0.25, True),
    ("bins", trained(errors={"loss": [], "excess": [0.005] * 40}), 2.0, False),
    ("bins_early", trained(errors={"loss": [], "excess": [0.04] * 40}), 1.25, False),
    ("contamination", trained("x0"), 0.1, True),
    ("contamination", trained("eps"), 0.9, False),
    ("contamination", trained("v"), 0.8, False),
    ("contamination", trained("v", phases=[{"contaminated": 1.0}, {"contaminated": 0.9}]), 0.1, True),
    ("contamination", trained("eps", phases=[{"contaminated": 0.8}, {"contaminated": 0.1}]), 0.2, True),
    ("contamination", trained("u", phases=[{"contaminated": 0.2}, {"contaminated": 0.4}]), 0.2, True),
    ("features", trained(), 0.3, True),
    ("features", trained(features=[{"spread": 1.0}, {"spread": 1.4}]), 1.4, False),
    ("eigenvalues", trained("u", **spectrum(FALL)), 0.1, True),
    ("eigenvalues", trained("u", **spectrum(U)), 5 / 6, False),
    ("eigenvalues", trained("eps", **spectrum(FALL)), None, None),
    ("u_shape", trained("eps", **spectrum(U)), 3.5, True),
    ("u_shape", trained("eps", **spectrum(FALL)), 1.0, False),
    ("u_shape", trained("v", **spectrum(U)), None, None),
    ("rank", trained(**spectrum(U, [8.0, 7.0, 5.0, 4.0, 4.0])), 0.5, True),
    ("rank", trained(**spectrum(U, [4.0, 5.0, 8.0, 5.0, 4.0])), 0.5, True),
    ("rank", trained(**spectrum(U, [9.0, 8.0, 5.0, 3.0, 6.0])), 2 / 3, False),
    ("blocks", trained(), 0.8, True),
    ("blocks", trained(**kernels(grams=[{"within": 0.9, "between": 0.5}, {}])), 0.4, False),
    ("uniform", trained(), 0.8, True),
    ("uniform", trained(**kernels(grams=[{}, {"within": 0.7, "between": 0.7}])), 0.7, False),
]


@pytest.mark.parametrize(("key", "case", "value", "holds"), CASES)
def test_claims(key, case, value, holds):
    (claim,) = (claim for claim in CLAIMS if claim.key == key)
    found = claim.measure(case)
    if found is None:
        assert value is None
    else:
        assert found == pytest.approx(value)
        assert claim.holds(found) is holds


def test_every_claim_has_a_case_that_holds_or_not():
    for key in (claim.key for claim in CLAIMS):
        assert [holds for name, _, _, holds in CASES if name == key], key


def test_rank_correlation_is_that_of_ranks():
    assert rank_correlation([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [3.0, 2.0, 1.0, 0.5]) == pytest.approx(-1.0)
    assert rank_correlation([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)  # 1 - 6*2/(3*8)


def cells() -> list[dict[str, Any]]:
    """In no order; a process and target can be told by their numbers."""
    found = []
    for number, (process, target) in enumerate([(p, t) for p in PROCESSES for t in TARGETS]):
        own = {"process": process, "target": target}
        for part in (4, 2, 0, 1, 3):
            excess = [100.0 * number + 10 * part + n for n in range(8)]
            errors = {"loss": excess, "excess": excess}
            found.append(own | {"part": part, "errors": errors, "early_errors": errors})
        found.append(own | {"part": None} | whole(floors=[float(number)] * 40))
    return found[::-1]


def test_cells_are_gathered_by_process_and_target():
    found = gather(cells())
    assert {process: tuple(own) for process, own in found.items()} == dict.fromkeys(PROCESSES, TARGETS)
    for number, it in enumerate(it for own in found.values() for it in own.values()):
        assert it.curve("floor") == [float(number)] * 40
        assert it.curve("bins_excess") == [100.0 * number + 10 * part + n for part in range(5) for n in range(8)]


def test_tables_hold_every_process_and_target():
    found = gather(cells())
    judged = judge(found)
    assert judged["u_shape"]["vp"].keys() == {"eps"}
    table = claims_table(judged)
    assert len(table) == 1 + len(CLAIMS)
    assert {len(row) for row in table} == {4}
    (row,) = (row for row in table if "entangled" in row[0])
    assert row[1] == "eps yes (0.3), x0 yes (0.3), v yes (0.3), u yes (0.3)"
    summary = summary_table(found)
    assert [row[0] for row in summary[1:]] == [f"{process}, {target}" for process in PROCESSES for target in TARGETS]
    assert {len(row) for row in summary} == {len(summary[0])}
    eps = dict(zip(summary[0], summary[1], strict=True))
    assert eps["mean floor"] == "0"
    assert eps["untrained"] == "1"
    assert eps["rank at t = 0.05"] == "9.67"
