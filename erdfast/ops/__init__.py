"""Fused operations: a functional API over a readable reference, compiled CPU code and Triton kernels.

Importing this package needs PyTorch alone; back ends load at first use.
"""

from .adamw_ema import adamw_ema, grad_norm
from .add_noise import add_noise
from .attention import attention, attention_qkv, attention_reason
from .backend import BACKENDS
from .diffusion_loss import diffusion_loss
from .dropout import dropout
from .fp8_linear import fp8_linear
from .gelu import gelu, linear_gelu
from .heun_step import HeunRow, heun_step
from .modulated_norm import gated_residual, modulated_norm, residual_norm
from .optimizer import AdamWEma
from .qk_norm_rope import qk_norm_rope, rope_tables
from .skip_linear import skip_linear
from .source import Coefficients, Moments, NoiseKey
from .swiglu import swiglu

__all__ = [
    "BACKENDS",
    "AdamWEma",
    "Coefficients",
    "HeunRow",
    "Moments",
    "NoiseKey",
    "adamw_ema",
    "add_noise",
    "attention",
    "attention_qkv",
    "attention_reason",
    "diffusion_loss",
    "dropout",
    "fp8_linear",
    "gated_residual",
    "gelu",
    "grad_norm",
    "heun_step",
    "linear_gelu",
    "modulated_norm",
    "qk_norm_rope",
    "residual_norm",
    "rope_tables",
    "skip_linear",
    "swiglu",
]
