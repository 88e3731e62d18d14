"""Options: each is explained, survives JSON, and refuses numbers that cannot be meant."""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import math
import re
from pathlib import Path

import pytest

from erdfast import cli, config, recipes
from erdfast.config import (
    EmaConfig,
    EmaReconstruction,
    EvalConfig,
    EvaluateConfig,
    OptimizerConfig,
    PreviewConfig,
    ProcessConfig,
    SampleConfig,
    TrainConfig,
)

IN_A_RUN = [ProcessConfig, OptimizerConfig, EmaConfig, PreviewConfig, EvalConfig]
CONFIGS = [*IN_A_RUN, TrainConfig, SampleConfig, EvaluateConfig, EmaReconstruction]
GROUPS = {"process", "optimizer", "ema", "preview", "evaluation"}


def documented(config_type: type) -> dict[str, str]:
    """Docstring by field, from the source: the string that follows the field."""
    (tree,) = ast.parse(inspect.getsource(config_type)).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in zip(tree.body, tree.body[1:], strict=False):
        is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            found[field.target.id] = str(text.value.value)  # pyright: ignore[reportAttributeAccessIssue]  # checked above
    return found


def help_of(config_type: type) -> str:
    """The text of --help in one line, without frames."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
        cli.parse(config_type, ["--help"], TrainConfig() if config_type is TrainConfig else None)
    assert stop.value.code in (0, None)
    return " ".join(output.getvalue().replace("│", " ").split())


def test_every_configuration_is_tested_here():
    types = {value for value in vars(config).values() if dataclasses.is_dataclass(value)}
    assert types == set(CONFIGS)


@pytest.mark.parametrize("config_type", CONFIGS)
def test_every_field_is_explained(config_type):
    fields = {field.name for field in dataclasses.fields(config_type)} - GROUPS
    texts = documented(config_type)
    assert fields == texts.keys()
    for name, text in texts.items():
        assert len(text) > 10, name
        assert text.strip().endswith("."), name
    assert config_type.__dataclass_params__.frozen


@pytest.mark.parametrize(
    ("config_type", "entry_point"),
    [(kind, TrainConfig) for kind in IN_A_RUN]
    + [(SampleConfig, SampleConfig), (EvaluateConfig, EvaluateConfig)]
    + [(EmaReconstruction, EmaReconstruction)],
)
def test_help_shows_every_flag_with_its_docstring(config_type, entry_point):
    shown = help_of(entry_point)
    for name, text in documented(config_type).items():
        assert re.search(rf"--{name.replace('_', '-')}[ ,]", shown), name
        assert re.sub(r"\s+", "", text)[:40] in shown.replace(" ", ""), name  # long words are broken over lines


def test_names_are_unique_over_all_groups():
    names = [field.name for kind in (*IN_A_RUN, TrainConfig) for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names))  # flags carry no prefix


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_json_round_trip(name):
    options = cli.with_options(TrainConfig(), recipes.recipe(name))
    options = dataclasses.replace(options, recipe=name, out=Path("runs/a b"), data="x.npz", seed=2**63 - 1)
    text = options.to_json()
    assert TrainConfig.from_json(text, "config.json") == options
    assert json.loads(text)["out"] == "runs/a b"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "Expecting value"),
        ("[1]", "list"),
        ("{}", "'optimizer' is missing"),
        ('{"optimizer": null}', "optimizer is None; it must be an object of options"),
        ('{"optimizer": "x"}', "optimizer is 'x'; it must be an object of options"),
        ('{"optimizer": {}}', "'ema' is missing"),
        ('{"ema": {}}', "'process' is missing"),
        ("[" * 100_000, "nested too deeply"),
        ('{"ema": {}, "process": {"nonsense": 1}}', "nonsense"),
        ("null", "NoneType"),
    ],
)
def test_other_json_is_refused(text, part):
    with pytest.raises(
        ValueError, match=r"run/config\.json does not hold the options of a training run \(.*\)"
    ) as caught:
        TrainConfig.from_json(text, "run/config.json")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("steps", "many", "steps is 'many'; it must be of type int"),
        ("steps", 10.5, "steps is 10.5"),
        ("steps", -3, "steps is -3"),
        ("batch_size", None, "batch_size is None; it must be of type int"),
        ("batch_size", True, "batch_size is True"),
        ("model", 3, "model is 3"),
        ("data", 5, "data is 5"),
        ("compile", "bogus", "compile is 'bogus'"),
        ("dry_run", "no", "dry_run is 'no'"),
        ("dry_run", True, "dry_run and gpus are options of the command line alone"),
        ("gpus", 8, "dry_run and gpus are options of the command line alone"),
        ("process", [], "process is []; it must be an object of options"),
        ("optimizer", None, "optimizer is None; it must be an object of options"),
        ("ema", "x", "ema is 'x'; it must be an object of options"),
        ("preview", 3, "preview is 3; it must be an object of options"),
        ("preview", {"sample_evry": 3}, "preview has no option 'sample_evry'; choose from sample_every, sample_num"),
        ("betas", 1, "a training run has no option 'betas'"),
        ("out", 3, "out is 3; it must be of type"),
    ],
)
def test_json_edited_by_hand_is_checked(name, value, part):
    values = json.loads(TrainConfig().to_json())
    values[name] = value
    with pytest.raises(ValueError, match="does not hold the options") as caught:
        TrainConfig.from_json(json.dumps(values), "config.json")
    assert part in str(caught.value)


def numbers(config_type: type) -> set[str]:
    hints = {field.name: str(field.type) for field in dataclasses.fields(config_type)}
    return {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", hint)}


NAN, INF = math.nan, math.inf

# Values that no field accepts beside those at its limits, which it does.
LIMITS = {
    OptimizerConfig: {
        "lr": ([0.0, -1.0, NAN, INF], [1e-9, 1e30]),
        "k_lr": ([-1e-9, -1.0, NAN, INF], [0.0, 1e30]),
        "betas": ([(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)], [(0.0, 0.0), (0.99, 0.999)]),
        "adam_eps": ([0.0, -1.0, INF], [1e-12, 1.0]),
        "weight_decay": ([-0.1, NAN, INF], [0.0, 1.0]),
        "warmup_steps": ([-1], [0, 10**9]),
        "grad_clip": ([-1.0, NAN, INF], [0.0, 5.0]),
    },
    EmaConfig: {
        "ema_decay": ([(1.0,), (0.9, -0.1), (NAN,)], [(0.0,), (0.9, 0.999999)]),
        "ema_std": ([(0.009,), (0.1, 0.26), (NAN,)], [(), (0.01, 0.25)]),
        "ema_snapshot_every": ([-1], [0, 1000]),
    },
    PreviewConfig: {
        "sample_every": ([-1], [0, 1]),
        "sample_num": ([0, -1], [1]),
        "sample_steps": ([1, 0], [2]),
        "sample_cfg_scale": ([-0.1, NAN, INF], [0.0, 1.0]),
    },
    EvalConfig: {
        "eval_every": ([-1], [0, 1]),
        "eval_num": ([3, -1, 2**31], [4, 50_000]),
        "eval_steps": ([1, 0], [2]),
        "eval_cfg_scale": ([-0.1, NAN, INF], [0.0, 1.0]),
    },
    EmaReconstruction: {
        "std": ([0.009, 0.26, NAN], [0.01, 0.25]),
        "step": ([0, -1], [1]),
    },
    TrainConfig: {
        "steps": ([0, -1, 2**32], [1, 2**32 - 1]),
        "batch_size": ([0, -256], [1]),
        "accumulation": ([0, -1, 3], [1, 2, 256]),
        "label_drop": ([-0.1, 1.5, NAN], [0.0, 1.0]),
        "seed": ([-1, 2**63], [0, 2**63 - 1]),
        "log_every": ([0], [1]),
        "checkpoint_every": ([0], [1]),
        "keep_last": ([0], [1]),
        "keep_every": ([-1], [0, 1]),
        "gpus": ([-1], [0, 8]),
    },
    SampleConfig: {
        "num": ([0, -1], [1]),
        "cfg_scale": ([(-1.0,), (1.0, NAN), (INF,)], [(0.0,), (1.0, 1.35)]),
        "interval": ([(0.8, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.0, NAN)], [(0.0, 0.0), (0.2, 0.8)]),
        "steps": ([0], [1]),
        "seed": ([-1], [0]),
        "batch_size": ([0], [1]),
    },
    EvaluateConfig: {"steps": ([0], [1]), "seed": ([-1], [0]), "batch_size": ([0], [1])},
    ProcessConfig: {
        "num_timesteps": ([1, 0], [2]),
        "kappa_clip": ([-0.1, NAN, INF], [0.0, 0.05]),
        "noise_scale": ([0.0, -1.0, NAN, INF], [0.5]),
        "logit_mean": ([NAN, INF], [-0.8]),
        "logit_std": ([0.0, -1.0, NAN], [0.8]),
        "gamma": ([0.0, -1.0, NAN], [None]),
        "p2_k": ([0.0, NAN], [1.0]),
        "sigmoid_bias": ([NAN, INF], [0.0]),
        "k_init": ([0.0, 1.0, NAN], [0.5]),
        "k_bins": ([0, -1], [128]),
    },
}
REQUIRED = {kind: {"run": Path("run")} for kind in (SampleConfig, EvaluateConfig, EmaReconstruction)}
CONTEXT = {
    "gpus": {"dry_run": True},
    "kappa_clip": {"schedule": "flow", "target": "u", "weighting": "constant", "loss_space": "v"},
    "logit_mean": {"time_sampler": "logit_normal"},
    "logit_std": {"time_sampler": "logit_normal"},
}


def check(config_type, **options):
    made = config_type(**REQUIRED.get(config_type, {}), **options)
    return made.build() if config_type is ProcessConfig else made.validate()


@pytest.mark.parametrize("config_type", CONFIGS)
def test_every_number_has_limits(config_type):
    special = {"classes", *GROUPS}  # classes are checked against the run
    assert numbers(config_type) - special == LIMITS[config_type].keys()


@pytest.mark.parametrize(("config_type", "name"), [(kind, name) for kind in CONFIGS for name in LIMITS[kind]])
def test_limits(config_type, name):
    bad, good = LIMITS[config_type][name]
    context = CONTEXT.get(name, {})
    for value in good:
        check(config_type, **{**context, name: value})
    for value in bad:
        with pytest.raises(ValueError, match=name) as caught:
            check(config_type, **{**context, name: value})
        wrong = value[-1] if name in ("ema_decay", "ema_std", "cfg_scale") else value  # the one that is named
        assert str(wrong) in str(caught.value)


def test_groups_are_checked_with_the_run():
    for group, bad in (
        ("optimizer", OptimizerConfig(lr=-1.0)),
        ("preview", PreviewConfig(sample_num=0)),
        ("evaluation", EvalConfig(eval_num=1)),
        ("evaluation", EvalConfig(eval_metrics=("fid", "kid"))),
        ("evaluation", EvalConfig(eval_metrics=())),
        ("evaluation", EvalConfig(eval_metrics=("is", "is"))),
        ("process", ProcessConfig(target="nonsense")),
    ):
        with pytest.raises(ValueError, match=r"lr|sample_num|nonsense|eval_num|eval_metrics"):
            TrainConfig(**{group: bad}).validate()  # pyright: ignore[reportArgumentType]  # one group each


def test_parts_must_divide_the_batch():
    with pytest.raises(ValueError, match="batch_size 10 is not divisible by accumulation 4"):
        TrainConfig(batch_size=10, accumulation=4).validate()


def test_options_of_the_process_are_those_of_Process():
    signature = inspect.signature(ProcessConfig().build().__class__.__init__)
    defaults = {name: parameter.default for name, parameter in list(signature.parameters.items())[1:]}
    assert defaults == dataclasses.asdict(ProcessConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "a100"}, "device a100 is a prediction's: add --dry-run --gpus"),
        ({"ddp_bf16": True, "parallel": "none"}, "ddp_bf16 has no effect with parallel none: choose ddp or auto"),
        ({"ddp_bf16": True, "parallel": "fsdp"}, "ddp_bf16 has no effect with parallel fsdp"),
        ({"ema": EmaConfig(ema_snapshot_every=9)}, "ema_snapshot_every 9 has no effect without power-function"),
        ({"evaluation": EvalConfig(eval_num=9)}, "eval_num 9 has no effect without eval_every: say with --eval-every"),
        ({"evaluation": EvalConfig(eval_vae=Path("v"))}, "eval_vae v has no effect without eval_every"),
    ],
)
def test_options_of_no_effect_are_refused_but_read(options, message):
    made = TrainConfig(**options)
    with pytest.raises(ValueError, match=message):
        made.validate()
    again = TrainConfig.from_json(made.to_json(), "config.json")  # an older version may have saved them
    assert again == dataclasses.replace(made, device="h200")


def test_options_that_have_an_effect_are_taken():
    for options in (
        {"device": "a100", "gpus": 8, "dry_run": True},
        {"ddp_bf16": True, "parallel": "ddp"},
        {"ddp_bf16": True},
        {"ema": EmaConfig(ema_std=(0.1,), ema_snapshot_every=9)},
        {"evaluation": EvalConfig(eval_every=10, eval_num=9, eval_reference=Path("r.npz"))},
    ):
        TrainConfig(**options).validate()  # pyright: ignore[reportArgumentType]  # of several types
