"""The training loop: steps, metrics, pictures, checkpoints, in one process or in many."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from erdfast.config import TrainConfig
from erdfast.data import Batch, Dataset
from erdfast.data.loader import Loader
from erdfast.models import Backbone
from erdfast.models.flops import training_flops
from erdfast.process import Process

from .checkpoint import CheckpointWriter, choose_checkpoint, load_into
from .checkpoint_files import checkpoint_path, complete_step, publish
from .ema import Ema
from .evaluation import Evaluator
from .fp8 import apply_fp8, describe_difference, loss_difference
from .graph import GraphedMicroBatch, MicroBatch, check_graph
from .health import Health, check_weights
from .interrupt import Interrupt, Vote
from .measures import Measure, open_measure
from .metrics import LossByLogsnr, MetricsWriter, board_folder, read_metrics
from .optimizer import build_optimizer, learning_rate, set_learning_rates
from .parallel import World, average_gradients, choose_mode, communicating, full_tensor, replicate, shard
from .plan import micro_batches, resolve_compile, warm_cache
from .precision import PrecisionPolicy, resolve_precision
from .predict import Plan, memory_per_gpu
from .preview import Preview, write_summary
from .progress import progress_bar
from .recompute import apply_recompute
from .setup import build_network
from .snapshots import snapshot_path, write_snapshot
from .speed import Speedometer
from .state import MODEL, Averaged, state_tensors, trained, untrained_copies
from .step import DiffusionStep, StepResult, compile_step


class Trainer:
    """A run: network, averages, optimiser and the loop over steps.

    Args:
        config: all options, resolved: `data` and `precision` are not left open.
        dataset: what is trained on.
        run: the run directory; it exists.
        world: this process and the others.
        say: prints a line for people; called by the first process alone.
        measure: what evaluations measure by, where it is open already.

    Raises:
        ValueError: options that do not go together here.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, run: Path, world: World, say=print, measure: Measure | None = None
    ) -> None:
        self.config, self.dataset, self.run, self.world = config, dataset, run, world
        self.device = world.device
        self.say = say if world.is_main else lambda _line: None
        self.precision: PrecisionPolicy = resolve_precision(config.precision, self.device)
        self.parts = micro_batches(config, world)
        self._build_network()
        self._build_optimizer()
        seed_args = {"seed": config.seed, "batch_size": config.batch_size, "parts": self.parts}
        self.loader = Loader(
            dataset, **seed_args, device=self.device, flip=config.flip, cache=config.cache, say=self.say
        )
        self.loss_by_logsnr = LossByLogsnr(device=self.device)
        self.health = Health(world, stop=config.on_nonfinite == "stop")
        self.preview = Preview(config.preview, dataset, self.averaged.process, self.precision)
        self.interrupt = Interrupt()
        self.evaluator = Evaluator(
            config.evaluation,
            measure or open_measure(config, dataset, world, self.say),
            self.averaged,
            self.precision,
            world,
            batch_size=self.parts[0][1],
            run=run,
            interrupted=lambda: self.interrupt.received is not None,
            say=self.say,
        )
        self.speed = Speedometer(self.device, training_flops(self.model.config), world.size)
        self.writer = CheckpointWriter(
            run / "checkpoints", keep_last=config.keep_last, keep_every=config.keep_every, world=world
        )
        self.step = 0
        self._saved: int | None = None
        """The step of the newest checkpoint that is written or being written."""
        self._warned: set[str] = set()
        self._batch: Batch | None = None
        """In fp8 the newest micro-batch, on which it is compared with bf16."""

    def _build_network(self) -> None:
        config, device = self.config, self.device
        torch.manual_seed(config.seed)  # the same weights in every process
        self.model: Backbone = build_network(config, self.dataset).to(device)
        self.process: Process = config.process.build().to(device)
        self.diffusion = DiffusionStep(
            self.model,
            self.process,
            seed=config.seed,
            global_batch=config.batch_size,
            label_drop=config.label_drop if self.model.num_classes else 0.0,
            precision=self.precision,
            device=device,
        )
        if self.precision.fp8_backend is not None:
            apply_fp8(self.model, self.precision.fp8_backend)
        whole = Plan("ddp", config.accumulation, config.recompute)
        size = (self.model.config, self.parts[0][1], self.precision.name, whole, self.world.size)
        memory = memory_per_gpu(*size, num_emas=config.ema.count).total
        self.mode = choose_mode(config.parallel, self.world, memory)
        apply_recompute(self.model, config.recompute)
        self.compiled = resolve_compile(config.compile, self.mode, device)
        if self.compiled != "none":
            warm_cache(self.run)
        compile_step(self.diffusion, self.compiled)
        shard(self.model, self.mode, self.world, self.precision)
        self.replica = replicate(
            self.diffusion, self.mode, self.world, accumulation=config.accumulation, compress=config.ddp_bf16
        )
        numbers = [offset for offset, _ in self.parts]
        self._offsets = torch.tensor(numbers, dtype=torch.int64, device=device).unbind()
        self._step = torch.zeros((), dtype=torch.int64, device=device)

    def _build_optimizer(self) -> None:
        config = self.config
        # Learnable targets are trained, averaged and saved with the network.
        self.parameters = trained(self.diffusion)
        self.ema = Ema(self.parameters, config.ema)
        self.optimizer = build_optimizer(self.parameters, config.optimizer, self.ema)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.name == "fp16")
        if self.scaler.is_enabled() and self.mode in ("fsdp", "hsdp"):
            raise ValueError(
                f"precision fp16 has no loss scale under {self.mode}; choose precision bf16, or parallel ddp"
            )
        self._micro_batch: MicroBatch = self._forward_backward
        if config.cuda_graph:
            check_graph(self.device, self.mode, config.accumulation)
            self._micro_batch = GraphedMicroBatch(self._forward_backward, [*self.parameters.values()], self.replica)
        averages = self.ema.averages[self.ema.primary]
        self.averaged = Averaged(
            lambda: untrained_copies(config, self.dataset, self.model), self.parameters, averages, self.world
        )

    def describe(self) -> str:
        """How the work is shared and compiled: "ddp on 8 processes, 32 images each, bf16, compile block"."""
        share = f"{self.parts[0][1]} images each" + (f" in {len(self.parts)} parts" if len(self.parts) > 1 else "")
        where = "one process" if self.world.size == 1 else f"{self.mode} on {self.world.size} processes"
        return f"{where}, {share}, {self.precision.name}, compile {self.compiled}"

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
        with contextlib.ExitStack() as stack:
            interrupt = stack.enter_context(self.interrupt)
            stack.enter_context(contextlib.closing(self.loader))
            log = stack.enter_context(self._metrics()) if self.world.is_main else None
            bar = stack.enter_context(
                progress_bar(self.world, total=config.steps, initial=self.step, unit="step", desc=config.model)
            )
            stack.callback(self._is_written)  # whatever ends the run
            self._maybe_evaluate(log)  # what the run that is resumed had no time for
            vote = Vote(self.world.size)
            self.speed.pause()
            signal = None
            while self.step < config.steps and signal is None:
                self._one_step(log, bar)
                signal = vote.poll(interrupt.received)
            vote.close()
            self._save_last()
            if self.step == config.steps:
                self._maybe_evaluate(log)
        return signal if self.step < config.steps else None

    def _one_step(self, log: MetricsWriter | None, bar: tqdm) -> None:
        """A step, and what is due after it."""
        config, first = self.config, self.speed.total_images == 0
        begun = time.monotonic()
        grad_norm = self._train_step()
        if first:
            self._say_first_step(begun)
        bar.update()
        if self.step % config.log_every == 0 or self.step == config.steps:
            record = self._log(log, grad_norm)
            bar.set_postfix_str(self.speed.describe(record), refresh=False)
        elif self.device.type == "cpu" and self.world.size == 1:
            self.health.check(self._newest)
        if config.ema.ema_std and self._snapshot_is_due():
            self._snapshot()  # before the checkpoint, after which a run that is killed would not come back here
        if self.step < config.steps:
            self._maybe_preview()
            if self.step % config.checkpoint_every == 0:
                self._save_or_warn()
            self._maybe_evaluate(log)  # after it: a run that is killed meanwhile comes back here

    def _train_step(self) -> Tensor | None:
        """One optimiser step; returns the gradient norm before clipping where it was computed."""
        config, step = self.config, self.step
        set_learning_rates(self.optimizer, config.optimizer, step, config.steps)
        self.optimizer.set_ema_decays(self.ema.decays(step))
        self._step.fill_(step)
        total = torch.zeros((), device=self.device)
        for part, offset in enumerate(self._offsets):
            batch = self.loader.batch(step, part)
            with communicating(self.replica, self.model, last=part == len(self.parts) - 1):
                result = self._micro_batch(batch.x, batch.y, offset, batch.moments_scale)
            self._batch = batch if self.precision.name == "fp8" else None
            total += result.loss.detach() / len(self.parts)
            self.loss_by_logsnr.update(result.logsnr, result.mse)
            self.health.update(step, result)
        if self.mode in ("fsdp", "hsdp"):
            average_gradients([p for name, p in self.parameters.items() if not name.startswith(MODEL)], self.world)
        skip = {"skip_nonfinite": True} if config.on_nonfinite == "skip" else {}
        self.scaler.step(self.optimizer, max_norm=self._max_norm(), **skip)  # moves the averages too
        self.scaler.update()
        if isinstance(self._micro_batch, GraphedMicroBatch):
            self._micro_batch.zero_gradients()
        else:
            self.optimizer.zero_grad(set_to_none=True)
        self.health.add_step(total, self.optimizer.grad_norm)
        self.step += 1
        self.speed.add(config.batch_size)
        return self.optimizer.grad_norm

    def _forward_backward(self, x: Tensor, y: Tensor, offset: Tensor, moments_scale: float | None) -> StepResult:
        result: StepResult = self.replica(x, y, self._step, offset, moments_scale)
        self.scaler.scale(result.loss / len(self.parts)).backward()
        return result

    def _max_norm(self) -> float | None:
        """What the gradient is clipped to; infinity only measures its norm, None is for steps that need none."""
        clip, done = self.config.optimizer.grad_clip, self.step + 1
        if clip:
            return clip
        wanted = done % self.config.log_every == 0 or done >= self.config.steps or not self.health.stop
        return math.inf if wanted else None

    def _say_first_step(self, begun: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        compiled = "" if self.compiled == "none" else f", torch.compile ({self.compiled}) included"
        self.say(f"first step: {time.monotonic() - begun:.1f} s{compiled}")
        self.speed.pause()

    # ------------------------------------------------------------------ what it leaves behind

    def _log(self, writer: MetricsWriter | None, grad_norm: Tensor | None) -> dict[str, Any]:
        """One line of metrics; the only place of a step where the host waits for the device."""
        self._is_written(wait=False)  # or is said not to be, now rather than when the next is due
        self.health.check(self._newest)
        by_level, counts = self.loss_by_logsnr.read_and_reset(self.world.all_reduce)
        losses = self.health.read(self._newest)
        record: dict[str, Any] = {
            "step": self.step,
            "loss": losses.mean,
            "loss_max": losses.largest,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "lr": learning_rate(self.config.optimizer, self.step - 1, self.config.steps),
            "images_per_s": self.speed.read(),
            "total_nimg": self.step * self.config.batch_size,
            "skipped_steps": losses.skipped,
            "loss_by_logsnr": by_level,
            "count_by_logsnr": counts,
        }
        record |= {name: value.tolist() for name, value in self.process.target_values().items()}
        lines = [self.health.spike(losses)]
        if self.precision.name == "fp8":
            assert self._batch is not None
            difference = loss_difference(self.diffusion, self.world, self._batch, self._step, self._offsets[-1])
            record["fp8_loss_difference"] = difference
            lines.append(describe_difference(difference))
        for line in filter(None, lines):
            self.say(f"step {self.step:,}: {line}")
        if writer is not None:
            with self._going_on("metrics.jsonl"):
                writer.write(record)
        return record

    @contextlib.contextmanager
    def _metrics(self) -> Iterator[MetricsWriter]:
        board = board_folder(self.run) if self.config.tensorboard else None
        writer = MetricsWriter(self.run / "metrics.jsonl", tensorboard=board, wandb=self.config.wandb)
        try:
            writer.truncate_after(self.step)
            yield writer
        finally:
            with self._going_on("metrics.jsonl"):
                writer.close()

    def _maybe_preview(self) -> None:
        every = self.config.preview.sample_every
        if every and self.step % every == 0:
            self._draw_preview()
            self.speed.pause()

    def _draw_preview(self) -> np.ndarray | None:
        """Pictures of this moment, where they are affordable; of the first process."""
        if not self.preview.is_affordable(self.averaged.model, self.speed, self.world, self.run, self._say_once):
            return None
        self.averaged.refresh()
        if not self.world.is_main:
            return None
        images = self.preview.draw(self.averaged.model)
        with self._going_on("pictures"):
            self.preview.save(self.run / "samples" / f"{self.step:08d}.png", images)
        return images

    def _maybe_evaluate(self, log: MetricsWriter | None) -> None:
        if not self.evaluator.is_due(self.step, self.config.steps):
            return
        record = self.evaluator.evaluate(self.step)
        if log is not None and record is not None:
            with self._going_on("metrics.jsonl"):
                log.write(record)
        self.speed.pause()

    def finish(self) -> Path:
        """Publish the averaged weights and draw summary.png; returns the picture's path. All processes call it."""
        config = self.config
        if self.world.is_main:
            publish(checkpoint_path(self.run, self.step), self.run)
        images = self._draw_preview() if config.preview.sample_every else None
        if self.world.is_main:
            records = read_metrics(self.run / "metrics.jsonl")
            self.evaluator.say_best(records)
            title = f"{config.model} on {config.data}: {self.step:,} steps, {config.process.weighting} weighting"
            write_summary(self.run, records, images, self.preview, title)
        self.world.barrier()
        return self.run / "summary.png"

    # ------------------------------------------------------------------ checkpoints

    def save(self, *, wait: bool = False) -> None:
        """Write a checkpoint of this moment, in the background unless `wait`.

        Raises:
            NonFiniteError: the weights are not finite; older checkpoints are untouched.
            OSError: it, or the one before, could not be written; older checkpoints are untouched.
        """
        averages = [average for group in self.ema.averages for average in group]
        check_weights([*self.parameters.values(), *averages], self.step, self.world, self._newest)
        self.averaged.refresh()
        self.writer.save(
            self.step,
            state_tensors(self.diffusion, self.optimizer, self.ema) | self.averaged.process_tensors(),
            self.averaged.model_tensors(),
            {"scaler": self.scaler.state_dict(), "health": self.health.state_dict()},
            wait=wait,
        )
        self._saved = self.step
        self.speed.pause()

    def _snapshot_is_due(self) -> bool:
        every = self.config.ema.ema_snapshot_every or self.config.checkpoint_every
        return self.step % every == 0 or self.step == self.config.steps

    def _snapshot(self) -> None:
        """Write every power-function average; what averages of other widths are made of afterwards."""
        for number, name in enumerate(self.ema.names):
            tensors = {key: full_tensor(value) for key, value in self.ema.snapshot(number).items()}
            if self.world.is_main:
                with self._going_on("a snapshot of the averages"):
                    std = self.config.ema.ema_std[number]
                    write_snapshot(snapshot_path(self.run, self.step, name), tensors, self.step, std)
        self.speed.pause()

    def _save_or_warn(self) -> None:
        self.health.check(self._newest)
        self._is_written()  # or has been said not to be
        self.save()

    def _is_written(self, *, wait: bool = True) -> bool:
        """Wait for the checkpoint in hand, if there is one; a full disk is no reason to lose what is trained."""
        try:
            self.writer.wait() if wait else self.writer.poll()
        except OSError as error:
            self._saved = None
            self.say(f"{error}; training goes on")
            return False
        return True

    def _save_last(self) -> None:
        if not self._is_written() or self._saved != self.step:
            self.health.check(self._newest)
            self.save(wait=True)

    def restore(self) -> None:
        """Continue from the newest complete checkpoint of the run directory.

        Raises:
            ValueError: there is none, or it belongs to another network.
        """
        path = choose_checkpoint(self.run, self.world, self.say)
        if path is None:
            return
        state = state_tensors(self.diffusion, self.optimizer, self.ema)
        numbers = load_into(path, state, self.world, verified=True)
        if self.scaler.is_enabled():
            if not numbers.get("scaler"):
                raise ValueError(f"checkpoint {path} holds no loss scale, which fp16 needs")
            self.scaler.load_state_dict(numbers["scaler"])
        self.health.load_state_dict(numbers.get("health", {}))
        self.step = self._saved = int(path.name)

    def _newest(self) -> str:
        self._is_written()
        step = complete_step(self.run)
        return "there is no checkpoint yet" if step is None else f"the newest checkpoint is of step {step:,}"

    # ------------------------------------------------------------------ for people

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
