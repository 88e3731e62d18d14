"""The network's calls as CUDA graphs: one per kind of call, each with inputs at fixed addresses.

A sampling run has two kinds of calls, with the unconditional half and without; both see the same batch size from the
first step of the first batch to the last. Everything of a step that varies (state, time, labels) is a tensor that is
copied to where the graph reads it; the handful of kernels around the call are launched as ever.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from erdfast.sampling.guidance import Model

WARM_UP = 3
"""Calls before a capture, in which libraries choose kernels and allocate workspaces."""

Capture = Callable[[Callable[[], Tensor]], "tuple[Callable[[], object], Tensor]"]
"""Work on fixed tensors => (what repeats it, where its result is each time)."""


def check_graph(device: torch.device) -> None:
    """Raises ValueError where there are no CUDA graphs."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a GPU, and the model is on {device}")


class GraphedModel:
    """A model whose calls are captured once per shape, and replayed from then on.

    Under autocast the graph holds the casts of the weights: those that autocast keeps are freed when its context ends.

    Args:
        model: what is captured.
        capture: how; None means as CUDA graphs that share their memory.
    """

    def __init__(self, model: Model, capture: Capture | None = None) -> None:
        self._model = model
        self._capture = CudaCapture() if capture is None else capture
        self._kinds: dict[tuple[torch.Size, bool], _Kind] = {}

    def __call__(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        """As the model; the result is overwritten by the next call of any kind.

        Args:
            x: (B, C, H, W). A shape that has not been seen is captured.
            time: (B,).
            y: (B,) int64 or None.
        """
        key = (x.shape, y is not None)
        if key not in self._kinds:
            self._kinds[key] = _Kind(self._model, self._capture, x, time, y)
        return self._kinds[key](x, time, y)


class _Kind:
    def __init__(self, model: Model, capture: Capture, x: Tensor, time: Tensor, y: Tensor | None) -> None:
        self._x, self._time = x.clone(), time.clone(memory_format=torch.contiguous_format)
        self._y = None if y is None else y.clone()
        kept = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            self._replay, self._result = capture(lambda: model(self._x, self._time, self._y))
        finally:
            torch.set_autocast_cache_enabled(kept)

    def __call__(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        self._x.copy_(x)
        self._time.copy_(time)
        if self._y is not None and y is not None:
            self._y.copy_(y)
        self._replay()
        return self._result


class CudaCapture:
    """Captures on the current device; all graphs share one pool, as only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """See Capture."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = run()
        return graph.replay, result
