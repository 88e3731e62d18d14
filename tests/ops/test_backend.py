"""Choosing a back end, and the Triton back end behind the public ops (in the interpreter where there is no GPU)."""

import re
from pathlib import Path

import pytest
import torch

from erdfast.ops import BACKENDS, Moments, NoiseKey, add_noise, backend, diffusion_loss
from erdfast.ops.diffusion_loss import _diffusion_loss
from erdfast.presets import build_model
from tests.ops.conftest import make_coefficients, make_key
from tests.ops.test_diffusion_loss import compare, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_fastest_back_end_of_a_cpu_is_compiled() -> None:
    assert backend.resolve_backend(None, torch.device("cpu"), torch.float32) == "cpu"
    assert backend.resolve_backend(None, torch.device("cpu"), torch.float64) == "reference"
    assert backend.resolve_backend(None, torch.device("meta"), torch.float32) == "reference"


def test_a_missing_extension_warns_once_or_raises(monkeypatch, request) -> None:
    request.addfinalizer(backend._resolve.cache_clear)
    monkeypatch.setattr(backend, "load_extension", lambda: "the extension is missing")
    backend._warn_once.cache_clear()
    backend._resolve.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"slow reference on cpu: the extension is missing"):
        assert backend.resolve_backend(None, torch.device("cpu"), torch.float32) == "reference"
    with pytest.raises(ValueError, match="'cpu' is not available here: the extension is missing"):
        backend.resolve_backend("cpu", torch.device("cpu"), torch.float32)


def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=", ".join(BACKENDS)):
        backend.resolve_backend("cuda", torch.device("cpu"), torch.float32)


def test_the_default_can_be_set_for_a_while_and_compiled_code_follows() -> None:
    device, dtype = torch.device("cpu"), torch.float32
    chosen: list[str] = []

    def record(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        arguments = [a for node in graph.graph.nodes if "add_noise" in str(node.target) for a in node.args]
        chosen.append(str(arguments[-1]) if arguments else "reference")
        return graph

    x0, coef, noise = torch.randn(2, 3, 5), make_coefficients(2), torch.randn(2, 3, 5)
    compiled = torch.compile(lambda x0: add_noise(x0, coef, noise=noise), fullgraph=True, backend=record)
    compiled(x0)
    with backend.default_backend("reference"):
        assert backend.resolve_backend(None, device, dtype) == "reference"
        assert backend.resolve_backend("cpu", device, dtype) == "cpu"
        compiled(x0)
        with backend.default_backend("triton"):  # an op without it keeps its own choice
            assert backend.resolve_backend(None, device, dtype, backends=("reference", "cpu")) == "cpu"
        assert backend.resolve_backend(None, device, dtype) == "reference"
    compiled(x0)
    assert chosen == ["cpu", "reference"]  # and the first code is found again
    assert backend.resolve_backend(None, device, dtype) == "cpu"
    with pytest.raises(ValueError, match=", ".join(BACKENDS)), backend.default_backend("cuda"):
        pass


def test_a_default_may_be_for_some_ops() -> None:
    def chosen(op: str) -> str:
        return backend.resolve_backend(None, torch.device("cpu"), torch.float32, op=op)

    with backend.default_backend("reference", "diffusion_loss"):
        assert (chosen("diffusion_loss"), chosen("adamw_ema")) == ("reference", "cpu")
        with backend.default_backend("reference"), backend.default_backend("cpu", "adamw_ema"):
            assert (chosen("diffusion_loss"), chosen("adamw_ema")) == ("reference", "cpu")
            with backend.default_backend(None, "diffusion_loss", "adamw_ema"):
                assert (chosen("diffusion_loss"), chosen("adamw_ema")) == ("cpu", "cpu")
                assert backend.default_of("gelu") == "reference"
        assert (chosen("diffusion_loss"), chosen("adamw_ema")) == ("reference", "cpu")
    assert chosen("diffusion_loss") == "cpu"
    unknown = r"no op is called 'norm'; choose from adamw_ema, .*, swiglu"
    with pytest.raises(ValueError, match=unknown), backend.default_backend("reference", "norm"):
        pass


def test_ops_are_those_that_choose_a_back_end() -> None:
    sources = "\n".join(path.read_text() for path in Path(backend.__file__).parent.glob("*.py"))
    assert set(re.findall(r'resolve_backend\(.*op="(\w+)"', sources)) | {"diffusion_loss"} == set(backend.OPS)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2, 5, 7), (2, 3, 40, 41)], ids=str)
def test_triton_matches_float64(shape) -> None:
    pred, x0 = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE)
    coef, key = make_coefficients(shape[0], DEVICE), make_key(shape[0], DEVICE)
    wanted = run(pred.double(), x0.double(), coef.double(), key, "reference", scale=7.0)
    compare(run(pred, x0, coef, key, "triton", scale=7.0), wanted, torch.float32)
    x_t = add_noise(x0, coef, key, backend="triton")
    torch.testing.assert_close(x_t.double(), add_noise(x0.double(), coef.double(), key), rtol=2e-6, atol=2e-6)


def test_triton_scales_in_place_only_where_nobody_can_tell() -> None:
    pred, x0 = torch.randn(2, 3, 5, device=DEVICE, requires_grad=True), torch.randn(2, 3, 5, device=DEVICE)
    coef, key = make_coefficients(2, DEVICE), make_key(2, DEVICE)
    (once,) = torch.autograd.grad(diffusion_loss(pred, x0, coef, key, backend="triton"), pred)
    loss = diffusion_loss(pred, x0, coef, key, backend="triton")
    scale = torch.tensor(3.0, device=DEVICE)
    for last in (False, False, True):
        (scaled,) = torch.autograd.grad(loss, pred, scale, retain_graph=not last)
        torch.testing.assert_close(scaled, 3 * once)


def test_triton_samples_moments() -> None:
    pred, moments = torch.randn(3, 4, 5, 7, device=DEVICE), Moments(torch.rand(3, 8, 5, 7, device=DEVICE), 0.18215)
    coef, key = make_coefficients(3, DEVICE), make_key(3, DEVICE)
    wanted = run(pred.double(), Moments(moments.tensor.double(), 0.18215), coef.double(), key, "reference")
    compare(run(pred, moments, coef, key, "triton"), wanted, torch.float32)


def test_triton_float16_keeps_scaled_gradients() -> None:
    pred, x0 = torch.randn(2, 3, 30, 31, device=DEVICE).half(), torch.randn(2, 3, 30, 31, device=DEVICE).half()
    coef, key = make_coefficients(2, DEVICE), make_key(2, DEVICE)
    tiny = coef._replace(w=coef.w * 1e-5)  # as a batch of 25 million elements would have it
    wanted = run(pred.double(), x0.double(), tiny.double(), key, "reference", scale=65536.0)
    compare(run(pred, x0, tiny, key, "triton", scale=65536.0), wanted, torch.float16)


def test_triton_passes_opcheck_and_compiles_whole() -> None:
    coef, ids, scalar = make_coefficients(3, DEVICE), torch.arange(3, device=DEVICE), torch.tensor(5, device=DEVICE)
    pred = torch.randn(3, 2, 5, device=DEVICE, requires_grad=True)
    x0 = torch.randn(3, 2, 5, device=DEVICE)
    graded = coef.with_grad()
    torch.library.opcheck(_diffusion_loss, (pred, x0, *graded[2:], None, scalar, scalar, ids, None, True, "triton"))

    def loss(pred, stream):
        return diffusion_loss(pred * 2, x0, coef, NoiseKey(scalar, stream, ids), backend="triton")

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (wanted,) = torch.autograd.grad(loss(pred, scalar), pred)
    (got,) = torch.autograd.grad(compiled(pred, scalar), pred)
    torch.testing.assert_close(got, wanted)


def test_large_results_reuse_memory_that_nobody_holds() -> None:
    x0, coef, key = torch.randn(2, 3, 300, 301), make_coefficients(2), make_key(2)
    first = add_noise(x0, coef, key, backend="cpu")
    kept = first[0, :1]  # a view keeps the memory
    address, wanted = first.data_ptr(), kept.clone()
    del first
    second = add_noise(-x0, coef, key, backend="cpu")
    assert second.data_ptr() != address
    assert torch.equal(kept, wanted)
    del kept
    assert add_noise(x0, coef, key, backend="cpu").data_ptr() == address


def test_a_pooled_gradient_survives_its_graph() -> None:
    pred, x0 = torch.randn(2, 3, 300, 301, requires_grad=True), torch.randn(2, 3, 300, 301)
    coef, key = make_coefficients(2), make_key(2)
    diffusion_loss(pred, x0, coef, key, backend="cpu").backward()
    assert pred.grad is not None
    wanted = pred.grad.clone()
    for _ in range(3):
        diffusion_loss(pred.detach().requires_grad_(), x0 + 1, coef, key, backend="cpu").backward()
    assert torch.equal(pred.grad, wanted)
    diffusion_loss(pred, x0, coef, key, backend="cpu").backward()
    torch.testing.assert_close(pred.grad, 2 * wanted)


def test_derivatives_that_compiled_code_does_not_know_are_refused() -> None:
    coef, key, x0 = make_coefficients(2), make_key(2), torch.randn(2, 3)

    def loss(pred, backend=None):
        return diffusion_loss(pred, x0, coef, key, backend=backend)

    tangent = torch.ones(2, 3)
    for transform in (
        lambda f: torch.func.jvp(f, (x0,), (tangent,)),
        lambda f: torch.func.grad(f)(x0),
        lambda f: torch.func.vmap(f)(x0.expand(2, 2, 3)),
    ):
        with pytest.raises(NotImplementedError, match=r"cpu back end.*backend='reference'"):
            transform(loss)
    value, slope = torch.func.jvp(lambda pred: loss(pred, "reference"), (x0,), (tangent,))[:2]
    assert torch.equal(value, loss(x0, "reference"))
    torch.testing.assert_close(slope, torch.func.grad(lambda pred: loss(pred, "reference"))(x0).sum())


def test_a_default_device_of_the_users_changes_nothing() -> None:
    pred, x0 = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    coef, key = make_coefficients(2), make_key(2)
    wanted = diffusion_loss(pred, x0, coef, key), add_noise(x0, coef, key)
    with torch.device("meta"):
        got = diffusion_loss(pred, x0, coef, key), add_noise(x0, coef, key)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_whole_network_can_be_differentiated_forward_by_its_references() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build_model("dit_tiny", attention="math").to(device)
    x, t = torch.randn(1, 4, 8, 8, device=device), torch.zeros(1, device=device)
    y = torch.zeros(1, dtype=torch.int64, device=device)
    torch.nn.init.normal_(network.get_parameter("final_layer.linear.weight"))

    def slope() -> torch.Tensor:
        return torch.func.jvp(lambda x: network(x, t, y), (x,), (torch.ones_like(x),))[1]

    with backend.default_backend("triton"), pytest.raises(NotImplementedError, match="default_backend"):
        slope()
    with backend.default_backend("reference"):
        assert slope().norm() > 0
