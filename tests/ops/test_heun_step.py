"""heun_step: each back end against float64, and all samplers expressed in it, step by step."""

import pytest
import torch
from torch import Tensor

from erdfast.ops.heun_step import HeunRow, _heun_step, _heun_step_into, heun_step
from erdfast.process import Process
from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import Levels, make_levels
from erdfast.sampling.samplers import SAMPLERS
from tests.sampling.gaussian import GaussianNetwork

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPE = (3, 2, 5, 7)


def make_inputs(dtype=torch.float32, *, guided=True, extra=0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(pred, x, x_in, row); `extra` channels of the network's output are NaN."""
    batch, channels, *size = SHAPE
    pred = torch.full((batch * (1 + guided), channels + extra, *size), float("nan"), device=DEVICE)
    pred[:, :channels] = torch.randn(batch * (1 + guided), channels, *size, device=DEVICE)
    x, x_in = torch.randn(SHAPE, device=DEVICE), torch.randn(SHAPE, device=DEVICE)
    return pred.to(dtype), x, x_in, torch.tensor(HeunRow(1.75, -0.4, 0.9, -0.3, 0.6), device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("corrector", [False, True], ids=["predictor", "corrector"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_matches_float64(guided, corrector, dtype, backend) -> None:
    pred, x, x_in, row = make_inputs(dtype, guided=guided, extra=2)
    y = x_in if corrector else None
    wanted, wanted_input = heun_step(pred.double(), x.double(), row.double(), x_in=None if y is None else y.double())
    for copies in (0, 1, 2):
        x_new, network_input = heun_step(pred, x, row, x_in=y, input_copies=copies, backend=backend)
        assert x_new.dtype == torch.float32
        torch.testing.assert_close(x_new.double(), wanted, atol=2e-6, rtol=1e-6)
        assert (network_input is None) == (copies == 0)
        if network_input is not None:
            assert network_input.dtype == dtype
            assert wanted_input is not None
            expected = torch.cat([wanted_input] * copies)
            torch.testing.assert_close(network_input.double(), expected, atol=2e-6, rtol=ROUNDING[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("over", ["x", "x_in", "new"])
def test_writes_where_it_is_told(over, backend) -> None:
    pred, x, x_in, row = make_inputs()
    wanted, wanted_input = heun_step(pred, x, row, x_in=x_in, input_copies=2, input_dtype=torch.float16)
    out = {"x": x, "x_in": x_in, "new": torch.full_like(x, float("nan"))}[over]
    out_input = torch.full((6, *SHAPE[1:]), float("nan"), device=DEVICE, dtype=torch.float16)
    state, network_input = heun_step(
        pred, x, row, x_in=x_in, input_copies=2, out=out, out_input=out_input, backend=backend
    )
    assert state is out
    assert network_input is out_input
    torch.testing.assert_close(out, wanted, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(out_input, wanted_input, atol=2e-3, rtol=1e-3)
    only_state, new_input = heun_step(pred, wanted, row, out=out, backend=backend)
    assert only_state is out
    assert new_input is not None
    assert new_input.shape == SHAPE


def network_calls(levels: Levels, corrected: bool) -> list[tuple[int, int]]:
    """(step, level) of every call of the network; the corrector's is one level on, and the last step has none."""
    calls = []
    for i in range(len(levels.times)):
        calls.append((i, i))
        if corrected and i + 1 < len(levels.times):
            calls.append((i, i + 1))
    return calls


def make_table(guided: Guided, levels: Levels, corrected: bool, edm: bool) -> Tensor:
    """One row for each call of the network: numbers of the host in float64, rounded once."""
    calls = network_calls(levels, corrected)
    rows = []
    for (step, level), (_, following) in zip(calls, [*calls[1:], calls[-1]], strict=True):
        at, then = guided._rows[levels.times[level]], guided._rows[levels.times[following]]
        pred_factor, state_factor = (float(factor) for factor in (at.to_x0 if edm else at.to_velocity))
        if edm:  # slope (x - D)/s with D = pred_factor * pred + state_factor * alpha * x
            pred_factor = -pred_factor / levels.positions[level]
            state_factor = (1.0 - state_factor * float(at.alpha)) / levels.positions[level]
        length = levels.positions[step + 1] - levels.positions[step]
        rows.append(HeunRow(guided.cfg_scale, pred_factor, state_factor, length, float(then.alpha) if edm else 1.0))
    return torch.tensor(rows, dtype=torch.float32, device=DEVICE)


def integrate(guided: Guided, latents: Tensor, levels: Levels, name: str, backend: str) -> Tensor:
    """A sampler with the fixed tensors that a CUDA graph would keep: two states, one row, the network's input."""
    corrected, edm = name.endswith("heun"), name.startswith("edm")
    calls, table = network_calls(levels, corrected), make_table(guided, levels, corrected, edm)
    copies = [1 + guided.guided_at(levels.times[level]) for _, level in calls]
    x, row = latents * levels.scale, torch.empty_like(table[0])
    x_in = torch.empty_like(x)
    inputs = {count: torch.empty(count * len(x), *x.shape[1:], device=DEVICE) for count in (1, 2)}
    alpha = float(guided._rows[levels.times[0]].alpha) if edm else 1.0
    inputs[copies[0]].copy_(torch.cat([alpha * x] * copies[0]))
    for number, (step, level) in enumerate(calls):
        network_input = inputs[copies[number]]
        time = guided._rows[levels.times[level]].network_time.expand(len(network_input))
        pred = guided.model(network_input, time, guided.y if copies[number] == 1 else guided._pair)
        row.copy_(table[number])
        is_corrector = level > step
        predicts_only = corrected and not is_corrector and number + 1 < len(calls)
        following = 0 if number + 1 == len(calls) else copies[number + 1]
        heun_step(
            pred,
            x,
            row,
            x_in=x_in if is_corrector else None,
            input_copies=following,
            out=x_in if predicts_only else x,
            out_input=inputs[following] if following else None,
            backend=backend,
        )
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cfg_scale", [1.0, 2.5], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("name", "schedule", "target"),
    [
        ("edm_heun", "cosine", "eps"),
        ("edm_heun", "cosine", "v"),
        ("edm_euler", "ddpm_linear", "x0"),
        ("heun", "flow", "u"),
        ("heun", "gvp", "v"),
        ("euler", "flow", "x0"),
    ],
)
def test_expresses_every_sampler(name, schedule, target, cfg_scale, backend) -> None:
    """Against the samplers themselves in float64: as close as they are in float32, guided within an interval."""
    process = Process(schedule=schedule, target=target, weighting="constant").to(DEVICE)
    network = GaussianNetwork(process, (2, 3, 3), extra=2).to(DEVICE)  # two more channels that do not count
    latents = torch.randn(4, 2, 3, 3, dtype=torch.float64, device=DEVICE)
    y = torch.tensor([1, 2, 3, 1], device=DEVICE)
    levels = make_levels(process, 6)
    guided = Guided(network, process, y, cfg_scale, (0.0, 0.7), null_class=0)
    guided.prepare(levels.times, latents.device)
    function = guided.denoise if name.startswith("edm") else guided.velocity
    with torch.no_grad():
        wanted = SAMPLERS[name](function, latents, levels, state_dtype=torch.float64)
        plain = SAMPLERS[name](function, latents.float(), levels, state_dtype=torch.float32)
        got = integrate(guided, latents.float(), levels, name, backend)
    scale = float(wanted.abs().max())
    error, of_samplers = (float((result - wanted).abs().max()) / scale for result in (got, plain))
    assert error <= max(3 * of_samplers, 1e-6), (error, of_samplers)


def test_reference_is_differentiable_and_triton_says_that_it_is_not() -> None:
    pred, x, x_in, row = (tensor.double()[..., :1] if tensor.dim() > 1 else tensor.double() for tensor in make_inputs())
    pred, x, x_in = (tensor.contiguous().requires_grad_() for tensor in (pred, x, x_in))

    def step(pred: Tensor, x: Tensor, x_in: Tensor) -> tuple[Tensor, ...]:
        state, network_input = heun_step(pred, x, row, x_in=x_in)
        assert network_input is not None
        return state, network_input

    assert torch.autograd.gradcheck(step, (pred, x, x_in))
    with pytest.raises(ValueError, match="gradients for pred"):
        heun_step(pred.float(), x.float(), row.float(), backend="triton")
    pred, x, row = pred.detach().float(), x.detach().float(), row.float().requires_grad_()
    assert heun_step(pred, x, row, backend="reference")[0].requires_grad
    with pytest.raises(ValueError, match="gradients for row"):
        heun_step(pred, x, row, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("result", ["out", "out_input"])
def test_autograd_notices_what_is_overwritten(result, backend) -> None:
    pred, x, _, row = make_inputs(guided=False)
    leaf = torch.randn(SHAPE, device=DEVICE, requires_grad=True)
    kept = leaf * 1.0
    loss = kept.square().sum()  # needs kept for its gradient
    into: dict = {result: kept.detach()}
    heun_step(pred, x, row, **into, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        state, network_input = heun_step(pred, x, row, out=x.clone(), out_input=x.clone(), backend=backend)
    assert network_input is not None
    assert state.is_inference()
    assert network_input.is_inference()


def test_opcheck() -> None:
    pred, x, x_in, row = make_inputs(torch.bfloat16)
    torch.library.opcheck(_heun_step.op, (pred, x, row, x_in, 2, torch.bfloat16, "triton"))
    torch.library.opcheck(_heun_step.op, (pred, x, row, None, 0, torch.float32, "reference"))
    out_input = torch.empty(6, *SHAPE[1:], device=DEVICE, dtype=torch.bfloat16)
    torch.library.opcheck(_heun_step_into, (torch.empty_like(x), out_input, pred, x, row, x_in, "triton"))
    torch.library.opcheck(_heun_step_into, (torch.empty_like(x), None, pred, x, row, None, "reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend) -> None:
    pred, x, _, row = make_inputs()

    def steps(pred, x, row, into):
        y, first = heun_step(pred, x, row, input_copies=2, backend=backend)
        heun_step(pred, x, row, x_in=y, input_copies=0, out=into, backend=backend)
        return y, first

    torch._dynamo.reset()
    compiled = torch.compile(steps, fullgraph=True, backend="aot_eager")
    into, wanted_into = torch.zeros_like(x), torch.zeros_like(x)
    for a, b in zip(compiled(pred, x, row, into), steps(pred, x, row, wanted_into), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(into, wanted_into)


@pytest.mark.parametrize("row", [HeunRow(1.0, 2.0, 3.0, 4.0, 5.0), [1.0] * 5], ids=["HeunRow", "list"])
def test_a_row_of_numbers_is_told_what_to_become(row) -> None:
    pred, x, _, _ = make_inputs()
    with pytest.raises(ValueError, match=r"row is .*1\.0.*torch\.tensor\(row, device=x\.device\)"):
        heun_step(pred, x, row)


def test_bad_input_is_named() -> None:
    pred, x, x_in, row = make_inputs()
    cases = [
        (lambda: heun_step(pred, x.half(), row), "x is torch.float16"),
        (lambda: heun_step(pred, x.transpose(2, 3), row), "contiguous"),
        (lambda: heun_step(pred, x, row[:4]), r"row has shape \(4,\)"),
        (lambda: heun_step(pred, x, row.half()), "row .*float16"),
        (lambda: heun_step(pred[:5], x, row), r"pred has shape \(5, 2, 5, 7\).*3 samples, or 6"),
        (lambda: heun_step(pred[:, :1], x, row), "at least 2 channels"),
        (lambda: heun_step(pred.long(), x, row), "pred is torch.int64"),
        (lambda: heun_step(pred.to(memory_format=torch.channels_last), x, row), "a sample of pred is not contiguous"),
        (lambda: heun_step(pred, x, row, x_in=x_in[:2]), r"x_in is torch.float32 of shape \(2, 2, 5, 7\)"),
        (lambda: heun_step(pred, x, row, out=x_in.double()), "out is torch.float64"),
        (lambda: heun_step(pred, x, row, input_copies=3), "0, 1 or 2, not 3"),
        (lambda: heun_step(pred, x, row, input_dtype=torch.int8), "input_dtype is torch.int8"),
        (lambda: heun_step(pred, x, row, input_copies=2, out_input=x_in), "for input_copies 2 it must be"),
        (lambda: heun_step(pred, x, row, input_copies=0, out_input=x_in), "for input_copies 0"),
        (lambda: heun_step(pred, x, row, backend="cpu"), "choose from reference, triton"),
        (lambda: heun_step(pred, x.double(), row, backend="triton"), "float64 is not among"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
