"""Diffusion processes as numbers per sample: schedules, targets, weightings, time samplers, conversions."""

from .coefficients import Coefficients, convert, kappa
from .process import Process
from .schedule import SCHEDULES
from .target import TARGETS
from .time import TIME_SAMPLERS
from .weighting import WEIGHTINGS

__all__ = [
    "SCHEDULES",
    "TARGETS",
    "TIME_SAMPLERS",
    "WEIGHTINGS",
    "Coefficients",
    "Process",
    "convert",
    "kappa",
]
