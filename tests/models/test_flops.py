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
    "uvit_digits": 1_060_366,
    "dit_digits": 1_060_036,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    assert parameter_count(MODELS[name]) == count


@pytest.mark.parametrize(("name", "giga"), [("uvit_h2", 799), ("dit_xl2", 712), ("dit_l2", 484), ("dit_b2", 138)])
def test_training_flops_of_the_papers_networks(name, giga):
    assert training_flops(MODELS[name]) == pytest.approx(giga * 1e9, rel=0.01)


@pytest.mark.parametrize("name", ["uvit_tiny", "dit_tiny", "dit_digits"])
def test_forward_flops_against_the_operations_pytorch_counts(name):
    from torch.utils.flop_counter import FlopCounterMode

    model = build_model(name, attention="math").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randn(2, *model.input_shape), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert forward_flops(model.config) == pytest.approx(counter.get_total_flops() / 2, rel=0.01)


def saved_bytes(model, batch, autocast):
    """Bytes that the forward pass keeps for the backward pass, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
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
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x, time, y)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["uvit_digits", "dit_digits", "uvit_tiny"])
def test_activation_estimate_against_what_autograd_keeps(name, precision):
    model = build_model(name, attention="flash")  # the estimate is for kernels that keep no logits
    autocast = precision == "bf16"
    per_image = (saved_bytes(model, 12, autocast) - saved_bytes(model, 4, autocast)) / 8
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
