"""The counter-based generator: known answers, distribution, independence of how a batch is split."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from erdfast import philox

aten = torch.ops.aten

# Known answers of Philox4x32-10 published with Random123.
KNOWN_ANSWERS = [
    (0, (0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (-1, (2**32 - 1, -1, 2**32 - 1), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        philox.signed64(0x299F31D0A4093822),
        (0x243F6A88, philox.signed64(0x13198A2E85A308D3), 0x03707344),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("seed", "counter", "expected"), KNOWN_ANSWERS)
def test_known_answers(seed: int, counter: tuple[int, int, int], expected: str) -> None:
    q, sample_id, stream = (torch.tensor([value]) for value in counter)
    words = philox.philox_words(seed, (q, sample_id, stream))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def integers(values: torch.Tensor | int) -> np.ndarray:
    """As Python's integers, which have no limit."""
    return np.array(values.tolist() if isinstance(values, torch.Tensor) else values, dtype=object)


class NoOverflow(TorchDispatchMode):
    """Fails where sums and products of int64 would not be those of integers."""

    checked = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        exact = {aten.add.Tensor: np.add, aten.mul.Tensor: np.multiply}.get(func)
        if exact is not None and out.dtype == torch.int64:
            assert (exact(*map(integers, args)) == integers(out)).all()
            self.checked += out.numel()
        return out


def test_no_product_leaves_int64() -> None:
    """What overflows is undefined in C++, and compilers make use of it."""
    with NoOverflow() as mode:
        philox.philox_words(-1, (torch.arange(64), torch.arange(64) << 40, torch.tensor(2**32 - 1)))
    assert mode.checked > 10 * 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 17])
def test_compiled_words_are_the_same(count: int) -> None:
    """By C++ that torch.compile writes, which for one number is other code than for many."""
    ids = torch.arange(count)

    def draw(stream: torch.Tensor) -> torch.Tensor:
        return philox.uniform(5, stream, ids, "time")

    compiled = torch.compile(draw, fullgraph=True)
    for stream in range(8):
        number = torch.tensor(stream)
        assert torch.equal(compiled(number), draw(number))


def test_tensors_and_integers_give_the_same_words() -> None:
    q = torch.arange(5)
    from_ints = philox.philox_words(77, (q, 2**40, 9))
    from_tensors = philox.philox_words(torch.tensor(77), (q, torch.tensor(2**40), torch.tensor(9)))
    assert all(torch.equal(a, b) for a, b in zip(from_ints, from_tensors, strict=True))


def test_normals_have_the_moments_of_a_standard_normal() -> None:
    draws = philox.normal(3, 4, torch.arange(100), 10_007)
    n = draws.numel()
    assert abs(draws.mean()) < 4 / n**0.5
    assert abs(draws.square().mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs(draws.pow(4).mean() - 3) < 4 * (96 / n) ** 0.5
    neighbours = (draws[:, 1:] * draws[:, :-1]).mean()
    assert abs(neighbours) < 4 / n**0.5


def test_unit_interval_is_exact_in_float32_and_never_zero() -> None:
    words = torch.tensor([0, 1, 2, 2**31, 2**32 - 1])
    u = philox.unit_interval(words)
    assert torch.equal(u.float().double(), u)
    assert float(u.min()) == 2.0**-32
    assert float(u.max()) <= 1.0


def test_a_sample_depends_on_its_id_alone() -> None:
    together = philox.normal(1, 2, torch.tensor([5, 6, 7]), 37)
    alone = philox.normal(1, 2, torch.tensor([6]), 37)
    assert torch.equal(together[1:2], alone)


def test_domains_seeds_streams_and_ids_differ() -> None:
    ids = torch.tensor([3])
    draws = [philox.normal(1, 2, ids, 8, domain) for domain in philox.DOMAINS]
    draws += [philox.normal(2, 2, ids, 8), philox.normal(1, 3, ids, 8), philox.normal(1, 2, ids + 2**32, 8)]
    stacked = torch.cat(draws)
    assert len(torch.unique(stacked)) == stacked.numel()


def test_uniform_lies_strictly_inside_and_is_uniform() -> None:
    u = philox.uniform(9, 1, torch.arange(100_000), "time")
    assert 0 < float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 50  # 19 degrees of freedom: p = 1e-4 at 52


def test_domain_seed_of_a_tensor_equals_that_of_an_int() -> None:
    assert int(philox.domain_seed(torch.tensor(-5), "time")) == philox.domain_seed(-5, "time")
    assert philox.domain_seed(2**64 - 5, "time") == philox.domain_seed(-5, "time")


def test_scalar_keeps_the_bits_and_refuses_the_rest() -> None:
    cpu = torch.device("cpu")
    for value in (0, 5, 2**63 - 1, 2**63, 2**64 - 1):
        assert int(philox.scalar("seed", value, 64, cpu)) == philox.signed64(value)
    assert int(philox.scalar("seed", torch.tensor([-3]), 64, cpu)) == -3
    for value, bits in ((2**64, 64), (-1, 64), (2**32, 32)):
        with pytest.raises(ValueError, match=f"key is {value}; it must be at least 0"):
            philox.scalar("key", value, bits, cpu)
    bad: list = [1.5, True, "1", torch.tensor(1.0), torch.tensor([1, 2])]
    for value in bad:
        with pytest.raises(ValueError, match="key is"):
            philox.scalar("key", value, 64, cpu)
