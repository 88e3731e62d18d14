"""The training loop on tiny networks: it learns, and is a function of its options and the seed."""

import importlib.util
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from erdfast.data import Batch, Dataset, GaussianMixture
from erdfast.ops.backend import default_backend
from erdfast.presets import build_model
from erdfast.training.checkpoint_files import newest_checkpoint
from erdfast.training.health import NonFiniteError
from erdfast.training.metrics import LOGSNR_EDGES, read_metrics
from erdfast.training.parallel import World
from erdfast.training.trainer import Trainer, complete_step
from tests.runs import all_tensors, assert_same_bits, tiny_config, tiny_trainer


class MomentsData(Dataset):
    """Means of a mixture with a constant standard deviation, as VAE latents come."""

    shape = (4, 8, 8)
    num_classes = 10

    def __init__(self, std: float) -> None:
        self.inner, self.std = GaussianMixture(self.shape, num_classes=10, seed=0), std

    def __len__(self) -> int:
        return len(self.inner)

    def gather(self, indices, flips=None):
        x, y, _ = self.inner.gather(indices)
        return Batch(torch.cat([x, torch.full_like(x, self.std)], dim=1), y, 0.5)

    def describe(self) -> str:
        return "moments"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["uvit_tiny", "dit_tiny"])
def test_the_loss_falls(tmp_path, model, precision):
    trainer = tiny_trainer(tmp_path, model=model, precision=precision, steps=60, log_every=15, lr=3e-3, stratified=True)
    assert trainer.train() is None
    losses = [record["loss"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(losses) == 4
    assert losses[-1] < 0.85 * losses[0], losses
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"stratified": True}, {"target": "k", "schedule": "flow"}])
def test_accumulation_changes_nothing_but_rounding(tmp_path, options):
    # A large epsilon makes Adam linear in the gradient: its sign alone would amplify rounding.
    linear = {"steps": 3, "lr": 1e3, "adam_eps": 1e3, **options}
    start = {name: value.detach() for name, value in tiny_trainer(tmp_path / "0", **linear).parameters.items()}
    ends = []
    for parts in (1, 4):
        trainer = tiny_trainer(tmp_path / str(parts), accumulation=parts, **linear)
        trainer.train()
        ends.append({name: value.detach() for name, value in trainer.parameters.items()})
    moved = max(float((ends[0][name] - start[name]).abs().max()) for name in start)
    apart = max(float((ends[0][name] - ends[1][name]).abs().max()) for name in start)
    assert moved > 1e-3
    assert apart < 1e-4 * moved


def test_a_run_is_a_function_of_options_and_seed(tmp_path):
    ends = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(len(ends))  # what was drawn elsewhere does not matter
        tiny_trainer(tmp_path / name, steps=4, seed=seed).train()
        ends.append(all_tensors(tmp_path / name))
    assert_same_bits(ends[0], ends[1])
    same = [n for n, v in ends[0].items() if n.endswith("exp_avg") and torch.equal(v, ends[2][n])]
    assert not same


@pytest.mark.parametrize("option", [{"log_every": 1}, {"checkpoint_every": 1}, {"sample_every": 2, "sample_num": 2}])
def test_watching_a_run_does_not_change_it(tmp_path, option):
    quick: dict[str, Any] = {"steps": 4, "sample_steps": 2}
    tiny_trainer(tmp_path / "a", **quick).train()
    tiny_trainer(tmp_path / "b", **(quick | option)).train()
    assert_same_bits(all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b"))


def test_labels_are_dropped_by_their_share(tmp_path):
    seen = []
    trainer = tiny_trainer(tmp_path, steps=1, batch_size=512, label_drop=0.25)
    trainer.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[2]))
    trainer.train()
    share = float((seen[0] == 10).float().mean())
    assert 0.25 - 4 * 0.0192 < share < 0.25 + 4 * 0.0192  # four standard deviations of 512 draws
    assert int(seen[0].max()) == 10


def test_without_label_drop_there_is_no_null_class(tmp_path):
    trainer = tiny_trainer(tmp_path, label_drop=0.0)
    assert (trainer.model.null_class, trainer.averaged.model.null_class) == (None, None)
    assert tiny_trainer(tmp_path / "with").model.null_class == 10


@pytest.mark.parametrize("target", ["k", "k2", "k(t)"])
def test_a_learnable_target_learns_is_logged_saved_and_restored(tmp_path, target):
    options = {"steps": 6, "target": target, "schedule": "flow", "weighting": "constant", "log_every": 2, "lr": 1e-2}
    trainer = tiny_trainer(tmp_path, **options)
    before = {name: value.clone() for name, value in trainer.process.target_values().items()}
    trainer.train()
    after = trainer.process.target_values()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    for name, value in after.items():
        torch.testing.assert_close(torch.tensor(last[name], dtype=value.dtype), value, rtol=1e-6, atol=0)
    averaged = trainer.averaged.process.target_values()
    assert all(not torch.equal(averaged[name], after[name]) for name in after)
    again = tiny_trainer(tmp_path, **options)
    again.restore()
    for found, wanted in ((again.process, after), (again.averaged.process, averaged)):
        assert all(torch.equal(found.target_values()[name], value) for name, value in wanted.items())


def test_moments_are_drawn_in_the_step(tmp_path):
    ends = {}
    for std in (0.0, 1.0):
        run = tmp_path / str(std)
        Trainer(tiny_config(steps=3, out=run), MomentsData(std), _made(run), World(device=torch.device("cpu"))).train()
        ends[std] = all_tensors(run)
    assert any(not torch.equal(ends[0.0][name], ends[1.0][name]) for name in ends[0.0])
    # Without spread they are the scaled means, so a run on these must agree but for rounding.
    plain = MomentsData(0.0)
    plain.gather = lambda indices, flips=None: _scaled(plain.inner.gather(indices))
    run = tmp_path / "plain"
    Trainer(tiny_config(steps=3, out=run), plain, _made(run), World(device=torch.device("cpu"))).train()
    for name, value in all_tensors(run).items():
        torch.testing.assert_close(ends[0.0][name], value, rtol=1e-3, atol=1e-5)


def _made(run):
    run.mkdir()
    return run


def _scaled(batch: Batch) -> Batch:
    return Batch(batch.x * 0.5, batch.y)


def test_hdf5_moments_from_a_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    generator = torch.Generator().manual_seed(0)
    moments = torch.cat(
        [torch.randn(40, 4, 8, 8, generator=generator), torch.rand(40, 4, 8, 8, generator=generator)], 1
    )
    with h5py.File(tmp_path / "latents.h5", "w") as file:
        file["train_latents"] = moments.numpy()
        file["train_labels"] = torch.arange(40).remainder(3).numpy()
    trainer = tiny_trainer(tmp_path / "run", steps=3, data=str(tmp_path / "latents.h5"), sample_every=2, sample_num=3)
    assert trainer.dataset.gather(torch.arange(2)).moments_scale == 0.18215
    assert trainer.model.num_classes == 3
    trainer.train()
    trainer.finish()
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 3
    assert (tmp_path / "run" / "samples" / "00000003.png").exists()


@pytest.mark.parametrize("model", ["uvit_tiny", "dit_tiny"])
def test_data_without_labels(tmp_path, model):
    path = tmp_path / "mixture.safetensors"  # a file may be called like embedded data
    save_file({"latents": torch.randn(20, 4, 8, 8)}, path)
    options = {"model": model, "steps": 3, "data": str(path), "sample_every": 2, "sample_num": 2, "sample_steps": 2}
    trainer = tiny_trainer(tmp_path / "run", **options)
    assert (trainer.model.num_classes, trainer.model.null_class) == (0, None)
    trainer.train()
    again = tiny_trainer(tmp_path / "run", **options)
    again.restore()
    assert again.step == 3


def test_a_relative_file_called_like_embedded_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"latents": torch.randn(20, 4, 8, 8), "labels": torch.arange(20) % 4}, tmp_path / "mixture.safetensors")
    assert tiny_trainer(tmp_path / "run", data="mixture.safetensors").model.num_classes == 4


def test_metrics(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=5, log_every=2, batch_size=16, warmup_steps=4, lr=1e-3)
    trainer.train()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [2, 4, 5]
    assert [record["total_nimg"] for record in records] == [32, 64, 80]
    assert [sum(record["count_by_logsnr"]) for record in records] == [32, 32, 16]
    assert [record["lr"] for record in records] == pytest.approx([5e-4, 1e-3, 1e-3])
    for record in records:
        assert len(record["loss_by_logsnr"]) == len(record["count_by_logsnr"]) == len(LOGSNR_EDGES) - 1
        for mean, count in zip(record["loss_by_logsnr"], record["count_by_logsnr"], strict=True):
            assert (mean is None) == (count == 0)
        assert record["grad_norm"] > 0
        assert record["images_per_s"] > 0


def test_the_logged_loss_is_the_mean_over_its_steps(tmp_path):
    tiny_trainer(tmp_path / "each", steps=4, log_every=1).train()
    tiny_trainer(tmp_path / "pair", steps=4, log_every=4).train()
    each = [record["loss"] for record in read_metrics(tmp_path / "each" / "metrics.jsonl")]
    (pair,) = read_metrics(tmp_path / "pair" / "metrics.jsonl")
    assert pair["loss"] == pytest.approx(sum(each) / 4, rel=1e-6)


def test_a_log_file_receives_few_lines_of_progress(tmp_path, capsys):
    tiny_trainer(tmp_path, steps=30, log_every=1).train()
    bars = capsys.readouterr().err.split("\r")
    assert len(bars) <= 5, bars
    assert "30/30" in bars[-1]
    assert "loss 0." in bars[-1]


def test_clipping_limits_the_gradient_that_is_used(tmp_path):
    used, norms = [], []
    for clip in (0.0, 1e-3):
        trainer = tiny_trainer(tmp_path / str(clip), steps=1, grad_clip=clip, betas=(0.0, 0.9), log_every=1)
        trainer.train()
        # With beta 0 the first moment is the gradient that the optimiser received.
        gradients = [trainer.optimizer.state[parameter]["exp_avg"] for parameter in trainer.parameters.values()]
        used.append(float(torch.cat([gradient.flatten() for gradient in gradients]).double().norm()))
        norms.append(read_metrics(tmp_path / str(clip) / "metrics.jsonl")[0]["grad_norm"])
    assert norms[0] == norms[1]  # what is logged is the norm before clipping
    assert used == pytest.approx([norms[0], 1e-3], rel=1e-3)


def test_every_step_is_averaged(tmp_path):
    decay = 0.75
    trainer = tiny_trainer(tmp_path, steps=3, ema_decay=(decay,), target="k", schedule="flow", weighting="constant")
    expected = {name: value.detach().double() for name, value in trainer.parameters.items()}
    step = trainer._train_step

    def step_and_average():
        result = step()
        for name, value in trainer.parameters.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
        return result

    trainer._train_step = step_and_average
    trainer.train()
    for name, average in trainer.ema.snapshot(0).items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)


def test_published_weights_are_the_averages(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=5)
    trainer.train()
    trainer.finish()
    published = load_file(tmp_path / "model.safetensors")
    build_model("uvit_tiny").load_state_dict(published)
    averaged, trained = trainer.averaged.model.state_dict(), trainer.model.state_dict()
    assert published.keys() == averaged.keys()
    assert all(torch.equal(published[name], averaged[name]) for name in published)
    assert any(not torch.equal(published[name], trained[name]) for name in published)
    assert (tmp_path / "summary.png").stat().st_size > 10_000
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_pictures_appear_when_asked_for(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=4, sample_every=2, sample_num=3, sample_steps=2)
    trainer.train()
    trainer.finish()
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000002.png", "00000004.png"]


def test_pictures_that_would_take_too_long_are_left_out_once(tmp_path):
    lines = []
    trainer = tiny_trainer(tmp_path, steps=4, sample_every=1, sample_num=1_000_000_000)
    trainer.say = lines.append
    trainer.train()
    trainer.finish()
    (line,) = [line for line in lines if line.startswith("no pictures")]
    assert "python -m erdfast.sample --run" in line
    assert not (tmp_path / "samples").exists()


def test_tensorboard_files(tmp_path):
    pytest.importorskip("tensorboard")
    tiny_trainer(tmp_path, steps=2, log_every=1, tensorboard=True).train()
    assert next((tmp_path / "tensorboard").iterdir()).name.startswith("events.out.tfevents")


def test_tensorboard_may_be_missing(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "tensorboard" else found(name))
    tiny_trainer(tmp_path, steps=2, log_every=1, tensorboard=True).train()
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_environment_and_options_are_kept(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=7, betas=(0.5, 0.6))
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["betas"] == [0.5, 0.6]
    assert trainer.config.steps == 7
    assert json.loads((tmp_path / "environment.json").read_text())["torch"] == torch.__version__


# ---------------------------------------------------------------------- divergence


def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    trainer = tiny_trainer(tmp_path, steps=20, checkpoint_every=1, log_every=100)
    poison = trainer._train_step

    def step():
        if trainer.step == 3:
            next(iter(trainer.parameters.values())).data.fill_(float("nan"))
        return poison()

    trainer._train_step = step
    with pytest.raises(
        NonFiniteError, match=r"loss is not finite at step 4 \(log-SNR -?[\d.]+, time [\d.e+]+\); the newest"
    ):
        trainer.train()
    assert complete_step(tmp_path) == 3
    assert all(bool(torch.isfinite(value).all()) for value in all_tensors(tmp_path).values())
    assert newest_checkpoint(tmp_path).name == "00000003"


def test_weights_that_an_update_spoils_are_never_saved(tmp_path):
    # The loss of the only step is still finite.
    trainer = tiny_trainer(tmp_path, steps=1, lr=1e39)
    with pytest.raises(NonFiniteError, match="weights are not finite after step 1; there is no checkpoint yet"):
        trainer.train()
    assert complete_step(tmp_path) is None


class NoReadBack(TorchDispatchMode):
    """Refuses what would make the host wait for a device: reading a value, or a shape that depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        read = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal)
        assert func.overloadpacket not in read, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"accumulation": 2, "grad_clip": 1.0}, {"target": "k"}])
def test_between_two_log_lines_nothing_is_read_on_the_host(tmp_path, options):
    """From the data to the averages, by the references: what kernels for the CPU read is no device's business."""
    trainer = tiny_trainer(tmp_path, log_every=100, **options)
    with default_backend("reference"), NoReadBack():
        for _ in range(3):
            trainer._train_step()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReadBack():
        trainer._log(None, None)
    trainer.loader.close()
