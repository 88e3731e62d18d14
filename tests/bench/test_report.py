"""README and the pages of results say what the committed results say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import report

TIMING = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "rounds": 5, "host_ms": None}


def row(case: str = "8x8 float32", **options: Any) -> dict[str, Any]:
    return {
        "case": case,
        "pass": "both",
        "share": 0.5,
        "over": {"eager": {"median": 2.0, "low": 1.5, "high": 2.5}},
        "peak_bytes": None,
        "kept_bytes": {"eager": 3_000_000, "fused": 1_000_000},
        "timings": [{"fused": TIMING}],
    } | options


def result(*rows: dict[str, Any], **options: Any) -> dict[str, Any]:
    environment = {"device": "box", "torch": "2.13.0", "date": "2026-01-02", "commit": "abc"}
    ceilings = {"copy_bytes_per_s": 3e10, "matmul_flops_per_s": {"bfloat16": 4e11}}
    return {"op": "square", "environment": environment, "ceilings": ceilings, "rows": list(rows)} | options


def test_every_page_is_rendered_from_committed_results() -> None:
    assert report.OPENING.search(report.README.read_text())
    for path, text in report.pages():
        assert path.exists(), f"{path} is missing: python -m bench.report"
        assert path.read_text() == text, f"{path} is not what the results say: python -m bench.report"


def test_a_table_has_the_columns_that_its_rows_fill() -> None:
    liger = {"eager": {"median": 1, "low": 1, "high": 1}, "compile": None, "liger": {"median": 3, "low": 2, "high": 4}}
    other = row("8x8 bfloat16", over=liger | {"compile": {"median": 1.25, "low": 1, "high": 1.5}})
    lines = report.render_result(result(row(), other)).splitlines()
    assert lines[0] == (
        "| case | pass | ms | of ceiling | over eager | over torch.compile | over liger | kept for backward |"
    )
    assert lines[1] == "|" + " --- |" * 8
    assert lines[2] == "| 8x8 float32 | forward + backward | 2 | 50% | 2.0x (1.5-2.5) |  |  | 1.0 MB (eager 3.0) |"
    assert "1.2x (1.0-1.5) | 3.0x (2.0-4.0)" in lines[3]
    assert "box (copies 30 GB/s, bfloat16 products 0.4 TFLOP/s), torch 2.13.0, 2026-01-02, commit `abc`" in lines[5]
    assert "Not a full run" not in lines[5]
    assert "Not a full run" in report.render_result(result(row(), complete=False))


def test_what_a_reader_must_know_stands_below() -> None:
    plain = report.render_result(result(row()))
    assert "alone" not in plain.lower()
    assert "100%" not in plain
    text = report.render_result(result(row(timings=[{"fused": TIMING, "alone": TIMING | {"p50_ms": 1.5}}])))
    assert "| ms | ms alone | of ceiling |" in text
    assert "| 2 | 1.5 | 50% |" in text
    assert "Alone: the fused side in rounds without the others." in text
    text = report.render_result(result(row(), row("small", share=1.11)))
    assert "| 111% |" in text
    assert "More than 100% of the ceiling: the data of a small case comes in part from the caches" in text
    assert "matrix products" in report.render_result(result(row(share=1.2, flops=10)))
    assert "More than" not in report.render_result(result(row(share=1.004)))
    text = report.render_result(result(row(share=None), row(backend="reference"), row(backend="triton")))
    assert text.count("| reference (no compiled code on this device) |") == 1
    assert "no result of a kernel of ours" in text
    assert "| 2 |  | 2.0x" in text
    assert "back end" not in report.render_result(result(row(backend="triton")))


def test_words_choose_rows() -> None:
    both = result(row("8x8 float32"), row("8x8 bfloat16"), row("16x8 float32"))
    assert report.render_result(both, ["8x8", "float32"]).count("\n| ") == 2  # the rule and one row
    with pytest.raises(ValueError, match="no row of square has all of: float16"):
        report.render_result(both, ["float16"])


def test_markers_are_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "square.json").write_text(json.dumps(result(row(), row("8x8 bfloat16"))))
    (tmp_path / "box" / "digits.json").write_text('{"step": 1}')  # no table
    (tmp_path / "box" / "square.partial.json").write_text("of a run that was cut short")
    text = (
        "a\n<!-- bench:square:box -->\nold\n<!-- /bench -->\nb\n<!-- bench:square:box:bfloat16 -->\n<!-- /bench -->\n"
    )
    rendered = report.render(text)
    assert "old" not in rendered
    assert rendered.count("| 8x8 float32 |") == 1
    assert rendered.count("| 8x8 bfloat16 |") == 2
    assert report.render(rendered) == rendered
    page = report.device_page(tmp_path / "box")
    assert page is not None
    assert page.startswith("# Measured on box\n")
    assert "## square\n" in page
    assert "digits" not in page


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            "<!-- bench:square:box -->\nno end\n",
            "README.md, <!-- bench:square:box -->: there is no line <!-- /bench -->",
        ),
        ("<!-- bench:square:box -->\n<!-- bench:square:box:a -->\n<!-- /bench -->\n", "before <!-- bench:square:box:a"),
        ("a\n<!-- /bench -->\n", "README.md, <!-- /bench -->: a marker is a line"),
        ("<!-- bench:square -->\n<!-- /bench -->\n", "README.md, <!-- bench:square -->: a marker is a line"),
        ("<!--bench:square:box-->\n<!-- /bench -->\n", "README.md, <!--bench:square:box-->: a marker is a line"),
        ("<!-- bench:square:box:tall -->\n<!-- /bench -->\n", "box:tall -->: bench/results/box/square.json: no row of"),
        ("<!-- bench:digits:box -->\n<!-- /bench -->\n", "bench/results/box/digits.json is no result of a benchmark"),
    ],
)
def test_markers_that_are_none_are_named(
    text: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / "square.json").write_text(json.dumps(result(row())))
    (tmp_path / "box" / "digits.json").write_text('{"op": "digits"}')
    with pytest.raises(report.ReportError, match=re.escape(wanted)) as error:
        report.render(text)
    assert "\n" not in str(error.value)


def test_devices_may_have_dashes_and_dots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "a100-sxm4-80gb_v1.2").mkdir()
    (tmp_path / "a100-sxm4-80gb_v1.2" / "square.json").write_text(json.dumps(result(row())))
    assert "| 8x8 float32 |" in report.render("<!-- bench:square:a100-sxm4-80gb_v1.2 -->\n<!-- /bench -->\n")


@pytest.mark.parametrize(
    ("content", "wanted"), [(None, "square.json is missing;"), ('{"rows": [', "square.json is damaged (Expecting")]
)
def test_a_result_that_cannot_be_read_is_one_line_that_names_everything(
    content: str | None,
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    text = "<!-- bench:square:box -->\n<!-- /bench -->\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "box").mkdir()
    if content is not None:
        (tmp_path / "box" / "square.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        report.main([])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bench.report: README.md, <!-- bench:square:box -->: bench/results/box/square.json is ")
    assert wanted in line
    assert line.endswith("`python -m bench.bench_square` writes it")
    assert (tmp_path / "README.md").read_text() == text


def test_help_renders_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "README", tmp_path / "none.md")
    with pytest.raises(SystemExit) as stop:
        report.main(["--help"])
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_steps_that_failed_are_left_out() -> None:
    memory = {"peak_bytes": 5 * 10**9, "reserved_bytes": 7 * 10**9}
    good = {"images_per_s": 1234.5, "mfu": 0.4321, **memory, "timing": TIMING, "ours_over": None}
    rows = [{"case": "dit_b2 batch 128", "side": "ours"} | good, {"case": "x", "side": "erd", "failed": "no"}]
    text = report.render_result(result(*rows, op="train_step"))
    assert "| dit_b2 batch 128 | ours | 1,234 | 2 | 43.2% | 5.0 GB | 7.0 GB |" in text
    assert "erd" not in text


def test_numbers_have_three_digits() -> None:
    assert [report.milliseconds(value) for value in (0.01234, 4.567, 999.7, 1234.5)] == [
        "0.0123",
        "4.57",
        "1,000",
        "1,234",
    ]
    assert report.between([{"n": 3}, {"n": 1200}], "n") == "3-1,200"
    assert report.between([{"n": 0.5}], "n", "{:.0%}") == "50%"
