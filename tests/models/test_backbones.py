"""Behaviour of the backbones beyond published outputs: gradients, first weights, refusals, compilation."""

import copy
import dataclasses
import json

import pytest
import torch

from erdfast.models import DiTConfig, JiTConfig, LightningDiTConfig, TransformerConfig, UViTConfig, config_from_dict
from erdfast.models.dit import DiTBlock
from erdfast.models.layers import Stream, TimeFeatures, joined, patchify, sincos_table, unpatchify
from erdfast.models.rope_layers import RopeBlock
from erdfast.models.uvit import UViTBlock
from erdfast.presets import MODELS, build_model

ADALN = ["dit_tiny", "lightningdit_tiny", "jit_tiny"]
TINY = [*ADALN, "uvit_tiny"]
ALL = [*TINY, "adm_unet_tiny"]
COMPILED = ["dit_tiny", "jit_tiny", "uvit_tiny"]
"""LightningDiT's blocks are JiT's."""
ONE_BLOCK = {"jit_tiny": {"context_start": 0}}
"""What else must change for a depth of one."""


def inputs_for(model, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *model.input_shape, generator=generator)
    time = 1000 * torch.rand(batch, generator=generator)
    y = torch.randint(0, model.num_classes + 1, (batch,), generator=generator)
    return x, time, y


def named_tensors(model):
    return [*model.named_parameters(), *model.named_buffers()]


def randomised(model, seed=0):
    """The model with noise on every trainable parameter, so that no gate is closed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_every_trainable_parameter(name):
    model = randomised(build_model(name))
    model(*inputs_for(model)).square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), parameter_name
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", TINY)
def test_gradients_match_finite_differences(name):
    model = build_model(name, depth=1, width=8, input_shape=(1, 4, 4), **ONE_BLOCK.get(name, {}))
    model = randomised(model).double()
    x, time, y = inputs_for(model, batch=2)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, time, y), (x,))


@pytest.mark.parametrize("name", ALL)
def test_samples_of_a_batch_do_not_mix(name):
    model = randomised(build_model(name)).eval()
    x, time, y = inputs_for(model)
    with torch.no_grad():
        before = model(x, time, y)
        x[0], time[0], y[0] = 0.0, 1.0, 0
        after = model(x, time, y)
    assert (after[1:] - before[1:]).abs().max() < 1e-5
    assert (after[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_time_and_label_matter(name):
    model = randomised(build_model(name)).eval()
    x, time, y = inputs_for(model)
    out = model(x, time, y)
    assert (model(x, time + 50, y) - out).abs().max() > 1e-3
    assert (model(x, time, (y + 1) % 11) - out).abs().max() > 1e-3
    null = torch.full_like(y, 10)
    assert torch.isfinite(model(x, time, null)).all()
    assert (model(x, time, null) - model(x, time, null - 1)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_unconditional_networks_see_the_time(name):
    model = randomised(build_model(name, num_classes=0)).eval()
    x, time, _ = inputs_for(model)
    out = model(x, time)
    assert torch.equal(model(x, time, None), out)
    assert (model(x, time + 50) - out).abs().max() > 1e-3


@pytest.mark.parametrize("name", TINY)
def test_rectangular_inputs_and_other_patches(name):
    model = randomised(build_model(name, input_shape=(3, 6, 9), patch_size=3))
    assert model(*inputs_for(model)).shape == (3, 3, 6, 9)
    assert isinstance(model.config, TransformerConfig)
    assert model.config.grid == (2, 3)


@pytest.mark.parametrize("name", ADALN)
def test_a_dit_starts_at_zero_with_identity_blocks(name):
    model = build_model(name)
    assert model(*inputs_for(model)).abs().max() == 0
    block = model.blocks_for_sharding()[0]
    tokens, condition = torch.randn(2, 16, 64), torch.randn(2, 64)
    rope = () if name == "dit_tiny" else (model.get_submodule("feat_rope")(),)
    assert torch.equal(joined(block(Stream(tokens), condition, *rope)), tokens)


@pytest.mark.parametrize("name", TINY)
def test_initial_scales_are_the_published_ones(name):
    torch.manual_seed(0)
    model = build_model(name, width=128, num_heads=4, depth=3)
    state = model.state_dict()
    xavier = (6 / (128 + 512)) ** 0.5 / 3**0.5
    expected = {
        "dit_tiny": {
            "blocks.0.mlp.fc1.weight": xavier,
            "t_embedder.mlp.0.weight": 0.02,
            "t_embedder.mlp.2.weight": 0.02,
            "y_embedder.embedding_table.weight": 0.02,
            "x_embedder.proj.weight": (6 / (128 + 16)) ** 0.5 / 3**0.5,
            "blocks.1.adaLN_modulation.1.weight": 0.0,
            "final_layer.linear.weight": 0.0,
        },
        "lightningdit_tiny": {
            "blocks.0.mlp.w12.weight": (6 / (128 + 2 * 341)) ** 0.5 / 3**0.5,
            "blocks.0.mlp.w3.weight": (6 / (128 + 341)) ** 0.5 / 3**0.5,
            "blocks.2.norm1.weight": 1.0,
            "final_layer.norm_final.weight": 1.0,
            "t_embedder.mlp.0.weight": 0.02,
            "x_embedder.proj.weight": (6 / (128 + 16)) ** 0.5 / 3**0.5,
            "final_layer.adaLN_modulation.1.weight": 0.0,
        },
        "jit_tiny": {
            "blocks.0.attn.q_norm.weight": 1.0,
            "in_context_posemb": 0.02,
            "x_embedder.proj1.weight": (6 / (8 + 16)) ** 0.5 / 3**0.5,
            "x_embedder.proj2.weight": (6 / (128 + 8)) ** 0.5 / 3**0.5,
            "x_embedder.proj2.bias": 0.0,
            "y_embedder.embedding_table.weight": 0.02,
            "final_layer.linear.weight": 0.0,
        },
        "uvit_tiny": {
            "in_blocks.0.mlp.fc1.weight": 0.02,
            "out_blocks.0.skip_linear.weight": 0.02,
            "pos_embed": 0.02,
            "label_emb.weight": 1.0,
            "in_blocks.0.norm1.bias": 0.0,
        },
    }[name]
    for key, scale in expected.items():
        assert state[key].square().mean().sqrt() == pytest.approx(scale, rel=0.1), key
    ends = ("fc1.bias", "fc2.bias", "w12.bias", "w3.bias", "attn.proj.bias")
    linear_biases = [value for key, value in state.items() if key.endswith(ends)]
    assert len(linear_biases) == 9
    assert all(bias.abs().max() == 0 for bias in linear_biases)


@pytest.mark.parametrize("name", ALL)
def test_meta_device_then_init_weights(name):
    with torch.device("meta"):
        model = build_model(name)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for _, tensor in named_tensors(model):
            tensor.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    reference = build_model(name)
    torch.manual_seed(0)
    reference.init_weights()
    for (key, tensor), (_, wanted) in zip(named_tensors(model), named_tensors(reference), strict=True):
        assert torch.equal(tensor, wanted), key


@pytest.mark.parametrize("name", TINY)
def test_compiles_without_graph_breaks(name):
    model = randomised(build_model(name))
    x, time, y = inputs_for(model, batch=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out, eager = compiled(x, time, y), model(x, time, y)
    assert (out - eager).abs().max() < 1e-5
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(out.square().sum(), parameters)
    wanted = torch.autograd.grad(eager.square().sum(), parameters)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < 1e-4 * other.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_compiles_under_autocast(name):
    model = randomised(build_model(name))
    inputs = inputs_for(model, batch=2)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        out, eager = compiled(*inputs), model(*inputs)
    assert (out.float() - eager.float()).abs().max() < 0.05 * eager.float().std()


def test_blocks_for_sharding_are_all_blocks_in_order():
    dit, uvit = build_model("dit_tiny"), build_model("uvit_tiny", depth=5)
    for name in ("lightningdit_tiny", "jit_tiny"):
        model = build_model(name)
        assert model.blocks_for_sharding() == [module for module in model.modules() if isinstance(module, RopeBlock)]
    assert dit.blocks_for_sharding() == [module for module in dit.modules() if isinstance(module, DiTBlock)]
    assert uvit.blocks_for_sharding() == [module for module in uvit.modules() if isinstance(module, UViTBlock)]
    assert len(uvit.blocks_for_sharding()) == 5


@pytest.mark.parametrize("name", ALL)
def test_wrong_inputs_are_refused(name):
    model = build_model(name)
    x, time, y = inputs_for(model)
    C, H, W = model.input_shape
    wrong = {
        rf"x must be \(B, {C}, {H}, {W}\), not \(3, {C}, {H}, 6\)": (x[..., :6], time, y),
        rf"x must be \(B, {C}, {H}, {W}\), not \({C}, {H}, {W}\)": (x[0], time, y),
        "x must be floating point": (x.long(), time, y),
        r"time must be \(3,\)": (x, time[:2], y),
        "time must be float32, not torch.bfloat16": (x, time.bfloat16(), y),
        r"needs labels y \(B,\) in 0..10": (x, time, None),
        r"y must be \(3,\) int64": (x, time, y[:1]),
        "y must be .* torch.float32": (x, time, y.float()),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            model(*arguments)
    unconditional = build_model(name, num_classes=0)
    with pytest.raises(ValueError, match="unconditional"):
        unconditional(x, time, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (4, 9, 8)}, "height 9 is not divisible by patch_size 2"),
        ({"input_shape": (4, 8, 9)}, "width 9 is not divisible by patch_size 2"),
        ({"input_shape": (4, 8)}, "channels, height, width"),
        ({"input_shape": (0, 8, 8)}, "channels must be at least 1"),
        ({"num_heads": 5}, "width 64 is not divisible by num_heads 5"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"patch_size": 0}, "patch_size must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"attention": "xformer"}, "unknown attention backend 'xformer'"),
    ],
)
@pytest.mark.parametrize("name", TINY)
def test_impossible_configurations_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MODELS[name], **changes)


def test_limits_of_one_backbone():
    with pytest.raises(ValueError, match="depth must be odd"):
        UViTConfig(width=64, depth=4, num_heads=2)
    with pytest.raises(ValueError, match="width must be even"):
        UViTConfig(width=63, depth=3, num_heads=3)
    with pytest.raises(ValueError, match="multiple of 4"):
        DiTConfig(width=66, depth=4, num_heads=2)
    with pytest.raises(ValueError, match="width 66 is not a multiple of 4"):
        LightningDiTConfig(width=66, depth=4, num_heads=2)
    with pytest.raises(ValueError, match="width 24 over num_heads 4 is 6, not a multiple of 4"):
        LightningDiTConfig(width=24, depth=4, num_heads=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"context_length": -1}, "context_length must be at least 0"),
        ({"context_start": 4}, "context_start must be a block, 0 to 3, not 4"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dropout": 0.1, "depth": 3}, "needs a depth of 4 to 128, not 3"),
    ],
)
def test_limits_of_a_jit(changes, message):
    with pytest.raises(ValueError, match=message):
        JiTConfig(**({"width": 64, "depth": 4, "num_heads": 2, "context_start": 1} | changes))


@pytest.mark.parametrize("name", list(MODELS))
def test_configurations_survive_json(name):
    config = dataclasses.replace(MODELS[name], num_classes=3, attention="math")
    assert config_from_dict(json.loads(json.dumps(config.describe()))) == config


def test_bad_descriptions_are_refused():
    good = MODELS["dit_tiny"].describe()
    with pytest.raises(ValueError, match="unknown backbone 'vit'; choose from dit, uvit, "):
        config_from_dict({**good, "backbone": "vit"})
    with pytest.raises(ValueError, match=r"unknown \['wdth'\]"):
        config_from_dict({**good, "wdth": 3})
    with pytest.raises(ValueError, match=r"missing \['width'\]"):
        config_from_dict({key: value for key, value in good.items() if key != "width"})


def test_patchify_is_the_convolution_and_unpatchify_places_every_number():
    x = torch.randn(2, 3, 6, 4)
    conv = torch.nn.Conv2d(3, 5, kernel_size=2, stride=2)
    linear = torch.nn.functional.linear(patchify(x, 2), conv.weight.flatten(1), conv.bias)
    assert (linear - conv(x).flatten(2).transpose(1, 2)).abs().max() < 1e-6
    numbers = torch.arange(6 * 12.0).reshape(1, 6, 12)
    image = unpatchify(numbers, (3, 2), 2)
    for row, column, i, j, c in [(0, 0, 0, 0, 0), (2, 1, 1, 0, 2), (1, 0, 0, 1, 1)]:
        assert image[0, c, 2 * row + i, 2 * column + j] == numbers[0, 2 * row + column, (2 * i + j) * 3 + c]


def test_position_table_against_its_definition():
    table = sincos_table((2, 3), 8)
    row, column = 1, 2
    omega = [1.0, 10000 ** (-1 / 2)]
    expected = [f(p * w) for p in (column, row) for f in (torch.sin, torch.cos) for w in torch.tensor(omega)]
    assert (table[0, row * 3 + column] - torch.stack(expected)).abs().max() < 1e-6


def test_time_features_against_float64():
    time = torch.tensor([0.0, 0.37, 999.0])
    features = TimeFeatures(256)
    angles = time.double().unsqueeze(1) * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    exact = torch.cat([angles.cos(), angles.sin()], dim=1)
    # The angle 999 itself is only known to 6e-5 in float32.
    assert (features(time) - exact).abs().max() < 2e-4
    assert (features(time[:2]) - exact[:2]).abs().max() < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert features(time).dtype == torch.float32
    with pytest.raises(ValueError, match="even"):
        TimeFeatures(7)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_whole_networks_are_saved_and_copied(name, tmp_path):
    model = randomised(build_model(name)).eval()
    torch.save(model, tmp_path / "model.pt")
    inputs = inputs_for(model)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)  # written above: that others may do so is the test
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(other(*inputs), model(*inputs))
