"""The backbones reproduce the published implementations' outputs from their parameters, by their names."""

import dataclasses

import pytest
import torch

from erdfast.models import (
    ADMUNetConfig,
    DiTConfig,
    JiTConfig,
    LightningDiTConfig,
    TransformerConfig,
    UViTConfig,
    load_weights,
)
from erdfast.models.layers import sincos_table
from tests.parity import load_parity, parity_spec, parity_state_dict


def our_config(published):
    """Our configuration for one in the argument names of the published code."""
    side = published.get("image_size", published.get("input_size"))
    if "model_channels" in published:
        return unet_config(published)
    common = {
        "input_shape": (published["in_channels"], side, side),
        "patch_size": published["patch_size"],
        "depth": published["depth"],
        "num_heads": published["num_heads"],
        "num_classes": max(0, published["num_classes"]),  # U-ViT writes -1 for unconditional
    }
    if "hidden_size" in published:
        common["width"] = published["hidden_size"]
    if "bottleneck_dim" in published:
        return JiTConfig(
            bottleneck=published["bottleneck_dim"],
            context_length=published["in_context_len"],
            context_start=published["in_context_start"],
            **common,
        )
    if "use_swiglu" in published:
        return LightningDiTConfig(qk_norm=published["use_qknorm"], **common)
    if "learn_sigma" in published:
        return DiTConfig(learn_sigma=published["learn_sigma"], **common)
    return UViTConfig(
        width=published["embed_dim"],
        conv=published["conv"],
        mlp_time_embed=published.get("mlp_time_embed", False),
        **common,
    )


def unet_config(published):
    """Of an ADM UNet; its arguments that are ours by the same name need no table."""
    renamed = {"image_size", "in_channels", "out_channels", "use_new_attention_order"}
    return ADMUNetConfig(
        input_shape=(published["in_channels"], published["image_size"], published["image_size"]),
        learn_sigma=published["out_channels"] == 2 * published["in_channels"],
        new_attention_order=published["use_new_attention_order"],
        null_class=False,
        **{name: value for name, value in published.items() if name not in renamed},
    )


def load_case(name, **overrides):
    arrays = load_parity(name)
    spec = parity_spec(arrays)
    config = dataclasses.replace(our_config(spec["config"]), **overrides)
    model, state = config.build().eval(), parity_state_dict(spec)
    if isinstance(config, TransformerConfig) and "pos_embed" not in state:
        state["pos_embed"] = sincos_table(config.grid, config.width)
    load_weights(model, state)
    x, time, y = (torch.from_numpy(arrays[key]) for key in ("x", "t", "y"))
    if isinstance(config, LightningDiTConfig | JiTConfig):
        time = 1 - time  # theirs is 1 for data
    return model, spec, (x, time, y if config.num_classes else None), torch.from_numpy(arrays["output"])


CASES = ["dit", "dit_learnsigma", "uvit_conv", "uvit_noconv", "uvit_uncond_mlptime"]
CASES += ["lightningdit", "lightningdit_qknorm", "jit", "adm_unet"]


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


@pytest.mark.parametrize("name", ["dit", "uvit_conv", "jit", "adm_unet"])
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
    # A cast of the model must not round the frequencies of the time features and the angles of the tokens.
    after = dict(model.named_buffers())
    assert after.keys() == before.keys() != set()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["dit", "uvit_conv", "uvit_uncond_mlptime", "lightningdit_qknorm", "jit", "adm_unet"])
def test_float64_confirms_float32(name):
    model, _, (x, time, y), expected = load_case(name)
    with torch.no_grad():
        exact = model.double()(x.double(), time.double(), y)
    assert exact.dtype == torch.float64
    assert (exact - expected).abs().max() < 2e-5 * expected.std()
