"""erdfast.evaluate with the small network, in each process of torchrun: rank_evaluate.py ARGUMENTS."""

import sys

import pytest
import torch

from erdfast import cli, evaluate
from tests.evaluation.inception_files import use_small_network

if __name__ == "__main__":
    torch.set_num_threads(1)
    use_small_network(pytest.MonkeyPatch())
    cli.run(lambda: evaluate.main(sys.argv[1:]), "erdfast.evaluate")
