"""adamw_ema and grad_norm: every back end against float64 and against torch's AdamW."""

import math
from typing import Any

import pytest
import torch

from erdfast.ops.adamw_ema import _adamw_ema, _grad_norm, adamw_ema, grad_norm
from erdfast.ops.backend import load_extension
from tests.ops.adamw64 import Adamw64, worst

SHAPES = [(3, 5), (1,), (0,), (513,), (), (16384,), (129, 257)]
"""The last ones take a whole chunk and several chunks of the C++ back end."""
SMALL = [(3, 5), (1,), (0,), (1000,)]
HUNDRED_ROUNDINGS = 1e-5
"""What float32 may lose in a hundred steps of parameters up to 4, where one rounding is 2.4e-7."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class State:
    """Parameters and all that a step of `adamw_ema` changes."""

    def __init__(self, device, decays=(), shapes=SHAPES, dtype=torch.float32):
        self.decays = decays
        self.params = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        self.first = [torch.zeros_like(param) for param in self.params]
        self.second = [torch.zeros_like(param) for param in self.params]
        self.steps = [torch.zeros((), device=device) for _ in self.params]
        self.emas = [[param.clone() for param in self.params] for _ in decays]

    def step(self, grads, **options):
        emas = list(zip(self.emas, self.decays, strict=True))
        adamw_ema(self.params, grads, self.first, self.second, self.steps, emas=emas, **options)

    def grads(self, dtype=torch.float32, scale=1.0):
        return [(scale * torch.randn(param.shape)).to(param.device, dtype) for param in self.params]

    def tensors(self):
        return [*self.params, *self.first, *self.second, *self.steps, *(e for emas in self.emas for e in emas)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hundred_steps_agree_with_float64(device_backend, dtype) -> None:
    device, backend = device_backend
    state = State(device, (0.9, 0.999), shapes=SMALL)
    expected = Adamw64(state.params, state.decays)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    for _ in range(100):
        grads = state.grads(dtype)
        state.step(grads, backend=backend, **options)
        expected.step(grads, **options)
    assert worst(state.params, expected.params) < HUNDRED_ROUNDINGS
    assert worst(state.first, expected.first) < 1e-6
    assert worst(state.second, expected.second) < 2e-6
    for averages, wanted in zip(state.emas, expected.emas, strict=True):
        assert worst(averages, wanted) < HUNDRED_ROUNDINGS
    assert [int(step) for step in state.steps] == expected.count == [100] * len(SMALL)


def test_a_hundred_steps_agree_with_torch(device_backend) -> None:
    device, backend = device_backend
    state = State(device, (0.99,), shapes=SMALL)
    params = [torch.nn.Parameter(param.clone()) for param in state.params]
    averages = [param.detach().clone() for param in params]
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.05, foreach=True)
    for _ in range(100):
        grads = state.grads()
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(params, 25.0)
        optimizer.step()
        torch._foreach_lerp_(averages, [param.detach() for param in params], 0.01)  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim does
        mine = grad_norm(grads, backend=backend)
        torch.testing.assert_close(mine, norm, rtol=1e-5, atol=0)
        state.step(grads, lr=3e-3, weight_decay=0.05, norm=mine, max_norm=25.0, backend=backend)
    assert worst(state.params, params) < HUNDRED_ROUNDINGS
    assert worst(state.emas[0], averages) < HUNDRED_ROUNDINGS
    for key, mine in (("exp_avg", state.first), ("exp_avg_sq", state.second)):
        assert worst(mine, [optimizer.state[param][key] for param in params]) < 1e-6


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
def test_scale_and_clip(device_backend, max_norm) -> None:
    device, backend = device_backend
    state = State(device, (0.5,))
    expected = Adamw64(state.params, state.decays)
    for _ in range(3):
        grads = state.grads(torch.float16, scale=64.0)
        scale = torch.tensor(64.0, device=device)
        norm = grad_norm(grads, backend=backend) / scale
        wanted = expected.step(grads, lr=1e-2, grad_scale=64.0, max_norm=max_norm)
        torch.testing.assert_close(float(norm), wanted, rtol=3e-6, atol=0)
        no = torch.tensor(0.0, device=device)
        state.step(grads, lr=1e-2, grad_scale=scale, found_inf=no, norm=norm, max_norm=max_norm, backend=backend)
    assert worst(state.params, expected.params) < 1e-5
    assert worst(state.first, expected.first) < 1e-6
    assert worst(state.emas[0], expected.emas[0]) < 1e-5


def test_found_inf_moves_the_averages_alone(device_backend) -> None:
    device, backend = device_backend
    state = State(device, (0.75,))
    for average in state.emas[0]:
        average.zero_()
    before = [tensor.clone() for tensor in state.tensors()]
    yes = torch.tensor(1.0, device=device)
    state.step(state.grads(scale=math.inf), lr=1.0, found_inf=yes, grad_scale=yes, backend=backend)
    unchanged = len(before) - len(state.params)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors()[:unchanged], before[:unchanged], strict=True))
    assert worst(state.emas[0], [0.25 * param for param in state.params]) < 1e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_not_finite_show(device_backend, bad) -> None:
    device, backend = device_backend
    state = State(device, shapes=[(3,), (700,)])
    grads = state.grads()
    grads[1][699] = bad
    norm = grad_norm(grads, backend=backend)
    assert not torch.isfinite(norm)
    state.step(grads, lr=1e-2, backend=backend)
    assert [int(param.isnan().sum()) for param in state.params] == [0, 1]
    if math.isnan(bad):  # as torch's clip_grad_norm_ has it
        state.step(state.grads(), lr=1e-2, norm=norm, max_norm=1.0, backend=backend)
        assert all(param.isnan().all() for param in state.params)


@pytest.mark.parametrize("copy_dtype", DTYPES[1:], ids=str)
def test_copies(device_backend, copy_dtype) -> None:
    device, backend = device_backend
    state = State(device)
    copies = [torch.full_like(param, math.nan, dtype=copy_dtype) for param in state.params]
    state.step(state.grads(), lr=1.0, copies=copies, backend=backend)
    assert all(torch.equal(c, param.to(copy_dtype)) for c, param in zip(copies, state.params, strict=True))


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.0, 0.9), (0.999, 0.3)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.2, 1.0])
def test_weights_at_both_ends(device_backend, betas, decay) -> None:
    """Where the old value counts for nothing, it leaves no rounding error behind."""
    device, backend = device_backend
    state = State(device, (decay,))
    expected = Adamw64(state.params, (decay,))
    for scale in (1e3, 1.0):
        grads = state.grads(scale=scale)
        state.step(grads, lr=1e-2, betas=betas, backend=backend)
        expected.step(grads, lr=1e-2, betas=betas)
    assert worst(state.params, expected.params) < 2e-6
    assert worst(state.emas[0], expected.emas[0]) < 2e-6
    if betas[0] == 0.0:
        assert worst(state.first, expected.first) < 1e-6


def test_float64_by_the_reference() -> None:
    state = State("cpu", (0.9,), dtype=torch.float64)
    expected = Adamw64(state.params, (0.9,))
    for _ in range(10):
        grads = state.grads(torch.float64)
        state.step(grads, lr=1e-2)
        expected.step(grads, lr=1e-2)
    assert worst(state.params, expected.params) < 1e-14
    assert worst(state.emas[0], expected.emas[0]) < 1e-14
    assert grad_norm(grads).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(device_backend, dtype) -> None:
    device, backend = device_backend
    grads = [torch.randn(shape, device=device).to(dtype) for shape in SHAPES]
    wanted = sum(float(grad.double().square().sum()) for grad in grads) ** 0.5
    norm = grad_norm(grads, backend=backend)
    assert (norm.dtype, norm.shape, norm.device.type) == (torch.float32, (), device)
    torch.testing.assert_close(float(norm), wanted, rtol=3e-6, atol=0)
    assert float(grad_norm([], backend=backend)) == 0.0
    assert float(grad_norm([grads[2]], backend=backend)) == 0.0


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_nothing_depends_on_threads(isa, monkeypatch) -> None:
    extension = load_extension()
    assert not isinstance(extension, str), extension
    if isa not in extension.supported_isas():
        pytest.skip(f"this processor has no {isa}")  # its instructions would end the process
    monkeypatch.setenv("ERDFAST_CPU_ISA", isa)
    before = torch.get_num_threads()
    ends = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            state = State("cpu", (0.9,))
            expected = Adamw64(state.params, (0.9,))
            grads = state.grads()
            norm = grad_norm(grads, backend="cpu")
            state.step(grads, lr=1e-2, norm=norm, max_norm=1.0, backend="cpu")
            expected.step(grads, lr=1e-2, max_norm=1.0)
            assert worst(state.params, expected.params) < 1e-6
            ends.append([norm, *state.tensors()])
    finally:
        torch.set_num_threads(before)
    for other in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], other, strict=True))


def test_dense_tensors_in_any_order(device_backend) -> None:
    device, backend = device_backend
    param = torch.randn(4, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    grad = torch.randn(4, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    first, second, average = torch.zeros_like(param), torch.zeros_like(param), param.clone()
    expected = Adamw64([param], (0.5,))
    expected.step([grad], lr=1e-2)
    options = {"lr": 1e-2, "emas": [([average], 0.5)], "backend": backend}
    adamw_ema([param], [grad], [first], [second], [torch.zeros((), device=device)], **options)
    assert worst([param, average], [expected.params[0], expected.emas[0][0]]) < 1e-6


BAD = {
    "parameter 0 is torch.bfloat16": {"params": lambda p: [p[0].bfloat16()]},
    "parameter 0 has gaps or overlaps": {"params": lambda p: [p[0][:, ::2]], "grads": lambda p: [p[0][:, ::2]]},
    r"exp_avgs\[0\] is torch.float16; choose from torch.float32": {"exp_avgs": lambda p: [p[0].half()]},
    r"exp_avg_sqs\[0\] is \(5, 4\)": {"exp_avg_sqs": lambda p: [p[0].t().contiguous()]},
    r"exp_avgs\[0\] has strides \(1, 4\), its parameter \(6, 1\)": {"exp_avgs": lambda p: [torch.zeros(6, 4).t()]},
    "exp_avgs has 2 tensors, there are 1 parameters": {"exp_avgs": lambda p: [p[0], p[0]]},
    "average 0 has 2 tensors, there are 1 parameters": {"emas": lambda p: [([p[0], p[0]], 0.9)]},
    r"copies\[0\] is torch.float32; choose from torch.bfloat16, torch.float16": {"copies": lambda p: [p[0].clone()]},
    "step 0 is torch.int64": {"steps": lambda p: [torch.zeros((), dtype=torch.int64)]},
    "gradient of parameter 0 is torch.sparse_coo": {"grads": lambda p: [p[0].to_sparse()]},
    r"gradient of parameter 0 is \(3,\)": {"grads": lambda p: [torch.zeros(3)]},
    "unknown backend 'cuda'; choose from reference, cpu, triton": {"backend": lambda p: "cuda"},
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message) -> None:
    params = [torch.zeros(4, 6)]
    if "5, 4" in message:
        params = [torch.zeros(4, 5)]
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    arguments: dict[str, Any] = {name: [param.clone() for param in params] for name in names}
    arguments |= {"steps": [torch.zeros(())], "lr": 1e-2, "backend": "cpu"}
    for name, make in BAD[message].items():
        arguments[name] = make(params)
    with pytest.raises(ValueError, match=message):
        adamw_ema(**arguments)


def test_norms_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"number 1 is torch.float16 on cpu, the first torch.float32"):
        grad_norm([torch.zeros(3), torch.zeros(3, dtype=torch.float16)])
    with pytest.raises(ValueError, match="gradient 0 has gaps"):
        grad_norm([torch.zeros(4, 6)[:, ::2]], backend="cpu")
    zeros = [torch.zeros(3), torch.zeros(3)]
    with pytest.raises(ValueError, match=r"gradients must have one dtype: that of parameter 1 is torch.float16"):
        adamw_ema(zeros, [zeros[0], zeros[1].half()], zeros, zeros, [torch.zeros(())] * 2, lr=1.0)


# ---------------------------------------------------------------------- tracers


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend) -> None:
    state = State("cpu", shapes=[(3, 5), (7,)])
    lists = (state.params, state.grads(), state.first, state.second, state.steps, [p.clone() for p in state.params])
    copies = [param.bfloat16() for param in state.params]
    scalars = (torch.tensor(2.0), torch.tensor(0.0), torch.tensor(3.0))
    group = [1e-2, 0.9, 0.999, 1e-8, 0.01]
    torch.library.opcheck(_adamw_ema, (*lists, copies, group, [0.1], *scalars, 1.0, backend))  # pyright: ignore[reportArgumentType]  # a CustomOpDef
    torch.library.opcheck(_grad_norm.op, (state.grads(), backend))


def test_compiles_without_graph_breaks(device_backend) -> None:
    device, backend = device_backend
    ends = []

    def step(params, grads, first, second, steps, averages):
        norm = grad_norm(grads, backend=backend)
        options = {"lr": 1e-2, "norm": norm, "max_norm": 1.0, "backend": backend}
        adamw_ema(params, grads, first, second, steps, emas=[(averages, 0.9)], **options)
        return norm

    for function in (step, torch.compile(step, fullgraph=True)):
        torch.manual_seed(0)
        state = State(device, (0.9,), shapes=[(3, 5), (7,)])
        norms = [function(state.params, state.grads(), state.first, state.second, state.steps, state.emas[0])]
        ends.append([*norms, *state.tensors()])
    assert worst(ends[0], ends[1]) < 1e-6
    assert float(ends[1][0]) > 1.0
