"""Loading published checkpoints. Our state_dict has their names, so that saving it is publishing it."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("ema", "state_dict", "model", "module")
"""Keys under which training scripts put the weights, the best first: its authors evaluated the average."""

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before the names."""

_SHOWN = 5


def load_published(model: nn.Module, source: str | Path | Mapping[str, Any]) -> None:
    """Copy published weights into `model`, in place; the model keeps its dtypes and devices.

    Args:
        model: an unsharded network.
        source: a `.safetensors` file, a `.pt`, `.pth` or `.ckpt` file (read without executing anything), or
            what such a file holds: a dict of tensors, or a dict that holds one under a name of WRAPPERS. Prefixes
            of PREFIXES are removed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, no weights in it, or weights of another network: the message lists
            the names that are missing, unexpected or of another shape, and the model is unchanged.
    """
    where = "the given weights" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else _read(Path(source))
    weights = published_weights(content, where)
    problems = _differences(weights, model.state_dict())
    if problems:
        raise ValueError(f"{where} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(weights)


def published_weights(content: Mapping[str, Any], where: str = "the given weights") -> dict[str, Tensor]:
    """The dict of tensors inside `content`, unwrapped and without prefixes; ValueError if there is none."""
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return published_weights(content[wrapper], where)
    weights = {_plain(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not weights:
        raise ValueError(f"{where} holds neither tensors nor one of {', '.join(WRAPPERS)}, but {_some(content)}")
    return weights


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix not in (".pt", ".pth", ".ckpt"):
        raise ValueError(f"{path} is neither .safetensors nor .pt, .pth or .ckpt")
    # DiT's training script stores its command line, a plain namespace, beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} is damaged or holds more than plain data: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _plain(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return _plain(name[len(prefix) :])
    return name


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """One phrase per kind of difference; empty if names and shapes agree."""
    shapes = [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    kinds = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "of another shape": shapes,
    }
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]


def _some(names: Mapping[str, Any] | list[str]) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
