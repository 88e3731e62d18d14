"""Recipes: what they set exists, can run, and is what was published."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from erdfast import cli, presets, train
from erdfast.config import TrainConfig
from erdfast.presets import MODELS
from erdfast.recipes import RECIPES, find_recipe, origin, recipe, recipe_of_model
from tests.test_config import GROUPS, IN_A_RUN

README = (Path(__file__).parents[1] / "README.md").read_text()
FIELDS = {field.name: field for kind in (*IN_A_RUN, TrainConfig) for field in dataclasses.fields(kind)}
EMBEDDED = [name for name, row in RECIPES.items() if row.options.get("data")]
PUBLISHED = [name for name in RECIPES if name not in EMBEDDED]

# Every option that a published recipe changes from its default, written out again from the papers.
COMMON = {"lr": 1e-4, "weight_decay": 0.0, "batch_size": 256, "label_drop": 0.1, "ema_decay": (0.9999,)}
COMMON |= {"steps": 400_000, "lr_schedule": "constant", "warmup_steps": 0, "grad_clip": 0.0, "num_timesteps": 1000}
ERD = COMMON | {"schedule": "cosine", "target": "eps", "weighting": "erd", "time_sampler": "uniform"}
ERD |= {"allocation": "time", "normalize": None, "loss_space": "target", "as_sampling": False}
DIT, UVIT = ERD | {"betas": (0.9, 0.999)}, ERD | {"betas": (0.99, 0.99)}
LADDER = DIT | {"model": "dit_s2", "weighting": "constant"}
CELEBA = ERD | {"batch_size": 128, "steps": 500_000, "label_drop": 0.0, "flip": True}
SCRIPT = ERD | {"weighting": "erd_repo", "betas": (0.9, 0.95), "label_drop": 0.0, "precision": "fp16", "seed": 42}
K_DIFF = COMMON | {"schedule": "flow", "weighting": "constant", "time_sampler": "logit_normal", "loss_space": "u"}
K_DIFF |= {"lr": 2e-4, "betas": (0.9, 0.95), "batch_size": 1024, "ema_decay": (0.9996, 0.9998, 0.9999), "flip": True}
K_DIFF |= {"k_init": 0.5, "k_bins": 128}
LATENTS = K_DIFF | {"model": "lightningdit_xl1", "logit_mean": 0.0, "logit_std": 1.0, "kappa_clip": 0.0}
LATENTS |= {"noise_scale": 1.0, "steps": 64 * 1251}
# Their time runs the other way: -0.8 there is 0.8 here.
PIXELS = K_DIFF | {"logit_mean": 0.8, "logit_std": 0.8, "kappa_clip": 0.05, "steps": 600 * 1251}
PIXELS |= {"warmup_steps": 5 * 1251, "noise_scale": 1.0}
PIXELS_512 = PIXELS | {"noise_scale": 512 / 256}
ADM = COMMON | {"target": "eps", "weighting": "constant", "betas": (0.9, 0.999), "label_drop": 0.0, "flip": True}

SETTINGS: dict[str, dict[str, Any]] = {
    **{f"erd_dit_{size}": DIT | {"model": f"dit_{size}"} for size in ("s2", "b2", "l2", "xl2")},
    **{f"erd_uvit_{size}": UVIT | {"model": f"uvit_{size}"} for size in ("s2", "m2", "l2", "h2")},
    "erd_unet_ldm": DIT | {"model": "adm_unet_ldm"},
    "erd_uvit_h2_800ep": UVIT | {"model": "uvit_h2", "steps": 4_000_000},
    "minsnr_uvit_h2": UVIT | {"model": "uvit_h2", "weighting": "min_snr", "gamma": 5.0},
    "ladder_dit_s2": LADDER | {"schedule": "ddpm_linear"},
    "ladder_dit_s2_beta2": LADDER | {"schedule": "ddpm_linear", "betas": (0.9, 0.95)},
    "ladder_dit_s2_cosine": LADDER | {"schedule": "cosine", "betas": (0.9, 0.95)},
    "ladder_dit_s2_erd": LADDER | {"schedule": "cosine", "betas": (0.9, 0.95), "weighting": "erd"},
    "celeba_unet": CELEBA | {"model": "adm_unet_celeba64", "lr": 1e-4, "betas": (0.9, 0.999)},
    "celeba_dit_s": CELEBA | {"model": "dit_s4_celeba64", "lr": 1e-3, "betas": (0.9, 0.95)},
    **{f"erd_repo_dit_{size}": SCRIPT | {"model": f"dit_{size}"} for size in ("b2", "l2", "xl2")},
    "sit_xl2": COMMON
    | {
        "model": "dit_xl2",
        "schedule": "flow",
        "target": "u",
        "weighting": "constant",
        "betas": (0.9, 0.999),
        "flip": True,
    },
    "lightningdit_xl1": LATENTS | {"target": "u"},
    "kdiff_lightningdit_xl1": LATENTS | {"target": "k"},
    "kdiff_lightningdit_xl1_800ep": LATENTS | {"target": "k", "steps": 800 * 1251},
    "k2diff_lightningdit_xl1": LATENTS | {"target": "k2"},
    "ktdiff_lightningdit_xl1": LATENTS | {"target": "k(t)"},
    **{f"jit_{size}16": PIXELS | {"model": f"jit_{size}16", "target": "x0"} for size in "blh"},
    **{f"jit_{size}32": PIXELS_512 | {"model": f"jit_{size}32", "target": "x0"} for size in "blh"},
    "kdiff_jit_b16": PIXELS | {"model": "jit_b16", "target": "k"},
    "kdiff_jit_b32": PIXELS_512 | {"model": "jit_b32", "target": "k"},
    "adm_imagenet64": ADM
    | {"model": "adm_unet_imagenet64", "schedule": "cosine", "batch_size": 2048, "lr": 3e-4, "steps": 540_000},
    "adm_imagenet128": ADM | {"model": "adm_unet_imagenet128", "schedule": "ddpm_linear", "steps": 4_360_000},
    "adm_imagenet256": ADM | {"model": "adm_unet_imagenet256", "schedule": "ddpm_linear", "steps": 1_980_000},
}
FIDS = {
    "erd_dit_b2": "32.3",
    "erd_dit_l2": "17.2",
    "erd_dit_xl2": "15.0",
    "erd_uvit_m2": "19.9",
    "erd_uvit_l2": "15.0",
    "erd_uvit_h2": "8.9",
    "erd_uvit_h2_800ep": "1.45",
    "minsnr_uvit_h2": "11.7",
    "ladder_dit_s2": "69.35",
    "ladder_dit_s2_beta2": "68.77",
    "ladder_dit_s2_cosine": "65.68",
    "ladder_dit_s2_erd": "57.54",
    "celeba_unet": "1.53",
    "celeba_dit_s": "2.37",
    "kdiff_lightningdit_xl1": "2.05",
    "kdiff_jit_b16": "3.64",
    "kdiff_lightningdit_xl1_800ep": "1.34",
}
SAMPLING = {
    "erd_uvit_h2_800ep": "--cfg-scale 2.1 --interval 0 0.8",
    "erd_uvit_h2": "",
    # [0.1, 1] where 1 is data.
    "kdiff_lightningdit_xl1": "--cfg-scale 1.5 --interval 0 0.9",
    "kdiff_jit_b16": "--cfg-scale 2.9 --interval 0 0.9",
}


def config_of(name: str) -> TrainConfig:
    """The run that a recipe alone gives."""
    return cli.with_options(TrainConfig(), recipe(name) | {"recipe": name})


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_runs(name) -> None:
    options = recipe(name)
    assert options.keys() <= FIELDS.keys() - {"recipe", "out", "resume"}
    config = config_of(name)
    config.validate()
    assert config.model in MODELS
    for key, value in recipe(name).items():
        group = next((getattr(config, g) for g in GROUPS if hasattr(getattr(config, g), key)), config)
        assert getattr(group, key) == value


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_is_the_published_one(name) -> None:
    """What the papers state is set so, and nothing else is anything but the default."""
    found, default = cli.flat_options(config_of(name)), cli.flat_options(TrainConfig())
    expected = default | SETTINGS[name] | {"recipe": name}
    assert found == expected


def test_every_published_recipe_is_checked() -> None:
    assert sorted(SETTINGS) == sorted(PUBLISHED)


@pytest.mark.parametrize(("name", "fid"), FIDS.items())
def test_published_results(name, fid) -> None:
    assert find_recipe(name).fid.split()[0] == fid
    assert find_recipe(name).source
    assert fid in origin(name)


@pytest.mark.parametrize(("name", "options"), SAMPLING.items())
def test_published_guidance(name, options) -> None:
    assert find_recipe(name).sampling == options


@pytest.mark.parametrize("name", [name for name, row in RECIPES.items() if row.sampling])
def test_sampling_options_are_options_of_sample(name) -> None:
    from erdfast.config import SampleConfig

    config = cli.parse(SampleConfig, ["--run", "x", *find_recipe(name).sampling.split()])
    assert config.cfg_scale[0] > 1


@pytest.mark.parametrize("name", RECIPES)
def test_dry_runs(name, capsys) -> None:
    assert train.main(["--recipe", name, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"recipe {name}: " in out
    assert "memory for" in out
    assert ("published: " in out) == bool(find_recipe(name).source)


@pytest.mark.parametrize("name", PUBLISHED)
def test_predictions_for_eight_gpus(name, capsys) -> None:
    """The days of README's table come from here."""
    assert train.main(["--recipe", name, "--dry-run", "--gpus", "8", "--device", "a100"]) == 0
    assert "predicted: " in capsys.readouterr().out


def test_readme_predicts_what_dry_runs_do(capsys) -> None:
    """Table 3 on eight GPUs: the published FIDs and the hours."""
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]*) ?\| ([\d.]+) \| ([\d.]+), ([\d.]+) \|$", README, re.MULTILINE)
    assert len(rows) == 7
    for name, plain, fid, *hours in rows:
        assert find_recipe(name).fid == (f"{fid} (plain: {plain})" if plain else fid)
        for device, expected in zip(("a100", "h200"), hours, strict=True):
            train.main(["--recipe", name, "--dry-run", "--gpus", "8", "--device", device])
            assert f"predicted: {expected} hours for 400,000 steps" in capsys.readouterr().out


def test_readme_names_recipes_that_exist() -> None:
    """Of "`erd_dit_s2`, `_b2`" the second is erd_dit_b2; of "`ladder_dit_s2`, `_erd`", ladder_dit_s2_erd."""
    section = README.partition("## Recipes")[2].partition("\n## ")[0]
    named: set[str] = set()
    for cell in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE):
        whole = ""
        for name in re.findall(r"`(\w+)`", cell):
            whole = whole if name.startswith("_") else name
            ends = (name, whole + name, whole.rpartition("_")[0] + name)
            found = [end for end in ends if end in RECIPES]
            assert found, name
            named.add(found[0])
    assert named == {name for name in RECIPES if not name.startswith("tiny_")}


def test_what_a_recipe_set_and_what_was_changed_is_printed() -> None:
    config = cli.parse_train(["--recipe", "erd_dit_b2", "--lr", "3e-4", "--flip", "--betas", "0.9", "0.95"])
    lines = train.describe_recipe(config).splitlines()
    assert lines[0].startswith("recipe erd_dit_b2: cosine schedule, eps target, erd weighting; batch 256, lr 0.0003")
    assert "--batch-size 256" in lines[1]
    assert "--model dit_b2" in lines[1]
    assert "--lr" not in lines[1]
    assert lines[2] == "changed: --lr 0.0003 --betas 0.9 0.95"
    assert lines[3] == "published: FID-50K 32.3 (plain: 43.4), unguided (ERD, table 3)"
    assert len(train.describe_recipe(cli.parse_train(["--recipe", "digits"])).splitlines()) == 2
    borrowed = train.describe_recipe(cli.parse_train(["--model", "lightningdit_b2"])).splitlines()
    assert borrowed[2] == "changed: --model lightningdit_b2"
    assert borrowed[3].startswith("published for lightningdit_xl1: FID-50K 2.08")


def test_without_data_a_recipe_of_pictures_trains_on_the_mixture(capsys) -> None:
    config = cli.parse_train(["--recipe", "jit_b16", "--model", "jit_tiny", "--precision", "fp32"])
    assert config.flip
    resolved = train.resolve(config, torch.device("cpu"))
    assert (resolved.data, resolved.flip) == ("mixture", False)
    assert capsys.readouterr().out == (
        "no --data: training on the embedded Gaussian mixture, 4x8x8, without mirror images\n"
    )
    named = train.resolve(dataclasses.replace(config, data="digits"), torch.device("cpu"))
    assert named.flip


def test_options_as_typed_are_read_back() -> None:
    config = config_of("kdiff_jit_b16" if "jit_b16" in MODELS else "erd_dit_b2")
    options = [cli.as_flag(key, value) for key, value in recipe(config.recipe or "").items()]
    typed = cli.parse_train([*" ".join(options).split(), "--recipe", "digits"])
    for key, value in recipe(config.recipe or "").items():
        assert cli.flat_options(typed)[key] == value
    assert cli.as_flag("flip", False) == "--no-flip"


def test_every_model_has_a_recipe() -> None:
    for model in MODELS:
        row = find_recipe(recipe_of_model(model))
        assert type(MODELS[row.options["model"]]) is type(MODELS[model])
    assert recipe_of_model("uvit_digits") == "digits"
    assert recipe_of_model("dit_xl2") == "erd_dit_xl2"


def test_a_recipe_is_a_copy() -> None:
    recipe("digits")["steps"] = 1
    assert recipe("digits")["steps"] == RECIPES["digits"].options["steps"] > 1


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(
        ValueError, match=r"unknown recipe 'digit' \(did you mean 'digits'\?\); choose from erd_dit_s2, .*tiny_dit"
    ):
        recipe("digit")
    with pytest.raises(ValueError, match=r"unknown recipe 'zzz'; choose from"):
        recipe("zzz")
    with pytest.raises(ValueError, match=r"unknown model 'uvit_x2'.*choose from uvit_s2"):
        recipe_of_model("uvit_x2")


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_data_suit_the_small_models(name) -> None:
    from erdfast.training.setup import build_network, open_data

    config = config_of(name)
    dataset = open_data(config)
    network = build_network(config, dataset)
    assert network.input_shape == dataset.shape
    assert network.num_classes == dataset.num_classes == 10


def test_the_tables_agree_with_their_comments() -> None:
    """The numbers beside the presets are the true ones."""
    from erdfast.models.flops import parameter_count, training_flops

    source = Path(presets.__file__).read_text()
    rows = re.findall(r'^    "(\w+)":.*#\s+([\d,]+)\s+(\d+)$', source, re.MULTILINE)
    assert len(rows) >= 8
    for name, count, gflop in rows:
        assert parameter_count(MODELS[name]) == int(count.replace(",", ""))
        assert f"{training_flops(MODELS[name]) / 1e9:.0f}" == gflop
