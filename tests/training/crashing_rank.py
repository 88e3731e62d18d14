"""erdfast.train in which the second process is killed once, after the first checkpoint; torchrun starts all anew.

torchrun --nproc-per-node 2 --max-restarts 1 tests/training/crashing_rank.py RUN OPTIONS...
"""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from erdfast import cli, train
from erdfast.training.checkpoint_files import complete_step


def crash_after(run: Path, step: int) -> None:
    """Kill this process as soon as a checkpoint of `step` or later is complete."""
    while (complete_step(run) or 0) < step:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    run = Path(sys.argv[1])
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(target=crash_after, args=(run, 3), daemon=True).start()
    cli.run(lambda: train.main(sys.argv[2:]), "erdfast.train")
