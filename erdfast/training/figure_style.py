"""What all figures share: colours that are legible with any colour vision (Okabe and Ito's), and plain axes.

Every curve differs by line style or marker too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, YELLOW = "#56B4E9", "#E69F00"
GREY, BLACK = "#999999", "#000000"


def tidy(axes: Axes) -> None:
    """A light grid behind the curves, and no frame above and to the right."""
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
