"""Published checkpoints by their path alone: what they are is recognised, what they count otherwise is turned round."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch
from torch import Tensor

from erdfast.models import ADMUNetConfig, DiTConfig, JiTConfig, LightningDiTConfig, UViTConfig, load_published
from erdfast.models.backbone import Backbone, BackboneConfig
from erdfast.presets import MODELS
from erdfast.process import Process
from erdfast.sampling import sample

CONFIGS: dict[str, BackboneConfig] = {
    "dit": DiTConfig(width=48, depth=2, num_heads=4, input_shape=(4, 8, 8), num_classes=5),
    "dit_learnsigma": DiTConfig(width=48, depth=3, num_heads=4, input_shape=(4, 8, 8), learn_sigma=True),
    "dit_unconditional": DiTConfig(width=48, depth=1, num_heads=4, input_shape=(3, 8, 8), num_classes=0, patch_size=4),
    "uvit": UViTConfig(width=48, depth=3, num_heads=4, input_shape=(4, 8, 8), num_classes=5),
    "uvit_noconv": UViTConfig(width=48, depth=5, num_heads=4, input_shape=(4, 8, 8), conv=False, qkv_bias=True),
    "uvit_uncond_mlptime": UViTConfig(
        width=48, depth=3, num_heads=4, input_shape=(1, 8, 8), num_classes=0, mlp_time_embed=True, mlp_ratio=2.0
    ),
    "lightningdit": LightningDiTConfig(width=48, depth=2, num_heads=4, input_shape=(8, 4, 4), num_classes=5),
    "lightningdit_qknorm": LightningDiTConfig(width=48, depth=2, num_heads=3, input_shape=(8, 4, 4), qk_norm=True),
    "jit": JiTConfig(
        width=48, depth=4, num_heads=4, input_shape=(3, 16, 16), patch_size=4, bottleneck=16, context_length=4,
        context_start=1, num_classes=5,
    ),
}  # fmt: skip
UNTOLD = {"jit": {"context_start": 1}, "lightningdit_qknorm": {}}
"""What shapes do not tell of them; of all others the number of heads."""


def random_network(config: BackboneConfig) -> Backbone:
    """With no gate closed."""
    torch.manual_seed(0)
    model = config.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def batch_for(model: Backbone) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *model.input_shape, generator=generator)
    y = torch.randint(0, model.num_classes, (3,), generator=generator) if model.num_classes else None
    return x, torch.tensor([0.0, 0.37, 1.0]), y


@pytest.mark.parametrize("name", CONFIGS)
def test_networks_are_recognised(name, tmp_path) -> None:
    config = CONFIGS[name]
    model = random_network(config)
    torch.save({"opt": {"lr": 1.0}, "ema": model.state_dict(), "model": {}}, tmp_path / "model.pt")
    fields = UNTOLD.get(name, {"num_heads": 4})
    published = load_published(tmp_path / "model.pt", ours=True, **fields)
    assert published.model.config == config
    assert published.family == config.backbone
    assert not published.model.training
    x, time, y = batch_for(model)
    assert torch.equal(published.model(x, time, y), model(x, time, y))
    assert published.found[0] == "averaged weights under 'ema'"
    assert published.found[-1].startswith(f"{config.backbone}: input_shape [")


@pytest.mark.parametrize("name", ["dit_b2", "dit_xl2", "uvit_m2", "uvit_h2", "lightningdit_xl1", "jit_b16", "jit_l32"])
def test_sizes_of_the_published_networks_need_no_help(name) -> None:
    from erdfast.models.recognise import recognise

    with torch.device("meta"):
        model = MODELS[name].build()
    assert recognise(model.state_dict(), "it") == MODELS[name]


@torch.no_grad()
def test_a_sit_is_turned_round() -> None:
    """Theirs: v(x, t') = data minus noise, t' = 1 for data. Ours: u(x, 1 - t') = -v."""
    config = DiTConfig(width=48, depth=2, num_heads=4, input_shape=(4, 8, 8), learn_sigma=True, num_classes=5)
    theirs = random_network(config)
    published = load_published(theirs.state_dict(), family="sit", num_heads=4)
    x, time, y = batch_for(theirs)
    expected = -theirs(x, 1 - time, y)
    assert (published.model(x, time, y) - expected).abs().max() < 2e-5 * expected.std()
    assert (published.model(x, time, y) - theirs(x, time, y)).abs().max() > expected.std()
    assert published.process == {"schedule": "flow", "target": "u", "weighting": "constant"}
    Process(**published.process)
    assert "time 1 was data" in published.found[0]
    assert "sign is changed" in published.found[1]
    assert "learned variance is not used" in published.found[2]


@torch.no_grad()
def test_a_lightningdit_predicts_our_velocity() -> None:
    theirs = random_network(CONFIGS["lightningdit"])
    rope = {"feat_rope.freqs_cos": torch.zeros(16, 12), "feat_rope.freqs_sin": torch.zeros(16, 12)}
    state = {f"module.{name}": value for name, value in (theirs.state_dict() | rope).items()}
    published = load_published({"ema": state}, num_heads=4)
    x, time, y = batch_for(theirs)
    assert torch.equal(published.model(x, time, y), -theirs(x, time, y))
    assert published.found[:3] == (
        "averaged weights under 'ema'",
        "prefix 'module.' removed",
        "2 rotary tables left out, they are computed",
    )


@torch.no_grad()
def test_a_jit_is_taken_from_its_wrapper() -> None:
    theirs = random_network(CONFIGS["jit"])
    average = {f"net.{name}": value for name, value in theirs.state_dict().items()}
    average |= {"net.feat_rope_incontext.freqs_cos": torch.zeros(20, 12)}
    content = {"model": {}, "model_ema1": average, "model_ema2": {}, "args": argparse.Namespace(lr=1.0)}
    published = load_published(content, num_heads=4, context_start=1)
    x, time, y = batch_for(theirs)
    assert torch.equal(published.model(x, time, y), theirs(x, time, y))
    assert published.process["target"] == "x0"


@torch.no_grad()
def test_a_uvit_counts_from_one() -> None:
    theirs = random_network(CONFIGS["uvit"])
    published = load_published(theirs.state_dict(), num_heads=4)
    x, _, y = batch_for(theirs)
    assert torch.equal(published.model(x, torch.arange(3.0), y), theirs(x, torch.arange(1.0, 4.0), y))
    assert "time_offset 1.0" in published.found[-1]
    Process(**published.process)
    erd = load_published(theirs.state_dict(), family="erd", num_heads=4)
    assert torch.equal(erd.model(x, torch.arange(3.0), y), theirs(x, torch.arange(3.0), y))
    assert erd.process == {"schedule": "cosine", "target": "eps", "weighting": "constant"}
    with pytest.raises(ValueError, match="is a lightningdit, not a erd"):
        load_published(random_network(CONFIGS["lightningdit"]).state_dict(), family="erd", num_heads=4)


@torch.no_grad()
def test_learned_variance_samples_with_the_mean_half() -> None:
    theirs = random_network(CONFIGS["dit_learnsigma"])
    model = load_published(theirs.state_dict(), num_heads=4).model
    half = DiTConfig(width=48, depth=3, num_heads=4, input_shape=(4, 8, 8)).build().eval()
    state = theirs.state_dict()
    for name in ("weight", "bias"):  # of a patch's numbers the channel is the fastest index
        numbers = state[f"final_layer.linear.{name}"]
        state[f"final_layer.linear.{name}"] = numbers.reshape(4, 8, *numbers.shape[1:])[:, :4].flatten(0, 1)
    half.load_state_dict(state)
    process = Process(schedule="ddpm_linear", target="eps", weighting="constant")
    options = {"num": 2, "classes": [1, 2], "seed": 3, "steps": 3, "cfg_scale": 1.5}
    drawn = [sample(network, process, **options) for network in (model, half)]
    assert drawn[0].shape == (2, 4, 8, 8)
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4 * drawn[1].std()


def test_weights_of_another_precision_are_said_to_be() -> None:
    state = {name: value.half() for name, value in random_network(CONFIGS["dit"]).state_dict().items()}
    published = load_published(state, num_heads=4)
    assert "converted from another precision" in published.found
    assert {value.dtype for value in published.model.state_dict().values()} == {torch.float32}


def test_what_cannot_be_known_is_asked_for() -> None:
    state = random_network(CONFIGS["dit"]).state_dict()
    cases = {
        "no published network is 48 wide: give num_heads": {},
        "unknown family 'flux'; choose from dit, sit": {"family": "flux"},
        "is a dit, not a jit": {"family": "jit", "num_heads": 4},
        "unexpected keyword": {"num_heads": 4, "depht": 3},
        "num_heads cannot be": {"config": CONFIGS["dit"], "num_heads": 4},
    }
    for message, options in cases.items():
        with pytest.raises(ValueError, match=message):
            load_published(state, **options)
    with pytest.raises(ValueError, match="no published JiT has 4 blocks: give context_start"):
        load_published(random_network(CONFIGS["jit"]).state_dict())
    with pytest.raises(ValueError, match="none of jit, lightningdit, dit, uvit, adm_unet: it holds a"):
        load_published({"a": torch.zeros(2)})
    with pytest.raises(ValueError, match="from_diffusers"):
        load_published({"transformer_blocks.0.attn1.to_q.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="give its config"):
        load_published({"input_blocks.0.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"has no 'pos_embed'"):
        load_published({name: value for name, value in state.items() if name != "pos_embed"})
    del state["blocks.1.attn.qkv.bias"]
    with pytest.raises(ValueError, match=r"does not fit this DiT: 1 missing \(blocks.1.attn.qkv.bias\)"):
        load_published(state, num_heads=4)


@pytest.mark.parametrize("fields", [{"null_class": False, "learn_sigma": True}, {"num_classes": 0}, {}])
def test_a_preset_gives_an_adm_unet_the_sizes_that_its_weights_do_not_tell(fields) -> None:
    preset = MODELS["adm_unet_tiny"]
    assert isinstance(preset, ADMUNetConfig)
    theirs = dataclasses.replace(preset, **fields)
    published = load_published(random_network(theirs).state_dict(), config=preset)
    assert published.model.config == theirs
    other = dataclasses.replace(preset, num_classes=7)
    with pytest.raises(ValueError, match=r"label_emb.weight is \(1[01], 128\) instead of"):
        load_published(random_network(dataclasses.replace(theirs, num_classes=10)).state_dict(), config=other)


def test_numbers_that_are_no_weights_are_refused() -> None:
    state = random_network(CONFIGS["dit"]).state_dict()
    name = "final_layer.linear.weight"
    with pytest.raises(ValueError, match=r"1 whose numbers are no weights \(final_layer.linear.weight is int8\)"):
        load_published(state | {name: state[name].to(torch.int8)}, num_heads=4)
    with pytest.raises(ValueError, match=r"final_layer.linear.weight is not finite"):
        load_published(state | {name: state[name] / 0}, num_heads=4)
    with pytest.raises(ValueError, match=r"not finite"):  # in float32
        load_published(state | {name: state[name].double() * 1e300}, num_heads=4)


def test_stray_names_and_shapes_are_one_sentence() -> None:
    state = random_network(CONFIGS["dit"]).state_dict()
    cases = {
        r"blocks\.\* is not numbered from 0 without a gap: there are 3, one of them 900000000": {
            "blocks.900000000.norm.weight": torch.zeros(1)
        },
        "one of them x": {"blocks.x.norm.weight": torch.zeros(1)},
        "a tensor of it has too few dimensions": {"pos_embed": state["pos_embed"][0]},
        "too few dimensions": {"x_embedder.proj.weight": state["x_embedder.proj.weight"].flatten(1)},
        r"1 unexpected \(7\)": {7: torch.zeros(1)},
        "more than one network: pos_embed with several prefixes": {"module.pos_embed": state["pos_embed"]},
    }
    for message, more in cases.items():
        with pytest.raises(ValueError, match=message):
            load_published(state | more, num_heads=4)
    with pytest.raises(ValueError, match="but nothing"):
        load_published({})


@torch.no_grad()
def test_wrappers_without_weights_and_long_prefixes_are_passed_over() -> None:
    theirs = random_network(CONFIGS["dit"])
    state = {"module." * 2000 + name: value for name, value in theirs.state_dict().items()}
    published = load_published({"ema": {}, "model": state}, num_heads=4)
    assert published.found[0] == "weights under 'model'"
    assert torch.equal(published.model(*batch_for(theirs)), theirs(*batch_for(theirs)))


def test_a_uvit_of_one_block_is_recognised() -> None:
    config = UViTConfig(width=48, depth=1, num_heads=4, input_shape=(4, 8, 8), num_classes=5)
    assert load_published(random_network(config).state_dict(), num_heads=4, ours=True).model.config == config
