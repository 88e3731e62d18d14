"""Predictions: memory and time by hand, what recomputing keeps against what is alive, and that what is chosen fits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erdfast import cli, presets, recipes, train
from erdfast.config import EmaConfig, TrainConfig
from erdfast.models import BackboneConfig, UViTConfig
from erdfast.models.flops import parameter_count, training_flops, training_memory
from erdfast.training import predict
from erdfast.training.gpus import GPUS
from erdfast.training.predict import Plan, choose, memory_limit, memory_per_gpu
from erdfast.training.recompute import apply_recompute
from erdfast.training.run_directory import create_run_directory, load_run_config
from tests.runs import refused, tiny_config, words

H2 = presets.model_config("uvit_h2")
P = 500_832_164
DDP, FSDP, HSDP = (Plan(mode, 1, "none") for mode in ("ddp", "fsdp", "hsdp"))


def asked(model: str = "uvit_h2", **options) -> TrainConfig:
    """A checked configuration of a prediction in bf16."""
    options = {"dry_run": True, "precision": "bf16", "model": model} | options
    config = cli.with_options(TrainConfig(), recipes.recipe(recipes.recipe_of_model(model)) | options)
    config.validate()
    return config


# ---------------------------------------------------------------------- memory


def test_memory_by_hand() -> None:
    whole = memory_per_gpu(H2, 32, "bf16", DDP, 8)
    assert whole == training_memory(H2, 32, "bf16")
    shared = memory_per_gpu(H2, 32, "bf16", FSDP, 8, num_emas=2)
    block = 2 * -(-P // 29)  # bf16
    assert shared.parameters == P / 2
    assert shared.gradients == P / 2 + block
    assert (shared.optimizer, shared.ema, shared.compute_weights) == (P, P, 2 * block)
    assert shared.activations == whole.activations


def test_hsdp_divides_by_a_machine_and_fsdp_by_all() -> None:
    on_64 = memory_per_gpu(H2, 4, "bf16", FSDP, 64)
    assert on_64.optimizer == -(-8 * P // 64)
    assert memory_per_gpu(H2, 4, "bf16", HSDP, 64) == memory_per_gpu(H2, 4, "bf16", FSDP, 8)
    totals = [memory_per_gpu(H2, 4, "bf16", FSDP, gpus).total for gpus in (2, 4, 8, 16, 64, 512)]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_fsdp_keeps_whole_gradients_while_it_accumulates() -> None:
    parts = memory_per_gpu(H2, 4, "bf16", FSDP._replace(accumulation=2), 8)
    assert parts.gradients == P / 2 + 4 * P


class Alive(TorchDispatchMode):
    """The memory that operations returned and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def num_bytes(self) -> int:
        return sum(size for storage, size in self._seen.values() if not storage.expired())


def alive_after_forward(config: BackboneConfig, batch: int, recompute: str) -> int:
    model = config.build()
    apply_recompute(model, recompute)
    x = torch.randn(batch, *config.input_shape)
    time, y = torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)
    with Alive() as alive, torch.autocast("cpu", torch.bfloat16):
        out = model(x, time, y)
        return alive.num_bytes() - out.untyped_storage().nbytes()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("model", ["uvit_tiny", "dit_tiny"])
def test_activations_against_what_is_alive_after_a_forward_pass(model: str, recompute: str) -> None:
    config = presets.model_config(model, depth=15, attention="flash")
    per_image = (alive_after_forward(config, 12, recompute) - alive_after_forward(config, 4, recompute)) / 8
    kept = predict.activation_bytes(config, 1, "bf16", recompute)
    if recompute != "none":  # one block's come in backward
        kept -= predict.activation_bytes(config, 1, "bf16", "none") / 15
    assert kept == pytest.approx(per_image, rel=0.1 if recompute != "full" else 0.2)  # DiT's ends are a fifth of that


def test_recomputing_keeps_less() -> None:
    none, selective, full = (predict.activation_bytes(H2, 8, "bf16", way) for way in ("none", "selective", "full"))
    assert none > 1.3 * selective > 1.3 * 1.3 * full
    with pytest.raises(ValueError, match="unknown recompute mode 'some'; choose from none, selective, full"):
        predict.activation_bytes(H2, 8, "bf16", "some")


# ---------------------------------------------------------------------- time


def test_step_of_one_gpu_by_hand() -> None:
    config = asked(gpus=1, device="h200", batch_size=128)
    found = predict.predict(config, Plan("none", 1, "none"))
    # 36 bytes per parameter: gradient, and weight, two moments and an average in and out.
    by_hand = 128 * training_flops(H2) / (0.205 * 989e12) + 36 * P / 4.8e12
    assert found.step_s == pytest.approx(by_hand, rel=1e-6)
    assert (found.exposed_s, found.busy) == (0, 1)
    assert found.hours(3600) == pytest.approx(by_hand)


def test_the_published_speed_comes_out_where_it_was_measured() -> None:
    found = choose(asked(gpus=1, device="a100", batch_size=128))
    assert 128 / found.step_s == pytest.approx(146, rel=0.02)


def test_recomputing_costs_a_forward_pass_or_little() -> None:
    none, selective, full = (
        sum(predict.compute_pass(H2, 32, GPUS["h100"], "bf16", way)) for way in ("none", "selective", "full")
    )
    assert full == pytest.approx(4 / 3 * none)
    assert none < selective < 1.05 * none
    # Two norms, a residual (18 bytes per element of the stream) and GELU (4 of the hidden layer) of 29 blocks.
    assert selective - none == pytest.approx(32 * 258 * 29 * (18 * 1152 + 4 * 4608) / 3.35e12)


def test_small_micro_batches_leave_multiprocessors_without_work() -> None:
    # 2 images of 258 tokens, width 1152, tiles of 128x128: 36.3 for 132 multiprocessors.
    assert predict.busy_share(H2, 2, GPUS["h200"]) == pytest.approx(2 * 258 * 1152 / 128**2 / 132)
    assert predict.busy_share(H2, 8, GPUS["h200"]) == 1


def test_fp32_has_no_tensor_cores() -> None:
    assert predict.assumed_flops_per_s(GPUS["a100"], "fp32") == 19.5e12
    assert predict.assumed_flops_per_s(GPUS["a100"], "bf16") == pytest.approx(0.374 * 312e12)


def test_more_gpus_are_faster_and_less_efficient() -> None:
    found = [(gpus, choose(asked(gpus=gpus, batch_size=1024))) for gpus in (1, 2, 4, 8, 16, 64)]
    speeds = [1 / each.step_s for _, each in found]
    efficiency = [1 / each.step_s / gpus for gpus, each in found]
    assert speeds == sorted(speeds)
    assert efficiency == sorted(efficiency, reverse=True)


# ---------------------------------------------------------------------- choice


@pytest.mark.parametrize("device", GPUS)
@pytest.mark.parametrize("gpus", [1, 8, 64])
@pytest.mark.parametrize("model", ["uvit_h2", "dit_xl2", "uvit_digits"])
def test_what_is_chosen_fits(model: str, gpus: int, device: str) -> None:
    config = asked(model, gpus=gpus, device=device, batch_size=1024)
    found = choose(config)
    assert found.memory.total <= memory_limit(GPUS[device])
    assert found.images * found.plan.accumulation * gpus == 1024
    assert found.plan.parallel == ("none" if gpus == 1 else "ddp")
    assert found.plan.recompute == "none"
    fewer = [Plan(found.plan.parallel, 2**n, "none") for n in range(10) if 2**n < found.plan.accumulation]
    assert all(predict.predict(config, plan).memory.total > memory_limit(GPUS[device]) for plan in fewer)


GIANT = UViTConfig(depth=49, width=2816, num_heads=22)
"""5.0 billion parameters: 22 bytes for each of them are 103 GiB."""


def test_what_does_not_fit_whole_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.MODELS, "uvit_h2", GIANT)
    assert 22 * parameter_count(GIANT) == pytest.approx(103.4 * 2**30, rel=1e-3)
    found = choose(asked(gpus=8, device="a100"))
    assert found.plan.parallel == "fsdp"
    assert found.memory.total <= memory_limit(GPUS["a100"])
    assert choose(asked(gpus=16, device="a100")).plan.parallel == "hsdp"
    with pytest.raises(ValueError, match=r"uvit_h2 does not fit on 1 a100: it takes .* GiB per GPU at least") as caught:
        choose(asked(gpus=1, device="a100"))
    assert "--recompute full" in str(caught.value)
    assert "training may fill 64.00; choose more GPUs or a smaller model" in str(caught.value)


def test_named_options_are_kept_or_where_the_search_begins() -> None:
    assert choose(asked(gpus=8, parallel="fsdp")).plan == Plan("fsdp", 1, "none")
    assert choose(asked(gpus=8, accumulation=4, recompute="selective")).plan == Plan("ddp", 4, "selective")
    assert choose(asked(gpus=16, parallel="hsdp")).plan.parallel == "hsdp"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 8, "parallel": "hsdp"}, "parallel hsdp does not suit 8 GPUs; choose from auto, ddp, fsdp"),
        (
            {"gpus": 8, "parallel": "fsdp", "precision": "fp16"},
            "parallel fsdp does not suit 8 GPUs with precision fp16",
        ),
        ({"gpus": 8, "parallel": "fsdp", "cuda_graph": True}, "parallel fsdp does not suit 8 GPUs with cuda_graph"),
        ({"gpus": 8, "parallel": "fsdp", "compile": "full"}, "with compile full; choose from auto, ddp"),
        (
            {"gpus": 8, "device": "a100", "precision": "fp8"},
            "a100 has no precision fp8; choose bf16, or device h100, h200",
        ),
        ({"gpus": 12, "batch_size": 240}, "gpus is 12; it must be 1 to 8 or a multiple of 8"),
    ],
)
def test_options_that_do_not_go_together(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(asked(**options))


def test_every_average_counts() -> None:
    one, three = (
        choose(dataclasses.replace(asked(gpus=8), ema=ema)).memory.ema
        for ema in (EmaConfig(), EmaConfig(ema_std=(0.05, 0.1, 0.2)))
    )
    assert (one, three) == (4 * P, 12 * P)


def test_ddp_bf16_waits_less() -> None:
    slow, fast = (choose(asked(gpus=64, ddp_bf16=half)).exposed_s for half in (False, True))
    assert fast < slow


# ---------------------------------------------------------------------- command line


def test_the_command_prints_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(words("--model uvit_h2 --dry-run --gpus 8 --device h200")) == 0
    shown = capsys.readouterr().out
    assert "8 x h200: 32 images at a time in bf16 fit with 20.06 of 112.80 GiB per GPU (parameters 1.87, " in shown
    found = choose(asked(gpus=8))
    assert f"predicted: {256 / found.step_s:,.0f} images/s" in shown
    assert f"predicted: {400_000 * found.step_s / 3600:.1f} hours for 400,000 steps, " in shown
    assert f"{800 * 1_281_167 / 256 * found.step_s / 3600:.1f} for 800 epochs of ImageNet" in shown
    assert shown.count("model, not measured: ") == 2
    assert "20.5% of the data sheet's, the best published (LightningDiT" in shown
    assert shown.endswith("options: --parallel ddp --accumulation 1 --recompute none --precision bf16\n")


def test_fp16_and_bf16_are_the_gpus_whatever_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(words("--dry-run --gpus 1 --precision fp16"))
    shown = capsys.readouterr().out
    assert "--precision fp16" in shown
    assert "of the multiprocessors that have work" in shown
    train.main(words("--dry-run --gpus 1 --precision fp32 --model uvit_s2"))
    assert "products at 67.0 TFLOP/s, all that fp32 has by the data sheet" in capsys.readouterr().out


def test_a_run_that_continues_predicts_nothing(tmp_path: Path) -> None:
    run = create_run_directory(tiny_config(out=tmp_path / "run", dry_run=True, gpus=8))
    assert load_run_config(run).gpus == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpus -1 --dry-run", "gpus is -1; it must be at least 0"),
        ("--gpus 8", "gpus 8 is a prediction's: add --dry-run"),
        ("--gpus 3 --dry-run", "batch_size 128 is not divisible by 3 GPUs times accumulation 1"),
        ("--gpus 64 --dry-run --accumulation 4", "batch_size 128 is not divisible by 64 GPUs times accumulation 4"),
        ("--gpus 12 --dry-run --batch-size 144", "it must be 1 to 8 or a multiple of 8: machines of 8 are assumed"),
        ("--gpus many --dry-run", "gpus"),
        ("--gpus 8 --dry-run --device v100", "a100"),
        ("--gpus 8 --dry-run --parallel none", "parallel none does not suit 8 GPUs; choose from auto, ddp, fsdp"),
    ],
)
def test_bad_numbers_of_gpus(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert message in refused(capsys, train.main, words(arguments))
