"""Imports point one way, and importing does nothing else."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "erdfast"
STDLIB = sys.stdlib_module_names

# What each part may import besides the standard library and itself. `erdfast` alone is the version in __init__.py.
ALLOWED: dict[str, set[str]] = {
    "erdfast": set(),
    "erdfast.philox": {"torch"},
    "erdfast.atomic": set(),
    "erdfast.figure_style": {"matplotlib", "erdfast.atomic"},
    "erdfast.cells": {"torch", "tqdm", "erdfast.atomic"},
    "erdfast.group": {"torch"},
    "erdfast.tensor_files": {"torch", "safetensors"},
    "erdfast.kernels": {"torch", "triton"},
    "erdfast.process": {"torch", "erdfast.philox"},
    "erdfast.ops": {"torch", "erdfast.philox"},
    "erdfast.typed_json": set(),
    "erdfast.job_file": {"erdfast.atomic"},
    "erdfast.models": {
        *("torch", "numpy", "safetensors", "erdfast.ops"),
        *("erdfast.atomic", "erdfast.tensor_files", "erdfast.typed_json"),
    },
    "erdfast.presets": {"torch", "erdfast.models"},
    "erdfast.recipes": {"erdfast.presets"},
    "erdfast.data": {
        *("torch", "numpy", "sklearn", "h5py", "PIL", "diffusers"),
        *("erdfast.philox", "erdfast.atomic", "erdfast.tensor_files", "erdfast.job_file", "erdfast.typed_json"),
    },
    "erdfast.sampling": {
        *("torch", "numpy", "typing_extensions"),
        *("erdfast.philox", "erdfast.process", "erdfast.atomic", "erdfast.job_file", "erdfast.data", "erdfast.group"),
    },
    "erdfast.evaluation": {
        *("torch", "numpy", "sklearn", "safetensors", "matplotlib"),
        "erdfast.figure_style",
        *("erdfast.atomic", "erdfast.tensor_files", "erdfast.data", "erdfast.group", "erdfast.monitoring"),
    },
    "erdfast.monitoring": {"erdfast.typed_json"},
    "erdfast.optimization": {"erdfast.typed_json"},
    "erdfast.config": {"erdfast.process", "erdfast.typed_json", "erdfast.monitoring", "erdfast.optimization"},
}
ALLOWED["erdfast.training"] = {
    "torch",
    "numpy",
    "safetensors",
    "tqdm",
    "matplotlib",
    "PIL",
    "wandb",
    "erdfast",
    *(name for name in ALLOWED if name != "erdfast.kernels"),
}
ALLOWED["erdfast.diagnostics"] = ALLOWED["erdfast.training"] | {"erdfast.training", "erdfast.cells", "sklearn"}
ENTRY_POINTS = {"erdfast.cli", "erdfast.published_run"}
ENTRY_POINTS |= {
    "erdfast.train",
    "erdfast.sample",
    "erdfast.evaluate",
    "erdfast.prepare",
    "erdfast.ema",
    "erdfast.encode",
    "erdfast.export",
    "erdfast.diagnose",
    "erdfast.experiments",
}
EXTRAS = {"h5py", "diffusers", "flash_attn", "flash_attn_interface", "xformers", "tensorboard", "wandb"}
"""Optional dependencies: imported where they are used, never when a module is."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
SOURCES |= {module_name(path): path for path in sorted((PACKAGE / "kernels").glob("*.py"))}  # behind a symlink
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}


def part_of(module: str) -> str:
    """erdfast.training.step => erdfast.training; torch.nn => torch."""
    names = module.split(".")
    return ".".join(names[:2]) if names[0] == "erdfast" else names[0]


def absolute(node: ast.ImportFrom, importer: str) -> str:
    """The module that a `from ... import` names."""
    if not node.level:
        assert node.module is not None
        return node.module
    package = importer.split(".")
    if SOURCES[importer].name != "__init__.py":
        package = package[:-1]
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *filter(None, [node.module])])


def targets(node: ast.AST, importer: str) -> set[str]:
    """Modules that one import statement names; `from erdfast import philox` names erdfast.philox."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    module = absolute(node, importer)
    found = set()
    for alias in node.names:
        deeper = f"{module}.{alias.name}"
        found.add(deeper if deeper in SOURCES or deeper == "erdfast.kernels" else module)
    return found


def type_only(tree: ast.Module) -> set[int]:
    """Ids of the nodes below `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    return {id(node) for block in blocks for statement in block.body for node in ast.walk(statement)}


def imports(module: str, *, at_import: bool) -> set[str]:
    """All modules imported anywhere in a module, or those that importing it imports."""
    tree = TREES[module]
    if not at_import:
        return set().union(*(targets(node, module) for node in ast.walk(tree)))
    skipped = type_only(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            skipped |= {id(inner) for inner in ast.walk(node)}
    return set().union(*(targets(node, module) for node in ast.walk(tree) if id(node) not in skipped))


def test_the_sources_were_found():
    assert {"erdfast.kernels.diffusion_loss", "erdfast.ops.diffusion_loss", "erdfast.train"} <= SOURCES.keys()
    assert "erdfast.process" in imports("erdfast.training.step", at_import=True)
    assert "erdfast.philox" in imports("erdfast.process.process", at_import=True)
    assert "tyro" in imports("erdfast.cli", at_import=False) - imports("erdfast.cli", at_import=True)


def test_every_part_has_a_rule():
    parts = {part_of(module) for module in SOURCES}
    assert parts <= ALLOWED.keys() | ENTRY_POINTS, "a new part needs a row in ALLOWED"


@pytest.mark.parametrize("module", [name for name in SOURCES if part_of(name) not in ENTRY_POINTS])
def test_imports_point_one_way(module):
    part = part_of(module)
    found = {part_of(name) for name in imports(module, at_import=False)}
    wrong = found - ALLOWED[part] - STDLIB - {part}
    assert not wrong, f"{module} imports {sorted(wrong)}"


def test_only_entry_points_import_entry_points():
    for module in SOURCES:
        found = {part_of(name) for name in imports(module, at_import=False)}
        assert part_of(module) in ENTRY_POINTS or not found & ENTRY_POINTS, module


@pytest.mark.parametrize("module", list(SOURCES))
def test_extras_and_compiled_parts_load_at_first_use(module):
    early = {part_of(name) for name in imports(module, at_import=True)}
    assert not early & (EXTRAS | {"erdfast._C"})
    assert part_of(module) == "erdfast.kernels" or not early & {"triton", "erdfast.kernels"}


def test_no_cycles():
    graph = {module: imports(module, at_import=True) & SOURCES.keys() - {module} for module in SOURCES}
    while graph:
        leaves = [module for module, needed in graph.items() if not needed & graph.keys()]
        assert leaves, f"these import one another: {sorted(graph)}"
        for module in leaves:
            del graph[module]


def test_files_are_named_by_what_they_hold():
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in SOURCES.values() if path.stem in vague]


@pytest.mark.parametrize("module", list(SOURCES))
def test_every_file_says_what_it_is(module):
    assert ast.get_docstring(TREES[module]), module


def test_no_module_is_very_long():
    lengths = {module: len(path.read_text().splitlines()) for module, path in SOURCES.items()}
    assert max(lengths.values()) <= 450, max(lengths, key=lambda name: lengths[name])


IMPORT_ALL = """
import importlib, json, os, sys, threading, random
import numpy as np
import torch
def state():
    return [torch.get_num_threads(), str(torch.get_default_dtype()), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.get_rng_state().sum().item(), int(np.random.get_state()[1].sum()), hash(random.getstate()),
            threading.active_count(), dict(os.environ), sorted(os.listdir())]
before = state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
assert state() == before, "importing changed something"
assert not torch.cuda.is_initialized()
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def test_importing_does_nothing_else(tmp_path):
    modules = [name for name in SOURCES if part_of(name) != "erdfast.kernels"]
    if importlib.util.find_spec("triton"):
        modules += [name for name in SOURCES if part_of(name) == "erdfast.kernels" and name != "erdfast.kernels"]
    compiled = [name for name in modules if name == "erdfast.ops.cpu" and not importlib.util.find_spec("erdfast._C")]
    done = run_python(tmp_path, IMPORT_ALL, json.dumps([name for name in modules if name not in compiled]))
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(json.loads(done.stdout))
    assert not loaded & {"matplotlib", "h5py", "sklearn", "tensorboard", "diffusers"}
    assert list(tmp_path.iterdir()) == []


def test_the_ops_need_torch_alone(tmp_path):
    code = "import sys, erdfast.ops; print(sorted(n for n in sys.modules if n.startswith(('erdfast', 'triton'))))"
    done = run_python(tmp_path, code)
    loaded = set(ast.literal_eval(done.stdout))
    assert {part_of(name) for name in loaded} == {"erdfast", "erdfast.ops", "erdfast.philox"}


def run_python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
