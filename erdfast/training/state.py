"""What a run is made of: the trained network and target, their averages, the optimiser; as one set of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from erdfast.config import TrainConfig
from erdfast.data import Dataset
from erdfast.models import Backbone
from erdfast.ops.optimizer import AdamWEma
from erdfast.process import Process

from .ema import Ema
from .parallel import World, full_tensor
from .setup import build_network
from .step import DiffusionStep

MODEL, PROCESS = "model.", "process."
"""What names of parameters begin with in a `DiffusionStep`."""
PUBLISHED_PROCESS = "published/process."
"""What the averaged target's tensors are called in a checkpoint."""


def state_tensors(step: DiffusionStep, optimizer: AdamWEma, ema: Ema) -> dict[str, Tensor]:
    """All that training continues from, by name; the tensors themselves, shards where they are sharded."""
    tensors = {f"weights/{name}": value for name, value in step.state_dict().items()}
    tensors |= {f"ema/{name}": value for name, value in ema.tensors().items()}
    for name, parameter in trained(step).items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def trained(step: DiffusionStep) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in step.named_parameters() if p.requires_grad}


def untrained_copies(config: TrainConfig, dataset: Dataset, model: Backbone) -> tuple[Backbone, Process]:
    """A network and a process for the averages: like the trained ones, but for what is trained, which is anything.

    All processes must call it where the trained network is sharded.
    """
    device = next(model.parameters()).device
    with torch.device("meta"):  # half a billion random numbers take seconds
        network = build_network(config, dataset)
    network.to_empty(device=device)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if not own[name].requires_grad:
                tensor.copy_(full_tensor(own[name]))
    return network, config.process.build().to(device)


class Averaged:
    """The averaged network and process as modules: for pictures, and for everybody else.

    Args:
        build: makes a fresh network and process, on the device.
        parameters: those that are trained, by name, in the order of the averages.
        averages: tensors in that order. Whole ones are shared with the modules, which so cost no memory and are always
            up to date; shards are gathered by `refresh`.
        world: the processes that train together.
    """

    def __init__(
        self,
        build: Callable[[], tuple[Backbone, Process]],
        parameters: Mapping[str, Tensor],
        averages: list[Tensor],
        world: World,
    ) -> None:
        self.model, self.process = build()
        for module in (self.model, self.process):
            module.eval().requires_grad_(False)
        self._own = [self._parameter(name) for name in parameters]
        self._averages, self._world = averages, world
        self._sharded = [hasattr(average, "full_tensor") for average in averages]
        for own, average, sharded in zip(self._own, averages, self._sharded, strict=True):
            if not sharded:
                own.data = average

    def _parameter(self, name: str) -> nn.Parameter:
        module = self.model if name.startswith(MODEL) else self.process
        return module.get_parameter(name.removeprefix(MODEL).removeprefix(PROCESS))

    @torch.no_grad()
    def refresh(self) -> None:
        """Gather what is sharded; every process must call it, and all of them then hold the averages."""
        for own, average, sharded in zip(self._own, self._averages, self._sharded, strict=True):
            if sharded:
                own.copy_(full_tensor(average))

    def model_tensors(self) -> dict[str, Tensor]:
        """The network's averaged weights under the published names."""
        return dict(self.model.state_dict())

    def process_tensors(self) -> dict[str, Tensor]:
        """The averaged target, named as in a checkpoint."""
        return {PUBLISHED_PROCESS + name: value.clone() for name, value in self.process.state_dict().items()}
