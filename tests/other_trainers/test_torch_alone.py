"""erdfast.ops and erdfast.process with torch and nothing else: every other package that is installed is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAINER = """
import importlib.abc, importlib.metadata, re, sys, warnings

def closure(name, known):
    known.add(name)
    for requirement in importlib.metadata.requires(name) or []:
        other = re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")
        if "extra ==" not in requirement and other not in known:
            try:
                closure(other, known)
            except importlib.metadata.PackageNotFoundError:
                pass
    return known

ALLOWED = closure("torch", set()) | {"erdfast"}
INSTALLED = importlib.metadata.packages_distributions()
REFUSED = {m for m, names in INSTALLED.items() if not ALLOWED & {n.lower().replace("_", "-") for n in names}}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED or name in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
assert {"numpy", "sklearn", "safetensors", "pytest"} <= REFUSED, REFUSED

import torch
from collections import namedtuple
from erdfast.ops import NoiseKey, add_noise, diffusion_loss
from erdfast.process import Process

device = "cuda" if torch.cuda.is_available() else "cpu"
network = torch.nn.Conv2d(3, 3, 3, padding=1).to(device)
process = Process(schedule="flow", target="u", weighting="erd").to(device)
Coefficients = namedtuple("Coefficients", "alpha sigma c_x c_eps w")
x0, t = torch.randn(4, 3, 8, 8, device=device), torch.rand(4, device=device)
one = torch.ones_like(t)
for coef in (Coefficients(1 - t, t, -one, one, one), process.coefficients(t)):
    key = NoiseKey(0, stream=1)
    loss = diffusion_loss(network(add_noise(x0, coef, key)), x0, coef, key)
    loss.backward()
    print(float(loss) > 0, bool(network.weight.grad.any()))
print(*sorted(REFUSED & {name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("missing", [[], ["erdfast._C", "triton"]], ids=["as installed", "without kernels"])
def test_a_trainer_with_torch_alone(missing: list[str]) -> None:
    result = subprocess.run([sys.executable, "-c", TRAINER, *missing], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["True True", "True True", ""]
    assert ("slow reference" in result.stderr) == bool(missing), result.stderr
