"""dropout: its share, its mean, and that a mask depends on key, place and element alone."""

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from erdfast import philox
from erdfast.ops import NoiseKey, dropout
from erdfast.ops.backend import default_backend
from erdfast.ops.dropout import _dropout, _key_tensors
from tests.ops.conftest import DTYPES

SHAPE = (3, 5, 13)
"""65 numbers of a sample: the last of 9 counters is used in part."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")


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


# ---------------------------------------------------------------------------- back ends


def device_key(batch: int) -> NoiseKey:
    return key(batch)._replace(sample_ids=(torch.arange(batch) * 977 + 2**40).to(DEVICE))


def layouts(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """In order and channels-last, of odd sizes."""
    x = 1 + torch.rand(3, 24, 3, 5, device=DEVICE)
    return [x.to(dtype), x.to(dtype, memory_format=torch.channels_last), x[:, 0].contiguous().to(dtype)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backends_agree(dtype, backend) -> None:
    for x in layouts(dtype)[1:]:
        wanted = dropout(x.double(), 0.3, device_key(3), 9, backend="reference")
        x.requires_grad_()
        y = dropout(x, 0.3, device_key(3), 9, backend=backend)
        assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())
        assert torch.equal(y == 0, wanted == 0)
        assert float((y.detach() / wanted - 1).nan_to_num().abs().max()) <= {torch.float32: 2**-22}.get(dtype, 2**-7)
        upstream = torch.randn_like(y)
        (grad,) = torch.autograd.grad(y, x, upstream)
        assert torch.equal(grad, dropout(upstream, 0.3, device_key(3), 9, backend=backend))
        assert torch.equal(grad == 0, wanted == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_is_the_same_in_any_batch_and_layout(backend) -> None:
    x, last, _ = layouts()
    whole = dropout(x, 0.3, device_key(3), backend=backend)
    assert torch.equal(dropout(last, 0.3, device_key(3), backend=backend), whole)
    for order in ([2, 0], [1], [1, 2, 0]):
        some = device_key(3)._replace(sample_ids=device_key(3).sample_ids[order])  # type: ignore[index]
        assert torch.equal(dropout(x[order], 0.3, some, backend=backend), whole[order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_kept_but_the_key(backend) -> None:
    x, kept = torch.randn(3, 4000, device=DEVICE, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda none: none):
        dropout(x, 0.3, device_key(3), backend=backend)
    assert sum(tensor.nbytes for tensor in kept) == 8 * 3 + 3 * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend) -> None:
    x, last, _ = layouts()
    torch.library.opcheck(_dropout.op, (x.requires_grad_(), *_key_tensors(x, device_key(3), 1), 20_000, backend))
    inputs = (last, *_key_tensors(x, device_key(3), 1), 20_000, backend)
    torch.library.opcheck(_dropout.op, inputs, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_compiled_op_for_every_key(backend) -> None:
    """Seed, step, ids and place are data: nothing is compiled anew, and the compiler sees one op."""
    graphs = []

    def watch(graph, _inputs):
        graphs.append([node.target for node in graph.graph.nodes if "erdfast" in str(node.target)])
        return graph.forward

    def loss(x, seed, step, ids, place):
        return dropout(2 * x, 0.4, NoiseKey(seed, step, ids), place, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=watch)
    x = torch.randn(SHAPE, device=DEVICE)
    for n in range(3):
        seed, step, place = torch.tensor([n, n + 1, n + 2], device=DEVICE)
        ids = torch.arange(3, device=DEVICE) + n
        assert torch.equal(compiled(x, seed, step, ids, place), loss(x, seed, step, ids, place))
    assert graphs == [[torch.ops.erdfast.dropout.default]]


def test_triton_compiles_with_its_gradient() -> None:
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)

    def loss(x):
        return dropout(x, 0.4, device_key(3), 2, backend="triton").square().sum()

    (wanted,) = torch.autograd.grad(loss(x), x)
    torch._dynamo.reset()
    (got,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend) -> None:
    x = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    y = dropout(x, 0.4, device_key(3), backend=backend)
    (grad,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    scale = dropout(torch.ones_like(x), 0.4, device_key(3), backend=backend)
    torch.testing.assert_close(second, 6 * x.detach() * scale**3)


def test_other_derivatives_are_the_references() -> None:
    x = torch.randn(SHAPE, device=DEVICE)
    scale = dropout(torch.ones_like(x), 0.4, device_key(3))
    with default_backend("reference"):

        def mean(x):
            return dropout(x, 0.4, device_key(3)).sum()

        torch.testing.assert_close(torch.func.grad(mean)(x), scale)
        torch.testing.assert_close(torch.func.jvp(mean, (x,), (x,))[1], (x * scale).sum())
    with pytest.raises(NotImplementedError, match="reference"):
        torch.func.grad(lambda x: dropout(x, 0.4, device_key(3), backend="triton").sum())(x)


def test_unusual_input_is_named() -> None:
    x = torch.randn(3, 6, 2, 5, device=DEVICE)
    cases = [
        (lambda: dropout(x.long(), 0.4, NoiseKey(0)), "x is torch.int64; choose from torch.float32"),
        (lambda: dropout(x[0, 0, 0, 0], 0.4, NoiseKey(0)), r"x has shape \(\); it must be \(B, ...\)"),
        (lambda: dropout(x[:1, :1, :1, :1].expand(1, 2**14, 2**14, 1), 0.4, NoiseKey(0)), "at most 134217728 elements"),
        (lambda: dropout(x, 0.4, NoiseKey(0), backend="cpu"), "unknown backend 'cpu'; choose from reference, triton"),
        (lambda: dropout(x.double(), 0.4, NoiseKey(0), backend="triton"), "float64 is not among"),
        (lambda: dropout(x.mT, 0.4, NoiseKey(0), backend="triton"), "neither contiguous nor channels-last with"),
        (lambda: dropout(x, 0.4, NoiseKey(torch.tensor(0, device="meta"))), "seed is on meta, x on"),
    ]
    cases.append(
        (
            lambda: dropout(x.contiguous(memory_format=torch.channels_last), 0.4, NoiseKey(0), backend="triton"),
            "a multiple of 8 channels; call .contiguous()",
        )
    )
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for odd in (x.mT, x.contiguous(memory_format=torch.channels_last), x[:, :1].expand(-1, 6, -1, -1)):
        wanted = dropout(odd.contiguous(), 0.4, NoiseKey(0), backend="reference")
        assert torch.equal(dropout(odd, 0.4, NoiseKey(0), backend="reference"), wanted)
