"""`Process` as a whole: combinations, refusals, its description, learnable targets and torch.compile."""

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from erdfast.process import SCHEDULES, TARGETS, TIME_SAMPLERS, WEIGHTINGS, Process
from erdfast.process.coefficients import SPACES


def some_times(process: Process) -> torch.Tensor:
    return torch.tensor([3, 40, 240]) if process.discrete else torch.tensor([0.003, 0.4, 0.99])


def test_the_names_of_the_method():
    assert set(SCHEDULES) == {
        "cosine", "ddpm_linear", "sd_linear", "logsnr_linear", "flow", "vp", "gvp", "logsnr_uniform",
    }  # fmt: skip
    assert set(TARGETS) == {"x0", "eps", "v", "u", "score", "k", "k2", "k(t)"}
    assert set(WEIGHTINGS) == {
        "erd", "erd_repo", "constant", "min_snr", "max_snr", "p2", "debias", "min_debias", "max_debias",
        "snr", "trunc_snr", "sigmoid", "edm",
    }  # fmt: skip
    assert set(TIME_SAMPLERS) == {"uniform", "logit_normal", "uniform_logsnr"}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_everything_combines(schedule):
    for i, (target, weighting, sampler) in enumerate(itertools.product(TARGETS, WEIGHTINGS, TIME_SAMPLERS)):
        as_sampling = target in SPACES and i % 2 == 0  # each weighting and each sampler with and without
        process = Process(schedule, target, weighting, time_sampler=sampler, as_sampling=as_sampling)
        t = process.sample_time(4, seed=1, step=1)
        assert all(value.shape == (4,) and value.isfinite().all() for value in process.coefficients(t))


REFUSED = {
    "unknown schedule 'sine'; choose from cosine": {"schedule": "sine"},
    "unknown target 'x'; choose from x0": {"target": "x"},
    "unknown weighting 'snr5'; choose from erd": {"weighting": "snr5"},
    "unknown time sampler 'cosmap'; choose from uniform": {"time_sampler": "cosmap"},
    "unknown allocation 'lambda'; choose from time, logsnr": {"allocation": "lambda"},
    "unknown loss_space 'k'; choose from target": {"loss_space": "k"},
    "num_timesteps=1 ": {"num_timesteps": 1},
    "num_timesteps=10.0": {"num_timesteps": 10.0},
    "num_timesteps=True": {"num_timesteps": True},
    "betas": {"schedule": "ddpm_linear", "num_timesteps": 20},
    "has no steps": {"schedule": "flow", "num_timesteps": 500},
    "only 'erd' has an allocation": {"weighting": "min_snr", "allocation": "logsnr"},
    "equally in every space": {"weighting": "min_snr", "loss_space": "x0"},
    "has no kappa": {"kappa_clip": 0.05},
    "kappa_clip=-1": {"kappa_clip": -1.0, "loss_space": "x0"},
    "noise_scale=0": {"noise_scale": 0},
    "noise_scale=inf": {"noise_scale": float("inf")},
    "logit_mean=1.0 cannot": {"logit_mean": 1.0},
    "logit_std=0": {"logit_std": 0.0, "time_sampler": "logit_normal"},
    "gamma=5.0 cannot": {"weighting": "debias", "gamma": 5.0},
    "gamma=0": {"weighting": "p2", "gamma": 0.0},
    "gamma='5'": {"weighting": "p2", "gamma": "5"},
    "p2_k=0": {"weighting": "p2", "p2_k": 0.0},
    "p2_k=2.0 cannot": {"p2_k": 2.0},
    "sigmoid_bias=1.0 cannot": {"sigmoid_bias": 1.0},
    "learns nothing": {"k_init": 0.7},
    "k_init=1.0": {"target": "k", "k_init": 1.0},
    "has bins": {"target": "k", "k_bins": 4},
    "k_bins=0": {"target": "k(t)", "k_bins": 0},
    "its density would change": {"target": "k", "as_sampling": True},
    "stratified=1 must": {"stratified": 1},
    "no time with": {"schedule": "logsnr_uniform", "noise_scale": 1e9},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_say_why(message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        Process(**REFUSED[message])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "flow", "target": "k", "weighting": "constant", "loss_space": "u", "kappa_clip": 0.05},
        {"weighting": "min_snr", "gamma": 3.0, "normalize": True, "num_timesteps": 250, "stratified": True},
        {"schedule": "vp", "target": "k(t)", "k_bins": 16, "k_init": 0.4, "noise_scale": 2.0},
        {"time_sampler": "logit_normal", "logit_mean": 0.8, "allocation": "logsnr", "as_sampling": True},
    ],
)
def test_description_rebuilds_the_process(options):
    process = Process(**options)
    again = Process(**json.loads(json.dumps(process.describe())))
    assert again.describe() == process.describe()
    t = some_times(process)
    for a, b in zip(process.coefficients(t), again.coefficients(t), strict=True):
        assert torch.equal(a, b)
    assert "cosine" in repr(Process())


def test_the_state_holds_learnt_numbers_alone():
    assert list(Process().state_dict()) == []
    shapes = {name: [tuple(p.shape) for p in Process("flow", name).parameters()] for name in TARGETS}
    assert shapes == {**{name: [] for name in SPACES}, "k": [()], "k2": [(2,)], "k(t)": [(129,)]}
    source, copied = Process("flow", "k", k_init=0.7), Process("flow", "k")
    copied.load_state_dict(source.state_dict())
    assert torch.equal(copied.target_values()["k"], source.target_values()["k"])
    assert Process().target_values() == {}


def test_learnable_targets_start_at_k_init():
    t = torch.linspace(0, 1, 50)
    for name in ("k", "k2", "k(t)"):
        c = Process("flow", name, k_init=0.3, noise_scale=2.0).coefficients(t)
        torch.testing.assert_close(c.c_x, torch.full_like(t, 0.3))
        torch.testing.assert_close(c.c_eps, torch.full_like(t, -0.3 * 2 if name == "k2" else -0.7 * 2))


@pytest.mark.parametrize(("k", "name", "factor"), [(1e-12, "eps", -1.0), (0.5, "u", -0.5), (1 - 1e-12, "x0", 1.0)])
def test_k_passes_through_the_known_targets(k, name, factor):
    t = torch.linspace(0.1, 0.9, 9)
    learnt = Process("flow", "k").double()
    with torch.no_grad():
        next(learnt.parameters()).fill_(torch.logit(torch.tensor(k, dtype=torch.float64)))
    a, b = learnt.coefficients(t), Process("flow", name).coefficients(t)
    torch.testing.assert_close(a.c_x, factor * b.c_x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.c_eps, factor * b.c_eps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.w, b.w, rtol=1e-4, atol=1e-5)  # normalised, so that the factor drops out


def test_k_of_time_is_piecewise_linear():
    process = Process("flow", "k(t)", k_bins=4)
    (w_k,) = process.parameters()
    ends = torch.tensor([0.1, 0.2, 0.6, 0.3, 0.9], dtype=torch.float64)
    with torch.no_grad():
        w_k.copy_(torch.logit(ends))
    t = torch.tensor([0.0, 0.125, 0.25, 0.5, 0.625, 1.0])
    got = process.coefficients(t).c_x
    torch.testing.assert_close(got, torch.tensor([0.1, 0.15, 0.2, 0.6, 0.45, 0.9]), rtol=1e-4, atol=1e-4)
    got[1].backward()
    assert w_k.grad is not None
    assert torch.equal(w_k.grad != 0, torch.tensor([True, True, False, False, False]))


@pytest.mark.parametrize("name", ["k", "k2", "k(t)"])
@pytest.mark.parametrize("schedule", ["flow", "cosine"])
def test_gradients_of_learnable_targets(name, schedule):
    """Of a loss with all three ways to the parameter, against differences in float64."""
    process = Process(schedule, name, "erd", loss_space="u", kappa_clip=0.01, k_bins=3 if name == "k(t)" else 128)
    process = process.double()
    (w_k,) = process.parameters()
    x0, eps, pred = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(values: torch.Tensor) -> torch.Tensor:
        changed = {next(iter(dict(process.named_parameters()))): values}
        c = torch.func.functional_call(process, changed, (some_times(process), torch.float64))
        error = pred - c.c_x[:, None] * x0 - c.c_eps[:, None] * eps
        return (c.w * error.square().mean(1)).mean()

    assert torch.autograd.gradcheck(loss, w_k.detach().clone().requires_grad_())


STEPS: list[dict[str, Any]] = [
    {"schedule": "cosine", "weighting": "min_snr"},
    {"schedule": "flow", "target": "k", "weighting": "erd", "loss_space": "u", "kappa_clip": 0.05},
    {"schedule": "vp", "target": "k(t)", "weighting": "constant"},
    {"schedule": "gvp", "target": "u", "as_sampling": True, "time_sampler": "logit_normal"},
    {"schedule": "flow", "target": "x0", "allocation": "logsnr", "time_sampler": "uniform_logsnr"},
    {"schedule": "cosine", "target": "v", "as_sampling": True, "stratified": True},
]


class NoReadBack(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading a value, or a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.masked_select,
            torch.ops.aten.equal,
        ), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", STEPS)
def test_nothing_is_read_back(options):
    process = Process(**options)
    seed, step = torch.tensor(3), torch.tensor(4)
    pred = torch.randn(4, 5)
    with NoReadBack():
        t = process.sample_time(4, seed=seed, step=step, global_batch=4)
        process.coefficients(t)
        process.to_x0(pred, pred, t)
    with pytest.raises(AssertionError), NoReadBack():
        t.max().item()


@pytest.mark.parametrize(
    ("backend", "options"), [("eager", STEPS[0]), *(("aot_eager", STEPS[number]) for number in (1, 2, 5))]
)
def test_compiles_without_graph_breaks(backend, options):
    torch._dynamo.reset()
    process = Process(**options)

    def step(seed, step):
        t = process.sample_time(6, seed=seed, step=step, rank_offset=2, global_batch=8)
        return (t, *process.coefficients(t))

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for number in (3, 4):
        arguments = torch.tensor(12), torch.tensor(number)
        for a, b in zip(step(*arguments), compiled(*arguments), strict=True):
            torch.testing.assert_close(a, b)


def test_copies_are_independent():
    process = Process("flow", "k", time_sampler="uniform_logsnr")
    other = copy.deepcopy(process)
    with torch.no_grad():
        next(other.parameters()).fill_(3.0)
    assert process.target_values()["k"] == 0.5
    assert torch.equal(process.sample_time(8, seed=1, step=1), other.sample_time(8, seed=1, step=1))


def test_network_time():
    t = torch.tensor([0, 100, 249])
    process = Process("cosine", num_timesteps=250)
    assert torch.equal(process.coefficients(t).time, torch.tensor([0.0, 400.0, 996.0]))
    assert process.schedule.network_time_range == (0.0, 996.0)
    assert torch.equal(Process("flow").coefficients(torch.tensor([0.25])).time, torch.tensor([0.25]))


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "sigmoid", "sigmoid_bias": -1000.0, "normalize": True},
        {"weighting": "sigmoid", "sigmoid_bias": -1000.0},
        {"weighting": "p2", "gamma": 3000.0, "p2_k": 1000.0},
        {"noise_scale": 1e300},
        {"schedule": "flow", "noise_scale": 1e300},
        {"schedule": "flow", "target": "k", "noise_scale": 1e300},
    ],
)
def test_options_that_leave_no_numbers_are_refused(options):
    with pytest.raises(ValueError, match=r"these options give weights that vanish.*noise_scale="):
        Process(**options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("as_sampling", [False, True])
def test_extreme_options_are_refused_or_give_finite_numbers(schedule, as_sampling):
    extremes: list[dict[str, Any]] = [
        {"weighting": "p2", "gamma": 3000.0},
        {"weighting": "p2", "gamma": 3000.0, "p2_k": 1e-3},
        {"weighting": "sigmoid", "sigmoid_bias": -300.0},
        {"weighting": "max_snr", "gamma": 1e30},
        {"noise_scale": 1e30},
        {"noise_scale": 1e-30},
    ]
    for target, options in itertools.product(("x0", "eps", "v"), extremes):
        try:
            process = Process(schedule, target, as_sampling=as_sampling, **options)
        except ValueError:
            continue
        t = torch.arange(1000) if process.discrete else torch.linspace(0, 1, 101)
        assert all(values.isfinite().all() for values in process.coefficients(t))


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_compiled_draw_takes_changing_integers(schedule, stratified):
    torch._dynamo.reset()
    process = Process(schedule, "v", stratified=stratified)
    compiled = torch.compile(
        lambda seed, step: process.sample_time(4, seed=seed, step=step, global_batch=4),
        fullgraph=True,
        backend="eager",
    )
    for seed, step in ((1, 0), (2, 1), (3, 7), (2**63 - 1, 2**32 - 1), (2**63 + 1, 5), (2**64 - 1, 6), (5, 2)):
        assert torch.equal(compiled(seed, step), process.sample_time(4, seed=seed, step=step, global_batch=4))
