"""dropout: its share, its mean, and that a mask depends on key, place and element alone."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from erdfast import philox
from erdfast.ops import NoiseKey, dropout

SHAPE = (3, 5, 13)
"""65 numbers of a sample: the last of 9 counters is used in part."""


def key(batch: int, stream: int = 7) -> NoiseKey:
    return NoiseKey(2**63 + 12345, stream, torch.arange(batch) * 977 + 2**40)


def mask(rate: float = 0.4, shape: tuple[int, ...] = SHAPE, place: int = 0, **changes) -> torch.Tensor:
    return dropout(torch.ones(shape), rate, key(shape[0])._replace(**changes), place) > 0


def test_the_definition() -> None:
    ids = key(2).sample_ids
    assert ids is not None
    counters = torch.arange(9) + 5 * 2**24
    words = philox.philox_words(philox.domain_seed(2**63 + 12345, "dropout"), (counters[None], ids[:2, None], 7))
    wanted = np.empty((2, 72), dtype=bool)
    for q in range(9):
        for lane in range(8):
            half = words[lane // 2].numpy()[:, q] >> 16 * (lane % 2) & 0xFFFF
            wanted[:, q + 9 * lane] = half >= round(0.4 * 2**16)
    assert np.array_equal(mask(place=5)[:2].flatten(1).numpy(), wanted[:, :65])


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_share_and_mean(rate: float) -> None:
    x = torch.ones(4, 50_000)
    y = dropout(x, rate, key(4))
    deviation = (rate * (1 - rate) / x.numel()) ** 0.5
    assert float((y == 0).float().mean()) == pytest.approx(rate, abs=5 * deviation)
    assert float(y.mean()) == pytest.approx(1.0, abs=5 * deviation / (1 - rate))
    (scale,) = y[y != 0].unique().tolist()
    assert scale == pytest.approx(1 / (1 - rate), rel=1e-4)


def test_every_part_of_the_key_matters_and_nothing_else() -> None:
    usual = mask()
    for other in (mask(place=1), mask(stream=8), mask(seed=3), mask(sample_ids=torch.arange(3))):
        assert 0.2 < float((usual != other).float().mean()) < 0.8
    assert not torch.equal(usual[0], usual[1])
    k = key(3)
    assert k.sample_ids is not None
    for one in range(3):
        assert torch.equal(mask(shape=(1, 5, 13), sample_ids=k.sample_ids[one : one + 1])[0], usual[one])
    assert torch.equal(mask(stream=torch.tensor(7), seed=torch.tensor(philox.signed64(2**63 + 12345))), usual)
    assert torch.equal(dropout(torch.ones(SHAPE), 0.4, k, torch.tensor(0)) > 0, usual)
    assert torch.equal(dropout(torch.ones(SHAPE).bfloat16(), 0.4, k) > 0, usual)
    torch.manual_seed(1)
    assert torch.equal(mask(), usual)


def test_places_are_independent() -> None:
    one, other = (mask(0.5, (1, 40_000), place=place).double() - 0.5 for place in (0, 1))
    assert abs(float((one * other).mean())) < 5 * 0.25 / 200


def test_gradients_pass_where_numbers_do() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.4, key(3)), (x,))
    (grad,) = torch.autograd.grad(dropout(x, 0.4, key(3)).sum(), x)
    assert torch.equal(grad > 0, mask())


def test_compiles_whole_and_recomputes() -> None:
    x = torch.randn(SHAPE, requires_grad=True)

    def loss(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return dropout(x, 0.4, key(3), place).square().sum()

    place = torch.tensor(2)
    (wanted,) = torch.autograd.grad(loss(x, place), x)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(compiled(x, place), x)[0], wanted)
    again = checkpoint(loss, x, place, use_reentrant=False, preserve_rng_state=False)
    assert torch.equal(torch.autograd.grad(again, x)[0], wanted)


def test_no_rate_is_no_work() -> None:
    x = torch.randn(SHAPE)
    assert dropout(x, 0.0, key(3)) is x


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.0}, "rate must be at least 0 and below 1, not 1.0"),
        ({"rate": -0.1}, "rate must be at least 0"),
        ({"place": 256}, "place must be at least 0 and below 256, not 256"),
        ({"key": key(2)}, r"sample_ids must be \(3,\) int64"),
        ({"key": NoiseKey(0, -1)}, "stream is -1"),
    ],
)
def test_what_cannot_be(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        dropout(torch.ones(SHAPE), **({"rate": 0.4, "key": key(3)} | options))
