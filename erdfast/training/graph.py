"""Forward and backward of a micro-batch as one CUDA graph: the host launches once, however small the kernels are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .step import StepResult

WARM_UP = 11
"""Passes before the capture: DistributedDataParallel rebuilds its buckets within the first ten."""

MicroBatch = Callable[[Tensor, Tensor, Tensor, "float | None"], StepResult]
"""(x, y, offset, moments_scale) => result, its loss already differentiated."""


def check_graph(device: torch.device, mode: str, accumulation: int) -> None:
    """Raise ValueError, saying why, where a step cannot be one graph."""
    if device.type != "cuda":
        raise ValueError("cuda_graph needs a GPU")
    if mode in ("fsdp", "hsdp"):
        raise ValueError(f"cuda_graph is for one GPU and ddp: {mode} gathers weights into memory that changes")
    if mode == "ddp" and accumulation > 1:
        raise ValueError("cuda_graph with ddp takes accumulation 1: the parts of a step would be different graphs")


class GraphedMicroBatch:
    """Captured at the first call, replayed from then on; inputs are copied to where the graph reads them.

    Gradients live at fixed addresses: they are zeroed between steps, never dropped. Seed, step and offset are device
    tensors, so that noise and times are new in every replay.

    Args:
        run: what is captured.
        parameters: whose gradients it adds to.
        replica: the module that `run` calls; DistributedDataParallel owns its gradients itself.
    """

    def __init__(self, run: MicroBatch, parameters: list[Tensor], replica: torch.nn.Module) -> None:
        self._run, self._parameters = run, parameters
        self._own_gradients = not isinstance(replica, DistributedDataParallel)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, Tensor, Tensor] | None = None
        self._result: StepResult | None = None

    def __call__(self, x: Tensor, y: Tensor, offset: Tensor, moments_scale: float | None) -> StepResult:
        """As `run`; the result is overwritten by the next call."""
        if self._graph is None:
            self._capture(x, y, offset, moments_scale)
        assert self._inputs is not None
        assert self._graph is not None
        assert self._result is not None
        for static, new in zip(self._inputs, (x, y, offset), strict=True):
            static.copy_(new)
        self._graph.replay()
        return self._result

    def zero_gradients(self) -> None:
        """In place."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_zero_(gradients)  # pyright: ignore[reportPrivateImportUsage]

    def _capture(self, x: Tensor, y: Tensor, offset: Tensor, moments_scale: float | None) -> None:
        self._inputs = (x.clone(), y.clone(), offset.clone())
        if self._own_gradients:
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._run(*self._inputs, moments_scale)
        torch.cuda.current_stream().wait_stream(side)
        self.zero_gradients()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._run(*self._inputs, moments_scale)
        self._graph = graph
        self.zero_gradients()
