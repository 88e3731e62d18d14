"""What the entry points share: from the command line to options, and from an error to one line and exit code 2."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import dataclasses
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from erdfast import recipes
from erdfast.config import EvalConfig, PreviewConfig, TrainConfig

Config = TypeVar("Config")

_GROUPS = ("process", "optimizer", "ema", "preview", "evaluation")
_MONITORING = {field.name for group in (PreviewConfig, EvalConfig) for field in dataclasses.fields(group)}
_FREE_ON_RESUME = {
    *("steps", "resume", "dry_run", "gpus", "device"),
    *("log_every", "checkpoint_every", "keep_last", "keep_every", "tensorboard", "wandb", "ema_snapshot_every"),
    *_MONITORING,
    *("compile", "attention", "parallel", "ddp_bf16", "accumulation", "recompute", "cuda_graph", "cache"),
}
"""What may change when a run continues: nothing that the weights depend on, but for rounding, except its length."""
AUTO = "auto"


def parse(
    config_type: type[Config], argv: Sequence[str] | None, default: Config | None = None, program: str | None = None
) -> Config:
    """Options from the command line, by the docstrings of a dataclass; flags carry no group prefix.

    Args:
        config_type: the dataclass.
        argv: the command line; by default this process's.
        default: where options start that are not named; by default the dataclass's own.
        program: the module's name for `--help`; by default that of the dataclass, "erdfast.train" for TrainConfig.

    Raises:
        ValueError: an unknown flag, a missing one, or a value of the wrong type.
        SystemExit: with code 0 after `--help`.
    """
    import tyro

    program = program or f"erdfast.{config_type.__name__.removesuffix('Config').lower()}"
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config_type,
                args=_arguments(argv),
                prog=f"python -m {program}",
                config=(tyro.conf.OmitArgPrefixes,),
                default=tyro.MISSING_NONPROP if default is None else default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(complaint.getvalue())) from None


def _arguments(argv: Sequence[str] | None) -> list[str]:
    """Without a first "--": torchrun takes --run and --num for abbreviations of its own options unless one is there."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return arguments[1:] if arguments[:1] == ["--"] else arguments


def _one_line(box: str) -> str:
    """tyro's framed message without title, frame, colours and the pointer to --help, which is the same for all."""
    _, *lines = (line.strip("│ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).strip().splitlines() or [""])
    # Rules part the sections; where the terminal cannot show lines they are made of hyphens.
    text = " ".join("\n" if line and set(line) <= set("─-╰╯") else line for line in lines)
    sections = [" ".join(part.split()) for part in text.split("\n")]
    kept = [part for part in sections if part and not part.startswith(("For full helptext", "Argument helptext"))]
    return "; ".join(kept) or " ".join(box.split())


def parse_train(argv: Sequence[str] | None = None, agree: Callable[[bool], bool] = bool) -> TrainConfig:
    """TrainConfig from a recipe (named, or the model's own) or a run to resume, with the command line on top.

    Args:
        argv: the command line; by default this process's.
        agree: for `--resume auto`, whether there is a run to resume: what the first process sees, in every process.

    Raises:
        ValueError: an unknown recipe or model, a run that cannot be resumed, or options that would change it.
    """
    arguments = _arguments(argv)
    first = _peek(arguments)
    if first.resume == AUTO:
        if first.out is None:
            raise ValueError("--resume auto continues the run that --out names, or begins it there: give --out too")
        at = arguments.index("--resume") if "--resume" in arguments else arguments.index("--resume=auto")
        del arguments[at : at + (2 if arguments[at] == "--resume" else 1)]
        first.resume = None
        if agree((Path(first.out) / "config.json").exists()):
            arguments, first.resume = [*_without_out(arguments), "--resume", first.out], first.out
    if first.resume is not None:
        return _parse_resume(arguments, Path(first.resume))
    name = first.recipe or ("digits" if first.model is None else recipes.recipe_of_model(first.model))
    return parse(TrainConfig, arguments, with_options(TrainConfig(), recipes.recipe(name) | {"recipe": name}))


def with_options(config: TrainConfig, options: dict[str, Any]) -> TrainConfig:
    """`config` with fields replaced by name, whichever group they are in."""
    for group in _GROUPS:
        inner = getattr(config, group)
        own = {name: options.pop(name) for name in list(options) if hasattr(inner, name)}
        config = dataclasses.replace(config, **{group: dataclasses.replace(inner, **own)})
    return dataclasses.replace(config, **options)


def _peek(arguments: list[str]) -> argparse.Namespace:
    """The options on which the defaults of all others depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--recipe", "--model", "--resume", "--out"):
        parser.add_argument(flag, nargs="?")
    return parser.parse_known_args(arguments)[0]


def _without_out(arguments: list[str]) -> list[str]:
    """The run directory is where the run lies, whatever its config.json was told."""
    if "--out" not in arguments:
        return [argument for argument in arguments if not argument.startswith("--out=")]
    at = arguments.index("--out")
    return arguments[:at] + arguments[at + 2 :]


def _parse_resume(arguments: list[str], run: Path) -> TrainConfig:
    from erdfast.training.run_directory import load_run_config

    saved = load_run_config(run)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # What the processes of a run shared has no meaning for one alone, which may well go on with it.
        saved = dataclasses.replace(saved, parallel="auto", ddp_bf16=False)
    config = parse(TrainConfig, arguments, saved)
    if saved.evaluation.eval_every and not config.evaluation.eval_every:  # switched off, with all that it had
        config = dataclasses.replace(config, evaluation=EvalConfig())
    before, after = (flat_options(c) for c in (saved, config))
    changed = [name for name in before if before[name] != after[name] and name not in _FREE_ON_RESUME]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{run} was started with {name} {before[name]}; resuming cannot change it to {after[name]}. "
            "Start a new run for that"
        )
    return config


def flat_options(config: TrainConfig) -> dict[str, Any]:
    """All options by name, whichever group they are in."""
    values = dataclasses.asdict(config)
    for group in _GROUPS:
        values |= values.pop(group)
    return values


def as_flag(name: str, value: Any) -> str:
    """An option as it would be typed: "--betas 0.9 0.999", "--no-flip"."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    return f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next step instead of returning it to the kernel page by page.

    A training step frees and asks for the same megabytes again; on two CPU cores the digits train 1.15 times as fast.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return
    m_trim_threshold, m_mmap_threshold = -1, -3
    mallopt(m_mmap_threshold, 32 << 20)  # the largest that glibc accepts
    mallopt(m_trim_threshold, 2**31 - 1)


def run(main: Callable[[], int | None], program: str) -> None:
    """Call `main` and exit with `exit_code`'s code."""
    keep_freed_memory()
    code = exit_code(main, program)
    parallel = sys.modules.get("erdfast.training.parallel")  # most commands never load it
    if parallel is not None and parallel.has_joined():
        _leave(code)
    sys.exit(code)


def exit_code(main: Callable[[], int | None], program: str) -> int:
    """Call `main`; errors that users can mend become one line on stderr and exit code 2.

    ValueError: input; ImportError: a missing extra; OSError: disk and files; ArithmeticError: a diverged run.
    """
    try:
        return main() or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            raise  # Python's own way writes it
        return int(end.code or 0)
    except BrokenPipeError:  # whoever reads our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, ImportError, OSError, ArithmeticError) as error:
        _say(f"{program}: error: {' '.join(str(error).split())}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise  # a bug of ours
        reason = " ".join(str(error).split())[:200]
        _say(f"{program}: error: out of memory ({reason}): try a smaller --batch-size")
        return 2
    except KeyboardInterrupt:
        _say(f"{program}: interrupted")
        return 130


def _leave(code: int) -> NoReturn:
    """End one process of several: what was to be done at exit is done, but the interpreter is not taken down.

    Gloo's threads live as long as DTensor's caches hold their group. One that has yet to let go of a collective's
    tensor needs the interpreter for it, and without one it ends the process with SIGABRT: a run that is complete
    would be called failed, and torchrun would start it again.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons; no public name has it
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # None: it was closed before Python began
                stream.flush()
        except BrokenPipeError:  # its reader has gone
            pass
        except (OSError, ValueError):
            code = code or 120  # as Python says that output was lost
    os._exit(code)


def _say(line: str) -> None:
    """Write a line to stderr in one piece: `print` may write its end apart, and other processes' words between."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
