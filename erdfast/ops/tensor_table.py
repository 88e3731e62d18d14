"""Lists of tensors as kernels take them: tables of addresses, checked and sent to the device only when they change."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import KERNEL_DTYPES, launcher


class StepTensors(NamedTuple):
    """What one optimiser step works on: entry t of each list belongs to parameter t. Plain tensors, no DTensors."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    """Of one dtype; None: the parameter is not updated, only averaged and copied."""
    exp_avgs: Sequence[Tensor | None]
    exp_avg_sqs: Sequence[Tensor | None]
    steps: Sequence[Tensor | None]
    """0-d float32; these and the moments may be None where the gradient is."""
    groups: Sequence[int]
    """Which row of the settings a parameter goes by."""
    emas: Sequence[Sequence[Tensor]]
    """A list of averages for every decay."""
    copies: Sequence[Tensor]
    """bfloat16 or float16, all or none."""

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of all gradients; float32 if there is none."""
        return next((grad.dtype for grad in self.grads if grad is not None), torch.float32)


class StepOptions(NamedTuple):
    """The numbers of one optimiser step."""

    groups: Sequence[Sequence[float]]
    """(lr, beta1, beta2, eps, weight_decay) of each group."""
    ema_weights: Sequence[float]
    """1 - decay of each average."""
    lrs: Sequence[Tensor | None]
    """For each group a 0-d learning rate that lives on the device and counts instead of that in `groups`."""
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    norm: Tensor | None = None
    """These three are 0-d float32 on the device; None: 1, 0, no clipping."""
    max_norm: float = math.inf


class TensorTable:
    """The addresses of a step's tensors on their device.

    Looks at every address in every step, so that nothing goes wrong when somebody replaces a tensor; checks and sends
    again only what changed, as a rule the gradients. When strides change and addresses stay, a new table is needed.
    """

    def __init__(self) -> None:
        self._table, self._grads, self._settings, self._sizes = _Sent(), _Sent(), _Sent(), _Sent()

    def grad_norm(self, grads: Sequence[Tensor | None], sizes: Sequence[int], backend: str) -> Tensor:
        """The norm of all gradients together, 0-d float32; `sizes` of tensors without one count for nothing."""
        some = next(grad for grad in grads if grad is not None)
        _check_grad_dtype(some.dtype)
        first, owner = _blocks(tuple(sizes), some.device, backend)
        table = self._sizes([list(sizes), [0] * len(sizes), first], torch.int64, some.device)
        addresses = self._grads(_addresses(grads), torch.int64, some.device)
        return launcher(backend, "adamw_ema").grad_norm(table, owner, addresses, some.dtype)

    def step(self, backend: str, tensors: StepTensors, options: StepOptions) -> None:
        """Run a compiled back end's step."""
        device = tensors.params[0].device
        _check_grad_dtype(tensors.grad_dtype)
        sizes = [param.numel() for param in tensors.params]
        first, owner = _blocks(tuple(sizes), device, backend)
        table = self._table(_rows(tensors, sizes, first, self._table.values), torch.int64, device)
        grads = self._grads(_addresses(tensors.grads), torch.int64, device)
        settings = self._settings(_settings(options), torch.float64, device)
        for g, lr in enumerate(options.lrs):
            if lr is not None:
                settings[5 * g].copy_(lr)
        launcher(backend, "adamw_ema").adamw_ema(
            table,
            owner,
            grads,
            settings,
            tensors.grad_dtype,
            len(tensors.emas),
            tensors.copies[0].dtype if tensors.copies else None,
            len(options.groups),
            options.grad_scale,
            options.found_inf,
            options.norm,
            options.max_norm,
        )
        torch.autograd.graph.increment_version(_written(tensors))


def _settings(options: StepOptions) -> list[float]:
    """Infinity holds the place of a rate on the device, so that no number can pass for what was sent last."""
    rows = zip(options.groups, options.lrs, strict=True)
    numbers = [x for group, lr in rows for x in (group[0] if lr is None else math.inf, *group[1:])]
    return [*numbers, *options.ema_weights]


def _written(tensors: StepTensors) -> Iterator[Any]:
    """What a step changes, for autograd to know."""
    updated = [tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps]
    if any(grad is None for grad in tensors.grads):
        updated = [itertools.compress(some, [grad is not None for grad in tensors.grads]) for some in updated]
    return itertools.chain(*updated, *tensors.emas, tensors.copies)


def _rows(tensors: StepTensors, sizes: list[int], first: list[int], known: list | None) -> list[list[int]]:
    """The rows of the table; checked unless they are `known`."""
    lists = (tensors.params, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.steps, *tensors.emas)
    rows = [sizes, list(tensors.groups), first, *map(_addresses, lists)]
    if tensors.copies:
        rows.append(_addresses(tensors.copies))
    if rows != known:
        check_tensors(tensors)
    return rows


@functools.lru_cache(maxsize=8)
def _blocks(sizes: tuple[int, ...], device: torch.device, backend: str) -> tuple[list[int], Tensor | None]:
    """What a Triton program looks up to find its tensor; C++ makes its tasks as it goes."""
    if backend != "triton":
        return [0] * len(sizes), None
    first, owner = launcher(backend, "adamw_ema").block_owners(sizes)
    return first, _send(owner, torch.int32, device)


class _Sent:
    """Numbers as a tensor on a device."""

    def __init__(self) -> None:
        self.values: list | None = None
        self._tensor = torch.empty(0, device="cpu")

    def __call__(self, values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
        if values != self.values or self._tensor.device != device:
            self._tensor, self.values = _send(values, dtype, device), values
        return self._tensor


def _send(values: list | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor each time: kernels that are still to run keep the old one."""
    host = torch.as_tensor(values, dtype=dtype, device="cpu")
    if device.type != "cuda":
        return host
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph captures addresses and numbers that the optimiser has sent before: run a step with the same "
            "gradient tensors first, keep them (zero_grad(set_to_none=False)), and pass lr as a tensor on the device"
        )
    return host.pin_memory().to(device, non_blocking=True)


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """0 is no tensor; empty ones, which nobody reads, have no address of their own."""
    return [0 if tensor is None else tensor.data_ptr() or 16 for tensor in tensors]


def check_lengths(count: int, lists: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError unless every list has an entry for each of `count` parameters."""
    for name, tensors in lists.items():
        if len(tensors) != count:
            raise ValueError(f"{name} has {len(tensors)} tensors, there are {count} parameters")


def companions(emas: Sequence[Sequence[Tensor]], copies: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """Averages and copies by the names that messages call them."""
    averages = {f"average {k}": tensors for k, tensors in enumerate(emas)}
    return {**averages, "copies": copies} if copies else averages


def checked_scalar(name: str, value: Any, like: Tensor) -> Tensor | None:
    """`value` as back ends read it: 0-d on the device of `like`, float32 unless that is float64; no waiting.

    Raises:
        ValueError: it is something else than one floating-point number in a tensor on that device.
    """
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {value!r}; it must be a tensor with one number on {like.device}")
    if value.numel() != 1 or not value.is_floating_point() or value.device != like.device:
        raise ValueError(
            f"{name} is {value.dtype} of shape {tuple(value.shape)} on {value.device}; "
            f"it must be one floating-point number on {like.device}"
        )
    return value.detach().reshape(()).to(torch.promote_types(like.dtype, torch.float32))


def _check_grad_dtype(dtype: torch.dtype) -> None:
    if dtype not in KERNEL_DTYPES:
        raise ValueError(f"the gradients are {dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))}")


def check_tensors(tensors: StepTensors) -> None:
    """Raise ValueError unless kernels can walk through all lists together; `checked_grads` has seen the gradients."""
    first = tensors.params[0]
    lists = {"exp_avgs": tensors.exp_avgs, "exp_avg_sqs": tensors.exp_avg_sqs}
    lists |= companions(tensors.emas, tensors.copies)
    for t, param in enumerate(tensors.params):
        if param.dtype != torch.float32 or param.device != first.device:
            raise ValueError(
                f"parameter {t} is {param.dtype} on {param.device}; all must be float32 on one device, {first.device} "
                "(backend='reference' takes other dtypes)"
            )
        if not is_dense(param):
            raise ValueError(
                f"parameter {t} has gaps or overlaps: shape {tuple(param.shape)}, strides {param.stride()}"
            )
        step = tensors.steps[t]
        if step is not None and (step.dtype != torch.float32 or step.device != first.device or step.numel() != 1):
            raise ValueError(
                f"step {t} is {step.dtype} on {step.device}; it must be a number in float32 on {first.device}"
            )
        for name, others in lists.items():
            if (other := others[t]) is not None:
                _check_companion(name, t, other, param)
    if len({copy.dtype for copy in tensors.copies}) > 1:
        raise ValueError("the copies must have one dtype: bfloat16 or float16")


def _check_companion(name: str, t: int, other: Tensor, param: Tensor) -> None:
    dtypes = KERNEL_DTYPES[1:] if name == "copies" else (torch.float32,)
    if other.dtype not in dtypes:
        raise ValueError(f"{name}[{t}] is {other.dtype}; choose from {', '.join(map(str, dtypes))}")
    if other.shape != param.shape or other.device != param.device:
        raise _misfit(f"{name}[{t}]", other, param)
    if not same_layout(other, param):
        raise ValueError(
            f"{name}[{t}] has strides {other.stride()}, its parameter {param.stride()}: they must be equal"
        )


def _misfit(name: str, other: Tensor, param: Tensor) -> ValueError:
    return ValueError(
        f"{name} is {tuple(other.shape)} on {other.device}, its parameter {tuple(param.shape)} on {param.device}"
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape have their elements in the same order in memory, without gaps."""
    return (a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride()


def is_dense(tensor: Tensor) -> bool:
    """Whether memory holds the elements without gaps and overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    return torch.empty_like(tensor, device="meta").stride() == tensor.stride()  # what is dense keeps its strides


def checked_grads(grads: Sequence[Any], params: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients that kernels can take; those in another order than their parameter in memory are copied into its order.

    Raises:
        ValueError: sparse, of several dtypes or of another shape or device than the parameter.
    """
    checked = list(grads)
    dtype = next((grad.dtype for grad in grads if grad is not None), None)
    for t, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise ValueError(f"the gradient of parameter {t} is {grad.layout}; only dense gradients are supported")
        if grad.dtype is not dtype:
            raise ValueError(f"gradients must have one dtype: that of parameter {t} is {grad.dtype}, not {dtype}")
        if grad.shape != param.shape or grad.device != param.device:
            raise _misfit(f"the gradient of parameter {t}", grad, param)
        if grad.stride() != param.stride() and not same_layout(grad, param):
            checked[t] = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    return checked
