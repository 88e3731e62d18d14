"""Runs the kernels on the GPU where there is one, else in Triton's interpreter.

`triton.jit` decides once, when a kernel is defined, and that includes Triton's own library: the variable must
be set before anything imports triton.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton.language" in sys.modules:
        raise RuntimeError(
            "triton was imported before the tests of the kernels without TRITON_INTERPRET=1: set it earlier"
        )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
