"""Training steps side by side: each in its own process, each a real step; checkouts of others by path."""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bench import bench_train_step, peers, report, step_sides
from bench.bench_train_step import Worker, make_rows, time_steps
from bench.step_sides import EagerStep, RandomLatents, StepOptions
from erdfast import presets
from erdfast.ops import backend
from tests.runs import single_thread, words

CPU = torch.device("cpu")
TINY = StepOptions(model="uvit_tiny", batch=4, samples=16)


@pytest.fixture(autouse=True)
def one_thread():
    with single_thread():
        yield


@pytest.fixture
def own_imports(monkeypatch: pytest.MonkeyPatch):
    """What a checkout brings into sys.path and sys.modules is taken out again."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_eager_side_trains_by_reference_back_ends() -> None:
    step = EagerStep(TINY, CPU, compiled=False)
    chosen: list[str] = []
    step.model.register_forward_pre_hook(lambda *_: chosen.append(backend.resolve_backend(None, CPU, torch.float32)))
    before = [p.detach().clone() for p in step.parameters]
    for _ in range(2):
        step()
    assert chosen == ["reference", "reference"]
    assert backend.resolve_backend(None, CPU, torch.float32) == "cpu"
    moved = sum(not torch.equal(old, new) for old, new in zip(before, step.parameters, strict=True))
    assert moved > len(before) // 2
    averages = zip(step.averages, before, strict=True)
    assert any(not torch.equal(average, old) for average, old in averages)


@pytest.mark.parametrize("model", ["dit_tiny", "uvit_digits"])
def test_our_side_is_the_trainers_step(model: str) -> None:
    step = step_sides.build("ours", StepOptions(model=model, batch=4, samples=16), CPU)
    trainer = step.__self__  # type: ignore[attr-defined]  # a bound method
    step()
    step()
    assert (trainer.step, trainer.config.batch_size) == (2, 4)
    assert trainer.dataset.is_latent == (model == "dit_tiny")
    with pytest.raises(ValueError, match="without_qk_norm_rope, without_swiglu, erd, uvit, lightningdit"):
        step_sides.build("theirs", TINY, CPU)


def test_times_are_from_end_to_end() -> None:
    calls: list[int] = []
    assert len(time_steps(lambda: calls.append(1), 3, CPU)) == 3
    assert len(calls) == 3


def test_a_whole_comparison_writes_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = words("--model dit_tiny --batch 4 --sides eager ours --blocks 2 --steps 2 --warmup 1")
    with pytest.raises(SystemExit) as stop:
        bench_train_step.main([*arguments, "--erd", str(tmp_path), "--results", str(tmp_path)])
    assert stop.value.code == 1  # there is no checkout
    (path,) = tmp_path.glob("*/train_step_dit_tiny_4.json")
    result = json.loads(path.read_text())
    eager, ours, erd = result["rows"]
    assert (eager["side"], ours["side"], erd["side"]) == ("eager", "ours", "erd")
    assert not result["complete"]
    assert result["missing"] == ["side compile", "side ours_compile", "3 of 5 blocks", "8 of 10 steps"]
    assert eager["timing"]["rounds"] == ours["timing"]["rounds"] == 4
    assert ours["ours_over"] is None
    assert eager["ours_over"]["median"] == pytest.approx(eager["timing"]["p50_ms"] / ours["timing"]["p50_ms"])
    assert "has no models/dit.py" in erd["failed"]
    assert f"{ours['images_per_s']:,.0f}" in report.render_result(result)
    assert "erd           not measured" in capsys.readouterr().out


def test_our_compiled_step_is_compared_with_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = "--sides ours_compile ours_segments ours_compile --blocks 1 --steps 2 --warmup 1"
    bench_train_step.main(words(f"--compare segments --model dit_tiny --batch 4 {sides} --results {tmp_path}"))
    (path,) = tmp_path.glob("*/train_step_dit_tiny_4_segments.json")
    result = json.loads(path.read_text())
    compiled, segments = result["rows"]  # a side that is named twice is one
    assert compiled["ours_over"] is None
    assert segments["ours_over"]["median"] == pytest.approx(segments["timing"]["p50_ms"] / compiled["timing"]["p50_ms"])
    assert (result["base"], result["compile"]) == ("ours_compile", "block")
    assert result["missing"] == ["4 of 5 blocks", "8 of 10 steps"]
    assert "| speed of ours_compile |" in report.render_result(result)
    assert re.search(r"  ours_compile \d+\.\d\dx", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--compare graph --erd .", "--compare graph is about our own step: leave out --erd"),
        ("--compare fp8 --sides ours_fp8", "--compare fp8 compares with ours_compile: name it among --sides"),
        ("--results /dev/null", "/dev/null/.* cannot be a folder of results: Not a directory"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_train_step.main(words(options))
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_sides_of_a_comparison() -> None:
    kernels = bench_train_step.default_sides("kernels", "lightningdit_tiny")
    assert kernels[0] == "ours_compile"
    assert {"without_swiglu", "without_qk_norm_rope", "without_attention"} < set(kernels)
    assert "without_gelu" not in kernels
    assert "without_dropout" not in bench_train_step.default_sides("kernels", "dit_tiny")
    for option in ("graph", "full", "tuned", "fp8", "segments"):
        assert bench_train_step.default_sides(option, "dit_tiny") == ["ours_compile", f"ours_{option}"]
    assert set(step_sides.REPLACED) < set(backend.OPS)


def test_a_replaced_op_runs_by_reference_and_the_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = step_sides.trainer(TINY, CPU, compiled="none")
    monkeypatch.setattr(step_sides, "trainer", lambda *_: trainer)
    step = step_sides.build("without_diffusion_loss", TINY, CPU)
    chosen: list[tuple[str, str]] = []

    def note(*_: object) -> None:
        for op in ("diffusion_loss", "adamw_ema"):
            chosen.append((op, backend.resolve_backend(None, CPU, torch.float32, op=op)))

    trainer.diffusion.register_forward_pre_hook(note)
    step()
    assert chosen == [("diffusion_loss", "reference"), ("adamw_ema", "cpu")]
    assert backend.resolve_backend(None, CPU, torch.float32) == "cpu"


def test_variants_are_what_they_are_called() -> None:
    compiled = {name: step_sides.VARIANTS[name](TINY, CPU).compiled for name in ("ours", "ours_compile", "ours_full")}
    assert compiled == {"ours": "none", "ours_compile": "block", "ours_full": "full"}
    with pytest.raises(ValueError, match="precision fp8 needs"):
        step_sides.VARIANTS["ours_fp8"](TINY, CPU)
    with pytest.raises(ValueError, match="cuda_graph needs a GPU"):
        step_sides.VARIANTS["ours_graph"](TINY, CPU)


def test_a_side_may_have_surroundings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(bench_train_step.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setenv("KEPT", "yes")
    Worker("ours_segments", TINY)
    Worker("ours", TINY)
    assert [env.get("PYTORCH_CUDA_ALLOC_CONF") for env in started] == ["expandable_segments:True", None]
    assert all(env["KEPT"] == "yes" for env in started)


@pytest.mark.parametrize("option", ["--batch", "--blocks", "--steps"])
def test_counts_begin_at_one(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench_train_step.main([option, "0"])
    assert stop.value.code == 2
    assert f"{option}: must be at least 1, not 0" in capsys.readouterr().err


def test_mfu_is_model_operations_over_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train_step, "peak_flops", lambda device: 1e12)
    worker = Worker.__new__(Worker)
    worker.side, worker.failed, worker.times, worker.memory = "ours", "", [10.0, 20.0, 30.0], {}
    (row,) = make_rows([worker], StepOptions(model="dit_b2", batch=4))
    assert row["images_per_s"] == pytest.approx(200)
    assert row["mfu"] == pytest.approx(4 * 138.0e9 / 0.02 / 1e12, rel=0.01)


UVIT = """
    import torch
    from torch import nn
    print("attention mode is none")

    class UViT(nn.Module):
        def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, num_classes, conv):
            super().__init__()
            assert (img_size, in_chans, embed_dim, depth, num_classes) == (8, 4, 64, 3, 11)
            self.layer = nn.Conv2d(in_chans, in_chans, 1)
            self.time = nn.Linear(1, in_chans)

        def forward(self, x, timesteps, y=None):
            assert 1 <= int(timesteps.min()) and int(timesteps.max()) <= 1000 and y.shape == timesteps.shape
            return self.layer(x) + self.time(timesteps.float()[:, None] / 1000)[:, :, None, None]
"""


@pytest.mark.usefixtures("own_imports")
def test_a_checkout_trains(tmp_path: Path) -> None:
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "uvit.py").write_text(textwrap.dedent(UVIT))
    config = presets.model_config("uvit_tiny")
    step = peers.build("uvit", str(tmp_path), config, 4, RandomLatents, CPU)
    step()
    step()


@pytest.mark.usefixtures("own_imports")
def test_what_a_checkout_lacks_is_said(tmp_path: Path) -> None:
    config = presets.model_config("uvit_tiny")
    with pytest.raises(ValueError, match=r"git clone https://github\.com/baofff/U-ViT"):
        peers.build("uvit", None, config, 4, RandomLatents, CPU)
    with pytest.raises(ValueError, match=r"has no libs/uvit\.py; is it a checkout of"):
        peers.build("uvit", str(tmp_path), config, 4, RandomLatents, CPU)
    (tmp_path / "libs").mkdir()
    (tmp_path / "libs" / "uvit.py").write_text("import surely_not_installed")
    with pytest.raises(ValueError, match="pip install surely_not_installed"):
        peers.build("uvit", str(tmp_path), config, 4, RandomLatents, CPU)
    with pytest.raises(ValueError, match="choose a uvit preset"):
        peers.build("uvit", str(tmp_path), presets.model_config("dit_tiny"), 4, RandomLatents, CPU)


@pytest.mark.usefixtures("own_imports")
def test_stand_ins_take_the_place_of_missing_packages_only() -> None:
    peers.stand_in("not_there.inner.module", "json")
    import not_there.inner.module as inner  # type: ignore[import-not-found]  # that is the test
    from not_there.inner import Anything  # type: ignore[import-not-found]  # likewise

    assert isinstance(Anything, type)
    assert inner is sys.modules["not_there.inner.module"]
    assert sys.modules["json"] is json
    assert not hasattr(inner, "__file__")
