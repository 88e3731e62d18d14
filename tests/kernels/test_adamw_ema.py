import pytest
import torch

from erdfast.kernels import adamw_ema as kernels
from tests.kernels.inputs import DTYPES, assert_guard_intact, guarded
from tests.ops.adamw64 import Adamw64, worst

SIZES = [1, kernels.BLOCK, 7, kernels.BLOCK + 1, 0, 40]
GROUPS = [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.8, 0.95, 1e-6, 0.0]]
STEPS = 2


class Lists:
    """Tensors between guard zones, and the tables that a launch takes."""

    def __init__(self, device, grad_dtype, emas=1, copy_dtype=None, offset=0, without=()):
        self.device, self.grad_dtype, self.copy_dtype = device, grad_dtype, copy_dtype
        self.whole = []
        self.offset, self.without = offset, without
        self.params, self.first, self.second = (self.make(torch.float32) for _ in range(3))
        self.emas = [self.make(torch.float32) for _ in range(emas)]
        self.copies = self.make(copy_dtype) if copy_dtype else []
        self.steps = [torch.zeros((), device=device) for _ in SIZES]
        self.groups = [t % 2 for t in range(len(SIZES))]
        for t in range(len(SIZES)):
            self.params[t].copy_(torch.randn(SIZES[t]))
            self.first[t].zero_()
            self.second[t].zero_()
            for average in self.emas:
                average[t].copy_(self.params[t])

    def make(self, dtype):
        """One tensor of each size; with an offset it starts at no multiple of 16 bytes."""
        views = []
        for numel in SIZES:
            whole, view = guarded((1, numel + self.offset), dtype, self.device)
            self.whole.append(whole)
            views.append(view.view(-1)[self.offset :])
        return views

    def table(self):
        first, owner = kernels.block_owners(SIZES)
        lists = [self.params, self.first, self.second, self.steps, *self.emas, *([self.copies] if self.copies else [])]
        rows = [SIZES, self.groups, first, *([tensor.data_ptr() for tensor in tensors] for tensors in lists)]
        return torch.tensor(rows, device=self.device), owner.to(self.device)

    def grads(self, scale=1.0):
        """(gradients, their addresses)."""
        grads = [grad.copy_(scale * torch.randn(grad.shape)) for grad in self.make(self.grad_dtype)]
        addresses = [0 if t in self.without else grad.data_ptr() or 16 for t, grad in enumerate(grads)]
        return grads, torch.tensor(addresses, device=self.device)

    def step(self, addresses, decays, *, grad_scale=None, found_inf=None, norm=None, max_norm=0.0):
        table, owner = self.table()
        weights = [1.0 - decay for decay in decays]
        settings = torch.tensor([x for group in GROUPS for x in group] + weights, dtype=torch.float64)
        kernels.adamw_ema(
            table,
            owner,
            addresses,
            settings.to(self.device),
            self.grad_dtype,
            len(self.emas),
            self.copy_dtype,
            len(GROUPS),
            None if grad_scale is None else torch.tensor(grad_scale, device=self.device),
            None if found_inf is None else torch.tensor(found_inf, device=self.device),
            norm,
            max_norm,
        )

    def check_guards(self):
        for whole in self.whole:
            assert_guard_intact(whole)


def by_group(expected, grads, groups, **options):
    """A step of `Adamw64` whose tensors go by two groups of settings."""
    before = [list(ema) for ema in expected.emas]
    for g, (lr, beta1, beta2, eps, weight_decay) in enumerate(GROUPS):
        expected.emas = [list(ema) for ema in before]
        mine = [grad if groups[t] == g else None for t, grad in enumerate(grads)]
        expected.step(mine, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, **options)


def compare(lists, expected, rounding=1e-6):
    assert worst(lists.params, expected.params) < 4 * rounding
    assert worst(lists.first, expected.first) < rounding * 10
    assert worst(lists.second, expected.second) < rounding * 100
    for average, wanted in zip(lists.emas, expected.emas, strict=True):
        assert worst(average, wanted) < 4 * rounding
    assert [int(step) for step in lists.steps] == expected.count
    lists.check_guards()


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype, offset, device):
    lists = Lists(device, DTYPES[dtype], offset=offset, without=(1, 3))
    expected = Adamw64(lists.params, [0.9])
    for _ in range(STEPS):
        grads, addresses = lists.grads()
        lists.step(addresses, [0.9])
        by_group(expected, [None if t in lists.without else g for t, g in enumerate(grads)], lists.groups)
    compare(lists, expected)


@pytest.mark.parametrize("copy_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decays", [[], [0.3, 0.999, 0.0]], ids=["none", "three"])
def test_any_number_of_averages_and_copies(decays, copy_dtype, device):
    lists = Lists(device, torch.float32, emas=len(decays), copy_dtype=copy_dtype)
    expected = Adamw64(lists.params, decays)
    grads, addresses = lists.grads()
    lists.step(addresses, decays)
    by_group(expected, grads, lists.groups)
    compare(lists, expected)
    unit = torch.finfo(copy_dtype).eps * (
        1.0 if copy_dtype == torch.bfloat16 else 0.5
    )  # the interpreter truncates bf16
    for copy, param in zip(lists.copies, lists.params, strict=True):
        torch.testing.assert_close(copy.float(), param, rtol=unit, atol=1e-7)
    if 0.0 in decays:
        assert all(torch.equal(average, param) for average, param in zip(lists.emas[2], lists.params, strict=True))


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_scales_and_clips_by_scalars_on_the_device(max_norm, device):
    lists = Lists(device, torch.float16)
    expected = Adamw64(lists.params, [0.9])
    grads, addresses = lists.grads(scale=100.0)
    table, owner = lists.table()
    norm = kernels.grad_norm(table, owner, addresses, torch.float16) / 100.0
    lists.step(addresses, [0.9], grad_scale=100.0, found_inf=0.0, norm=norm, max_norm=max_norm)
    size = sum(float((grad.double() / 100).square().sum()) for grad in grads) ** 0.5
    factor = min(1.0, max_norm / (size + 1e-6))
    by_group(expected, [grad.double() * factor for grad in grads], lists.groups, grad_scale=100.0)
    torch.testing.assert_close(float(norm), size, rtol=1e-6, atol=0)
    compare(lists, expected)


def test_found_inf_moves_the_averages_alone(device):
    lists = Lists(device, torch.float32, emas=2, copy_dtype=torch.float16)
    for average in lists.emas[0]:
        average.zero_()
    before = [param.clone() for param in lists.params]
    _, addresses = lists.grads(scale=float("inf"))
    lists.step(addresses, [0.75, 0.0], grad_scale=65536.0, found_inf=1.0)
    for t, param in enumerate(before):
        assert torch.equal(lists.params[t], param)
        assert not lists.first[t].any()
        assert not lists.second[t].any()
        assert torch.equal(lists.emas[0][t], 0.25 * param)
        torch.testing.assert_close(lists.copies[t].float(), param, rtol=1e-3, atol=1e-7)
    assert not any(lists.steps)
    lists.check_guards()


def test_a_norm_that_is_not_a_number_shows(device):
    lists = Lists(device, torch.float32)
    _, addresses = lists.grads()
    lists.step(addresses, [0.9], norm=torch.tensor(float("nan"), device=device), max_norm=1.0)
    assert all(param.isnan().all() for param in lists.params)


def test_late_steps_are_corrected_in_float64(device):
    """1 - 0.999^t at t = 1 and near 1 at t = 2^24, the last that a float32 counts."""
    lists = Lists(device, torch.float32)
    late = 2.0**24 - 2
    lists.steps = [torch.tensor(late, device=device) for _ in SIZES]
    expected = Adamw64(lists.params, [0.9])
    expected.count = [int(late)] * len(SIZES)
    grads, addresses = lists.grads()
    lists.step(addresses, [0.9])
    by_group(expected, grads, lists.groups)
    compare(lists, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("programs", [1024, 2])
def test_norm(dtype, programs, device, monkeypatch):
    monkeypatch.setattr(kernels, "NORM_PROGRAMS", programs)  # 2: programs that take several blocks
    for offset in (0, 1):
        lists = Lists(device, DTYPES[dtype], offset=offset, without=(4,))
        grads, addresses = lists.grads()
        table, owner = lists.table()
        norm = kernels.grad_norm(table, owner, addresses, DTYPES[dtype])
        wanted = sum(float(g.double().square().sum()) for t, g in enumerate(grads) if t != 4) ** 0.5
        torch.testing.assert_close(float(norm), wanted, rtol=1e-6, atol=0)
        assert torch.equal(norm, kernels.grad_norm(table, owner, addresses, DTYPES[dtype]))
        grads[3][-1] = float("inf")
        assert kernels.grad_norm(table, owner, addresses, DTYPES[dtype]).isinf()


def test_nothing_to_do(device):
    empty = torch.zeros((8, 0), dtype=torch.int64, device=device)
    owner = kernels.block_owners([])[1].to(device)
    assert owner.numel() == 0
    assert float(kernels.grad_norm(empty, owner, empty[0], torch.float32)) == 0.0
    settings = torch.zeros(6, dtype=torch.float64, device=device)
    kernels.adamw_ema(empty, owner, empty[0], settings, torch.float32, 1, None, 1, None, None, None, 0.0)


def test_blocks_know_their_tensors():
    first, owner = kernels.block_owners([kernels.BLOCK, 0, kernels.BLOCK + 1, 1])
    assert first == [0, 1, 1, 3]
    assert owner.tolist() == [0, 2, 2, 3]
