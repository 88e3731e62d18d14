"""Fused operations: a functional API over a readable reference, compiled CPU code and Triton kernels.

Importing this package needs PyTorch alone; back ends load at first use.
"""

from .add_noise import add_noise
from .attention import attention
from .backend import BACKENDS
from .diffusion_loss import diffusion_loss
from .source import Coefficients, Moments, NoiseKey

__all__ = ["BACKENDS", "Coefficients", "Moments", "NoiseKey", "add_noise", "attention", "diffusion_loss"]
