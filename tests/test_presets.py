"""Recipes: what they set exists, can run, and is what was published."""

import dataclasses

import pytest

from erdfast import cli, presets
from erdfast.config import TrainConfig
from erdfast.presets import MODELS, RECIPES, recipe, recipe_of_model
from tests.test_config import GROUPS, IN_A_RUN

FIELDS = {field.name: field for kind in (*IN_A_RUN, TrainConfig) for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_runs(name):
    options = recipe(name)
    assert options.keys() <= FIELDS.keys() - {"recipe", "out", "resume"}
    config = cli.with_options(TrainConfig(), options | {"recipe": name})
    config.validate()
    assert config.model in MODELS
    for key, value in recipe(name).items():
        group = next(
            (getattr(config, g) for g in GROUPS if hasattr(getattr(config, g), key)),
            config,
        )
        assert getattr(group, key) == value


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("erd_")])
def test_published_settings(name):
    config = cli.with_options(TrainConfig(), recipe(name))
    optimizer, process = config.optimizer, config.process
    assert name == f"erd_{config.model}"
    assert (process.schedule, process.target, process.weighting, process.num_timesteps) == (
        "cosine",
        "eps",
        "erd",
        1000,
    )
    assert (config.batch_size, config.steps, config.label_drop) == (256, 400_000, 0.1)
    assert (optimizer.lr, optimizer.lr_schedule, optimizer.weight_decay, optimizer.warmup_steps) == (
        1e-4,
        "constant",
        0,
        0,
    )
    assert (config.ema.ema_decay, optimizer.grad_clip) == ((0.9999,), 0)
    assert optimizer.betas == ((0.99, 0.99) if config.model.startswith("uvit") else (0.9, 0.999))


def test_every_model_has_a_recipe():
    for model in MODELS:
        assert RECIPES[recipe_of_model(model)]["model"] == model
    assert recipe_of_model("uvit_digits") == "digits"
    assert recipe_of_model("dit_xl2") == "erd_dit_xl2"


def test_a_recipe_is_a_copy():
    recipe("digits")["steps"] = 1
    assert recipe("digits")["steps"] == RECIPES["digits"]["steps"] > 1


def test_unknown_names_list_the_choices():
    with pytest.raises(
        ValueError, match=r"unknown recipe 'digit' \(did you mean 'digits'\?\); choose from erd_dit_s2, .*tiny_dit"
    ):
        recipe("digit")
    with pytest.raises(ValueError, match=r"unknown recipe 'zzz'; choose from"):
        recipe("zzz")
    with pytest.raises(ValueError, match=r"unknown model 'uvit_x2'.*choose from uvit_s2"):
        recipe_of_model("uvit_x2")


def test_embedded_data_suit_the_small_models():
    from erdfast.training.setup import build_network, open_data

    for name in ("digits", "digits_dit", "tiny_uvit", "tiny_dit"):
        config = cli.with_options(TrainConfig(), recipe(name))
        dataset = open_data(config)
        network = build_network(config, dataset)
        assert network.input_shape == dataset.shape
        assert network.num_classes == dataset.num_classes == 10


def test_the_tables_agree_with_their_comments():
    """The numbers beside the presets are the true ones."""
    import re
    from pathlib import Path

    from erdfast.models.flops import parameter_count, training_flops

    source = Path(presets.__file__).read_text()
    rows = re.findall(r'^    "(\w+)":.*#\s+([\d,]+)\s+(\d+)$', source, re.MULTILINE)
    assert len(rows) == 8
    for name, count, gflop in rows:
        assert parameter_count(MODELS[name]) == int(count.replace(",", ""))
        assert f"{training_flops(MODELS[name]) / 1e9:.0f}" == gflop
