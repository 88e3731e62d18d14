"""The training loop on one device: steps, metrics, pictures, checkpoints."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from erdfast.config import TrainConfig
from erdfast.data import Batch, Dataset, batch_indices
from erdfast.models import Backbone
from erdfast.models.flops import training_flops
from erdfast.process import Process

from .checkpoint import Checkpoint, checkpoint_path, load_checkpoint, newest_checkpoint, publish, save_checkpoint
from .ema import Ema
from .health import Health, check_weights
from .interrupt import Interrupt
from .metrics import LossByLogsnr, MetricsWriter, read_metrics
from .optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors
from .precision import PrecisionPolicy, resolve_precision
from .preview import Preview, write_summary
from .setup import build_network
from .speed import Speedometer
from .step import DiffusionStep

PATIENCE_S = 60.0
"""Pictures that would take longer than this, or than a tenth of the training so far, are left to erdfast.sample."""


class Trainer:
    """A run: network, averages, optimiser and the loop over steps.

    Args:
        config: all options, resolved: `data` and `precision` are not left open.
        dataset: what is trained on.
        run: the run directory; it exists.
        device: where.
        say: prints a line for people.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, run: Path, device: torch.device, say=print) -> None:
        self.config, self.dataset, self.run, self.device, self.say = config, dataset, run, device, say
        self.precision: PrecisionPolicy = resolve_precision(config.precision, device)
        torch.manual_seed(config.seed)
        self.model = build_network(config, dataset).to(device)
        self.process: Process = config.process.build().to(device)
        # Learnable targets are trained, averaged and saved with the network.
        self.trained = nn.ModuleDict({"model": self.model, "process": self.process})
        self.parameters = {n: p for n, p in self.trained.named_parameters() if p.requires_grad}
        self.ema = Ema(self.trained)
        self.optimizer = build_optimizer(self.parameters, config.optimizer, self.ema.averages)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.name == "fp16")
        self.step = 0
        self.diffusion = DiffusionStep(
            self._compiled(self.model),
            self.process,
            num_classes=self.model.num_classes,
            seed=config.seed,
            global_batch=config.batch_size,
            label_drop=config.label_drop if self.model.num_classes else 0.0,
            precision=self.precision,
            device=device,
        )
        self.loss_by_logsnr = LossByLogsnr(device=device)
        self.health = Health(device)
        self.preview = Preview(config.preview, dataset, self.ema_process, self.precision)
        self.speed = Speedometer(device, training_flops(self.model.config))
        self._warned: set[str] = set()

    @property
    def ema_model(self) -> Backbone:
        """The averaged network."""
        return self.ema.module["model"]  # pyright: ignore[reportIndexIssue, reportReturnType]  # a copy of `trained`

    @property
    def ema_process(self) -> Process:
        """The process with the averaged learnable target."""
        return self.ema.module["process"]  # pyright: ignore[reportIndexIssue, reportReturnType]  # a copy of `trained`

    def _compiled(self, model: Backbone) -> nn.Module:
        if self.config.compile == "none":
            return model
        mode = None if self.config.compile == "default" else "max-autotune-no-cudagraphs"
        return torch.compile(model, mode=mode, dynamic=False)  # pyright: ignore[reportReturnType]  # wraps a module

    # ------------------------------------------------------------------ the loop

    def train(self) -> str | None:
        """Run until the last step or a signal; the state is saved either way.

        Returns:
            The signal's name if one ended the run, else None.

        Raises:
            NonFiniteError: the loss is not finite; the newest checkpoint is from before.
            OSError: the final state cannot be written.
        """
        config = self.config
        with Interrupt() as interrupt, MetricsWriter(self.run / "metrics.jsonl", tensorboard=self._board()) as writer:
            writer.truncate_after(self.step)
            self.speed.pause()
            with self._progress_bar() as bar:
                while self.step < config.steps and interrupt.received is None:
                    grad_norm = self._train_step()
                    bar.update()
                    if self.step % config.log_every == 0 or self.step == config.steps:
                        record = self._log(writer, grad_norm)
                        bar.set_postfix_str(self.speed.describe(record), refresh=False)
                    elif self.device.type == "cpu":
                        self.health.check(self._newest)
                    if self.step < config.steps:
                        self._maybe_preview()
                        if self.step % config.checkpoint_every == 0:
                            self._save_or_warn()
            if complete_step(self.run) != self.step:
                self.health.check(self._newest)
                self.save()
        return interrupt.received if self.step < config.steps else None

    def _train_step(self) -> Tensor | None:
        """One optimiser step; returns the gradient norm before clipping where it was computed."""
        config, step = self.config, self.step
        lr = learning_rate(config.optimizer, step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.diffusion.step.fill_(step)
        micro = config.batch_size // config.accumulation
        total = torch.zeros((), device=self.device)
        for part in range(config.accumulation):
            result = self.diffusion(self._batch(part * micro, micro), part * micro)
            self.scaler.scale(result.loss / config.accumulation).backward()
            total += result.loss.detach() / config.accumulation
            self.loss_by_logsnr.update(result.logsnr, result.mse)
            self.health.update(step, result)
        self.scaler.step(self.optimizer, max_norm=self._max_norm())  # moves the averages too
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.health.add_loss(total)
        self.step += 1
        self.speed.add(config.batch_size)
        return self.optimizer.grad_norm

    def _batch(self, offset: int, count: int) -> Batch:
        config = self.config
        indices = batch_indices(
            config.seed, self.step, config.batch_size, len(self.dataset), rank_offset=offset, count=count
        )
        batch = self.dataset.gather(indices)
        if self.device.type == "cuda":  # only copies from pinned memory leave the host free
            batch = Batch(batch.x.pin_memory(), batch.y.pin_memory(), batch.moments_scale)
        x, y = (part.to(self.device, non_blocking=True) for part in batch[:2])
        return Batch(x, y, batch.moments_scale)

    def _max_norm(self) -> float | None:
        """What the gradient is clipped to; infinity only measures its norm, None is for steps that need none."""
        clip, done = self.config.optimizer.grad_clip, self.step + 1
        if clip:
            return clip
        return math.inf if done % self.config.log_every == 0 or done >= self.config.steps else None

    # ------------------------------------------------------------------ what it leaves behind

    def _log(self, writer: MetricsWriter, grad_norm: Tensor | None) -> dict[str, Any]:
        """One line of metrics; the only place of a step where the host waits for the device."""
        self.health.check(self._newest)
        losses, counts = self.loss_by_logsnr.read_and_reset()
        record: dict[str, Any] = {
            "step": self.step,
            "loss": self.health.read_mean_loss(),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "lr": learning_rate(self.config.optimizer, self.step - 1, self.config.steps),
            "images_per_s": self.speed.read(),
            "total_nimg": self.step * self.config.batch_size,
            "loss_by_logsnr": losses,
            "count_by_logsnr": counts,
        }
        record |= {name: value.tolist() for name, value in self.process.target_values().items()}
        with self._going_on("metrics.jsonl"):
            writer.write(record)
        return record

    def _maybe_preview(self) -> None:
        every = self.config.preview.sample_every
        if every and self.step % every == 0 and self._affordable():
            with self._going_on("pictures"):
                self.preview.save(self.run / "samples" / f"{self.step:08d}.png", self.preview.draw(self.ema_model))
            self.speed.pause()

    def _affordable(self) -> bool:
        seconds = self.preview.cost(self.ema_model) / max(self.speed.flops_per_s, 1.0)
        if seconds <= max(PATIENCE_S, 0.1 * self.speed.elapsed):
            return True
        self._say_once(
            f"no pictures: {self.config.preview.sample_num} samples would take about {seconds / 60:.0f} min here; "
            f"later: python -m erdfast.sample --run {self.run}"
        )
        return False

    def finish(self) -> Path:
        """Publish the averaged weights and draw summary.png; returns the picture's path."""
        publish(checkpoint_path(self.run, self.step), self.run)
        images = None
        if self.config.preview.sample_every and self._affordable():
            images = self.preview.draw(self.ema_model)
            self.preview.save(self.run / "samples" / f"{self.step:08d}.png", images)
        title = (
            f"{self.config.model} on {self.config.data}: {self.step:,} steps, {self.config.process.weighting} weighting"
        )
        write_summary(self.run, read_metrics(self.run / "metrics.jsonl"), images, self.preview, title)
        return self.run / "summary.png"

    # ------------------------------------------------------------------ checkpoints

    def save(self) -> Path:
        """Write a checkpoint of this moment.

        Raises:
            NonFiniteError: the weights are not finite; older checkpoints are untouched.
            OSError: it cannot be written; older checkpoints are untouched.
        """
        check_weights([*self.trained.parameters(), *self.ema.module.parameters()], self.step, self._newest)
        tensors = {f"weights/{name}": value for name, value in self.trained.state_dict().items()}
        optimizer = optimizer_tensors(self.optimizer, self.parameters)
        tensors |= {f"optimizer/{name}": value for name, value in optimizer.items()}
        averages = {f"process/{name}": value for name, value in self.ema_process.state_dict().items()}
        tensors |= {f"ema/{name}": value for name, value in averages.items()}
        path = save_checkpoint(
            self.run / "checkpoints",
            self.step,
            tensors=tensors,
            model=self.ema_model.state_dict(),
            numbers={"scaler": self.scaler.state_dict()},
            keep_last=self.config.keep_last,
        )
        self.speed.pause()
        return path

    def _save_or_warn(self) -> None:
        self.health.check(self._newest)
        try:
            self.save()
        except OSError as error:
            step = min(self.step + self.config.checkpoint_every, self.config.steps)
            self.say(
                f"checkpoint {self.step:,} could not be written: {error}; training goes on, next try at step {step:,}"
            )

    def restore(self) -> None:
        """Continue from the newest complete checkpoint of the run directory.

        Raises:
            ValueError: there is none, or it belongs to another network.
        """
        published = (self.run / "model.safetensors").exists()
        if not published and not any((self.run / "checkpoints").glob("[0-9]*")):
            self.say(f"{self.run} was interrupted before its first checkpoint: starting from step 0")
            return
        path = newest_checkpoint(self.run)
        checkpoint = load_checkpoint(path)
        groups = self._groups(checkpoint)
        self._check_shapes(groups, path)
        self.trained.load_state_dict(groups["weights"])
        self.ema.module.load_state_dict(groups["ema"])
        load_optimizer_tensors(self.optimizer, self.parameters, groups["optimizer"])
        if self.scaler.is_enabled():
            if not checkpoint.numbers.get("scaler"):
                raise ValueError(f"checkpoint {path} holds no loss scale, which fp16 needs")
            self.scaler.load_state_dict(checkpoint.numbers["scaler"])
        self.step = checkpoint.step

    @staticmethod
    def _groups(checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
        """Weights and averages as in `trained.state_dict()`, and the optimiser's tensors; unknown ones are left out."""
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "optimizer": {}, "ema": {}}
        for name, value in checkpoint.tensors.items():
            group, _, rest = name.partition("/")
            if group in groups:
                groups[group][rest.replace("/", ".") if group == "ema" else rest] = value
        groups["ema"] |= {f"model.{name}": value for name, value in checkpoint.model.items()}
        return groups

    def _check_shapes(self, groups: dict[str, dict[str, Tensor]], path: Path) -> None:
        weights = {name: value.shape for name, value in self.trained.state_dict().items()}
        moments = {f"{n}/{m}": p.shape for n, p in self.parameters.items() for m in ("exp_avg", "exp_avg_sq")}
        moments |= {f"{name}/step": torch.Size() for name in self.parameters}
        if int(path.name) == 0:  # AdamW makes its state at the first step
            moments = {}
        for group, wanted in {"weights": weights, "ema": weights, "optimizer": moments}.items():
            found = {name: value.shape for name, value in groups[group].items()}
            wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
            if wrong:
                name = wrong[0]
                raise ValueError(
                    f"checkpoint {path} is not of {self.config.model}: {len(wrong)} tensors of {group} differ, such as "
                    f"{name} (here {_shape(wanted.get(name))}, there {_shape(found.get(name))})"
                )

    def _newest(self) -> str:
        step = complete_step(self.run)
        return "there is no checkpoint yet" if step is None else f"the newest checkpoint is of step {step:,}"

    # ------------------------------------------------------------------ for people

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,  # a log file needs few lines
            desc=self.config.model,
        )

    def _board(self) -> Path | None:
        installed = importlib.util.find_spec("tensorboard") is not None
        return self.run / "tensorboard" if self.config.tensorboard and installed else None

    @contextlib.contextmanager
    def _going_on(self, what: str) -> Iterator[None]:
        """A full disk must not end a run for the sake of a log line or a picture."""
        try:
            yield
        except OSError as error:
            self._say_once(f"{what} could not be written: {error}; training goes on")

    def _say_once(self, line: str) -> None:
        if line.partition(":")[0] not in self._warned:
            self._warned.add(line.partition(":")[0])
            self.say(line)


def complete_step(run: Path) -> int | None:
    """The step of the newest complete checkpoint; None if there is none."""
    try:
        return int(newest_checkpoint(run).name)
    except ValueError:
        return None


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "a number"
