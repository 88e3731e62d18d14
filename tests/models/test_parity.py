"""The backbones reproduce the published implementations' outputs from their parameters, by their names."""

import dataclasses

import pytest
import torch

from erdfast.models import DiTConfig, UViTConfig, load_published
from erdfast.models.layers import sincos_table
from tests.parity import load_parity, parity_spec, parity_state_dict


def our_config(published):
    """Our configuration for one in the argument names of the published code."""
    side = published.get("image_size", published.get("input_size"))
    common = {
        "input_shape": (published["in_channels"], side, side),
        "patch_size": published["patch_size"],
        "depth": published["depth"],
        "num_heads": published["num_heads"],
        "num_classes": max(0, published["num_classes"]),  # U-ViT writes -1 for unconditional
    }
    if "hidden_size" in published:
        return DiTConfig(width=published["hidden_size"], learn_sigma=published["learn_sigma"], **common)
    return UViTConfig(
        width=published["embed_dim"],
        conv=published["conv"],
        mlp_time_embed=published.get("mlp_time_embed", False),
        **common,
    )


def load_case(name, **overrides):
    arrays = load_parity(name)
    spec = parity_spec(arrays)
    config = dataclasses.replace(our_config(spec["config"]), **overrides)
    model, state = config.build().eval(), parity_state_dict(spec)
    if isinstance(config, DiTConfig):
        state["pos_embed"] = sincos_table(config.grid, config.width)
    load_published(model, state)
    x, time, y = (torch.from_numpy(arrays[key]) for key in ("x", "t", "y"))
    return model, spec, (x, time, y if config.num_classes else None), torch.from_numpy(arrays["output"])


CASES = ["dit", "dit_learnsigma", "uvit_conv", "uvit_noconv", "uvit_uncond_mlptime"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_output(name):
    model, _, inputs, expected = load_case(name)
    assert (model(*inputs) - expected).abs().max() < 2e-5 * expected.std()


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_count(name):
    model, spec, _, _ = load_case(name)
    published = {name: tuple(shape) for name, shape, _, _ in spec["parameters"]}
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == published
    assert {name for name, _ in model.named_parameters()} == set(published)
    assert sum(parameter.numel() for parameter in model.parameters()) == spec["n_params"]


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_batch_of_one_gives_the_same(name):
    model, _, (x, time, y), expected = load_case(name)
    for i in range(len(x)):
        one = model(x[i : i + 1], time[i : i + 1], None if y is None else y[i : i + 1])
        assert (one - expected[i : i + 1]).abs().max() < 2e-5 * expected.std()


@pytest.mark.parametrize("name", ["dit", "uvit_conv"])
@torch.no_grad()
def test_other_attention_backends_agree(name):
    for backend in ("reference", "math", "flash"):
        model, _, inputs, expected = load_case(name, attention=backend)
        assert (model(*inputs) - expected).abs().max() < 2e-5 * expected.std()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_bf16_is_close_under_autocast_and_as_weights(name):
    model, _, inputs, expected = load_case(name)
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(*inputs) - expected).abs().max() < 0.1 * expected.std()
    before = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model.bfloat16()
    assert (model(*inputs) - expected).abs().max() < 0.1 * expected.std()
    # A cast of the model must not round the frequencies of the time features.
    (frequencies,) = model.named_buffers()
    assert torch.equal(frequencies[1], before[frequencies[0]])


@pytest.mark.parametrize("name", ["dit", "uvit_conv", "uvit_uncond_mlptime"])
def test_float64_confirms_float32(name):
    model, _, (x, time, y), expected = load_case(name)
    with torch.no_grad():
        exact = model.double()(x.double(), time.double(), y)
    assert exact.dtype == torch.float64
    assert (exact - expected).abs().max() < 2e-5 * expected.std()
