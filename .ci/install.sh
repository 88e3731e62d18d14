#!/usr/bin/env bash
# Makes .venv with everything in it. A torch that is already there and new enough is kept, whether it came with the
# Python that runs this or was put into .venv by hand; otherwise constraints.txt says which is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=.venv

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "install: $python is $("$python" --version 2>&1); Python 3.10 or later is needed (make PYTHON=python3.11 ...)" >&2
  exit 2
}
command -v "${CXX:-c++}" >/dev/null || { echo "install: no C++ compiler found; install g++ or clang++" >&2; exit 2; }

if nvidia-smi -L >/dev/null 2>&1; then gpu=1; else gpu=0; fi

# Prints the version of a torch that will do: 2.10 or later, and with CUDA where a GPU is visible.
usable_torch() {
  GPU=$gpu "$1" - 2>/dev/null <<'EOF'
import os, sys
import torch
new_enough = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
has_cuda = torch.version.cuda is not None
sys.exit(1) if not new_enough or (os.environ["GPU"] == "1" and not has_cuda) else print(torch.__version__)
EOF
}

if [ ! -x "$venv/bin/python" ]; then
  if usable_torch "$python" >/dev/null; then
    "$python" -m venv --system-site-packages "$venv"
  else
    "$python" -m venv "$venv"
  fi
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
constraints=$venv/constraints.txt
cp constraints.txt "$constraints"

if version=$(usable_torch "$venv/bin/python"); then
  echo "install: keeping torch $version"
  # Its companions are its own affair: pin what is there, and nothing that belongs to another torch.
  grep -vE '^(torch|triton)==' constraints.txt >"$constraints"
  echo "torch==$version" >>"$constraints"
  if [[ $version == "$(sed -n 's/^torch==//p' constraints.txt)"* ]]; then grep '^triton==' constraints.txt >>"$constraints"; fi
else
  pinned=$(sed -n 's/^torch==//p' constraints.txt)
  # "===" admits no local version such as +cpu: where a GPU is visible the ordinary build is wanted.
  if [ "$gpu" = 1 ]; then requirement="torch===$pinned"; else requirement="torch==$pinned"; fi
  echo "install: installing $requirement"
  "${pip[@]}" install --quiet --constraint "$constraints" "$requirement"
fi
if grep -q '^triton==' "$constraints" && [ "$(uname -s)" = Linux ]; then
  "${pip[@]}" install --quiet --constraint "$constraints" triton
fi
# The build tools go into .venv, and the build uses them from there: no second environment, no second torch.
"${pip[@]}" install --quiet --constraint "$constraints" scikit-build-core pybind11 ninja cmake
"${pip[@]}" install --quiet --constraint "$constraints" --no-build-isolation --editable '.[dev]'
touch "$venv/.installed"
"$venv/bin/python" - <<'EOF'
import erdfast, torch
from erdfast import _C
print(f"install: erdfast {erdfast.__version__}, torch {torch.__version__}, CPU kernels for {', '.join(_C.supported_isas())}")
EOF
