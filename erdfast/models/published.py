"""Loading published checkpoints. Our state_dict has their names, so that saving it is publishing it."""

from __future__ import annotations

import argparse
import dataclasses
import pickle
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adm_unet import ADMUNetConfig
from .backbone import Backbone, BackboneConfig
from .dit import DiT
from .layers import TimeFeatures
from .recognise import recognise, told_by_weights
from .uvit import UViTConfig

WRAPPERS = ("ema", "model_ema1", "model_ema", "ema_model", "state_dict", "model", "module")
"""Keys under which training scripts put the weights, the best first: its authors evaluated the average."""

AVERAGES = ("ema", "model_ema1", "model_ema", "ema_model")
"""Those of them that are averages."""

PREFIXES = ("module.", "_orig_mod.", "net.")
"""What DistributedDataParallel, torch.compile and JiT's wrapper put before the names."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")
"""Of files that are read."""

COMPUTED = ("freqs_cos", "freqs_sin")
"""How the names of tables end that published checkpoints hold and our networks compute."""

_SHOWN = 5


class Convention(NamedTuple):
    """How a family of published checkpoints differs from what this package trains."""

    time_is_data: bool = False
    """The time that its network embeds is 1 for data, where our network of that kind embeds 1 for noise."""
    velocity_to_data: bool = False
    """It predicts data minus noise, the negative of our target u."""
    first_time: int = 0
    """The time of the least noise on a discrete schedule."""
    process: Mapping[str, Any] = {}
    """Options of `Process` under which it was trained; empty where it is none of ours, or not always the same."""


_FLOW = {"schedule": "flow", "target": "u", "weighting": "constant"}
CONVENTIONS: dict[str, Convention] = {
    "dit": Convention(process={"schedule": "ddpm_linear", "target": "eps", "weighting": "constant"}),
    "sit": Convention(time_is_data=True, velocity_to_data=True, process=_FLOW),
    "lightningdit": Convention(velocity_to_data=True, process=_FLOW),  # the network itself turns the time round
    "jit": Convention(process=_FLOW | {"target": "x0"}),
    "uvit": Convention(first_time=1, process={"schedule": "sd_linear", "target": "eps", "weighting": "constant"}),
    "adm_unet": Convention(),
    "erd": Convention(process={"schedule": "cosine", "target": "eps", "weighting": "constant"}),
}
"""By family. SiT and the ERD authors have the names of others, so that nothing but the caller can tell them apart."""

NETWORKS = {"sit": ("dit",), "erd": ("dit", "uvit", "adm_unet")}
"""The backbones of a family that is not called like its own."""


class Published(NamedTuple):
    """What `load_published` made."""

    model: Backbone
    """In evaluation mode, on the CPU, in float32."""
    family: str
    """A name of CONVENTIONS."""
    process: dict[str, Any]
    """Options of `Process` under which the family was trained, JiT's noise scale included; empty where not known."""
    found: tuple[str, ...]
    """What the file holds and what was done to it, a phrase each."""


def load_published(
    source: str | Path | Mapping[str, Any],
    *,
    family: str | None = None,
    config: BackboneConfig | None = None,
    ours: bool = False,
    **fields: Any,
) -> Published:
    """The network of a published checkpoint: its kind and sizes are read from the names and shapes of its tensors.

    Wrappers (an average before the last weights), prefixes and computed tables are taken off. What the family counts
    the other way round is folded into the weights, exactly up to float32 rounding: a SiT's time into its first Linear,
    by the addition theorems for the features; the sign of SiT's and LightningDiT's velocity into the last one. The
    network then takes our time and predicts our targets like any that was trained here.

    Args:
        source: a file or its content, as for `load_weights`.
        family: a name of CONVENTIONS. By default what the names say; a SiT must be named.
        config: of the network, where shapes do not tell it: an ADM UNet's, in which the weights overrule whether there
            are classes, a null class and a learned variance.
        ours: the checkpoint was trained by this package, so that nothing is turned round.
        fields: fields of the configuration that are known better than shapes tell them (`num_heads`, `attention`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown family, no weights, names and shapes of no backbone, or numbers that are no weights; the
            message says which.
    """
    if family is not None and family not in CONVENTIONS:
        raise ValueError(f"unknown family {family!r}; choose from {', '.join(CONVENTIONS)}")
    where, (weights, found) = _opened(source)
    if config is None:
        config = recognise(weights, where, **fields)
    elif fields:
        raise ValueError(f"config is given, so that {', '.join(fields)} cannot be: use dataclasses.replace")
    elif isinstance(config, ADMUNetConfig):
        config = told_by_weights(config, weights)
    kind = config.backbone
    if family is not None and kind not in NETWORKS.get(family, (family,)):
        raise ValueError(f"{where} is a {kind}, not a {family}")
    family = family or kind
    convention = Convention() if ours else CONVENTIONS[family]
    if convention.first_time and isinstance(config, UViTConfig):
        config = dataclasses.replace(config, time_offset=float(convention.first_time))
    model = config.build()
    found += _fit(model, weights, where)
    model.load_state_dict(weights)
    found += _turn_round(model, convention)
    found.append(_describe(config))
    process = dict(convention.process)
    if family == "jit" and not ours:
        process["noise_scale"] = config.input_shape[1] / 256
    return Published(model.eval(), family, process, tuple(found))


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> list[str]:
    """Copy published weights into `model`, in place and as they are; the model keeps its dtypes and devices.

    Args:
        model: an unsharded network.
        source: a `.safetensors` file, a `.pt`, `.pth` or `.ckpt` file (read without executing anything), or
            what such a file holds: a dict of tensors, or a dict that holds one under a name of WRAPPERS. Prefixes
            of PREFIXES are removed.

    Returns:
        What was found, a phrase each.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, no weights in it, or weights of another network: the message lists
            the names that are missing, unexpected, of another shape, or whose numbers are no weights (integers, not
            finite), and the model is unchanged.
    """
    where, (weights, found) = _opened(source)
    found += _fit(model, weights, where)
    model.load_state_dict(weights)
    return found


def unwrap(content: Mapping[str, Any], where: str = "the given weights") -> tuple[dict[str, Tensor], list[str]]:
    """The dict of tensors inside `content`, without wrappers, prefixes and computed tables; and what was taken off.

    Raises:
        ValueError: there are no tensors, or two of one name but for its prefix.
    """
    for wrapper in WRAPPERS:
        if isinstance(content.get(wrapper), Mapping) and content[wrapper]:
            weights, found = unwrap(content[wrapper], where)
            return weights, [f"{'averaged weights' if wrapper in AVERAGES else 'weights'} under {wrapper!r}", *found]
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        there = _some(content) or "nothing"
        raise ValueError(f"{where} holds neither tensors nor one of {', '.join(WRAPPERS)}, but {there}")
    plain = {name: _plain(name) for name in tensors}
    if twice := [name for name, count in Counter(plain.values()).items() if count > 1]:
        raise ValueError(f"{where} holds more than one network: {_some(twice)} with several prefixes")
    found = [f"prefix {p!r} removed" for p in dict.fromkeys(n.removesuffix(plain[n]) for n in tensors) if p]
    computed = [name for name in tensors if name.endswith(COMPUTED)]
    if computed:
        found.append(f"{len(computed)} rotary tables left out, they are computed")
    return {plain[name]: value for name, value in tensors.items() if name not in computed}, found


def _opened(source: str | Path | Mapping[str, Any]) -> tuple[str, tuple[dict[str, Tensor], list[str]]]:
    """What errors call it, and what `unwrap` finds in it."""
    if isinstance(source, Mapping):
        return "the given weights", unwrap(source)
    return str(source), unwrap(_read(Path(source)), str(source))


def _fit(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> list[str]:
    """ValueError unless names and shapes agree and the numbers are weights; a phrase if the dtypes do not agree."""
    problems = _differences(weights, model.state_dict())
    if problems:
        raise ValueError(f"{where} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    converted = any(weights[name].dtype != value.dtype for name, value in model.state_dict().items())
    return ["converted from another precision"] if converted else []


def _describe(config: BackboneConfig) -> str:
    """ "dit: depth 28, width 1152, ..., learn_sigma True", without what is the same in every network."""
    values = {name: value for name, value in config.describe().items() if name not in ("backbone", "attention")}
    described = f"{config.backbone}: " + ", ".join(f"{name} {value}" for name, value in values.items())
    if values.get("learn_sigma"):
        described += " (the first half of the output's channels is the prediction, the learned variance is not used)"
    return described


@torch.no_grad()
def _turn_round(model: Backbone, convention: Convention) -> list[str]:
    """Fold a family's opposite conventions into the weights, in place; what was done, a phrase each."""
    done = []
    if convention.time_is_data:
        assert isinstance(model, DiT)
        _reverse_time(model.t_embedder.mlp[0], model.t_embedder.features)
        done.append("time 1 was data: folded into the first Linear of the time's embedding")
    if convention.velocity_to_data:
        last = model.get_submodule("final_layer.linear")
        for parameter in last.parameters():
            parameter.neg_()
        done.append("it predicted data minus noise: the last Linear's sign is changed")
    return done


def _reverse_time(linear: nn.Module, features: TimeFeatures) -> None:
    """Make `linear(features(t))` what it was for 1 - t: cos(w - wt) and sin(w - wt) by the addition theorems.

    With the features [cos(wt), sin(wt)] and the weights [A, B], the new ones are
    [A cos(w) + B sin(w), A sin(w) - B cos(w)].
    """
    assert isinstance(linear, nn.Linear)
    half = features.features // 2
    weight, w = linear.weight.double(), features.frequencies.double()
    A, B = weight[:, :half], weight[:, half:]
    linear.weight.copy_(torch.cat([A * w.cos() + B * w.sin(), A * w.sin() - B * w.cos()], dim=1))


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is neither .safetensors nor .pt, .pth or .ckpt")
    # DiT's training script stores its command line, a plain namespace, beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is damaged or holds more than plain data: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _plain(name: str) -> str:
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(prefix)
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
        "whose numbers are no weights": [] if shapes else _no_weights(found, wanted),
    }
    return [f"{len(names)} {kind} ({_some(names)})" for kind, names in kinds.items() if names]


def _no_weights(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Integers where there should be real numbers, and what is not finite in the dtype wanted."""
    problems = []
    for name, value in wanted.items():
        if name not in found or not value.is_floating_point():
            continue
        if not found[name].is_floating_point():
            problems.append(f"{name} is {str(found[name].dtype).removeprefix('torch.')}")
        elif not found[name].to(value.dtype).isfinite().all():
            problems.append(f"{name} is not finite")
    return problems


def _some(names: Mapping[str, Any] | list[str]) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(map(str, names[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")
