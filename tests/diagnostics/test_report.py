"""Reports: figures, numbers, and a page that needs nothing else."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erdfast.diagnostics.report import Report, markdown_table, write_json
from erdfast.figure_style import new_figure


def some_figure() -> Any:
    figure = new_figure(3.0, 2.0)
    figure.add_subplot().plot([0, 1], [1, 2])
    return figure


class Tags(HTMLParser):
    """Opening and closing tags that match, and all addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report(tmp_path: Path) -> Report:
    made = Report(tmp_path / "new" / "page", "Eps < x0 & v", {"seed": 3, "data": "<digits>"})
    made.heading("First", "What is shown: a|b < c.")
    made.figure("curves", some_figure(), {"x": [1.0, math.nan], "y": torch.tensor([0.5, 2.0])}, 'A "caption" < 1')
    made.table([["name", "value"], ["a|b", "<1>"]], "numbers")
    return made


def test_the_page_stands_alone(report):
    page = report.close()
    assert page == report.out / "index.html"
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert [address.partition(",")[0] for address in tags.addresses] == ["data:image/png;base64"]
    shown = base64.b64decode(tags.addresses[0].partition(",")[2])
    assert shown == (report.out / "curves.png").read_bytes()
    assert Image.open(report.out / "curves.png").size == (330, 220)
    for escaped in ("Eps &lt; x0 &amp; v", "&lt;digits&gt;", "a|b &lt; c.", "&lt;1&gt;", "&quot;caption&quot;"):
        assert escaped in text


def test_numbers_are_beside_the_figure(report):
    numbers = json.loads((report.out / "curves.json").read_text())
    assert numbers == {"about": {"seed": 3, "data": "<digits>"}, "x": [1.0, None], "y": [0.5, 2.0]}


def test_the_same_as_markdown(report):
    report.close()
    text = (report.out / "index.md").read_text(encoding="utf-8")
    assert text.startswith("# Eps < x0 & v\n\n## First\n\nWhat is shown: a|b < c.\n")
    assert re.search(r"!\[curves\]\(curves\.png\)\n\nA \"caption\" < 1\n", text)
    assert "numbers\n\n| name | value |\n| --- | --- |\n| a\\|b | <1> |\n" in text
    assert text.endswith("## About\n\n- seed: 3\n- data: <digits>\n")


def test_json_of_tensors_arrays_and_what_is_not_finite(tmp_path):
    value = {1: np.float64(1 / 3), "b": (np.arange(2), torch.tensor([math.inf])), "c": {"d": None, "e": True}}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "1": 0.333333,
        "b": [[0, 1], [None]],
        "c": {"d": None, "e": True},
    }


def test_a_bar_does_not_end_a_cell():
    assert markdown_table([["a"], ["b|c"]]) == "| a |\n| --- |\n| b\\|c |\n"


def test_an_out_that_is_a_file(tmp_path):
    (tmp_path / "page").write_text("mine")
    made = Report(tmp_path / "page", "title", {})
    with pytest.raises(OSError, match="page"):
        made.figure("curves", some_figure(), {}, "caption")
    assert (tmp_path / "page").read_text() == "mine"
