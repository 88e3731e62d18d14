import pytest
import torch

from erdfast.data import batch_indices
from erdfast.data.order import epoch_permutation

PINNED = [4, 5, 3, 8, 0, 1, 9, 6, 7, 2]


@pytest.mark.parametrize(("n", "batch"), [(1, 3), (2, 5), (7, 3), (10, 10), (10, 64), (1797, 128)])
def test_every_epoch_sees_every_sample_once(n, batch):
    epochs = 3
    steps = -(-epochs * n // batch)
    order = torch.cat([batch_indices(5, step, batch, n) for step in range(steps)])[: epochs * n]
    assert order.dtype == torch.int64
    for epoch in order.view(epochs, n):
        assert torch.equal(epoch.sort().values, torch.arange(n))


def test_a_batch_is_a_function_of_seed_and_step():
    late = batch_indices(1, 40, 16, 50)
    epoch_permutation.cache_clear()
    assert torch.equal(batch_indices(1, 40, 16, 50), late)
    assert not torch.equal(batch_indices(2, 40, 16, 50), late)
    assert not torch.equal(batch_indices(1, 41, 16, 50), late)
    assert not torch.equal(epoch_permutation(1, 0, 50), epoch_permutation(1, 1, 50))


def test_the_order_is_pinned():
    # Computed once; a change of this list breaks the resumption of existing runs.
    assert batch_indices(0, 0, 10, 10).tolist() == PINNED


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_share_out_one_batch(world):
    batch, n = 12, 9
    share = batch // world
    for step in range(5):
        parts = [batch_indices(3, step, batch, n, rank_offset=r * share, count=share) for r in range(world)]
        assert torch.equal(torch.cat(parts), batch_indices(3, step, batch, n))
    assert batch_indices(3, 0, batch, n, rank_offset=10).tolist() == batch_indices(3, 0, batch, n)[10:].tolist()
    assert batch_indices(3, 0, batch, n, rank_offset=12).numel() == 0


def test_permutations_are_even():
    # Where sample 0 lands over 2,000 epochs of 5 samples: each place 400 times, standard deviation 18.
    places = torch.stack([(epoch_permutation(9, epoch, 5) == 0).nonzero()[0, 0] for epoch in range(2000)])
    counts = torch.bincount(places, minlength=5)
    assert float((counts - 400).abs().max()) < 90


def test_the_caller_cannot_spoil_the_cache():
    first = batch_indices(0, 0, 8, 8)
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(0, 0, 8, 8), kept)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((0, -1, 4, 10), {}),
        ((0, 0, 0, 10), {}),
        ((0, 0, 4, 0), {}),
        ((0, 0, 4, 10), {"rank_offset": 3, "count": 2}),
        ((0, 0, 4, 10), {"rank_offset": -1}),
        ((0, 0, 4, 10), {"count": -1}),
    ],
)
def test_bad_arguments(arguments, options):
    with pytest.raises(ValueError, match=r"need step|must lie within"):
        batch_indices(*arguments, **options)
