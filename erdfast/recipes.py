"""Training recipes: everything that a published run sets, by name, with the FID that it reached.

Times are counted as everywhere here, 1 is noise: LightningDiT's and JiT's papers count the other way, so that the mean
of their logit-normal sampler changes its sign.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from erdfast.presets import model_config, nearest

Options = dict[str, Any]
"""Options of erdfast.train by field name; what is not named has its default."""


class Recipe(NamedTuple):
    """A row of RECIPES."""

    options: Options
    fid: str = ""
    """Published FID-50K; empty where none was published."""
    source: str = ""
    """Where it was published, and what differs here."""
    sampling: str = ""
    """Options of erdfast.sample with which that FID was measured; empty: 50 Heun steps without guidance."""


IMAGENET_EPOCH_1024 = 1251
"""Whole batches of 1,024 in ImageNet's 1,281,167 training images."""

# fmt: off
# What several rows share. ERD: section G.1, table 5. k-Diff: appendix F, table 4; JiT is trained in the same way.
_ADAMW: Options = {"lr": 1e-4, "batch_size": 256, "label_drop": 0.1, "ema_decay": (0.9999,), "steps": 400_000}
_ERD = _ADAMW | {"schedule": "cosine", "target": "eps", "weighting": "erd"}
_DIT, _UVIT = _ERD | {"betas": (0.9, 0.999)}, _ERD | {"betas": (0.99, 0.99)}
_PLAIN: Options = {"weighting": "constant"}
_MIN_SNR: Options = {"weighting": "min_snr", "gamma": 5.0}
_LONG: Options = {"steps": 4_000_000}
_CELEBA = _ERD | {"batch_size": 128, "steps": 500_000, "label_drop": 0.0, "flip": True}
_SCRIPT: Options = {"weighting": "erd_repo", "betas": (0.9, 0.95), "label_drop": 0.0, "precision": "fp16", "seed": 42}
_FLOW: Options = {
    "schedule": "flow", "weighting": "constant", "time_sampler": "logit_normal", "loss_space": "u",
    "lr": 2e-4, "betas": (0.9, 0.95), "batch_size": 1024, "label_drop": 0.1, "flip": True,
    "ema_decay": (0.9996, 0.9998, 0.9999),
}
_LIGHTNING = _FLOW | {"logit_mean": 0.0, "logit_std": 1.0, "steps": 64 * IMAGENET_EPOCH_1024}
_JIT = _FLOW | {
    "target": "x0", "logit_mean": 0.8, "logit_std": 0.8, "kappa_clip": 0.05,
    "steps": 600 * IMAGENET_EPOCH_1024, "warmup_steps": 5 * IMAGENET_EPOCH_1024,
}
_JIT_512 = _JIT | {"noise_scale": 2.0}
_ADM = _ADAMW | {"target": "eps", "weighting": "constant", "label_drop": 0.0, "betas": (0.9, 0.999), "flip": True}
_DIGITS: Options = {
    "data": "digits", "schedule": "cosine", "target": "eps", "weighting": "erd", "batch_size": 128, "lr": 2e-3,
    "betas": (0.9, 0.99), "warmup_steps": 50, "lr_schedule": "cosine", "ema_decay": (0.99,), "steps": 1800,
    "stratified": True, "log_every": 25, "checkpoint_every": 600, "sample_every": 450, "sample_num": 80,
}
_TINY: Options = {
    "data": "mixture", "batch_size": 16, "lr": 1e-3, "ema_decay": (0.99,), "steps": 200, "log_every": 10,
    "checkpoint_every": 100, "sample_every": 100,
}

_INTERVAL = "--cfg-scale 2.1 --interval 0 0.8"
_K_GUIDED = "--cfg-scale 1.5 --interval 0 0.9"
_JIT_G = "--cfg-scale {} --interval 0 0.9"
_REPO = "the authors' run.sh, to the letter"

RECIPES: dict[str, Recipe] = {
    # ERD on ImageNet 256 latents.
    "erd_dit_s2":          Recipe(_DIT | {"model": "dit_s2"}),
    "erd_dit_b2":          Recipe(_DIT | {"model": "dit_b2"},             "32.3 (plain: 43.4)", "ERD, table 3"),
    "erd_dit_l2":          Recipe(_DIT | {"model": "dit_l2"},             "17.2 (plain: 23.3)", "ERD, table 3"),
    "erd_dit_xl2":         Recipe(_DIT | {"model": "dit_xl2"},     "15.0 (plain: 19.5)", "ERD, table 3"),
    "erd_uvit_s2":         Recipe(_UVIT | {"model": "uvit_s2"}),
    "erd_uvit_m2":         Recipe(_UVIT | {"model": "uvit_m2"},           "19.9 (plain: 27.7)", "ERD, table 3"),
    "erd_uvit_l2":         Recipe(_UVIT | {"model": "uvit_l2"},           "15.0 (plain: 20.4)", "ERD, table 3"),
    "erd_uvit_h2":         Recipe(_UVIT | {"model": "uvit_h2"},           "8.9 (plain: 13.7)",  "ERD, table 3"),
    "erd_unet_ldm":        Recipe(_DIT | {"model": "adm_unet_ldm"}),
    "erd_uvit_h2_800ep":   Recipe(_UVIT | _LONG | {"model": "uvit_h2"},   "1.45 (1.89 with 1.5 everywhere)",
                                  "ERD, tables 8 and 9", _INTERVAL),
    "minsnr_uvit_h2":      Recipe(_UVIT | _MIN_SNR | {"model": "uvit_h2"}, "11.7",              "ERD, table 3"),
    # The ladder of training tricks for DiT-S/2 (ERD, table 1), every step on top of the one before.
    "ladder_dit_s2":       Recipe(_DIT | _PLAIN | {"model": "dit_s2", "schedule": "ddpm_linear"}, "69.35",
                                  "ERD, table 1: DiT's own settings, without its learned variance"),
    "ladder_dit_s2_beta2": Recipe(_DIT | _PLAIN | {"model": "dit_s2", "schedule": "ddpm_linear", "betas": (0.9, 0.95)},
                                  "68.77", "ERD, table 1: beta2 0.95"),
    "ladder_dit_s2_cosine": Recipe(_DIT | _PLAIN | {"model": "dit_s2", "betas": (0.9, 0.95)}, "65.68",
                                   "ERD, table 1: cosine schedule"),
    "ladder_dit_s2_erd":   Recipe(_DIT | {"model": "dit_s2", "betas": (0.9, 0.95)}, "57.54", "ERD, table 1"),
    # ERD on CelebA 64, pixels without classes.
    "celeba_unet":         Recipe(_CELEBA | {"model": "adm_unet_celeba64", "betas": (0.9, 0.999)}, "1.53",
                                  "ERD, table 2; the authors' script also warms up for 5,000 steps"),
    "celeba_dit_s":        Recipe(_CELEBA | {"model": "dit_s4_celeba64", "betas": (0.9, 0.95), "lr": 1e-3},
                                  "2.37 (plain: 3.00)", "ERD, table 2"),
    # The ERD authors' scripts. Other than in their paper: beta2 0.95, no label drop (so no guidance), ERD without
    # normalisation, float16. Other than in their code: nothing that changes the expected gradient.
    "erd_repo_dit_b2":     Recipe(_ERD | _SCRIPT | {"model": "dit_b2"},   "",                   _REPO),
    "erd_repo_dit_l2":     Recipe(_ERD | _SCRIPT | {"model": "dit_l2"},   "",                   _REPO),
    "erd_repo_dit_xl2":    Recipe(_ERD | _SCRIPT | {"model": "dit_xl2"},  "",                   _REPO),
    # Flow matching on latents: SiT; LightningDiT and its learnable target on VA-VAE latents (32, 16, 16).
    "sit_xl2":             Recipe(_ADAMW | {"model": "dit_xl2", "schedule": "flow", "target": "u",
                                            "weighting": "constant", "betas": (0.9, 0.999), "flip": True},
                                  "17.2", "SiT, in ERD's table 3; its learned variance is not trained"),
    "lightningdit_xl1":    Recipe(_LIGHTNING | {"model": "lightningdit_xl1", "target": "u"}, "2.08",
                                  "k-Diff, section 5.1: 64 epochs, without LightningDiT's cosine loss", _K_GUIDED),
    "kdiff_lightningdit_xl1": Recipe(_LIGHTNING | {"model": "lightningdit_xl1", "target": "k"}, "2.05",
                                     "k-Diff, table 3: 64 epochs, k 0.522", _K_GUIDED),
    "kdiff_lightningdit_xl1_800ep": Recipe(_LIGHTNING | {"model": "lightningdit_xl1", "target": "k",
                                                         "steps": 800 * IMAGENET_EPOCH_1024},
                                           "1.34", "k-Diff, table 1: 800 epochs, k 0.66", _K_GUIDED),
    "k2diff_lightningdit_xl1": Recipe(_LIGHTNING | {"model": "lightningdit_xl1", "target": "k2"}, "2.04",
                                      "k-Diff, table 3: k0 0.556, k1 0.509", _K_GUIDED),
    "ktdiff_lightningdit_xl1": Recipe(_LIGHTNING | {"model": "lightningdit_xl1", "target": "k(t)"}, "2.17",
                                      "k-Diff, table 3: 128 bins in time", _K_GUIDED),
    # JiT and its learnable target on pixels, 600 epochs.
    "jit_b16":             Recipe(_JIT | {"model": "jit_b16"},     "3.66", "JiT, 256 pixels", _JIT_G.format(2.9)),
    "jit_l16":             Recipe(_JIT | {"model": "jit_l16"},     "2.36", "JiT, 256 pixels", _JIT_G.format(2.4)),
    "jit_h16":             Recipe(_JIT | {"model": "jit_h16"},     "1.86", "JiT, 256 pixels", _JIT_G.format(2.2)),
    "jit_b32":             Recipe(_JIT_512 | {"model": "jit_b32"}, "4.02", "JiT, 512 pixels", _JIT_G.format(2.9)),
    "jit_l32":             Recipe(_JIT_512 | {"model": "jit_l32"}, "2.53", "JiT, 512 pixels", _JIT_G.format(2.5)),
    "jit_h32":             Recipe(_JIT_512 | {"model": "jit_h32"}, "1.94", "JiT, 512 pixels", _JIT_G.format(2.3)),
    "kdiff_jit_b16":       Recipe(_JIT | {"model": "jit_b16", "target": "k"},     "3.64", "k-Diff, table 1: k 1.0",
                                  _JIT_G.format(2.9)),
    "kdiff_jit_b32":       Recipe(_JIT_512 | {"model": "jit_b32", "target": "k"}, "4.03", "k-Diff, table 2",
                                  _JIT_G.format(2.9)),
    # ADM without guidance and without its learned variance; batches, rates and steps of its appendix.
    "adm_imagenet64":      Recipe(_ADM | {"model": "adm_unet_imagenet64", "schedule": "cosine", "batch_size": 2048,
                                          "lr": 3e-4, "steps": 540_000}, "2.07", "ADM, table 5"),
    "adm_imagenet128":     Recipe(_ADM | {"model": "adm_unet_imagenet128", "schedule": "ddpm_linear",
                                          "steps": 4_360_000}, "5.91", "ADM, table 5"),
    "adm_imagenet256":     Recipe(_ADM | {"model": "adm_unet_imagenet256", "schedule": "ddpm_linear",
                                          "steps": 1_980_000}, "10.94", "ADM, table 5"),
    # Embedded data on a CPU: Frechet distance and label accuracy are in README.
    "digits":              Recipe(_DIGITS | {"model": "uvit_digits"}),
    "digits_dit":          Recipe(_DIGITS | {"model": "dit_digits"}),
    "digits_k":            Recipe(_DIGITS | {"model": "uvit_digits", "schedule": "flow", "target": "k",
                                             "loss_space": "u", "weighting": "constant", "k_lr": 1e-2}),
    "tiny_uvit":           Recipe(_TINY | {"model": "uvit_tiny"}),
    "tiny_dit":            Recipe(_TINY | {"model": "dit_tiny"}),
    "tiny_lightningdit":   Recipe(_TINY | {"model": "lightningdit_tiny"}),
    "tiny_jit":            Recipe(_TINY | {"model": "jit_tiny"}),
    "tiny_unet":           Recipe(_TINY | {"model": "adm_unet_tiny", "data": "mixture"}),
}
# fmt: on
"""Every recipe by name."""

FAMILIES: tuple[tuple[str, str], ...] = (
    ("lightningdit_", "lightningdit_xl1"),
    ("jit_", "jit_b16"),
    ("adm_unet_", "adm_imagenet64"),
    ("uvit_", "erd_uvit_h2"),
    ("dit_", "erd_dit_xl2"),
)
"""The recipe of models that have none of their own, by the beginning of their names."""


def recipe(name: str) -> Options:
    """The options that a recipe sets, by field name.

    Raises:
        ValueError: an unknown name.
    """
    return dict(find_recipe(name).options)


def find_recipe(name: str) -> Recipe:
    """The row of a name; raises ValueError, with the choices, if there is none."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, RECIPES)}; choose from {', '.join(RECIPES)}")
    return RECIPES[name]


def recipe_of_model(model: str) -> str:
    """The first recipe that trains `model`, or that of its family, which then trains another one by itself.

    Raises:
        ValueError: an unknown model.
    """
    model_config(model)  # an unknown model is named, with the choices
    own = [name for name, row in RECIPES.items() if row.options["model"] == model]
    return own[0] if own else next(name for beginning, name in FAMILIES if model.startswith(beginning))


def origin(name: str) -> str:
    """Where a recipe is from and what it reached: "FID-50K 8.9 (plain: 13.7), unguided (ERD, table 3)"."""
    row = find_recipe(name)
    if not row.fid:
        return row.source
    return f"FID-50K {row.fid}, {row.sampling or 'unguided'} ({row.source})"
