"""Activation checkpointing changes what is kept for backward and nothing else: gradients are equal to the last bit
(of a compiled U-ViT to rounding)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erdfast import presets
from erdfast.models import Backbone
from erdfast.training.recompute import MODES, _summed_up, apply_recompute
from tests.runs import all_tensors, assert_same_bits, tiny_trainer

NETWORKS = ["uvit_tiny", "dit_tiny", "adm_unet_tiny"]
BATCH = 8


class Watched(TorchDispatchMode):
    """Counts products, and the memory that operations returned and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.norms = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0]
        self.products += name in ("mm", "addmm", "bmm", "linear", "convolution")
        self.norms += "norm" in name
        for tensor in filter(torch.is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            self._seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def num_bytes(self) -> int:
        return sum(size for storage, size in self._seen.values() if not storage.expired())


def made(model: str, recompute: str) -> tuple[Backbone, tuple[Tensor, Tensor, Tensor]]:
    """A network and a batch, always the same."""
    torch.manual_seed(0)
    network = presets.model_config(model, attention="math").build()
    for parameter in network.parameters():
        if parameter.requires_grad:  # a fresh network's last layer is zero, and with it most gradients
            parameter.data.normal_(std=0.05)
    apply_recompute(network, recompute)
    x = torch.randn(BATCH, *network.config.input_shape)
    return network, (x, torch.linspace(0.0, 999.0, BATCH), torch.arange(BATCH))


def gradients_of(network: Backbone) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


class Passes(NamedTuple):
    """Of forward and backward."""

    gradients: dict[str, Tensor]
    kept: int
    """Bytes between the two."""
    backward: Watched


def eager(model: str, recompute: str) -> Passes:
    network, batch = made(model, recompute)
    with Watched() as forward:
        out = network(*batch)
        kept = forward.num_bytes() - out.untyped_storage().nbytes()
    with Watched() as backward:
        out.square().mean().backward()
    return Passes(gradients_of(network), kept, backward)


def compiled(model: str, recompute: str, *, summed: bool = False) -> Passes:
    """By block, through the compiler's tracer and partitioner alone: the operations stay those of eager mode.

    `summed`: blocks end with their sums without being recomputed too.
    """
    network, batch = made(model, recompute)
    for block in network.blocks_for_sharding():
        if summed:
            block.forward = functools.partial(_summed_up, block.forward)
        block.forward = torch.compile(
            block.forward, fullgraph=True, dynamic=False, backend="aot_eager_decomp_partition"
        )
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = network(*batch)
    out.square().mean().backward()
    return Passes(gradients_of(network), sum(kept.values()), Watched())


@pytest.mark.parametrize("model", NETWORKS)
def test_gradients_are_equal_to_the_last_bit_and_less_is_kept(model):
    ends = {mode: eager(model, mode) for mode in MODES}
    gradients = {mode: end.gradients for mode, end in ends.items()}
    kept = {mode: end.kept for mode, end in ends.items()}
    work = {mode: end.backward for mode, end in ends.items()}
    assert all(bool(gradient.any()) for gradient in gradients["none"].values())
    for mode in ("selective", "full"):
        assert_same_bits(gradients[mode], gradients["none"])
    assert kept["none"] > 1.2 * kept["selective"] > 1.2 * 1.2 * kept["full"]
    # Selective computes the norms again but no product; full computes both.
    assert work["none"].products == work["selective"].products < work["full"].products
    assert work["none"].norms < work["selective"].norms == work["full"].norms


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_run_ends_as_without(tmp_path, recompute):
    options: dict[str, Any] = {"steps": 4, "target": "k", "schedule": "flow", "weighting": "constant", "grad_clip": 0.5}
    tiny_trainer(tmp_path / "kept", **options).train()
    tiny_trainer(tmp_path / "again", recompute=recompute, **options).train()
    assert_same_bits(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "kept"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["uvit_tiny", "dit_tiny"])
def test_compiled_by_block(model):
    torch._dynamo.reset()
    ends = {mode: compiled(model, mode) for mode in MODES}
    torch._dynamo.reset()
    gradients = {mode: end.gradients for mode, end in ends.items()}
    kept = {mode: end.kept for mode, end in ends.items()}
    # U-ViT's blocks end with their sums: of the three gradients that meet where a skip leaves, another pair is first.
    kin = gradients["none"] if model == "dit_tiny" else compiled(model, "none", summed=True).gradients
    for mode in ("selective", "full"):
        assert_same_bits(gradients[mode], kin)
        assert gradients[mode].keys() == gradients["none"].keys()
        for name, gradient in gradients[mode].items():
            error = (gradient - gradients["none"][name]).norm() / gradients["none"][name].norm().clamp_min(1e-30)
            assert error < 1e-6, name
    assert kept["none"] > 1.2 * kept["selective"] > 1.2 * 1.2 * kept["full"]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="unknown recompute mode 'some'; choose from none, selective, full"):
        apply_recompute(presets.model_config("uvit_tiny").build(), "some")
