"""Samplers as pure functions over noise levels, guidance, and `sample`, which joins them to a model."""

from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import LEVEL_SETS, Levels, make_levels, noise_table
from erdfast.sampling.output import default_labels, save_npz
from erdfast.sampling.sample import SAMPLER_KINDS, Batch, ImageSampler, sample, sample_batches
from erdfast.sampling.samplers import (
    SAMPLERS,
    ddim,
    dpmpp_2m,
    edm_euler,
    edm_heun,
    euler,
    heun,
    sde_euler,
    sde_heun,
)

__all__ = [
    "LEVEL_SETS",
    "SAMPLERS",
    "SAMPLER_KINDS",
    "Batch",
    "Guided",
    "ImageSampler",
    "Levels",
    "ddim",
    "default_labels",
    "dpmpp_2m",
    "edm_euler",
    "edm_heun",
    "euler",
    "heun",
    "make_levels",
    "noise_table",
    "sample",
    "sample_batches",
    "save_npz",
    "sde_euler",
    "sde_heun",
]
