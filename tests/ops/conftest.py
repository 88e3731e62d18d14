"""Inputs that the tests of both central ops share."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from erdfast.ops import NoiseKey


class Coefficients(NamedTuple):
    """The five numbers per sample."""

    alpha: Tensor
    sigma: Tensor
    c_x: Tensor
    c_eps: Tensor
    w: Tensor

    def double(self) -> "Coefficients":
        return Coefficients(*[value.detach().double() for value in self])

    def with_grad(self) -> "Coefficients":
        """c_x, c_eps and w as leaves that require gradients."""
        fixed = [value.detach().clone() for value in self]
        return Coefficients(*fixed[:2], *[value.requires_grad_() for value in fixed[2:]])


def make_coefficients(batch: int, device: str = "cpu") -> Coefficients:
    generator = torch.Generator().manual_seed(batch)
    return Coefficients(*[torch.rand(batch, generator=generator).to(device) + 0.1 for _ in range(5)])


def make_key(batch: int, device: str = "cpu") -> NoiseKey:
    """A key whose every part uses its upper bits."""
    return NoiseKey(2**63 + 12345, stream=2**31 + 7, sample_ids=torch.arange(batch, device=device) * 977 + 2**40)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (2, 3), (3, 1, 5, 1), (2, 4, 8, 8), (3, 3, 17, 19), (2, 1, 65, 67), (1, 5001))
"""No size is a multiple of anything; the last ones take more than one task."""

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Bound on the rounding of one value near 1: the noise itself agrees to a few 1e-7."""

DEVICE_BACKENDS = [("cpu", "cpu"), ("cpu", "reference")]
if torch.cuda.is_available():
    DEVICE_BACKENDS += [("cuda", "triton"), ("cuda", "reference")]


@pytest.fixture(params=DEVICE_BACKENDS, ids=lambda p: f"{p[1]}-{p[0]}")
def device_backend(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param
