"""What all figures share: colours that are legible with any colour vision (Okabe and Ito's), plain axes, and a file
that is whole or absent.

Every curve differs by line style or marker too.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from erdfast.atomic import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW = "#56B4E9", "#E69F00"
GREY, BLACK = "#999999", "#000000"
_DOTS_PER_INCH = 110


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, laid out without overlaps, apart from pyplot's global state.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")


def save_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a PNG so that `path` holds the old file or the complete new one, never a part. Makes the folder."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    with atomic_write(path) as stream:
        canvas.print_png(stream)


def tidy(axes: Axes) -> None:
    """A light grid behind the curves, and no frame above and to the right."""
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
