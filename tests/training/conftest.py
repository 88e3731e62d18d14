"""One thread for these tests; and files for those that measure pictures."""

import pytest
import torch
from safetensors.torch import save_file

from tests.evaluation.inception_files import save_pictures, use_small_network
from tests.runs import single_thread


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with single_thread():
        yield


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with pictures, made-up weights, latents, and a small network in Inception's place."""
    use_small_network(monkeypatch)
    save_pictures(tmp_path / "real.npz", 50)
    (tmp_path / "weights.pth").write_bytes(b"made up")
    save_file({"latents": torch.randn(20, 4, 8, 8)}, tmp_path / "latents.safetensors")
    return tmp_path
