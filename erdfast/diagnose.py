"""`python -m erdfast.diagnose`: what noise levels do to training, in figures, numbers and one page.

    mixture --out DIR                  the ERD paper's toy: four targets, three processes, against closed forms
    targets --out DIR [--data D]       how predictable eps, x0, v, u, score and k are from x_t, by noise level
    dimension --out DIR [--data D]     intrinsic dimension of data, and the learnable target k that it suggests
    run RUN [RUN2 ...] --out DIR       loss, weight, gradients and ranks of trained networks by noise level

Each writes PNG files, the numbers behind each as JSON beside it, and index.html, which needs nothing else.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any, Union

from erdfast import cli
from erdfast.training.run_directory import describe_environment

PROGRAM = "erdfast.diagnose"
COMMANDS: dict[type, Callable[..., None]] = {}
"""What is done with the options of each command, and what it was started as."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, run; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options: Any = cli.parse(Union[tuple(COMMANDS)], arguments, program=PROGRAM)  # type: ignore[arg-type]  # noqa: UP007  # built from a table
    options.validate()
    command = shlex.join(["python", "-m", PROGRAM, *arguments])
    about = {**describe_environment(), "command": command, "date": date.today().isoformat()}
    COMMANDS[type(options)](options, about)
    return 0


if __name__ == "__main__":
    cli.run(main, PROGRAM)
