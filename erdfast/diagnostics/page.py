"""What every page needs before its numbers are worked out."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

from erdfast.figure_style import new_figure


def prepare_page(out: Path) -> None:
    """Make the folder; an impossible one, and a missing matplotlib, are noticed before the work and not after it.

    Call it when options and data are known to be good: what is refused leaves no folder behind.

    Raises:
        OSError: the folder cannot be written to.
        ImportError: matplotlib is missing.
    """
    new_figure(1.0, 1.0)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror or error}") from error
