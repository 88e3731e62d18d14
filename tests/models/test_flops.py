"""Costs: published parameter counts and operations, and the memory estimate against what autograd keeps."""

import pytest
import torch

from erdfast.models.flops import (
    forward_flops,
    parameter_count,
    training_flops,
    training_memory,
    training_memory_bytes,
)
from erdfast.ops import NoiseKey
from erdfast.ops.backend import default_backend
from erdfast.presets import MODELS, build_model

PARAMETERS = {
    "uvit_s2": 44_772_516,
    "uvit_m2": 130_891_940,
    "uvit_l2": 286_763_172,
    "uvit_h2": 500_832_164,
    "dit_s2": 32_957_200,
    "dit_b2": 130_500_112,
    "dit_l2": 458_086_416,
    "dit_xl2": 675_111_184,
    "lightningdit_b1": 130_556_192,
    "lightningdit_xl1": 675_256_736,
    "lightningdit_1p0b": 1_029_401_120,
    "lightningdit_1p6b": 1_631_767_120,
    "lightningdit_b2": 130_531_600,
    "lightningdit_l2": 458_120_176,
    "lightningdit_xl2": 675_219_856,
    "jit_b16": 131_320_320,
    "jit_l16": 459_139_808,
    "jit_h16": 952_842_048,
    "jit_b32": 133_387_008,
    "jit_l32": 461_796_320,
    "jit_h32": 956_383_296,
    "adm_unet_celeba64": 58_936_963,
    "adm_unet_imagenet64": 295_900_035,
    "adm_unet_imagenet128": 421_523_715,
    "adm_unet_imagenet256": 553_832_195,
    "adm_unet_ldm": 289_521_668,
    "adm_unet_tiny": 828_899,
    "uvit_digits": 1_060_366,
    "dit_digits": 1_060_036,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    assert parameter_count(MODELS[name]) == count


PAPERS = {"uvit_h2": 799, "dit_xl2": 712, "dit_l2": 484, "dit_b2": 138, "lightningdit_xl1": 712, "jit_b16": 150}


@pytest.mark.parametrize(("name", "giga"), PAPERS.items())
def test_training_flops_of_the_papers_networks(name, giga):
    assert training_flops(MODELS[name]) == pytest.approx(giga * 1e9, rel=0.01)


@pytest.mark.parametrize(
    "name", ["uvit_tiny", "dit_tiny", "dit_digits", "lightningdit_tiny", "jit_tiny", "adm_unet_tiny"]
)
def test_forward_flops_against_the_operations_pytorch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(name, attention="math").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(2, *model.input_shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert forward_flops(model.config) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def saved_bytes(model, batch, autocast):
    """Bytes that the forward pass keeps for the backward pass, parameters and tables apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    x, time, y = (
        torch.randn(batch, *model.input_shape),
        torch.zeros(batch),
        torch.zeros(batch, dtype=torch.int64),
    )
    options = {"key": NoiseKey(0, sample_ids=y)} if model.has_dropout else {}
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x, time, y, **options)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["uvit_digits", "dit_digits", "uvit_tiny", "adm_unet_tiny"])
def test_activation_estimate_against_what_autograd_keeps(name, precision):
    model = build_model(name, attention="flash")  # the estimate is for kernels that keep no logits
    autocast = precision == "bf16"
    per_image = (saved_bytes(model, 12, autocast) - saved_bytes(model, 4, autocast)) / 8
    assert training_memory(model.config, 1, precision).activations == pytest.approx(per_image, rel=0.08)


@pytest.mark.parametrize(
    ("name", "options", "precision"),
    [
        ("lightningdit_tiny", {"depth": 1}, "fp32"),
        ("lightningdit_tiny", {"depth": 1, "qk_norm": True}, "bf16"),
        ("jit_tiny", {"depth": 2}, "bf16"),
        ("jit_tiny", {"dropout": 0.5}, "fp32"),
    ],
)
def test_activation_estimate_against_what_the_kernels_keep(name, options, precision):
    """Which recompute the rotation and the gate; their references, of which nobody estimates the memory, do not."""
    model = build_model(name, attention="flash", **options)
    autocast = precision == "bf16"
    with default_backend("triton"):
        per_image = saved_bytes(model, 2, autocast) - saved_bytes(model, 1, autocast)
    assert training_memory(model.config, 1, precision).activations == pytest.approx(per_image, rel=0.08)


def test_memory_adds_up():
    config = MODELS["dit_b2"]
    count = parameter_count(config)
    assert training_memory_bytes(config, 0, "fp32") == 20 * count
    assert training_memory_bytes(config, 0, "bf16") == 22 * count
    assert training_memory(config, 0, "fp32", num_emas=3).total == 28 * count
    memory = training_memory(config, 8, "fp16")
    assert memory.activations == 8 * training_memory(config, 1, "bf16").activations
    with pytest.raises(ValueError, match="'int8'; choose from fp32, bf16, fp16, fp8"):
        training_memory_bytes(config, 1, "int8")
    with pytest.raises(ValueError, match="at least 0, not -1"):
        training_memory_bytes(config, -1)
