"""What only the ADM UNet has: its plan, its orders of channels, layouts of memory, labels without a null class."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from erdfast import cli, presets
from erdfast.config import TrainConfig
from erdfast.models import ADMUNet, ADMUNetConfig
from erdfast.models.adm_unet import make_plan
from erdfast.models.flops import forward_flops, parameter_count, training_flops, training_memory
from erdfast.models.unet_layers import AttentionBlock, GroupNorm32, ResBlock, UNetBlock
from erdfast.ops import NoiseKey
from erdfast.presets import MODELS, build_model
from erdfast.process import Process
from erdfast.sampling import sample
from erdfast.training import predict
from erdfast.training.gpus import GPUS
from erdfast.training.recompute import apply_recompute
from erdfast.training.setup import build_network, open_data
from tests.models.test_backbones import inputs_for, randomised
from tests.models.test_flops import saved_bytes
from tests.runs import assert_same_bits, single_thread, tiny_config
from tests.training.test_predict import alive_after_forward

TINY = MODELS["adm_unet_tiny"]
assert isinstance(TINY, ADMUNetConfig)


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


def tiny(**changes: Any) -> ADMUNet:
    torch.manual_seed(0)
    model = build_model("adm_unet_tiny", **changes)
    assert isinstance(model, ADMUNet)
    return model


def gradients(model: nn.Module, *inputs: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(*inputs, **options).square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---------------------------------------------------------------------------- plan


def test_it_starts_at_zero_with_blocks_that_are_their_skips() -> None:
    model = tiny()
    assert model(*inputs_for(model)).abs().max() == 0
    stream, embedding = torch.randn(2, 32, 16, 16), torch.randn(2, 128)
    assert torch.equal(model.input_blocks[1](stream, embedding), stream)
    halved = model.input_blocks[2](stream, embedding)
    assert torch.equal(halved, nn.functional.avg_pool2d(stream, 2))


def test_blocks_are_all_but_the_stem_in_running_order() -> None:
    model = tiny()
    seen: list[nn.Module] = []
    for block in model.modules():
        if isinstance(block, UNetBlock):
            block.register_forward_hook(lambda module, *_: seen.append(module))
    model(*inputs_for(model))
    assert seen[1:] == model.blocks_for_sharding()
    assert seen[0] is model.input_blocks[0]
    assert len(seen) - 1 == model.config.accounting().blocks == len(make_plan(model.config).blocks)


def test_attention_is_where_it_was_asked_for() -> None:
    config = MODELS["adm_unet_imagenet256"]
    with torch.device("meta"):
        model = config.build()
    grids = [module.plan.grid for module in model.modules() if isinstance(module, AttentionBlock)]
    assert {grid: grids.count(grid) for grid in set(grids)} == {(32, 32): 5, (16, 16): 5, (8, 8): 6}
    widths = {(heads.tokens, heads.num_heads, heads.width) for heads in config.accounting().attentions}
    assert widths == {(1024, 8, 64), (256, 16, 64), (64, 16, 64)}


def test_the_presets_numbers_are_the_true_ones() -> None:
    source = Path(presets.__file__).read_text()
    rows = re.findall(r'^    "(adm_unet_\w+)":[^#]*#\s+([\d,]+)\s+(\d+)$', source, re.MULTILINE)
    assert {name for name, _, _ in rows} == {name for name in MODELS if name.startswith("adm_unet")} - {"adm_unet_tiny"}
    for name, count, gflop in rows:
        assert parameter_count(MODELS[name]) == int(count.replace(",", ""))
        assert f"{training_flops(MODELS[name]) / 1e9:.0f}" == gflop


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_predicted_activations_are_those_alive_after_a_forward_pass(recompute: str) -> None:
    config = dataclasses.replace(TINY, num_res_blocks=3, attention="flash")
    few, many = (alive_after_forward(config, batch, recompute) for batch in (2, 6))
    assert isinstance(config, ADMUNetConfig)
    kept = predict.activation_bytes(config, 1, "bf16", recompute)
    if recompute != "none":  # one block's come in backward
        kept -= max(block.cost().kept_bytes for block in make_plan(config).blocks)
    assert kept == pytest.approx((many - few) / 4, rel=0.1)


@pytest.mark.parametrize("model", [name for name in MODELS if name.startswith("adm_unet")])
def test_runs_elsewhere_are_predicted(model: str) -> None:
    options = {"model": model, "device": "a100", "gpus": 8, "batch_size": 256, "precision": "bf16", "dry_run": True}
    config = cli.with_options(TrainConfig(), options)
    chosen = predict.choose(config)
    assert chosen.memory.total <= predict.memory_limit(GPUS["a100"])
    assert 0 < chosen.busy <= 1
    assert "predicted" in predict.render(config, chosen)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_scale_shift_norm": False},
        {"resblock_updown": False},
        {"resblock_updown": False, "conv_resample": False},
        {"num_res_blocks": 2, "channel_mult": (1, 1, 3), "attention_resolutions": (1, 4)},
        {"input_shape": (2, 8, 20), "num_head_channels": None, "num_heads": 8, "learn_sigma": True},
        {"dropout": 0.3},
    ],
)
def test_costs_of_every_kind_of_network(changes: dict[str, Any]) -> None:
    model = randomised(tiny(attention="math", **changes)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(*inputs_for(model, batch=2)).shape == (2, model.out_channels, *model.input_shape[1:])
    assert forward_flops(model.config) == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)
    for precision in ("fp32", "bf16"):
        model = tiny(attention="flash", **changes)
        if model.has_dropout:
            model.register_forward_pre_hook(
                lambda _module, args, _kwargs: (args, {"key": NoiseKey(1, 2)}), with_kwargs=True
            )
        few, many = (saved_bytes(model, batch, precision == "bf16") for batch in (4, 12))
        assert training_memory(model.config, 1, precision).activations == pytest.approx((many - few) / 8, rel=0.02)


def test_the_first_half_of_a_learned_variances_channels_is_the_prediction() -> None:
    model = tiny(learn_sigma=True)
    assert model.out_channels == 6
    assert model(*inputs_for(model)).shape == (3, 6, 16, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 0}, "model_channels must be at least 1"),
        ({"num_res_blocks": 0}, "num_res_blocks must be at least 1"),
        ({"channel_mult": ()}, "channel_mult must name at least one level"),
        ({"channel_mult": (1, 1.5)}, r"1\.5 times model_channels 32 must be a multiple of 32.*, not 48"),
        ({"model_channels": 24, "channel_mult": (4,)}, "attention_resolutions are factors"),
        ({"model_channels": 33, "channel_mult": (32,), "attention_resolutions": ()}, "model_channels must be even"),
        ({"input_shape": (3, 16, 15)}, "width 15 is not divisible by 2, as the 2 levels"),
        ({"attention_resolutions": (16,)}, r"factors, with their images: 1 \(16x16\), 2 \(8x8\); not 16"),
        ({"num_head_channels": 24}, "attention of 64 channels is not divisible by num_head_channels 24"),
        ({"num_head_channels": 0}, "num_head_channels must be at least 1"),
        ({"num_head_channels": None, "num_heads": 3}, "attention of 64 channels is not divisible by num_heads 3"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1"),
        ({"dropout": 0.1, "num_res_blocks": 40}, "dropout is for up to 128 blocks; this network has 164"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"attention": "fast"}, "unknown attention backend 'fast'"),
    ],
)
def test_impossible_configurations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_half_the_channels_are_possible() -> None:
    config = ADMUNetConfig(
        model_channels=64, channel_mult=(0.5, 1), num_res_blocks=1, attention_resolutions=(), input_shape=(3, 8, 8)
    )
    assert config.channels == (32, 64)


# ---------------------------------------------------------------------------- arithmetic


@torch.no_grad()
def test_the_two_orders_of_channels_are_one_network() -> None:
    old, new = randomised(tiny()), tiny(new_attention_order=True)
    new.load_state_dict(old.state_dict())
    inputs = inputs_for(old)
    assert (new(*inputs) - old(*inputs)).abs().max() > 1e-3
    for block in new.modules():
        if isinstance(block, AttentionBlock):  # (H, 3, K) => (3, H, K)
            for parameter in block.qkv.parameters():
                rows = parameter.view(block.plan.num_heads, 3, -1, *parameter.shape[1:])
                parameter.copy_(rows.transpose(0, 1).reshape(parameter.shape))
    assert (new(*inputs) - old(*inputs)).abs().max() < 1e-5


def test_norms_are_float32_inside() -> None:
    norm, x = GroupNorm32(64).bfloat16(), (100 + torch.randn(2, 64, 4, 4)).bfloat16()
    exact = nn.functional.group_norm(x.double(), 32)
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) - exact).abs().max() < 0.01
    assert (norm.double()(x.double()) - exact).abs().max() < 1e-12


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("updown", [True, False])
def test_channels_last_is_the_same_network_in_another_layout(updown: bool, dropout: float) -> None:
    contiguous = randomised(tiny(resblock_updown=updown, dropout=dropout))
    last = tiny(resblock_updown=updown, dropout=dropout, channels_last=True)
    last.load_state_dict(contiguous.state_dict())
    layouts: list[bool] = []
    for module in last.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(
                lambda _module, args: layouts.append(args[0].is_contiguous(memory_format=torch.channels_last))
            )
    options = {"key": NoiseKey(3, 4)} if dropout else {}
    inputs = inputs_for(contiguous)
    found, wanted = gradients(last, *inputs, **options), gradients(contiguous, *inputs, **options)
    assert len(layouts) > 15
    assert all(layouts)
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():  # of a bias before a norm of single channels it is rounding alone
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-6 * largest, name


# ---------------------------------------------------------------------------- dropout


def test_dropout_is_a_function_of_the_key() -> None:
    model = randomised(tiny(dropout=0.3))
    x, time, y = inputs_for(model, batch=4)
    ids = torch.tensor([5, 6, 7, 8])
    with pytest.raises(ValueError, match=r"dropout 0\.3 needs key=NoiseKey"):
        model(x, time, y)
    with torch.no_grad():
        whole = model(x, time, y, key=NoiseKey(1, 10, ids))
        half = model(x[2:], time[2:], y[2:], key=NoiseKey(1, 10, ids[2:]))
        assert (half - whole[2:]).abs().max() < 1e-5  # in another batch, as in another process
        assert (model(x, time, y, key=NoiseKey(1, 11, ids)) - whole).abs().max() > 0.01
        assert (model(x, time, y, key=NoiseKey(2, 10, ids)) - whole).abs().max() > 0.01
        expected = tiny().eval()
        expected.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(x, time, y), expected(x, time, y))


def test_every_residual_block_drops_others() -> None:
    model, kept = randomised(tiny(dropout=0.5)), []
    for module in model.modules():
        if isinstance(module, ResBlock):
            convolution = module.out_layers[3]
            convolution.register_forward_pre_hook(lambda _module, args: kept.append(args[0][0, :32, :8, :8] != 0))
    model(*inputs_for(model), key=NoiseKey(1, 10))
    assert len(kept) == 10
    for i, mask in enumerate(kept):
        assert 0.45 < mask.float().mean() < 0.55
        assert all(0.4 < (mask == other).float().mean() < 0.6 for other in kept[:i])


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputing_gives_the_same_bits(dropout: float) -> None:
    options = {"key": NoiseKey(3, 4)} if dropout else {}
    found = {}
    for mode in ("none", "selective", "full"):
        model = randomised(tiny(dropout=dropout))
        apply_recompute(model, mode)
        found[mode] = gradients(model, *inputs_for(model), **options)
    assert_same_bits(found["selective"], found["none"])
    assert_same_bits(found["full"], found["none"])


# ---------------------------------------------------------------------------- labels


def test_published_networks_have_no_null_class() -> None:
    model = tiny(null_class=False)
    x, time, _ = inputs_for(model)
    assert model.null_class is None
    assert model.get_parameter("label_emb.weight").shape == (10, 128)
    assert tiny().get_parameter("label_emb.weight").shape == (11, 128)
    with pytest.raises(ValueError, match=r"needs labels y \(B,\) in 0\.\.9; it has no null class"):
        model(x, time)
    with pytest.raises(ValueError, match=r"cfg_scale 2\.0 needs a null class"):
        sample(model, Process(schedule="cosine", target="eps"), num=1, steps=1, cfg_scale=2.0)
    with pytest.raises(ValueError, match=r"labels \[10\] are not within 0\.\.9; this model knows no null class"):
        sample(model, Process(schedule="cosine", target="eps"), num=1, steps=1, labels=[10])
    unconditional = tiny(num_classes=0)
    assert unconditional.label_emb is None
    assert unconditional.null_class is None


def test_label_drop_needs_a_null_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "adm_unet_tiny", dataclasses.replace(TINY, null_class=False))
    config = tiny_config(model="adm_unet_tiny", data="mixture:3x16x16", label_drop=0.1)
    with pytest.raises(ValueError, match=r"label_drop 0\.1 needs a null class, which adm_unet_tiny"):
        build_network(config, open_data(config))
    kept = tiny_config(model="adm_unet_tiny", data="mixture:3x16x16", label_drop=0.0)
    assert build_network(kept, open_data(kept)).null_class is None
