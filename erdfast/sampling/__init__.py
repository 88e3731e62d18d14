"""Samplers as pure functions over noise levels, guidance, and `sample`, which joins them to a model."""

from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import LEVEL_SETS, Levels, make_levels, noise_table
from erdfast.sampling.output import default_labels, save_npz
from erdfast.sampling.sample import SAMPLER_KINDS, sample
from erdfast.sampling.samplers import SAMPLERS, edm_euler, edm_heun, euler, heun

__all__ = [
    "LEVEL_SETS",
    "SAMPLERS",
    "SAMPLER_KINDS",
    "Guided",
    "Levels",
    "default_labels",
    "edm_euler",
    "edm_heun",
    "euler",
    "heun",
    "make_levels",
    "noise_table",
    "sample",
    "save_npz",
]
