"""Several processes that measure together: each takes a part, and sums join the parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """What is asked of the processes; `erdfast.training.parallel.World` is one."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def size(self) -> int:
        """Number of processes."""
        ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place, in every process."""
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor


ALONE = Alone()
