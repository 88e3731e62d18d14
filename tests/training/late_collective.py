"""A process of two that ends while one of Gloo's threads waits for the interpreter, to let go of a collective's tensor.

torchrun --nproc-per-node 2 tests/training/late_collective.py FOLDER
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from pathlib import Path

FOLDER = Path(sys.argv[1])
HELD = []
"""What keeps the group's threads alive, as DTensor's caches do."""


def wait_for_the_collective() -> None:
    """Without giving way to the thread that ends it."""
    (FOLDER / "at exit").touch()
    sys.setswitchinterval(1000)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        pass


atexit.register(wait_for_the_collective)  # before torch's: the last to be called

import torch  # noqa: E402  # after the handler
import torch.distributed as dist  # noqa: E402  # after the handler

from erdfast import cli  # noqa: E402  # after the handler
from erdfast.training.parallel import World, open_world  # noqa: E402  # after the handler


def late(world: World) -> int:
    tensor = torch.ones(4)
    if world.is_main:
        time.sleep(1)  # the other process is at its end by then
        dist.all_reduce(tensor)
    else:
        HELD.append(dist.group.WORLD)
        dist.all_reduce(tensor, async_op=True)
        threading.Thread(target=lambda: (time.sleep(0.2), (FOLDER / "thread").touch())).start()
    return 0


def main() -> int:
    with open_world(torch.device("cpu")) as world:
        return late(world)


if __name__ == "__main__":
    cli.run(main, "late_collective")
