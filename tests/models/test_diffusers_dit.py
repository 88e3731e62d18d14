"""DiT to and from diffusers' DiTTransformer2DModel: equal outputs, round trips, refusals; files: test_export.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from erdfast.models import (
    DiffusersDiT,
    DiffusersDiTConfig,
    DiT,
    DiTConfig,
    UViTConfig,
    config_from_dict,
    diffusers_dit,
    from_diffusers,
    save_diffusers,
    to_diffusers,
    use_published_frequencies,
)
from erdfast.models.diffusers_dit import CONFIG, CONVENTION, INDEX, WEIGHTS
from erdfast.models.layers import sincos_table
from tests.models.test_backbones import randomised
from tests.runs import assert_same_bits

BASE = DiTConfig(input_shape=(4, 8, 8), width=32, depth=2, num_heads=2, num_classes=5)
CASES = {
    "heads of 16": BASE,
    "patches of 4": dataclasses.replace(BASE, patch_size=4, input_shape=(3, 16, 16), depth=3),
    "variance, one head": dataclasses.replace(BASE, learn_sigma=True, num_heads=1, num_classes=1),
    "heads of 12": dataclasses.replace(BASE, width=36, num_heads=3, patch_size=1, input_shape=(1, 6, 6)),
    "no labels": dataclasses.replace(BASE, num_classes=0, learn_sigma=True),
}
TIMES = torch.tensor([0.0, 1.0, 0.37, 500.25, 999.0])


def network(config=BASE, seed=0) -> Any:
    torch.manual_seed(seed)
    return randomised(config.build(), seed)


def inputs_for(config, dtype=torch.float64):
    x = torch.randn(len(TIMES), *config.input_shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, TIMES, torch.arange(len(TIMES)) % (config.num_classes + 1)


def ours(model, x, time, y):
    with torch.no_grad():
        return model(x, time, y if model.num_classes else None)


def theirs(model, x, time, y):
    with torch.no_grad():
        return model(x, timestep=time, class_labels=y).sample


def their_class() -> Any:
    pytest.importorskip("diffusers")
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    return DiTTransformer2DModel


def their_model(shared=True, **changes) -> Any:
    """Of diffusers' own making, with the embedders of the first block in all."""
    options = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
    torch.manual_seed(0)
    model = randomised(their_class()(**(options | {"num_embeds_ada_norm": 5} | changes)))
    for block in model.transformer_blocks:
        if shared:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model.eval()


def edit(path: Path, **changes) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "absent"}))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------- equal outputs


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_we_write_diffusers_computes(tmp_path, case, dtype):
    model, inputs = network(CASES[case]).to(dtype), inputs_for(CASES[case], dtype)
    save_diffusers(model, tmp_path / "dit")
    loaded = their_class().from_pretrained(str(tmp_path / "dit"), local_files_only=True, torch_dtype=dtype)
    use_published_frequencies(loaded)
    out, tolerance = ours(model, *inputs), {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    assert out.std() > 0.1
    assert (theirs(loaded, *inputs) - out).abs().max() < tolerance * out.std()


@pytest.mark.parametrize("case", ["heads of 16", "no labels"])
def test_without_the_call_diffusers_computes_something_else(tmp_path, case):
    model, (x, time, y) = network(CASES[case]).double(), inputs_for(CASES[case])
    save_diffusers(model, tmp_path / "dit")
    loaded = their_class().from_pretrained(str(tmp_path / "dit"), torch_dtype=torch.float64)
    difference = (theirs(loaded, x, time, y) - ours(model, x, time, y)).abs().amax((1, 2, 3))
    assert difference[0] < 1e-12  # all angles of time 0 are 0
    assert difference[1] < 0.02
    assert difference[4] > 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_eps": 0.1},
        {"patch_size": 4, "sample_size": 16, "out_channels": 8},
        {
            "in_channels": 3,
            "out_channels": 3,
            "attention_head_dim": 12,
            "num_attention_heads": 3,
            "upcast_attention": True,
        },
        {"num_embeds_ada_norm": 1, "num_layers": 1},
    ],
)
def test_what_diffusers_writes_we_compute(tmp_path, changes):
    model = their_model(**changes).double()
    model.save_pretrained(str(tmp_path))
    read = from_diffusers(tmp_path)
    assert type(read) is DiffusersDiT
    inputs = inputs_for(read.config)
    out = ours(read, *inputs)
    assert out.std() > 0.1
    assert (theirs(model, *inputs) - out).abs().max() < 1e-12 * out.std()
    save_diffusers(read, tmp_path / "again")
    again = their_class().from_pretrained(str(tmp_path / "again"), torch_dtype=torch.float64)
    assert (theirs(again, *inputs) - theirs(model, *inputs)).abs().max() < 1e-12 * out.std()


def test_as_published_it_is_the_published_network(tmp_path):
    model = their_model().double()
    model.save_pretrained(str(tmp_path))
    read = from_diffusers(tmp_path, convention="published")
    assert type(read) is DiT
    inputs = inputs_for(read.config)
    assert (theirs(model, *inputs) - ours(read, *inputs)).abs().max() > 0.1
    use_published_frequencies(model)
    for block in model.transformer_blocks:
        block.norm3.eps = 1e-6
    assert (theirs(model, *inputs) - ours(read, *inputs)).abs().max() < 1e-12


@pytest.mark.parametrize(("shift", "kind"), [(0, DiTConfig), (1, DiffusersDiTConfig)])
def test_time_is_their_timestep_without_a_factor(shift, kind):
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import Timesteps

    features = kind(**dataclasses.asdict(BASE)).build().t_embedder.features
    wanted = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=shift)
    times = torch.cat([TIMES, torch.linspace(0, 1, 7), torch.arange(1000.0)])
    assert torch.equal(features(times), wanted(times))
    assert torch.equal(features(torch.arange(1000.0)), wanted(torch.arange(1000)))


def test_the_position_tables_are_the_same():
    for side, patch_size in ((8, 2), (32, 4), (64, 2)):
        found = their_model(sample_size=side, patch_size=patch_size, num_layers=1).pos_embed.pos_embed
        assert (found - sincos_table((side // patch_size, side // patch_size), 32)).abs().max() < 1e-6


def test_diffusers_keeps_the_convention(tmp_path):
    model, inputs = network().double(), inputs_for(BASE)
    save_diffusers(model, tmp_path / "dit")
    their_class().from_pretrained(str(tmp_path / "dit")).save_pretrained(str(tmp_path / "theirs"))
    read = from_diffusers(tmp_path / "theirs").double()
    assert type(read) is DiT
    assert (ours(read, *inputs) - ours(model, *inputs)).abs().max() < 1e-5


# ---------------------------------------------------------------------- round trip


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("dtype", diffusers_dit.DTYPES)
@pytest.mark.parametrize("kind", [DiTConfig, DiffusersDiTConfig])
def test_a_round_trip_changes_no_bit(tmp_path, case, dtype, kind):
    config = kind(**dataclasses.asdict(CASES[case]))
    model = network(config).to(dtype)
    save_diffusers(model, tmp_path / "dit")
    read = from_diffusers(str(tmp_path / "dit"))
    assert read.config == config
    assert_same_bits(read.state_dict(), model.state_dict())
    assert torch.equal(read.t_embedder.features.frequencies, model.t_embedder.features.frequencies)
    assert {n: p.requires_grad for n, p in read.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    save_diffusers(read, tmp_path / "again")
    assert content(tmp_path / "again") == content(tmp_path / "dit")


def test_the_weights_are_copies_each_with_memory_of_its_own():
    model = network()
    _, weights = to_diffusers(model)
    addresses = {value.untyped_storage().data_ptr() for value in weights.values()}
    assert len(addresses) == len(weights)
    assert not addresses & {value.untyped_storage().data_ptr() for value in model.state_dict().values()}


def test_a_network_as_diffusers_computes_it_is_described_and_cast():
    config = DiffusersDiTConfig(**dataclasses.asdict(BASE), norm_eps=0.01)
    assert config_from_dict(json.loads(json.dumps(config.describe()))) == config
    model = config.build()
    before = model.t_embedder.features.frequencies.clone()
    assert torch.equal(model.bfloat16().double().t_embedder.features.frequencies, before)
    assert before[127] == pytest.approx(1e-4, rel=1e-6)
    with torch.device("meta"):
        empty = config.build()
    empty = empty.to_empty(device="cpu")
    empty.init_weights()
    assert torch.equal(empty.t_embedder.features.frequencies, before)


def test_sharded_folders(tmp_path):
    model = their_model(num_layers=4)
    model.save_pretrained(str(tmp_path), max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    inputs = inputs_for(BASE, torch.float32)
    assert (theirs(model, *inputs) - ours(from_diffusers(tmp_path), *inputs)).abs().max() < 1e-5


def test_older_folders_of_transformer_2d_model(tmp_path):
    model = their_model()
    model.save_pretrained(str(tmp_path))
    unused = {"cross_attention_dim": None, "num_vector_embeds": None, "use_linear_projection": False}
    edit(tmp_path / CONFIG, _class_name="Transformer2DModel", norm_eps="absent", **unused)
    inputs = inputs_for(BASE, torch.float32)
    assert (theirs(model, *inputs) - ours(from_diffusers(tmp_path), *inputs)).abs().max() < 1e-5


# ---------------------------------------------------------------------- refusals


@pytest.fixture
def folder(tmp_path):
    save_diffusers(network(), tmp_path / "dit")
    return tmp_path / "dit"


def refuse(folder: Path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_diffusers(folder, **options)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'; supported: 'DiTTransformer2DModel'"),
        ({"_class_name": "absent"}, "_class_name is None"),
        ({"norm_type": "ada_norm_single"}, "norm_type is 'ada_norm_single'; supported: 'ada_norm_zero'"),
        ({"attention_bias": False}, "attention_bias is False; supported: True"),
        ({"activation_fn": "geglu"}, "activation_fn is 'geglu'; supported: 'gelu-approximate'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine is True; supported: False"),
        ({"dropout": 0.1}, r"dropout is 0\.1; supported: 0\.0"),
        ({"sample_size": [8, 16]}, r"sample_size is \[8, 16\]; supported: a positive integer"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": 7}, "height 7 is not divisible by patch_size 2"),
        ({"sample_size": 1 << 40}, "sample_size is 1099511627776"),
        ({"attention_head_dim": 1 << 30}, "verflow"),
        ({"num_layers": 0}, "num_layers is 0; supported: a positive integer"),
        ({"num_layers": True}, "num_layers is True"),
        ({"patch_size": "2"}, "patch_size is '2'"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm is None"),
        ({"num_embeds_ada_norm": -1}, "num_embeds_ada_norm is -1"),
        ({"out_channels": 5}, "out_channels is 5; supported: 4, 8, None"),
        ({"attention_head_dim": 9}, "width 18 is not a multiple of 4"),
        ({CONVENTION: "diffusers", "norm_eps": 0}, "norm_eps is 0; supported: a number between 0 and 1"),
        ({CONVENTION: "diffusers", "norm_eps": "1e-6"}, "norm_eps is '1e-6'"),
        ({"norm_eps": 1e-5}, r"norm_eps is 1e-05; supported: 1e-06"),
        ({CONVENTION: "mine"}, "_erdfast_convention is 'mine'; supported: 'published', 'diffusers'"),
        ({CONVENTION: ["published"]}, r"_erdfast_convention is \['published'\]"),
        ({"quantization_config": {}}, "unknown field quantization_config"),
        ({"num_layers": 3}, r"weight transformer_blocks\.2\.\S+ is missing \(one of 19\)"),
        ({"num_layers": 1}, r"weight transformer_blocks\.1\.\S+ is unknown \(one of 19\)"),
        ({"num_embeds_ada_norm": 6}, r"embedding_table\.weight is \(6, 32\); supported: \(7, 32\)"),
        ({"out_channels": 8}, r"proj_out_2\.weight is \(16, 32\); supported: \(32, 32\)"),
    ],
)
def test_other_architectures_are_refused(folder, changes, message):
    edit(folder / CONFIG, **changes)
    refuse(folder, message)


def change(folder: Path, name: str, value: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {name: value(tensors[name])}, folder / WEIGHTS)


def test_another_hidden_width_is_refused(folder):
    change(folder, "transformer_blocks.1.ff.net.0.proj.weight", lambda w: w[:96].clone())
    refuse(folder, r"ff\.net\.0\.proj\.weight is \(96, 32\); supported: \(128, 32\)")


@pytest.mark.parametrize("name", ["timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"])
def test_embedders_that_differ_between_blocks_are_refused(folder, name):
    change(folder, f"transformer_blocks.1.norm1.emb.{name}", lambda w: w + 1)
    refuse(
        folder,
        f"transformer_blocks.1.norm1.emb.{name} is not that of transformer_blocks.0; supported: the same embedders",
    )


def test_what_diffusers_drew_itself_has_embedders_that_differ(tmp_path):
    their_model(shared=False).save_pretrained(str(tmp_path))
    refuse(tmp_path, "supported: the same embedders in all blocks")


def test_a_null_embedding_without_labels_must_be_zero(tmp_path):
    save_diffusers(network(CASES["no labels"]), tmp_path / "dit")
    for n in range(2):
        change(
            tmp_path / "dit", f"transformer_blocks.{n}.norm1.emb.class_embedder.embedding_table.weight", lambda w: w + 1
        )
    refuse(tmp_path / "dit", "num_embeds_ada_norm is 0 with an embedding that is not zero")


def test_a_network_that_was_read_does_not_change_with_its_file(folder):
    read, wanted = from_diffusers(folder), network().state_dict()
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.write(bytes((folder / WEIGHTS).stat().st_size))
    assert_same_bits(read.state_dict(), wanted)


def test_mixed_and_odd_dtypes_are_refused(folder):
    change(folder, "proj_out_2.bias", torch.Tensor.half)
    refuse(folder, r"the weights are torch\.float\d+, torch\.float\d+; supported: one of")
    save_file({name: value.to(torch.int32) for name, value in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    refuse(folder, r"the weights are torch\.int32; supported")


def test_an_unknown_convention_is_refused(folder):
    refuse(folder, "convention is 'ours'; supported: 'published', 'diffusers'", convention="ours")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (CONFIG, lambda b: b[:-20], "config.json cannot be read"),
        (CONFIG, lambda b: b"[]", "config.json cannot be read: it holds a list, not an object"),
        (CONFIG, lambda b: b"\xff\xfe", "config.json cannot be read"),
        (CONFIG, lambda b: b"[" * 100_000, "config.json cannot be read"),
        (CONFIG, lambda b: None, "there is no config.json"),
        (WEIGHTS, lambda b: b[:-1], f"{WEIGHTS} cannot be read"),
        (WEIGHTS, lambda b: b"", f"{WEIGHTS} cannot be read"),
        (WEIGHTS, lambda b: b[:8] + b"?" + b[9:], f"{WEIGHTS} cannot be read"),
        (WEIGHTS, lambda b: None, f"neither {WEIGHTS} nor {INDEX}, but nothing; supported: safetensors"),
    ],
)
def test_damaged_files_are_named(folder, name, damage, message):
    left = damage((folder / name).read_bytes())
    (folder / name).unlink()
    if left is not None:
        (folder / name).write_bytes(left)
    refuse(folder, message)


def test_pickled_weights_are_not_read(folder):
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    refuse(folder, r"but diffusion_pytorch_model\.bin; supported: safetensors")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"weight_map": {"proj_out_2.bias": "../dit/other.safetensors"}}, r"names '\.\./dit/other\.safetensors'"),
        ({"weight_map": {"proj_out_2.bias": "other.bin"}}, r"names 'other\.bin'; supported: safetensors files"),
        ({"weight_map": {"proj_out_2.bias": 3}}, "names '3'"),
        ({"weight_map": {"proj_out_2.bias": "gone.safetensors"}}, "gone.safetensors cannot be read"),
        ({"weight_map": {"proj_out_9.bias": "a.safetensors"}}, "proj_out_9.bias is not in a.safetensors, where"),
        ({"weight_map": {"proj_out_2.bias": "a.safetensors"}}, r"weight \S+ is missing \(one of 43\)"),
        ({"weight_map": []}, "weight_map is"),
        ({}, "'weight_map' is missing"),
    ],
)
def test_damaged_indices_are_named(folder, places, message):
    (folder / INDEX).write_text(json.dumps(places))
    refuse(folder, f"it holds both {WEIGHTS} and {INDEX}")
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    refuse(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_shape": (4, 8, 16)}, "square inputs alone, not 8 x 16"),
        ({"mlp_ratio": 3.0}, r"mlp_ratio 4, not 3\.0"),
    ],
)
def test_networks_without_counterpart_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_diffusers(network(dataclasses.replace(BASE, **changes)), tmp_path / "dit")
    assert list(tmp_path.iterdir()) == []


def test_other_tables_layers_and_backbones_are_refused(tmp_path):
    model = network()
    with torch.no_grad():
        model.pos_embed[0, 3, 3] += 0.01
    with pytest.raises(ValueError, match=r"pos_embed is 0\.01 from the sine-cosine table"):
        to_diffusers(model)
    with torch.no_grad():
        model.pos_embed[0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="pos_embed is nan"):
        to_diffusers(model)
    model = network()
    model.blocks[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"layers that are not its own \(blocks\.0\.mlp\.extra\.bias\)"):
        to_diffusers(model)
    uvit = UViTConfig(input_shape=(4, 8, 8), width=32, depth=3, num_heads=2).build()
    with pytest.raises(ValueError, match="a UViT has no counterpart in diffusers"):
        save_diffusers(cast(Any, uvit), tmp_path / "uvit")
    with pytest.raises(ValueError, match="UViT has no time features of diffusers"):
        use_published_frequencies(uvit)
