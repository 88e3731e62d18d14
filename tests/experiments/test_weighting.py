"""The weighting experiment: cells, statistics, report."""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from erdfast.cells import read_cell
from erdfast.data import GaussianMixture
from erdfast.diagnostics.toy_findings import rank_correlation
from erdfast.evaluation.mixture import KnownMixture
from erdfast.experiments import weighting
from erdfast.experiments.weighting_cells import (
    LOGSNRS,
    NETWORKS,
    OPTIMIZER,
    TARGETS,
    WEIGHTINGS,
    Cell,
    compare,
    excess_by_level,
    held_out,
    run_cell,
)
from erdfast.experiments.weighting_claims import claims
from erdfast.experiments.weighting_report import allocation_table, format_ratio, ratio_table, render, write_report
from erdfast.experiments.weighting_statistics import (
    Ratio,
    check_result,
    excess_in,
    final_frechet,
    ranking,
    ratio,
    relative_excess,
    sample_value,
)
from erdfast.process import Process


def cell(**options: Any) -> Cell:
    settings: dict[str, Any] = {"data": "mixture_4x8x8", "std": 0.4, "network": "dit", "steps": 4, "batch": 8}
    return Cell(**settings | {"target": "eps", "weighting": "erd", "seed": 0, "samples": 20} | options)


# ---------------------------------------------------------------------- the plan


def test_every_target_weighting_and_seed_is_trained_in_every_study_once():
    cells = list(weighting.planned_cells("cpu"))
    assert len({c.name for c in cells}) == len(cells) == 3 * 3 * (2 * 8 + 3 * 7 + 2 * 4)
    for study in weighting.STUDIES["cpu"]:
        settings = {name: value for name, value in study.items() if name != "weightings"}
        names = study.get("weightings", [name for name in WEIGHTINGS if name != "erd_logsnr_sampled"])
        own = [c for c in cells if all(getattr(c, name) == value for name, value in settings.items())]
        assert {(c.target, c.weighting, c.seed) for c in own} == {
            (target, name, seed) for target in TARGETS for name in names for seed in (0, 1, 2)
        }
    assert {(c.data, c.network) for c in cells} <= NETWORKS.keys()


def test_the_gpu_trains_dit_s2_with_five_seeds():
    cells = list(weighting.planned_cells("gpu"))
    assert {(c.data, c.network) for c in cells} == {("mixture_4x32x32", "dit_s2")}
    assert {c.seed for c in cells} == {0, 1, 2, 3, 4}
    config = NETWORKS["mixture_4x32x32", "dit_s2"]
    with torch.device("meta"):
        count = sum(p.numel() for p in config.build().parameters())
    assert abs(count / 32_957_200 - 1) < 0.02  # that of 1000 classes has 990 more rows of 384


def test_no_network_squeezes_a_patch():
    for config in NETWORKS.values():
        assert config.input_shape[0] * config.patch_size**2 <= config.width  # type: ignore[attr-defined]  # a transformer's


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "0"], "workers is 0"),
        (["--quick", "--scale", "gpu"], "--quick is of --scale cpu"),
        (["--only-report"], "holds no cell"),
        (["--scale", "tpu"], "tpu"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        weighting.main(["--out", str(tmp_path), *options])


# ---------------------------------------------------------------------- what is measured


class Best(torch.nn.Module):
    """The best possible prediction of a target, plus an error."""

    num_classes = 10

    def __init__(self, data: GaussianMixture, process: Process, error: float) -> None:
        super().__init__()
        self.data, self.process, self.error = data, process, error
        self.input_shape = data.shape
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, time: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        c = self.process.coefficients(time.round().long(), dtype=torch.float64)
        return (self.data.target_mean(x, c.alpha, c.sigma, c.c_x, c.c_eps, y) + self.error).float()


@pytest.mark.parametrize("target", TARGETS)
def test_the_excess_of_a_known_error(target):
    """An error in x0 is sigma^2 of one in v, in eps alpha^2: the relative excess is the same seen from either."""
    data = GaussianMixture((4, 4, 4), num_classes=10, std=0.4, seed=3, size=2 * 10**9)
    process = Process("cosine", target, "constant")
    logsnr, excess, floor = excess_by_level(Best(data, process, 0.1), process, data)  # type: ignore[arg-type]  # stands for one
    assert len(logsnr) == len(excess) == len(floor) == len(LOGSNRS)
    for at, wanted, found in zip(logsnr, LOGSNRS, excess, strict=True):
        assert abs(at - wanted) < 0.1
        scale = {"v": 1.0, "x0": 1 + math.exp(at), "eps": 1 + math.exp(-at)}[target]
        assert found == pytest.approx(0.01 * scale, rel=2e-3)
    best = excess_by_level(Best(data, process, 0.0), process, data)[1]  # type: ignore[arg-type]  # stands for one
    assert max(best) < 1e-5


def test_perfect_samples_and_samples_of_one_mode():
    data = GaussianMixture((4, 8, 8), num_classes=10, std=0.2, seed=1, size=2 * 10**9)
    x, labels = held_out(data, 2000)
    known = KnownMixture(data)
    good = compare(known, x, labels)
    assert good["recognised"] == 1.0
    assert good["frechet"] < 1.0
    assert good["mode_imbalance"] < 0.1
    bad = compare(known, x[labels == 0][:1].expand(2000, -1, -1, -1), labels)
    assert bad["recognised"] == pytest.approx(float((labels == labels[labels == 0][0]).double().mean()))
    assert bad["mode_imbalance"] == pytest.approx(1 - 1 / 40)
    assert bad["frechet"] > 100


@pytest.mark.parametrize("data", ["mixture_4x8x8", "digits"])
def test_a_cell_repeats_and_measures_all(data):
    options = {"data": data, "std": 0.0 if data == "digits" else 0.4, "weighting": "erd_sampled"}
    first, again = run_cell(cell(**options)), run_cell(cell(**options))
    assert first == again
    assert [point["step"] for point in first["curve"]] == [1, 2, 4]
    steps = [set(point["samples"]) for point in first["curve"]]
    if data == "digits":
        assert steps == [{"12"}, {"12"}, {"12", "perfect"}]
    else:
        assert steps == [{"9"}, {"9"}, {"5", "9", "18", "perfect"}]
        assert all(x > 0 for point in first["curve"] for x in relative_excess(point))
    other = run_cell(cell(**options | {"seed": 1}))
    assert other["curve"] != first["curve"]


def test_a_longer_training_begins_like_a_shorter_one():
    """The rate is constant, so that a curve shows what shorter trainings would reach."""
    short, long = run_cell(cell(steps=2, samples=10)), run_cell(cell(steps=4, samples=10))
    assert long["curve"][1]["v_excess"] == short["curve"][-1]["v_excess"]


# ---------------------------------------------------------------------- from cells to numbers


def made_up(excess: Callable[[float], float], frechet: float, **options: Any) -> dict[str, Any]:
    point = {"step": 2, "samples": {"9": {"frechet": frechet, "mode_imbalance": 0.1, "recognised": 0.9}}}
    if options.get("data") != "digits":
        floor = [0.5 + 0.01 * at for at in LOGSNRS]
        found = [f * excess(at) for f, at in zip(floor, LOGSNRS, strict=True)]
        point |= {"logsnr": [float(at) for at in LOGSNRS], "v_excess": found, "v_floor": floor}
    perfect = {"frechet": 0.5, "mode_imbalance": 0.05, "recognised": 1.0}
    end = point | {"step": 4, "samples": point["samples"] | {"perfect": perfect}}
    return dataclasses.asdict(cell(**options)) | {"curve": [point, end]}


def test_means_over_noise_levels_are_geometric():
    point = made_up(lambda at: math.exp(at), 1.0)["curve"][0]
    assert excess_in(point, "all") == pytest.approx(1.0)
    assert excess_in(point, "low noise") == pytest.approx(math.exp((3 + 4 + 5 + 6 + 7 + 8) / 6))
    assert excess_in(point, "high noise") == pytest.approx(math.exp(-(3 + 4 + 5 + 6 + 7 + 8) / 6))
    assert excess_in(point, "middle") == pytest.approx(1.0)


def test_ratios_pair_equal_seeds():
    values = {("constant", 0): 4.0, ("constant", 1): 100.0, ("erd", 0): 2.0, ("erd", 1): 200.0, ("erd", 2): 7.0}
    cells = [made_up(lambda _: 1.0, value, weighting=w, seed=seed) for (w, seed), value in values.items()]

    def frechet(found: dict[str, Any]) -> float:
        return sample_value(found["curve"][-1], "frechet")

    found = ratio(cells, "erd", frechet)
    assert found is not None
    spread = math.sqrt(2) * math.log(2)
    assert found == pytest.approx(Ratio(1.0, math.exp(-spread), math.exp(spread), 1, 2))
    assert ratio(cells, "p2", frechet) is None
    assert ranking(cells, frechet) == ["erd", "constant"]  # 14.1 against 20
    assert format_ratio(Ratio(0.5, 0.25, 1.0, 2, 2)) == "0.50 (0.25-1.00)"
    assert format_ratio(Ratio(0.5, 0.5, 0.5, 1, 1)) == "0.50"


def test_an_unfinished_experiment_ranks_the_seeds_that_all_have():
    values = {("constant", 0): 4.0, ("constant", 1): 0.1, ("erd", 0): 2.0}
    cells = [made_up(lambda _: 1.0, value, weighting=w, seed=seed) for (w, seed), value in values.items()]
    assert ranking(cells, final_frechet) == ["erd", "constant"]
    assert ranking(cells, final_frechet, ("constant", "p2")) == []


def test_rank_correlation():
    assert rank_correlation([1.0, 2.0, 30.0], [3.0, 4.0, 5.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]) == pytest.approx(0.6)


def test_claims_tell_what_was_seen():
    """ERD first for eps alone, at high noise better and at low noise worse."""
    cells = []
    for target in TARGETS:
        for number, name in enumerate(WEIGHTINGS):
            better = name == "erd" and target == "eps"
            tilt = (lambda at: math.exp(0.1 * at)) if better else (lambda at: 1.0)
            frechet = 1.0 if better else 2.0 + 0.1 * number
            cells.append(made_up(tilt, frechet, target=target, weighting=name))
    seen = {row[0]: row[2] for row in claims(cells)}
    first = next(text for claim, text in seen.items() if claim.startswith("ERD has the lowest FID"))
    assert "eps: first in 1 of 1 studies, 1 of 1 single seeds (of all weightings most often first: erd)" in first
    assert "v: first in 0 of 1 studies, 0 of 1 single seeds (of all weightings most often first: constant)" in first
    along = next(text for claim, text in seen.items() if claim.startswith("..."))
    assert along == "First in 1 of 3 after half, 1 of 3 after all of the training (studies times targets)"
    elsewhere = next(text for claim, text in seen.items() if claim.startswith("Less weight"))
    assert f"eps: excess at high noise times {math.exp(-0.55):.2f}" in elsewhere
    assert f"at low noise, from where weight was taken, times {math.exp(0.55):.2f}" in elsewhere
    logsnr = next(text for claim, text in seen.items() if claim.startswith("What counts"))
    assert "erd_logsnr against erd: excess times eps 1.00 (" in logsnr
    assert ". erd_logsnr_sampled against erd: " in logsnr
    pair = next(text for claim, text in seen.items() if claim.startswith("Drawing times"))
    assert pair.startswith("erd_sampled against erd: excess times eps 1.00 (1 to 1), x0 1.00 (1 to 1), v 1.00 (1 to 1)")


def test_pairs_are_of_the_runs_that_have_all_and_show_their_range():
    cells = [made_up(lambda _: 1.0, 10.0, weighting="erd", seed=seed) for seed in (0, 1, 2)]
    cells += [made_up(lambda _: 1.0, 10.0 * seed + 5.0, weighting="erd_logsnr", seed=seed) for seed in (0, 1, 2)]
    text = claims(cells)[6][2]
    assert "Frechet distance times eps 1.23 (0.5 to 2.5), lower in 1 of 3 runs" in text  # (0.5 * 1.5 * 2.5)^(1/3)
    cells += [made_up(lambda _: 1.0, 80.0, weighting="erd_logsnr_sampled", seed=seed) for seed in (1, 2)]
    text = claims(cells)[6][2]
    assert "Frechet distance times eps 1.94 (1.5 to 2.5), lower in 0 of 2 runs. erd_logsnr_sampled" in text
    assert text.endswith("Frechet distance times eps 8.00 (8 to 8), lower in 0 of 2 runs")


def test_a_network_that_diverged_is_named_and_left_out(tmp_path, monkeypatch):
    good, bad = cell(samples=10), cell(samples=10, weighting="constant")
    monkeypatch.setattr(weighting, "planned_cells", lambda scale, quick: iter([good, bad]))
    monkeypatch.setattr("erdfast.experiments.weighting_cells.OPTIMIZER", dataclasses.replace(OPTIMIZER, lr=1e30))
    broken = run_cell(bad)
    assert broken["curve"] == []
    for settings, found in ((good, made_up(lambda _: 1.0, 2.0, samples=10)), (bad, broken)):
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / f"{settings.name}.json").write_text(json.dumps(found))
    assert weighting.main(["--out", str(tmp_path), "--only-report"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["cells"]) == 1
    assert "Diverged, and left out: mixture_4x8x8 dit eps constant seed 0." in (tmp_path / "weighting.md").read_text()


def test_claims_about_what_was_not_trained():
    rows = claims([made_up(lambda _: 1.0, 1.0, weighting="debias")])
    assert {row[2] for row in rows} == {"not trained"}


def test_where_the_weight_lies():
    rows = {tuple(r.split(" | ")[:2]): r.split(" | ")[2:] for r in allocation_table().splitlines()}
    assert rows["| v", "debias"] == rows["| v", "erd"]  # 1/sqrt(SNR) in eps is alpha sigma in v
    assert rows["| eps", "constant"][-2:] == ["1.000", "1 |"]
    assert float(rows["| eps", "debias"][3]) > 0.8  # all but unweighted where the excess is measured
    assert float(rows["| eps", "debias"][4]) < 0.01


ENVIRONMENT = dict.fromkeys(("command", "erdfast", "torch", "device", "commit"), "x")


def test_the_report_of_an_unfinished_experiment(tmp_path):
    cells = [
        made_up(lambda _: 0.5, 3.0, weighting=w, data=data, std=std, seed=s)
        for w in ("constant", "erd")
        for data, std in (("mixture_4x8x8", 0.4), ("digits", 0.0))
        for s in (0, 1)
    ]
    results = {"cells": cells, "planned": 99, "environment": ENVIRONMENT, "date": "2026-01-01"}
    names = write_report(results, tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    text = (tmp_path / "weighting.md").read_text()
    assert "8 of 99 trainings" in text
    assert "## mixture 4x8x8, spread 0.4, DiT" in text
    assert "## digits, DiT" in text
    assert "| erd | 0.5 (+-0) |" in text
    for line in text.splitlines():
        if line.startswith("| ") and "---" not in line:
            assert line.endswith(" |")
    assert "| 1.00 (1.00-1.00) |" in ratio_table(cells)
    only_digits = [c for c in cells if c["data"] == "digits"]
    assert "weighting_excess.png" not in write_report(results | {"cells": only_digits}, tmp_path / "digits")
    assert "excess" not in render(results | {"cells": only_digits}).split("## digits")[1]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Cell]]:
    """A folder with the cells of a plan, and its report."""
    cells = [cell(weighting=name, samples=10) for name in ("constant", "erd")]
    monkeypatch.setattr(weighting, "planned_cells", lambda scale, quick: iter(cells))
    (tmp_path / "cells").mkdir()
    for settings in cells:
        found = made_up(lambda _: 1.0, 2.0, weighting=settings.weighting, samples=10)
        (tmp_path / "cells" / f"{settings.name}.json").write_text(json.dumps(found))
    assert weighting.main(["--out", str(tmp_path), "--only-report"]) == 0
    return tmp_path, cells


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    cells = [cell(weighting=name, samples=10) for name in ("constant", "erd")]
    monkeypatch.setattr(weighting, "planned_cells", lambda scale, quick: iter(cells))
    assert weighting.main(["--out", str(tmp_path), "--workers", "1"]) == 0
    assert f"written: {tmp_path}/results.json, weighting_excess.png" in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [found["weighting"] for found in results["cells"]] == ["constant", "erd"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", results["date"])
    before = mtimes(tmp_path / "cells")
    for path in (tmp_path / "results.json", tmp_path / "cells" / f"{cells[1].name}.json"):
        path.unlink()
    assert weighting.main(["--out", str(tmp_path), "--only-report"]) == 0
    assert len(json.loads((tmp_path / "results.json").read_text())["cells"]) == 1
    assert weighting.main(["--out", str(tmp_path), "--workers", "1"]) == 0  # trains what is missing, and that alone
    after = mtimes(tmp_path / "cells")
    assert after[f"{cells[0].name}.json"] == before[f"{cells[0].name}.json"]
    assert after.keys() == before.keys()


def test_a_report_is_made_again_from_the_results_alone(trained):
    folder, cells = trained
    first = json.loads((folder / "results.json").read_text())
    shutil.rmtree(folder / "cells")
    assert weighting.main(["--out", str(folder), "--only-report"]) == 0
    assert json.loads((folder / "results.json").read_text())["cells"] == first["cells"]
    path = folder / "cells" / f"{cells[0].name}.json"
    for lose in (Path.unlink, lambda lost: lost.write_text("{")):  # and what is lost there comes back
        lose(path)
        assert weighting.main(["--out", str(folder), "--only-report"]) == 0
        assert json.loads((folder / "results.json").read_text())["cells"] == first["cells"]
    assert path.with_name(f"{path.name}.unusable1").read_text() == "{"


def test_results_of_another_plan_are_not_replaced(trained, monkeypatch):
    folder, cells = trained
    before = (folder / "results.json").read_bytes()
    for other in ([cells[0]], [dataclasses.replace(c, samples=11) for c in cells], [cell(seed=5)]):
        monkeypatch.setattr(weighting, "planned_cells", lambda scale, quick, other=other: iter(other))
        with pytest.raises(ValueError, match=r"results\.json sums up another plan .*: choose another --out"):
            weighting.main(["--out", str(folder), "--only-report"])
    assert (folder / "results.json").read_bytes() == before
    for text in ("{", "[]", '{"cells": [1]}', '{"cells": [{}]}', "[" * 100_000):
        (folder / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json is damaged \(.*\): move it away"):
            weighting.main(["--out", str(folder), "--only-report"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("curve"),
        lambda found: found["curve"][0].pop("samples"),
        lambda found: found["curve"][-1]["samples"]["9"].update(frechet=0.0),
        lambda found: found["curve"][-1]["samples"]["9"].update(recognised="many"),
        lambda found: found["curve"][-1]["samples"].pop("perfect"),
        lambda found: found["curve"][0]["v_excess"].__setitem__(0, float("nan")),
        lambda found: found["curve"][0].update(v_floor=[1.0]),
    ],
)
def test_a_cell_that_lacks_something_is_left_out_and_named_and_trained_again(trained, damage, capsys):
    folder, cells = trained
    (folder / "results.json").unlink()
    path = folder / "cells" / f"{cells[1].name}.json"
    found = json.loads(path.read_text())
    damage(found)
    path.write_text(json.dumps(found))
    assert weighting.main(["--out", str(folder), "--only-report"]) == 0
    assert "1 files are damaged or of other settings, and left out" in capsys.readouterr().err
    assert len(json.loads((folder / "results.json").read_text())["cells"]) == 1
    assert read_cell(folder / "cells", cells[1], check_result) is None


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
