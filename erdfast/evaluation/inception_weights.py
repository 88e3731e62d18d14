"""The weight file of the FID Inception network: from the user's disk, checked, never downloaded."""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .inception import InceptionNetwork

FILE_NAME = "pt_inception-2015-12-05-6726825d.pth"
SOURCE = (
    f"erdfast never downloads it: the usual file is {FILE_NAME} (91 MiB), among the releases of "
    "github.com/mseitzer/pytorch-fid (tag fid_weights)"
)
_DAMAGE = (RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, ValueError, LookupError, TypeError)
"""What reading a file that is no state_dict makes PyTorch raise."""


def load_inception(path: Path, device: torch.device | str = "cpu") -> InceptionNetwork:
    """The network with the weights of a file, ready for inference: evaluation mode, norms folded, channels last.

    Args:
        path: .pth or .pt (a state_dict, read without unpickling anything but tensors) or .safetensors, with the
            names of the common converted file.
        device: where it shall compute.

    Raises:
        ValueError: the file is missing (says where people get it), damaged, or holds other tensors; names it.
    """
    state = _read(path)
    with torch.device("meta"):  # random weights would take a second and be thrown away
        network = InceptionNetwork()
    _check(path, state, network.state_dict())
    network.load_state_dict({name: value.float() for name, value in state.items()}, strict=False, assign=True)
    network.requires_grad_(False).eval().fold_norms()
    return network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _read(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(f"{path}: no such file; it should hold the weights of the FID Inception network. {SOURCE}")
    if path.is_dir() or path.suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{path}: expected a .pth, .pt or .safetensors file with the FID Inception weights. {SOURCE}")
    _check_hash(path)
    try:
        state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: cannot be read as a state_dict of tensors ({reason}). {SOURCE}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds no state_dict (tensors by name), but {type(state).__name__}. {SOURCE}")
    return {str(name): value for name, value in state.items() if not str(name).endswith("num_batches_tracked")}


def _read_torch(path: Path) -> Mapping[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _check_hash(path: Path) -> None:
    """PyTorch's convention: NAME-abcdef12.pth begins its SHA-256 with abcdef12."""
    match = re.search(r"-([0-9a-f]{8})\.pth$", path.name)
    if match is None:
        return
    with path.open("rb") as stream:
        found = hashlib.sha256()
        while chunk := stream.read(1 << 22):
            found.update(chunk)
    if not found.hexdigest().startswith(match[1]):
        raise ValueError(
            f"{path}: is damaged or another file: its SHA-256 begins with {found.hexdigest()[:8]}, by its name it "
            f"should be {match[1]} ({path.stat().st_size:,} bytes)"
        )


def _check(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names, shapes and finite numbers suit the network."""
    names = {name for name in wanted if not name.endswith("num_batches_tracked")}
    missing, extra = sorted(names - state.keys()), sorted(state.keys() - names)
    if missing or extra:
        found = f"lacks {len(missing)} of {len(names)} tensors" + (f", such as {missing[0]}" if missing else "")
        found += f", and has {len(extra)} unknown ones, such as {extra[0]}" if extra else ""
        raise ValueError(f"{path}: is not the FID Inception network: it {found}. {SOURCE}")
    for name in sorted(names):
        if state[name].shape != wanted[name].shape:
            raise ValueError(
                f"{path}: is not the FID Inception network: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(wanted[name].shape)}. {SOURCE}"
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise ValueError(f"{path}: {name} holds values that are not finite")
