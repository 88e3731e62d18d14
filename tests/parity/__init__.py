"""Numbers of the published implementations, which the tests must match.

`load_parity("dit")` reads dit.npz from this folder, or from the folder named by ERDFAST_PARITY_DIR.
"""

import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch


def parity_folder() -> Path:
    """The folder that holds the npz files."""
    return Path(os.environ.get("ERDFAST_PARITY_DIR", Path(__file__).parent))


def load_parity(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(parity_folder() / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def parity_spec(arrays: dict[str, np.ndarray]) -> dict:
    """The JSON description of a network: config, seed, parameter count, parameters."""
    return json.loads(str(arrays["spec"]))


def parity_state_dict(spec: dict) -> dict[str, torch.Tensor]:
    """The made-up weights of a network, by published name; fixed tables (scale null) are left out."""
    state = {}
    for name, shape, scale, offset in spec["parameters"]:
        if scale is None:
            continue
        random = np.random.RandomState(zlib.crc32(name.encode()) ^ spec["seed"])
        values = random.randn(*shape).astype(np.float32) * np.float32(scale) + np.float32(offset)
        state[name] = torch.from_numpy(np.asarray(values, dtype=np.float32))
    return state
