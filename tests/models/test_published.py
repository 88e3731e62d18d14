"""Checkpoints in the forms in which they are published, and the refusal of wrong ones."""

import argparse

import pytest
import torch
from safetensors.torch import save_file

from erdfast.models import load_weights
from erdfast.presets import build_model


def other_weights(name="uvit_tiny", **overrides):
    torch.manual_seed(1)
    return {key: torch.randn_like(value) for key, value in build_model(name, **overrides).state_dict().items()}


def assert_loaded(model, state):
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("name", ["uvit_tiny", "dit_tiny"])
def test_safetensors_round_trip(name, tmp_path):
    state = other_weights(name)
    save_file(state, tmp_path / "model.safetensors")
    model = build_model(name)
    load_weights(model, tmp_path / "model.safetensors")
    assert_loaded(model, state)
    save_file(model.state_dict(), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {
            "model": {key: value + 1 for key, value in state.items()},
            "ema": state,
            "opt": {"lr": 1.0},
        },
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {"ema": state, "args": argparse.Namespace(model="U-ViT")},
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", None])
def test_wrapped_checkpoints(wrap, suffix, tmp_path):
    state = other_weights()
    source = wrap(state)
    if suffix is not None:
        path = tmp_path / f"model{suffix}"
        torch.save(source, path)
        source = path
    model = build_model("uvit_tiny")
    load_weights(model, source)
    assert_loaded(model, state)


def test_weights_take_the_dtype_of_the_model():
    state = other_weights()
    model = build_model("uvit_tiny")
    load_weights(model, {key: value.half() for key, value in state.items()})
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert_loaded(model, {key: value.half().float() for key, value in state.items()})


def test_a_wrong_checkpoint_is_one_error_and_no_change():
    model = build_model("dit_tiny")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = other_weights("dit_tiny", learn_sigma=True)
    del state["pos_embed"]
    state["surplus"] = torch.zeros(2)
    with pytest.raises(ValueError, match="does not fit this DiT") as error:
        load_weights(model, state)
    message = str(error.value)
    assert "1 missing (pos_embed)" in message
    assert "1 unexpected (surplus)" in message
    assert "final_layer.linear.weight is (32, 64) instead of (16, 64)" in message
    assert_loaded(model, before)


def test_another_backbones_checkpoint_lists_the_first_few_names():
    with pytest.raises(ValueError, match=r"missing \(.*, \.\.\.\).*unexpected \(.*, \.\.\.\)") as error:
        load_weights(build_model("dit_tiny"), other_weights("uvit_tiny"))
    assert len(str(error.value)) < 800


def test_files_that_hold_no_weights(tmp_path):
    model = build_model("uvit_tiny")
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        load_weights(model, tmp_path / "absent.pt")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither \.safetensors nor"):
        load_weights(model, tmp_path / "model.bin")
    torch.save({"model": other_weights(), "path": tmp_path}, tmp_path / "objects.pt")
    with pytest.raises(ValueError, match="holds more than plain data"):
        load_weights(model, tmp_path / "objects.pt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"holds neither tensors nor one of ema, .* but epoch, lr"):
        load_weights(model, tmp_path / "none.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor, not a dict"):
        load_weights(model, tmp_path / "tensor.pt")
