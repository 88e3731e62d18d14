"""Without a GPU, Triton's interpreter stands in; the variable must be set before anything imports triton."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random data in every run and any order: a test that fails once fails again."""
    torch.manual_seed(0)
