"""A folder of figures with their numbers, and one page of them all: HTML that needs nothing else, and Markdown."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erdfast.atomic import write_text
from erdfast.cells import rounded
from erdfast.figure_style import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
img { max-width: 100%; height: auto; } figure { margin: 1.2rem 0; } figcaption { color: #555; font-size: 0.92rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } dt { font-weight: 600; } dd { margin: 0 0 0.4rem 1rem; }
"""


class Report:
    """Figures as NAME.png and their numbers as NAME.json as they come, and index.html and index.md when it is closed.

    Args:
        out: the folder; made if need be. Files of the same names are replaced, others stay.
        title: of the page.
        about: what was run and where: name and value.
    """

    def __init__(self, out: Path, title: str, about: Mapping[str, Any]) -> None:
        self.out, self.title, self.about = out, title, dict(about)
        self._parts: list[str] = []
        self._markdown: list[str] = []

    def heading(self, text: str, explained: str = "") -> None:
        """A new section, and a paragraph on what it shows."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")
        self._markdown.append(f"## {text}\n")
        if explained:
            self._parts.append(f"<p>{html.escape(explained)}</p>")
            self._markdown.append(f"{explained}\n")

    def figure(self, name: str, figure: Figure, numbers: Mapping[str, Any], caption: str) -> None:
        """Write NAME.png and NAME.json and show the picture.

        Args:
            numbers: all that the figure shows: strings, numbers, lists and mappings of them; numbers that are not
                finite are written as null.
            caption: what to see in it; also the picture's text for those who cannot.

        Raises:
            ImportError: matplotlib is missing.
            OSError: the files cannot be written.
        """
        write_json(self.out / f"{name}.json", {"about": self.about, **numbers})
        picture = self.out / f"{name}.png"
        save_figure(picture, figure)
        data, text = base64.b64encode(picture.read_bytes()).decode(), html.escape(caption)
        image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{text} ({name}.png, {name}.json)</figcaption></figure>")
        self._markdown.append(f"![{name}]({name}.png)\n\n{caption}\n")

    def table(self, rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """A table whose first row is its head."""
        head, *body = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in _tagged(rows))
        lines = [f"<tr>{row}</tr>" for row in body]
        title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
        self._parts.append(f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")
        self._markdown += [*([f"{caption}\n"] if caption else []), markdown_table(rows)]

    def close(self) -> Path:
        """Write index.md and index.html; returns the latter's path."""
        lines = [f"- {name}: {value}" for name, value in self.about.items()]
        write_text(self.out / "index.md", "\n".join([f"# {self.title}\n", *self._markdown, "## About\n", *lines, ""]))
        about = "".join(f"<dt>{html.escape(str(n))}</dt><dd>{html.escape(str(v))}</dd>" for n, v in self.about.items())
        title, body = html.escape(self.title), "\n".join(self._parts)
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n{body}\n<h2>About</h2><dl>{about}</dl></body></html>\n"
        )
        write_text(self.out / "index.html", page)
        return self.out / "index.html"


def _tagged(rows: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return [("th" if number == 0 else "td", row) for number, row in enumerate(rows)]


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file; numbers in six significant digits, those that are not finite as null."""
    write_text(path, json.dumps(rounded(_plain(value)), separators=(",", ":"), allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or an array
        return _plain(value.tolist())
    return value


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown; a bar within a cell would end it."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"
