"""Types of command line options that say what they take."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def at_least(minimum: int) -> Callable[[str], int]:
    """For `type=`: a whole number that is not below `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    return parse


def above(minimum: float) -> Callable[[str], float]:
    """For `type=`: a finite number above `minimum`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, not {text!r}") from None
        if not minimum < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be above {minimum:g} and finite, not {text}")
        return value

    return parse
