"""The comparative table of Xu's article on targets (section 3.4) as computed: three quantities at low, middle and high
SNR, in numbers and in words, beside the article's words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .target_statistics import QUANTITIES, TARGETS

TABLE_LOGSNR = (-6.0, 0.0, 6.0)
UNIFORM = 1.5
"""Three values are called uniform if the largest is at most this many times the smallest."""
ZERO = 0.02
"""Values below are called zero."""
NEGLIGIBLE = 1e-9
"""Values below are written as 0."""
TURN = 1.1
"""The middle value is called a peak or a dip if it is beyond both ends by this factor."""
SHARES = tuple(
    torch.tensor(shares, dtype=torch.float64) for shares in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0), repeat=3)
)
"""Where between the ends of a row the truth may be, at each level for itself."""
TRENDS = {
    "zero": "zero",
    "uniform": "uniform",
    "falls": "falls with SNR",
    "rises": "rises with SNR",
    "peaks": "peaks in the middle",
    "dips": "dips in the middle",
}


class Claim(NamedTuple):
    """What the article says of a target: trends that agree with it, by quantity, and its net effect."""

    correlation: tuple[str, ...]
    mean: tuple[str, ...]
    variance: tuple[str, ...]
    net: str


ARTICLE = {
    "eps": Claim(("falls",), ("falls",), ("rises",), "biased toward low SNR"),
    "x0": Claim(("rises",), ("rises",), ("falls",), "biased toward high SNR"),
    "v": Claim(("zero",), ("zero", "uniform"), ("uniform",), "balanced but weak"),
    "score": Claim(("falls",), ("uniform",), ("rises",), "unstable at high SNR"),
}
"""Its table; of v's conditional mean it says "weak but uniform". It has no row for u and k."""


class Row(NamedTuple):
    """One quantity at the three levels."""

    values: Tensor
    """(3,) float64."""
    text: tuple[str, str, str]
    """As it is written."""
    ends: tuple[Tensor, Tensor] | None = None
    """(3,) each: where it may be with its errors; from the side of `values` to the other. None: known to all digits."""

    def between(self, shares: Tensor) -> Tensor:
        """(3,): so far from one end to the other."""
        return self.values if self.ends is None else torch.lerp(*self.ends, shares)


def trend(values: Tensor) -> str:
    """What three values at low, middle and high SNR do, by their sizes: a key of TRENDS."""
    low, middle, high = values.abs().tolist()
    if max(low, middle, high) < ZERO:
        return "zero"
    if max(low, middle, high) <= UNIFORM * min(low, middle, high):
        return "uniform"
    if middle > TURN * max(low, high):
        return "peaks"
    if TURN * middle < min(low, high):
        return "dips"
    return "falls" if low > high else "rises"


def net_effect(mean: Tensor, variance: Tensor) -> str:
    """Where a target can be learnt, from its conditional mean and variance at low, middle and high SNR.

    First of all by a variance that at high SNR is more than ten times that in the middle and more than 1: it drowns all
    other levels in a loss without weights. Then by the predictable share of the power, mean^2 / (mean^2 + variance).
    """
    if float(variance[2]) > max(10.0 * float(variance[1]), 1.0):
        return "unstable at high SNR"
    low, middle, high = (mean.square() / (mean.square() + variance)).tolist()
    if abs(low - high) > 0.5:
        return f"biased toward {'low' if low > high else 'high'} SNR"
    if max(low, middle, high) < 0.1:
        return "balanced but weak"
    if max(low, middle, high) - min(low, middle, high) < 0.2:
        return "balanced"
    return "strongest in the middle" if middle > max(low, high) else "weakest in the middle"


def comparison(found: Mapping[str, Mapping[str, Row]], logsnr: Tensor) -> list[list[str]]:
    """The table: four rows per target, the last of them its net effect.

    Args:
        found: by target and quantity.
        logsnr: (3,), for the head.
    """
    rows = [["target", "", *(f"log-SNR {value:.3g}" for value in logsnr.tolist()), "as computed", "the article", ""]]
    for target in TARGETS:
        claim = ARTICLE.get(target)
        for quantity, title in QUANTITIES.items():
            row = found[target][quantity]
            words = [TRENDS[trend(row.values)], *(TRENDS[trend(row.between(shares))] for shares in SHARES)]
            says = [] if claim is None else [TRENDS[name] for name in getattr(claim, quantity)]
            rows.append([target, title, *row.text, *compared(words, says)])
        mean, variance = found[target]["mean"], found[target]["variance"]
        words = [net_effect(mean.values, variance.values)]
        words += [net_effect(mean.between(shares), variance.between(shares)) for shares in SHARES]
        rows.append([target, "net effect", "", "", "", *compared(words, [claim.net] if claim else [])])
    return rows


def compared(words: Sequence[str], says: Sequence[str]) -> tuple[str, str, str]:
    """What is found, what the article says, and whether they agree: the last three cells.

    Args:
        words: the first from the values shown; the others are what the truth may be between the ends.
        says: what agrees with the article; empty if it says nothing.
    """
    may_be = set(words)
    found = words[0] if len(may_be) == 1 else f"{words[0]}, but not for certain"
    if not says:
        return found, "", ""
    verdict = "agrees" if may_be <= set(says) else "differs" if may_be.isdisjoint(says) else "open"
    return found, " or ".join(says), verdict


def plain_row(values: Tensor) -> Row:
    """Of a closed form: (3,)."""
    low, middle, high = map(_short, values.tolist())
    return Row(values, (low, middle, high))


def bounded_row(sides: Sequence[tuple[Tensor, Tensor]], *, down: bool = False) -> Row:
    """Of estimates with their errors, each (3,).

    Args:
        sides: one, or a lower and an upper bound.
        down: the words are about the upper one, and the row's ends run from high to low.
    """
    texts = [" to ".join(_with_error(float(v[i]), float(e[i])) for v, e in sides) for i in range(3)]
    (low, low_error), (high, high_error) = sides[0], sides[-1]
    # Trends are those of sizes: what may be on both sides of 0 has sizes from 0 on.
    least, most = low - 2.0 * low_error, high + 2.0 * high_error
    least = torch.where(low >= 0, least.clamp(min=0.0), least)
    most = torch.where(high < 0, most.clamp(max=0.0), most)
    ends = (most, least) if down else (least, most)
    return Row(sides[-1 if down else 0][0], (texts[0], texts[1], texts[2]), ends)


def _with_error(value: float, error: float) -> str:
    """And its standard error, where there is one."""
    return _short(value) if error < NEGLIGIBLE else f"{_short(value)} (+-{error:.1g})"


def _short(value: float) -> str:
    """Three digits; what is rounding of 0 is 0."""
    return "0" if abs(value) < NEGLIGIBLE else f"{value:.3g}"


def table_places(logsnr: Tensor) -> Tensor:
    """Where to read off: the indices of the levels nearest to TABLE_LOGSNR, of (L,) that a schedule reaches."""
    wanted = torch.tensor(TABLE_LOGSNR, dtype=torch.float64)
    return (logsnr[None, :] - wanted[:, None]).abs().argmin(1)
