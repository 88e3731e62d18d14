"""AdamW and averages of the weights as an optimiser: torch.optim.AdamW's interface and state, one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .adamw_ema import Averages, check_decays, check_max_norm, check_numbers, check_real, reference_norm, run_step
from .backend import BACKENDS, KERNEL_DTYPES, resolve_backend
from .tensor_table import (
    StepOptions,
    StepTensors,
    TensorTable,
    check_lengths,
    checked_grads,
    checked_scalar,
    companions,
    same_layout,
)


class AdamWEma(torch.optim.Optimizer):
    """torch.optim.AdamW that also averages the weights, unscales and clips in its one pass over the parameters.

    State and state_dict are those of torch.optim.AdamW, in both directions. Gradients are read and left as they are.
    Works with parameter groups, GradScaler, closures and DTensors (FSDP2), whose local shards it updates; a parameter
    without a gradient is only averaged. A gradient whose strides differ from its parameter's is copied into its order.

    Args:
        params: float32 (other dtypes with backend="reference") on one device, dense.
        lr: a float, or a tensor of one number; on a GPU a tensor there, which a CUDA graph then reads anew.
        betas, eps, weight_decay: as in torch.optim.AdamW; param groups may have their own.
        emas: (tensors, decay) of any number of averages, the tensors in the order of the parameters.
        copies: bfloat16 or float16 tensors in the order of the parameters that receive every new value.
        backend: "reference", "cpu" or "triton"; by default the fastest of the device.

    Raises:
        ValueError: a number out of range, lists that do not fit, an unknown back end, complex parameters, or amsgrad
            or maximize, which do not exist here.
    """

    _step_supports_amp_scaling = True  # GradScaler then sets grad_scale and found_inf and calls step

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        emas: Averages = (),
        copies: Iterable[Tensor] = (),
        backend: str | None = None,
    ) -> None:
        # The rest are torch.optim.AdamW's own, so that it can load this state as its own.
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        defaults |= {"maximize": maximize, "foreach": None, "capturable": False, "differentiable": False}
        defaults |= {"fused": True, "decoupled_weight_decay": True}
        _check_group(defaults)
        if backend not in (None, *BACKENDS):
            raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
        super().__init__(params, defaults)
        self.emas = [(list(tensors), decay) for tensors, decay in emas]
        self.copies = list(copies)
        self.backend = backend
        check_decays([decay for _, decay in self.emas])
        self._check_lengths()
        for t, tensor in enumerate(self.copies):
            if tensor.dtype not in KERNEL_DTYPES[1:]:
                raise ValueError(f"copies[{t}] is {tensor.dtype}; choose from torch.bfloat16, torch.float16")
        self.grad_norm: Tensor | None = None
        """The gradients' norm before clipping at the last step that was given `max_norm`: 0-d, on the device."""
        self._table = TensorTable()
        self._strides: list[tuple[int, ...]] | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch. Averages and copies of new parameters go to the ends of their lists."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        own = {"emas": self.emas, "copies": self.copies, "backend": self.backend, "grad_norm": None}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by load_state_dict: AdamW without `fused` keeps its step counters on the CPU."""
        super().__setstate__(state)
        self._table = TensorTable()
        self._strides = None
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "capturable", "differentiable"):
                group.setdefault(name, False)
            group.setdefault("foreach", None)
            group["fused"] = group["decoupled_weight_decay"] = True
            _check_group(group)
            for param in group["params"]:
                if (moments := self.state.get(param)) and "step" in moments:
                    step = torch.as_tensor(moments["step"], dtype=torch.float32, device=param.device)
                    moments["step"] = step.reshape(())

    def set_ema_decays(self, decays: Sequence[float]) -> None:
        """Decays of the averages from the next step on, in their order.

        Raises:
            ValueError: another number of them, or one outside [0, 1).
        """
        check_decays(decays)
        if len(decays) != len(self.emas):
            raise ValueError(f"{len(decays)} decays for {len(self.emas)} averages")
        self.emas = [(tensors, decay) for (tensors, _), decay in zip(self.emas, decays, strict=True)]

    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]  # as torch.optim does: addresses cannot be traced
    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]  # closure as in torch, the rest is new
        self,
        closure: Callable[[], Any] | None = None,
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> Any:
        """One step of AdamW, then of the averages and copies.

        Args:
            closure: called first, with gradients enabled; its result is returned.
            max_norm: clip the norm of all (unscaled) gradients together to this, as torch's clip_grad_norm_ does; the
                norm before is then in `grad_norm`. Infinity measures without clipping.
            skip_nonfinite: leave parameters and moments as they are where that norm is not finite, which `max_norm`
                must then ask for; the device decides, and the host does not wait. Averages go on.

        Raises:
            ValueError: gradients or state that a kernel cannot take; the message says which.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if max_norm is not None:
            check_max_norm(max_norm)
        params = [param for group in self.param_groups for param in group["params"]]
        if not params:
            return result
        tensors = self._tensors(params)
        first = tensors.params[0]
        backend = resolve_backend(self.backend, first.device, first.dtype, op="adamw_ema")
        grad_scale = checked_scalar("grad_scale", getattr(self, "grad_scale", None), first)
        found_inf = getattr(self, "found_inf", None)
        if not isinstance(found_inf, Tensor):  # GradScaler adds up those of all devices: the number 0 without gradients
            found_inf = None
        found_inf = checked_scalar("found_inf", found_inf, first)
        self.grad_norm = None
        if max_norm is not None:
            self.grad_norm = self._norm(params, tensors, backend)
            if grad_scale is not None:
                self.grad_norm = self.grad_norm / grad_scale
        if skip_nonfinite:
            if self.grad_norm is None:
                raise ValueError("skip_nonfinite judges by the norm: give max_norm, infinity for no clipping")
            bad = (~torch.isfinite(self.grad_norm)).to(torch.float32)
            found_inf = bad if found_inf is None else torch.maximum(found_inf, bad)
        clips = max_norm is not None and max_norm < math.inf
        rates = [_rate(group["lr"]) for group in self.param_groups]
        options = StepOptions(
            groups=[_numbers(group, lr) for group, (lr, _) in zip(self.param_groups, rates, strict=True)],
            ema_weights=[1.0 - decay for _, decay in self.emas],
            lrs=[tensor for _, tensor in rates],
            grad_scale=grad_scale,
            found_inf=found_inf,
            norm=checked_scalar("norm", self.grad_norm, first) if clips else None,
            max_norm=math.inf if max_norm is None else max_norm,
        )
        run_step(self._table, backend, tensors, options)
        if not _PLAIN.issuperset(map(type, params)):  # DTensors, of which the shards alone know so far
            torch.autograd.graph.increment_version([param for param in params if param.grad is not None])
        return result

    def _check_lengths(self) -> None:
        count = sum(len(group["params"]) for group in self.param_groups)
        check_lengths(count, companions([tensors for tensors, _ in self.emas], self.copies))

    def _tensors(self, params: Sequence[Tensor]) -> StepTensors:
        """All lists as plain tensors; makes AdamW's state of parameters that have their first gradient."""
        self._check_lengths()
        shards, states = _locals(params), [self._state(param) for param in params]
        strides = list(map(Tensor.stride, shards))
        if strides != self._strides:
            self._strides, self._table = strides, TensorTable()
            for param, state in zip(params, states, strict=True):
                _rearrange(state, param)
        return StepTensors(
            params=shards,
            grads=checked_grads(_local_grads(params), shards),
            exp_avgs=_locals([state.get("exp_avg") for state in states]),
            exp_avg_sqs=_locals([state.get("exp_avg_sq") for state in states]),
            steps=[state.get("step") for state in states],
            groups=[g for g, group in enumerate(self.param_groups) for _ in group["params"]],
            emas=[_locals(tensors) for tensors, _ in self.emas],
            copies=_locals(self.copies),
        )

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state.get(param, {})
        if not state and param.grad is not None:
            state = self.state[param]
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _norm(self, params: Sequence[Tensor], tensors: StepTensors, backend: str) -> Tensor:
        """Over all shards: gradients that are split in the same way are summed among their processes together."""
        splits: dict[Any, list[Tensor | None]] = {}
        for t, (param, grad) in enumerate(zip(params, tensors.grads, strict=True)):
            if grad is not None:
                split = None if _is_plain(param) else (param.device_mesh, tuple(param.placements))  # pyright: ignore[reportAttributeAccessIssue]  # a DTensor
                splits.setdefault(split, [None] * len(params))[t] = grad
        sizes = [param.numel() for param in tensors.params]
        norms = []
        for split, grads in splits.items():
            if backend == "reference":
                norm = reference_norm([grad for grad in grads if grad is not None])
            else:
                norm = self._table.grad_norm(grads, sizes, backend)
            norms.append(norm if split is None else _sum_shards(norm.square(), *split).sqrt())
        if len(norms) == 1:
            return norms[0]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else tensors.params[0].new_zeros(())


def _check_group(group: dict[str, Any]) -> None:
    for name in ("amsgrad", "maximize"):
        if group[name]:
            raise ValueError(f"{name} is not supported by AdamWEma; use torch.optim.AdamW for it")
    check_numbers(*(group[name] for name in ("lr", "betas", "eps", "weight_decay")))
    check_real(group.get("params", ()))


def _numbers(group: dict[str, Any], lr: float) -> list[float]:
    beta1, beta2 = group["betas"]
    return [lr, float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"])]


def _rate(lr: float | Tensor) -> tuple[float, Tensor | None]:
    """(number, None), or (0, tensor) where reading it would make the host wait."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        return 0.0, lr.reshape(())
    return float(lr), None


def _rearrange(state: dict[str, Tensor], param: Tensor) -> None:
    """Moments in the parameter's order in memory, which may have changed since they were made, as to channels last."""
    for name in ("exp_avg", "exp_avg_sq"):
        moment = state.get(name)
        if moment is not None and moment.shape == param.shape and not same_layout(moment, param):
            state[name] = torch.empty_like(param, dtype=moment.dtype).copy_(moment)


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in _PLAIN


def _locals(tensors: Sequence[Any]) -> list[Any]:
    """This process's shards of DTensors: the shards themselves, as gradients are disabled here."""
    if _PLAIN.issuperset(map(type, tensors)):
        return list(tensors)
    return [tensor if _is_plain(tensor) else tensor.to_local() for tensor in tensors]


def _local_grads(params: Sequence[Any]) -> list[Tensor | None]:
    for param in params:
        if not _is_plain(param) and param.grad is not None and tuple(param.grad.placements) != tuple(param.placements):
            raise ValueError(f"a gradient is placed as {param.grad.placements}, its parameter as {param.placements}")
    return _locals([param.grad for param in params])


def _sum_shards(value: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """The sum of a number over the processes that hold different shards."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    parts = [Replicate() if placement.is_replicate() else Partial() for placement in placements]
    return DTensor.from_local(value, mesh, parts, run_check=False).full_tensor()
