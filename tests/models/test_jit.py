"""JiT's own: the direction of time, the label's tokens, and dropout that the batch and the generator do not change."""

import pytest
import torch

from erdfast.models import JiT
from erdfast.models.layers import Stream, joined
from erdfast.ops import NoiseKey
from erdfast.presets import build_model
from erdfast.training.recompute import apply_recompute
from tests.models.test_backbones import inputs_for, randomised

IDS = torch.tensor([5, 2**33, 7, 8])


def dropping(**options) -> JiT:
    torch.manual_seed(0)
    model = randomised(build_model("jit_tiny", dropout=0.3, **options))
    assert isinstance(model, JiT)
    return model


def gradients(model: JiT, batch, ids: torch.Tensor, step: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and gradients of a sum over samples."""
    out = model(*batch, key=NoiseKey(1, step, ids))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), list(torch.autograd.grad(out.square().sum(), parameters))


def assert_close(found, wanted) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_a_batch_in_two_halves_drops_the_same_numbers() -> None:
    model = dropping()
    batch = inputs_for(model, batch=4)
    whole, grads = gradients(model, batch, IDS)
    first, second = (gradients(model, [t[part] for t in batch], IDS[part]) for part in (slice(0, 2), slice(2, 4)))
    assert_close([torch.cat([first[0], second[0]])], [whole])
    assert_close([a + b for a, b in zip(first[1], second[1], strict=True)], grads)
    for other in (gradients(model, batch, IDS + 1), gradients(model, batch, IDS, step=4)):
        assert (other[0] - whole).abs().max() > 0.01 * whole.abs().max()


@torch.no_grad()
def test_the_mean_over_masks_is_what_a_block_does_without() -> None:
    model = dropping(context_length=0)
    block = model.blocks[1]
    for parameter in block.get_submodule("mlp").parameters():
        parameter.zero_()  # what remains is linear in what is dropped
    x, time, y = inputs_for(model, batch=1)
    tokens, (condition, _) = model.patches(x), model.conditions(1 - time, y)
    rope, key, many = model.feat_rope(), NoiseKey(0, 0, torch.arange(512)), 512
    usual = joined(block(Stream(tokens), condition, rope))
    repeated = Stream(tokens.expand(many, -1, -1)), condition.expand(many, -1)
    dropped = joined(block(*repeated, rope, key, torch.arange(2)))
    one, mean = dropped[0] - usual[0], dropped.mean(0) - usual[0]
    assert one.norm() > 0.1 * (usual - tokens).norm()
    assert mean.norm() == pytest.approx(float(one.norm()) / many**0.5, rel=0.3)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_drops_the_same_numbers(mode) -> None:
    model, again = dropping(), dropping()
    batch = inputs_for(model, batch=4)
    apply_recompute(again, mode)
    wanted, found = gradients(model, batch, IDS), gradients(again, batch, IDS)
    assert torch.equal(found[0], wanted[0])
    assert_close(found[1], wanted[1])


def test_only_training_with_dropout_needs_a_key() -> None:
    model = dropping()
    batch = inputs_for(model)
    assert model.has_dropout
    with pytest.raises(ValueError, match=r"dropout 0.3 needs key=NoiseKey\(seed, stream=step, sample_ids=ids\)"):
        model(*batch)
    usual = build_model("jit_tiny")
    usual.load_state_dict(model.state_dict())
    assert not usual.has_dropout
    assert torch.equal(model.eval()(*batch), usual(*batch))
    assert torch.equal(model(*batch, key=NoiseKey(0)), usual(*batch))


def test_only_the_middle_half_drops() -> None:
    rates = [block.get_submodule("attn").training and block.dropout for block in dropping(depth=8).blocks]
    assert rates == [0, 0, 0.3, 0.3, 0.3, 0.3, 0, 0]


@pytest.mark.parametrize("name", ["lightningdit_tiny", "jit_tiny"])
@torch.no_grad()
def test_one_is_noise_here_and_data_in_the_embedding(name) -> None:
    model = randomised(build_model(name)).eval()
    seen = []
    model.get_submodule("t_embedder").register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    x, _, y = inputs_for(model, batch=3)
    model(x, torch.tensor([0.0, 0.25, 1.0]), y)
    assert seen[0].tolist() == [1.0, 0.75, 0.0]


@torch.no_grad()
def test_the_labels_tokens_come_late_and_unturned() -> None:
    model = randomised(build_model("jit_tiny", context_start=2)).eval()
    lengths = []
    for block in model.blocks_for_sharding():
        block.register_forward_hook(lambda _module, args, out: lengths.append((out.x_BLD.shape[1], len(args[2][0]))))
    model(*inputs_for(model))
    assert lengths == [(16, 16), (16, 16), (20, 20), (20, 20)]
    cos, sin = model.get_submodule("feat_rope_incontext")()
    usual = model.get_submodule("feat_rope")()
    assert bool((cos[:4] == 1).all())
    assert bool((sin[:4] == 0).all())
    assert torch.equal(cos[4:], usual[0])
    assert torch.equal(sin[4:], usual[1])
