"""AdamWEma: torch.optim.AdamW's interface and state, and what it does besides."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from erdfast.ops.optimizer import AdamWEma
from tests.ops.adamw64 import Adamw64, worst

SHAPES = [(3, 5), (7,), (33, 17), ()]


def make(device="cpu", shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def set_grads(*lists, scale=1.0):
    """The same random gradients for the parameters of every list."""
    for row in zip(*lists, strict=True):
        grad = scale * torch.randn(row[0].shape)
        for param in row:
            param.grad = grad.to(param.device, param.dtype, copy=True)


def grads_of(params):
    return [param.grad.clone() for param in params if param.grad is not None]


def averages_of(params):
    return [param.detach().clone() for param in params]


def test_groups_have_their_own_settings(device_backend) -> None:
    device, backend = device_backend
    mine, theirs = make(device), make(device)

    def groups(params):
        return [{"params": params[:2], "lr": 1e-2, "weight_decay": 0.3}, {"params": params[2:], "betas": (0.5, 0.7)}]

    ours = AdamWEma(groups(mine), lr=1e-3, backend=backend)
    torchs = torch.optim.AdamW(groups(theirs), lr=1e-3)
    for step in range(20):
        for optimizer in (ours, torchs):
            optimizer.param_groups[1]["lr"] = 1e-3 * (step + 1)
        set_grads(mine, theirs)
        ours.step()
        torchs.step()
    assert worst(mine, theirs) < 3e-6


def test_what_has_no_gradient_is_only_averaged(device_backend) -> None:
    device, backend = device_backend
    params = make(device)
    averages = [torch.zeros_like(param) for param in params]
    copies = [torch.zeros_like(param, dtype=torch.bfloat16) for param in params]
    optimizer = AdamWEma(params, lr=1e-2, emas=[(averages, 0.5)], copies=copies, backend=backend)
    set_grads(params)
    params[1].grad = None
    before = averages_of(params)
    optimizer.step()
    assert torch.equal(params[1], before[1])
    assert params[1] not in optimizer.state
    assert not torch.equal(params[0], before[0])
    assert worst(averages, [0.5 * param for param in params]) < 1e-6
    assert all(torch.equal(c, param.bfloat16()) for c, param in zip(copies, params, strict=True))
    set_grads(params)  # its first gradient comes later: its own bias correction
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [2, 1, 2, 2]
    optimizer.zero_grad()
    optimizer.step()
    assert [int(optimizer.state[param]["step"]) for param in params] == [2, 1, 2, 2]


def test_tensors_may_be_replaced_between_steps(device_backend) -> None:
    """Addresses are looked at anew: gradients, moments, data and averages may all move."""
    device, backend = device_backend
    params = make(device)
    averages = averages_of(params)
    expected = Adamw64(params, (0.9,))
    optimizer = AdamWEma(params, lr=1e-2, emas=[(averages, 0.9)], backend=backend)
    kept = []
    for step in range(6):
        set_grads(params)
        kept.append([param.grad for param in params])  # so that the next ones lie elsewhere
        optimizer.step()
        expected.step([param.grad for param in params], lr=1e-2)
        if step == 2:
            for t, param in enumerate(params):
                kept.append([param.data, *optimizer.state[param].values(), averages[t]])
                param.data = param.data.clone()
                optimizer.state[param] = {key: value.clone() for key, value in optimizer.state[param].items()}
                optimizer.emas[0][0][t] = averages[t].clone()
    assert worst(params, expected.params) < 2e-6
    assert worst(optimizer.emas[0][0], expected.emas[0]) < 2e-6


def test_clips_by_the_norm_of_all_groups(device_backend) -> None:
    device, backend = device_backend
    mine, theirs = make(device), make(device)
    ours = AdamWEma([{"params": mine[:1]}, {"params": mine[1:]}], lr=1e-2, backend=backend)
    torchs = torch.optim.AdamW(theirs, lr=1e-2)
    for max_norm in (1.0, 1e6, 3.0):
        set_grads(mine, theirs)
        before = grads_of(mine)
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        assert ours.step(max_norm=max_norm) is None
        torchs.step()
        assert ours.grad_norm is not None
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=0)
        assert worst(grads_of(mine), before) == 0.0  # only read
    assert worst(mine, theirs) < 2e-6
    ours.step()
    assert ours.grad_norm is None
    with pytest.raises(ValueError, match="max_norm is -1; it must be above 0"):
        ours.step(max_norm=-1)


def test_measuring_changes_nothing(device_backend) -> None:
    device, backend = device_backend
    ends, norms = [], []
    for max_norm in (None, math.inf):
        torch.manual_seed(0)
        params = make(device)
        optimizer = AdamWEma(params, lr=1e-2, backend=backend)
        set_grads(params)
        optimizer.step(max_norm=max_norm)
        ends.append(params)
        norms.append(optimizer.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert norms[0] is None
    assert float(norms[1]) > 1.0


def test_closures_run_with_gradients() -> None:
    params = make()
    optimizer = AdamWEma(params, lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in params]).sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_learning_rate_may_be_a_tensor(device_backend) -> None:
    device, backend = device_backend
    mine, theirs = make(device), make(device)
    lr = torch.tensor(0.0, device=device)
    ours, plain = AdamWEma(mine, lr=lr, backend=backend), AdamWEma(theirs, lr=0.0, backend=backend)
    for step in range(4):
        lr.fill_(1e-2 * (step + 1))
        plain.param_groups[0]["lr"] = float(lr)
        set_grads(mine, theirs)
        ours.step()
        plain.step()
    assert worst(mine, theirs) < 1e-6


def test_works_with_schedulers_and_hooks() -> None:
    params = make()
    optimizer = AdamWEma(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    for _ in range(3):
        set_grads(params)
        optimizer.step()
        scheduler.step()
    assert seen == [1.0, 0.5, 0.25]


def test_triton_tables() -> None:
    """The kernels' own tests make tables by hand; here they are the optimiser's, in the interpreter without a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = make(device, [(3, 5), (0,), (2049,), (7,), ()])
    averages = averages_of(params)
    copies = [param.detach().half() for param in params]
    expected = Adamw64(params, (0.9, 0.5))
    emas = [(averages, 0.9), (averages_of(params), 0.5)]
    optimizer = AdamWEma(params, lr=1e-2, emas=emas, copies=copies, backend="triton")
    kept = []
    for step in range(3):
        set_grads(params)
        params[3].grad = None
        kept.append(grads_of(params))
        optimizer.step(max_norm=3.0)
        norm = expected.step([param.grad for param in params], lr=1e-2, max_norm=3.0)
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(float(optimizer.grad_norm), norm, rtol=1e-6, atol=0)
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert worst(params, expected.params) < 2e-6
    for (tensors, _), wanted in zip(optimizer.emas, expected.emas, strict=True):
        assert worst(tensors, wanted) < 2e-6
    assert all(torch.equal(c, param.half()) for c, param in zip(copies, params, strict=True))
    assert [int(optimizer.state[params[t]]["step"]) for t in (0, 1, 2, 4)] == [3, 3, 3, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waits_for_nothing_and_can_be_captured() -> None:
    mine, theirs = make("cuda"), make("cuda")
    lr = torch.tensor(1e-2, device="cuda")
    ours, plain = AdamWEma(mine, lr=lr), AdamWEma(theirs, lr=1e-2)
    set_grads(mine, theirs)
    ours.step(max_norm=1.0)
    plain.step(max_norm=1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(max_norm=1.0)
        plain.param_groups[0]["lr"] = 2e-2  # a number that changes is sent
        plain.step(max_norm=1.0)
        plain.param_groups[0]["lr"] = 1e-2
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))
    ours.param_groups[0]["lr"] = lr
    for a, b in zip(mine, theirs, strict=True):
        a.data.copy_(b.data)
    ours.step(max_norm=1.0)
    plain.step(max_norm=1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step(max_norm=1.0)
    for rate in (1e-2, 3e-2):
        lr.fill_(rate)
        plain.param_groups[0]["lr"] = rate
        graph.replay()
        plain.step(max_norm=1.0)
    assert worst(mine, theirs) < 2e-6
    with torch.cuda.stream(torch.cuda.Stream()):
        set_grads(mine)  # elsewhere: their addresses would have to be sent
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            with pytest.raises(RuntimeError, match="a CUDA graph captures addresses"):
                ours.step()
        finally:
            graph.capture_end()


# ---------------------------------------------------------------------- state


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("torch_first", [False, True])
def test_state_is_interchangeable_with_torch(device_backend, torch_first, fused) -> None:
    device, backend = device_backend
    torch.manual_seed(0)
    whole, halves = make(device), make(device)

    def torchs(params):
        return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.2, fused=fused)

    def ours(params):
        return AdamWEma(params, lr=1e-2, weight_decay=0.2, backend=backend)

    kinds = [torchs, ours] if torch_first else [ours, torchs]
    reference, first = torchs(whole), kinds[0](halves)
    for _ in range(5):
        set_grads(whole, halves)
        reference.step()
        first.step()
    second = kinds[1](halves)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(5):
        set_grads(whole, halves)
        reference.step()
        second.step()
    assert worst(whole, halves) < 2e-6
    state, wanted = second.state_dict(), reference.state_dict()
    assert state["param_groups"][0].keys() == wanted["param_groups"][0].keys()
    assert state["state"].keys() == wanted["state"].keys()
    for t, moments in wanted["state"].items():
        assert list(state["state"][t]) == list(moments) == ["step", "exp_avg", "exp_avg_sq"]
        assert float(state["state"][t]["step"]) == float(moments["step"]) == 10
        assert state["state"][t]["step"].dtype == moments["step"].dtype


def test_a_copy_keeps_its_averages() -> None:
    params = make()
    optimizer = AdamWEma(params, lr=1e-2, emas=[(averages_of(params), 0.9)])
    set_grads(params)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    for group in other.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    for param in params:
        param.grad = torch.ones_like(param)
    other.step()
    optimizer.step()
    assert worst(other.param_groups[0]["params"], params) == 0.0
    assert worst(other.emas[0][0], optimizer.emas[0][0]) == 0.0


REFUSED = {
    "amsgrad is not supported": {"amsgrad": True},
    "maximize is not supported": {"maximize": True},
    "lr is -1; it must be at least 0": {"lr": -1},
    r"betas are \(0.9, 1.0\)": {"betas": (0.9, 1.0)},
    "eps is -1e-08": {"eps": -1e-8},
    "average 0 has 1 tensors, there are 4 parameters": {"emas": [([torch.zeros(3)], 0.5)]},
    "the decay of average 0 is 1.5": {"emas": [([torch.zeros(3)], 1.5)]},
    "copies has 1 tensors, there are 4 parameters": {"copies": [torch.zeros(3)]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message) -> None:
    with pytest.raises(ValueError, match=message):
        AdamWEma(make(), **REFUSED[message])


def test_states_that_cannot_be_are_refused() -> None:
    params = make()
    theirs = torch.optim.AdamW(params, amsgrad=True)
    set_grads(params)
    theirs.step()
    with pytest.raises(ValueError, match="amsgrad is not supported by AdamWEma"):
        AdamWEma(params).load_state_dict(theirs.state_dict())
    optimizer = AdamWEma(params, emas=[(averages_of(params), 0.5)])
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="average 0 has 4 tensors, there are 5 parameters"):
        optimizer.step()


def test_gradients_in_another_order_are_copied_into_the_parameters() -> None:
    param = nn.Parameter(torch.randn(6, 4))
    expected = Adamw64([param])
    optimizer = AdamWEma([param], lr=1e-2)
    param.grad = torch.randn(4, 6).t()
    optimizer.step()
    expected.step([param.grad], lr=1e-2)
    assert worst([param], expected.params) < 1e-6


# ---------------------------------------------------------------------- loss scale, several processes


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(device_backend, unscale) -> None:
    device, backend = device_backend
    mine, theirs = make(device), make(device)
    averages = averages_of(mine)
    expected = [average.clone() for average in averages]
    ours = AdamWEma(mine, lr=1e-2, emas=[(averages, 0.75)], backend=backend)
    torchs = torch.optim.AdamW(theirs, lr=1e-2)
    scalers = [torch.amp.GradScaler(device, init_scale=1024.0) for _ in range(2)]
    for step in range(5):
        set_grads(mine, theirs, scale=scalers[0].scale(torch.ones((), device=device)).item())
        scalers[1].scale(torch.ones((), device=device))
        if step == 2:
            for param in (mine[0], theirs[0]):
                assert param.grad is not None
                param.grad[0, 0] = math.inf
        scalers[1].unscale_(torchs)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 5.0)
        scalers[1].step(torchs)
        if unscale:
            scalers[0].unscale_(ours)
        scalers[0].step(ours, max_norm=5.0)
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-5, atol=0)
        for average, param in zip(expected, theirs, strict=True):
            average.lerp_(param.detach(), 0.25)  # also when the step was skipped
        for scaler in scalers:
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale() == (1024.0 if step < 2 else 512.0)
    assert worst(mine, theirs) < 2e-6
    assert worst(averages, expected) < 2e-6
    assert [int(ours.state[param]["step"]) for param in mine] == [4] * len(mine)


def sharded(rank: int, store: str) -> None:
    """Two processes hold the rows of a matrix, and a vector each as a whole; one process is the reference."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = [torch.randn(5, 3), torch.randn(1, 4), torch.randn(7)]
    placements = [[Shard(0)], [Shard(0)], [Replicate()]]
    expected = Adamw64(whole, (0.9,))
    pairs = list(zip(whole, placements, strict=True))
    params = [nn.Parameter(distribute_tensor(value.clone(), mesh, place)) for value, place in pairs]
    averages = [distribute_tensor(value.clone(), mesh, place) for value, place in pairs]
    optimizer = AdamWEma(params, lr=1e-2, emas=[(averages, 0.9)])
    for _ in range(3):
        grads = [torch.randn_like(value) for value in whole]
        for param, grad, place in zip(params, grads, placements, strict=True):
            param.grad = distribute_tensor(grad, mesh, place)
        versions = [param._version for param in params]
        optimizer.step(max_norm=1.0)
        assert all(param._version > version for param, version in zip(params, versions, strict=True))
        norm = expected.step(grads, lr=1e-2, max_norm=1.0)
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(float(optimizer.grad_norm), norm, rtol=1e-5, atol=0)
    assert all(isinstance(optimizer.state[param]["exp_avg"], DTensor) for param in params)
    assert worst([param.full_tensor() for param in params], expected.params) < 2e-6  # pyright: ignore[reportAttributeAccessIssue]  # DTensors
    assert worst([average.full_tensor() for average in averages], expected.emas[0]) < 2e-6
    params[0].grad = distribute_tensor(whole[0], mesh, [Replicate()])
    with pytest.raises(ValueError, match="a gradient is placed as"):
        optimizer.step()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_shards_of_two_processes(tmp_path) -> None:
    # A store in a file: one in a process ends with it, maybe before the other has done.
    mp.spawn(sharded, args=(str(tmp_path / "store"),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]  # its documented place
