"""What AdamWEma and adamw_ema do with unusual, changed and wrong input: the same on every back end."""

import copy
import math

import pytest
import torch
from torch import nn

from erdfast.ops.adamw_ema import adamw_ema, grad_norm
from erdfast.ops.optimizer import AdamWEma, _rate
from erdfast.ops.tensor_table import StepOptions, StepTensors, TensorTable
from tests.ops.adamw64 import Adamw64, worst

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = {"cpu": "cpu", "reference": "cpu", "triton": DEVICE}
"""The device of each back end; without a GPU Triton's interpreter runs."""


@pytest.fixture(params=PLACES)
def place(request):
    """(device, backend)."""
    return PLACES[request.param], request.param


def make(device, *shapes):
    """Parameters with gradients."""
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes or [(4,)]]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def functional(place, **options):
    """The parameter after one step with a gradient of norm 6."""
    device, backend = place
    param, grad, first, second = (torch.full((4,), value, device=device) for value in (1.0, 3.0, 0.0, 0.0))
    step = torch.zeros((), device=device)
    adamw_ema([param], [grad], [first], [second], [step], **{"lr": 0.1, "eps": 1.0, "backend": backend} | options)
    return param


def test_a_group_may_be_empty(place):
    device, backend = place
    params, average = make(device), torch.zeros(4, device=device)
    groups = [{"params": params}, {"params": [], "lr": 0.5}]
    optimizer = AdamWEma(groups, lr=0.0, emas=[([average], 0.9)], backend=backend)
    optimizer.step()
    assert worst([average], [0.1 * params[0]]) < 1e-6


# ---------------------------------------------------------------------- scalars

SCALARS = {"norm": 6.0, "grad_scale": 8.0, "found_inf": 1.0}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_of_any_floating_dtype(place, name):
    ends = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        value = torch.full((1,), SCALARS[name], dtype=dtype, device=place[0])
        ends.append(functional(place, **{name: value}, **({"max_norm": 1.0} if name == "norm" else {})))
        param = make(place[0])[0]
        assert param.grad is not None
        param.data.fill_(1.0)
        param.grad.fill_(3.0)
        optimizer = AdamWEma([param], lr=0.1, eps=1.0, backend=place[1])
        if name != "norm":  # as GradScaler does
            setattr(optimizer, name, value)
        optimizer.step(max_norm=1.0 if name == "norm" else None)
        ends.append(param)
    assert worst(ends, [ends[0]] * len(ends)) < 1e-6
    assert worst(ends[:1], [functional(place)]) > 0.01


NO_SCALARS = {
    "is 6.0; it must be a tensor": 6.0,
    r"is torch.bool of shape \(\)": torch.tensor(True),
    r"is torch.float32 of shape \(2,\)": torch.ones(2),
    r"is torch.float32 of shape \(\) on meta": torch.ones((), device="meta"),
}


@pytest.mark.parametrize("message", NO_SCALARS)
@pytest.mark.parametrize("name", SCALARS)
def test_other_scalars_are_refused(place, name, message):
    value = NO_SCALARS[message]
    with pytest.raises(ValueError, match=f"{name} {message}"):
        functional(place, **{name: value})
    optimizer = AdamWEma(make(place[0]), backend=place[1])
    if name != "norm" and isinstance(value, torch.Tensor):
        setattr(optimizer, name, value)
        with pytest.raises(ValueError, match=f"{name} {message}"):
            optimizer.step()


def test_a_scaler_may_find_no_gradients(place):
    device, backend = place
    params = make(device)
    optimizer = AdamWEma(params, lr=0.1, backend=backend)
    before = params[0].detach().clone()
    optimizer.zero_grad()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0, device=device), 0  # pyright: ignore[reportAttributeAccessIssue]  # GradScaler's
    optimizer.step(max_norm=1.0)
    assert torch.equal(params[0], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, "max_norm is 1.0 and norm is None"),
        ({"max_norm": math.nan}, "max_norm is nan; it must be above 0"),
        ({"max_norm": -1.0}, "max_norm is -1.0; it must be above 0"),
        ({"betas": (0.9,)}, r"betas are \(0.9,\)"),
        ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": "a"}, "eps is 'a'"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"emas": [([torch.zeros(4)], 1.5)]}, "the decay of average 0 is 1.5"),
        ({"emas": [([torch.zeros(4)] * 2, 0.5)]}, "average 0 has 2 tensors, there are 1 parameters"),
        ({"copies": [torch.zeros(4).half()] * 2}, "copies has 2 tensors, there are 1 parameters"),
    ],
)
def test_numbers_and_lists_are_checked(place, options, message):
    with pytest.raises(ValueError, match=message):
        functional(place, **options)


@pytest.mark.parametrize("t", range(1, 5))
def test_lists_of_other_lengths_are_refused(place, t):
    lists = [[torch.ones(3, device=place[0])] for _ in range(4)] + [[torch.zeros((), device=place[0])]]
    lists[t] = []
    name = ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps")[t]
    with pytest.raises(ValueError, match=f"{name} has 0 tensors, there are 1 parameters"):
        adamw_ema(*lists, lr=0.1, backend=place[1])


def test_averages_may_be_iterators(place):
    average = torch.zeros(4, device=place[0])
    param = functional(place, emas=iter([(iter([average]), 0.5)]))
    assert worst([average], [0.5 * param]) < 1e-6


def test_the_norm_of_what_is_no_gradient():
    with pytest.raises(ValueError, match="gradient 1 is NoneType; it must be a dense tensor"):
        grad_norm([torch.ones(2), None])  # pyright: ignore[reportArgumentType]
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=r"gradient 0 is torch\.sparse_coo"):
            grad_norm([torch.ones(2, 2).to_sparse()], backend=backend)


def test_a_default_device_changes_nothing(place):
    device, backend = place
    params = make(device, (3, 5), (0,), (7,))
    expected = Adamw64(params, (0.9,))
    wanted = expected.step([param.grad for param in params], lr=0.1, max_norm=1.0)
    optimizer = AdamWEma(params, lr=0.1, emas=[([p.detach().clone() for p in params], 0.9)], backend=backend)
    with torch.device("meta"):
        norm = grad_norm([param.grad for param in params if param.grad is not None], backend=backend)
        optimizer.step(max_norm=1.0)
        nothing = grad_norm([])
    torch.testing.assert_close([float(norm), float(nothing)], [wanted, 0.0], rtol=1e-5, atol=0)
    assert worst([*params, *optimizer.emas[0][0]], [*expected.params, *expected.emas[0]]) < 1e-6


# ---------------------------------------------------------------------- autograd


def test_autograd_notices_what_a_step_changes(place):
    device, backend = place
    params = make(device, (4,), (3,))
    params[1].grad = None
    averages, copies = [p.detach().clone() for p in params], [p.detach().half() for p in params]
    optimizer = AdamWEma(params, emas=[(averages, 0.5)], copies=copies, backend=backend)
    optimizer.step()
    unchanged = params[1]._version
    tensors = [params[0], *averages, *copies, *optimizer.state[params[0]].values()]
    versions = [tensor._version for tensor in tensors]
    x = torch.ones(4, device=device, requires_grad=True)
    loss = (x * params[0]).sum()
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))
    assert params[1]._version == unchanged
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------------- groups and what the constructor refuses

BAD_GROUPS = {
    "amsgrad is not supported": {"amsgrad": True},
    "maximize is not supported": {"maximize": True},
    "lr is -1.0": {"lr": -1.0},
    r"lr is tensor\(\[-1.\]\)": {"lr": torch.tensor([-1.0])},
    r"lr is a tensor of shape \(2,\)": {"lr": torch.ones(2)},
    "lr is 'a'": {"lr": "a"},
    "betas are 0.9": {"betas": 0.9},
    r"betas are \(0.9, 0.99, 0.999\)": {"betas": (0.9, 0.99, 0.999)},
    "weight_decay is nan": {"weight_decay": math.nan},
}


@pytest.mark.parametrize("message", BAD_GROUPS)
def test_every_group_is_checked(message):
    options = BAD_GROUPS[message]
    optimizer = AdamWEma(make("cpu"))
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": make("cpu"), **options})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=message):
        AdamWEma([{"params": make("cpu"), **options}])
    with pytest.raises(ValueError, match=message):
        AdamWEma(make("cpu"), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "cuda"}, "unknown backend 'cuda'; choose from reference, cpu, triton"),
        ({"copies": [torch.ones(4)]}, r"copies\[0\] is torch.float32; choose from torch.bfloat16, torch.float16"),
        ({"emas": [([torch.ones(4)], math.nan)]}, "the decay of average 0 is nan"),
    ],
)
def test_what_the_constructor_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AdamWEma(make("cpu"), **options)


def test_complex_parameters_are_refused():
    param = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"parameter 0 is torch\.complex64; complex parameters are not supported"):
        AdamWEma([nn.Parameter(param)])
    with pytest.raises(ValueError, match="complex parameters are not supported"):
        adamw_ema([param], [param], [param], [param], [torch.zeros(())], lr=0.1)


def test_betas_of_a_group_are_two_at_every_step(place):
    optimizer = AdamWEma(make(place[0]), backend=place[1])
    optimizer.param_groups[0]["betas"] = (0.9, 0.99, 0.999)
    with pytest.raises(ValueError, match="too many values to unpack"):
        optimizer.step()


# ---------------------------------------------------------------------- what changes between steps


def test_strides_that_change_in_place_are_noticed(place):
    device, backend = place
    params = make(device, (4, 4))
    average = params[0].detach().clone()
    plain, averaging = AdamWEma(params, lr=0.1, backend=backend), None
    if backend != "reference":
        averaging = AdamWEma(params, lr=0.1, emas=[([average], 0.5)], backend=backend)
    for optimizer in filter(None, (plain, averaging)):
        optimizer.step()
    expected = Adamw64(params)
    state = plain.state[params[0]]
    expected.first, expected.second = [state["exp_avg"].double().cpu()], [state["exp_avg_sq"].double().cpu()]
    expected.count = [1]
    params[0].data = params[0].data.t()  # the same address
    expected.params[0] = expected.params[0].t()
    params[0].grad = torch.randn(4, 4, device=device)
    plain.step()
    expected.step([params[0].grad], lr=0.1)
    assert worst(params, expected.params) < 1e-6
    if averaging is not None:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"average 0\[0\] has strides \(4, 1\), its parameter \(1, 4\)"):
                averaging.step()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_gradient_dtypes_that_change_are_noticed(backend):
    params = make(PLACES[backend])
    optimizer = AdamWEma(params, backend=backend)
    optimizer.step(max_norm=1.0)
    params[0].grad_dtype = None  # pyright: ignore[reportAttributeAccessIssue]
    params[0].grad = torch.ones(4, dtype=torch.float64, device=PLACES[backend])
    for max_norm in (None, 1.0):
        with pytest.raises(ValueError, match=r"the gradients are torch\.float64; choose from"):
            optimizer.step(max_norm=max_norm)


@pytest.mark.parametrize("loaded", [False, True])
def test_state_goes_on_in_another_memory_format(place, loaded):
    device, backend = place
    mine, theirs = nn.Conv2d(4, 8, 3, device=device), nn.Conv2d(4, 8, 3, device=device)
    theirs.load_state_dict(mine.state_dict())

    def step(model, optimizer):
        model(torch.ones(1, 4, 5, 5, device=device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    ours = AdamWEma(mine.parameters(), lr=0.1, backend=backend)
    torchs = torch.optim.AdamW(theirs.parameters(), lr=0.1)
    for _ in range(2):
        for model in (mine, theirs):
            step(model, ours if model is mine else torchs)
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # as documented
        if loaded:
            state = copy.deepcopy(ours.state_dict())
            ours = AdamWEma(mine.parameters(), lr=0.1, backend=backend)
            ours.load_state_dict(state)
    step(mine, ours)
    step(theirs, torchs)
    assert worst(list(mine.parameters()), list(theirs.parameters())) < 1e-5
    assert ours.state[mine.weight]["exp_avg"].stride() == mine.weight.stride()


@pytest.mark.parametrize("key", ["maximize", "amsgrad", "foreach", "capturable", "differentiable", "fused"])
def test_old_states_lack_some_options(key):
    params = make("cpu")
    state = copy.deepcopy(AdamWEma(params).state_dict())
    del state["param_groups"][0][key]
    optimizer = AdamWEma(params)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0].keys() == AdamWEma(params).param_groups[0].keys()
    optimizer.step()


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_rate_on_the_device_is_forgotten_when_a_number_follows(backend):
    """The table sends settings that change alone, and a rate on the device overwrites what was sent."""
    device = PLACES[backend]
    ones, zeros, step = torch.ones(2, device=device), torch.zeros(2, device=device), torch.zeros((), device=device)
    tensors = StepTensors([ones], [ones.clone()], [zeros], [zeros.clone()], [step], [0], [], [])
    table, group = TensorTable(), [0.0, 0.9, 0.999, 1e-8, 0.0]
    table.step(backend, tensors, StepOptions([group], [], [torch.tensor(0.5, device=device)]))
    assert worst([ones], [torch.full((2,), 0.5)]) < 1e-6
    table.step(backend, tensors, StepOptions([group], [], [None]))
    assert worst([ones], [torch.full((2,), 0.5)]) < 1e-6


def test_a_rate_on_a_device_may_have_one_dimension():
    number, rate = _rate(torch.ones(1, device="meta"))
    assert rate is not None
    assert (number, rate.shape) == (0.0, ())
    param = make("cpu")[0]
    AdamWEma([param], lr=torch.tensor([0.1])).step()


def test_numbers_may_change_under_compile():
    def step(param, lr):
        adamw_ema([param], [torch.ones_like(param)], [param * 0], [param * 0], [param.new_zeros(())], lr=lr)
        return param

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lr in (0.1, 0.2, 0.3):
        assert worst([compiled(torch.ones(3), lr)], [step(torch.ones(3), lr)]) < 1e-6
