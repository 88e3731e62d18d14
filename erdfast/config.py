"""The options of the entry points: frozen dataclasses, one docstring per field, from which the command line is made."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from erdfast import typed_json
from erdfast.monitoring import EVAL_PATHS, EvalConfig, PreviewConfig
from erdfast.optimization import EmaConfig, OptimizerConfig
from erdfast.process import Process
from erdfast.process.coefficients import SPACES
from erdfast.typed_json import require as _require

Precision = Literal["auto", "fp32", "bf16", "fp16", "fp8"]
SamplePrecision = Literal["auto", "fp32", "bf16", "fp16"]
Compile = Literal["auto", "none", "block", "full", "max-autotune"]
Parallel = Literal["auto", "none", "ddp", "fsdp", "hsdp"]
Recompute = Literal["none", "selective", "full"]
Cache = Literal["auto", "disk", "ram", "gpu"]
GpuName = Literal["a100", "h100", "h200"]


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Noise levels: what is added, what is predicted, how errors are weighed. See erdfast.process.Process."""

    schedule: str = "cosine"
    """Signal and noise over time: cosine, ddpm_linear, sd_linear, logsnr_linear (discrete); flow, vp, gvp,
    logsnr_uniform."""
    target: str = "eps"
    """What the network predicts: x0, eps, v, u, score; learnable: k, k2, k(t)."""
    weighting: str = "erd"
    """Weight of an error by noise level: constant, erd, erd_repo, min_snr, max_snr, p2, debias, min_debias, max_debias,
    snr, trunc_snr, sigmoid, edm."""
    time_sampler: str = "uniform"
    """How times are drawn: uniform, logit_normal, uniform_logsnr."""
    num_timesteps: int = 1000
    """Times of a discrete schedule."""
    stratified: bool = False
    """Draw one time per stratum of the batch, so that every batch covers all noise levels."""
    normalize: bool | None = None
    """Give the weighting mean 1 over the drawn times; by default only erd is normalised."""
    allocation: Literal["time", "logsnr"] = "time"
    """erd: weight proportional to the recoverability at the drawn time, or per unit of log-SNR."""
    as_sampling: bool = False
    """Draw times in proportion to the weight instead of weighing: same expected gradient, lower variance."""
    loss_space: Literal["target", "x0", "eps", "v", "u"] = "target"
    """The space in which the error is measured, if not the network's own target."""
    kappa_clip: float = 0.0
    """Floor of the denominator when the loss space is not the target (k-Diff: 0.05 on pixels)."""
    noise_scale: float = 1.0
    """Standard deviation of the noise (JiT: image size / 256)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal time sampler; time 1 is noise."""
    logit_std: float = 1.0
    """Standard deviation of the logit-normal time sampler."""
    gamma: float | None = None
    """Parameter of min_snr (5), max_snr (1) and p2 (1)."""
    p2_k: float = 1.0
    """Offset k of the p2 weighting."""
    sigmoid_bias: float = 0.0
    """Bias b of the sigmoid weighting."""
    k_init: float = 0.5
    """Where a learnable target starts: 0 is eps, 0.5 v, 1 x0."""
    k_bins: int = 128
    """Bins in time of the target k(t)."""

    @property
    def learnable(self) -> bool:
        """Whether the target has numbers that are trained."""
        return self.target not in SPACES

    def build(self) -> Process:
        """The process; raises ValueError for impossible combinations and says why."""
        return Process(**dataclasses.asdict(self))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a diffusion transformer. Without options: the handwritten digits, in minutes on a CPU."""

    model: str = "uvit_digits"
    """Preset of the network: uvit_s2, uvit_m2, uvit_l2, uvit_h2, dit_s2, dit_b2, dit_l2, dit_xl2, lightningdit_xl1,
    jit_b16, adm_unet_imagenet64 and others (an unknown name lists them); for a CPU uvit_digits, dit_digits,
    uvit_tiny, dit_tiny, lightningdit_tiny, jit_tiny, adm_unet_tiny."""
    data: str | None = None
    """digits, mixture, mixture:CxHxW, or a file or folder; by default what suits the model."""
    recipe: str | None = None
    """A published recipe that sets every other option (the command line still wins); by default the model's own."""
    steps: int = 400_000
    """Optimiser steps of the whole run."""
    batch_size: int = 256
    """Images per optimiser step."""
    accumulation: int = 1
    """Parts that a batch is split into when it does not fit in memory; divides the batch size."""
    label_drop: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    precision: Precision = "auto"
    """fp32, bf16, fp16 with a loss scale, or fp8 (bf16 with the products of attention and MLP in float8, on GPUs of
    compute capability 8.9 or later); auto: bf16 where the hardware has it, else fp32."""
    compile: Compile = "auto"
    """torch.compile: block (each block of the network once, and what precedes it), full (data to loss as one graph),
    max-autotune (the same with kernels chosen by measurement), none; auto: block on a GPU, none on a CPU."""
    parallel: Parallel = "auto"
    """How the processes of torchrun share the work: ddp (whole copies), fsdp (everything split), hsdp (split within a
    machine, copies across); auto: ddp where one device holds everything."""
    ddp_bf16: bool = False
    """ddp: send gradients as bf16, half the traffic."""
    recompute: Recompute = "none"
    """Activation checkpointing: full (blocks are computed again in backward), selective (all of them but matrix
    products and attention)."""
    cuda_graph: bool = False
    """Launch forward and backward as one CUDA graph (one GPU, or ddp): for networks whose kernels are short."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A gradient that is not finite: stop the run, or skip the update and count it (25 in a row stop it)."""
    latent_scale: Literal["auto", "stored", "sd", "edm2"] = "auto"
    """How stored latents are brought to the network's scale: stored (they are), sd (times 0.18215), edm2 (whitened to
    std 0.5); auto: as the code does that the format comes from."""
    flip: bool = False
    """Mirror every second sample, at random, where the data can be mirrored."""
    cache: Cache = "auto"
    """Where the data live: disk (memory-mapped), ram, gpu; auto: the fastest that has room."""
    attention: str = "auto"
    """Back end of attention: auto (the fastest by a table of measurements), flash, cudnn, efficient, math, reference,
    triton, flash_attn2, flash_attn3, flash_attn4, xformers."""
    seed: int = 0
    """A run is a pure function of its options and this number."""
    out: Path | None = None
    """Run directory; by default the next free runs/NNN-model-data."""
    resume: Path | None = None
    """Run directory to continue from its newest complete checkpoint; needs no other option. "auto": the one that --out
    names, if it holds a run, else begin there: what a scheduler that restarts jobs wants."""
    dry_run: bool = False
    """Print parameters, operations and memory; do not train."""
    gpus: int = 0
    """With dry_run: predict memory, speed and hours on so many GPUs (above 8, machines of 8), and the options that fit;
    0 predicts nothing."""
    device: GpuName = "h200"
    """The GPU for which gpus predicts: for nothing else."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 5_000
    """Steps between checkpoints; there is always one at the end."""
    keep_last: int = 2
    """How many checkpoints to keep."""
    keep_every: int = 0
    """Keep those of every so many steps for good; 0 keeps none."""
    tensorboard: bool = True
    """Write TensorBoard logs too, where TensorBoard is installed (extra: logging)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to as well, over the network (pip install wandb)."""
    process: ProcessConfig = field(default_factory=ProcessConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)

    def validate(self) -> None:
        """Raise ValueError for a number out of range, a combination that cannot run, or options of no effect."""
        self.validate_values()
        self._refuse_unused()

    def validate_values(self) -> None:
        """The same, but for options of no effect: older versions took and saved them."""
        _require("steps", self.steps, 1 <= self.steps < 2**32, "at least 1 and below 2^32")
        _require("batch_size", self.batch_size, 1 <= self.batch_size < 2**31, "at least 1 and below 2^31")
        _require("accumulation", self.accumulation, self.accumulation >= 1, "at least 1")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}")
        _require("label_drop", self.label_drop, 0 <= self.label_drop <= 1, "in [0, 1]")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2^63")
        self._validate_prediction()
        _require("log_every", self.log_every, self.log_every >= 1, "at least 1")
        _require("checkpoint_every", self.checkpoint_every, self.checkpoint_every >= 1, "at least 1")
        _require("keep_last", self.keep_last, self.keep_last >= 1, "at least 1")
        _require("keep_every", self.keep_every, self.keep_every >= 0, "at least 0 (0 keeps none for good)")
        self.optimizer.validate()
        self.ema.validate()
        self.preview.validate()
        self.evaluation.validate()
        self.process.build()

    def _validate_prediction(self) -> None:
        _require("gpus", self.gpus, self.gpus >= 0, "at least 0 (0 predicts nothing)")
        if self.gpus and not self.dry_run:
            raise ValueError(
                f"gpus {self.gpus} is a prediction's: add --dry-run; a run takes as many GPUs as torchrun starts "
                "processes (--nproc-per-node)"
            )
        if self.gpus and self.batch_size % (self.gpus * self.accumulation):
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by {self.gpus} GPUs times accumulation "
                f"{self.accumulation}"
            )

    def _refuse_unused(self) -> None:
        if self.device != TrainConfig.device and not self.gpus:
            raise ValueError(f"device {self.device} is a prediction's: add --dry-run --gpus, or leave it out")
        if self.ddp_bf16 and self.parallel not in ("auto", "ddp"):
            raise ValueError(
                f"ddp_bf16 has no effect with parallel {self.parallel}: choose ddp or auto, or add --no-ddp-bf16"
            )
        if self.optimizer.k_lr is not None and not self.process.learnable:
            raise ValueError(
                f"k_lr {self.optimizer.k_lr} has no effect: target {self.process.target!r} learns nothing; choose k, "
                "k2 or k(t), or leave it out"
            )
        if self.ema.ema_snapshot_every and not self.ema.ema_std:
            raise ValueError(
                f"ema_snapshot_every {self.ema.ema_snapshot_every} has no effect without power-function averages: "
                "name their widths with --ema-std, or set it to 0"
            )
        self.evaluation.refuse_unused()

    def to_json(self) -> str:
        """All options as JSON; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str) -> TrainConfig:
        """The options of a config.json.

        Raises:
            ValueError: not JSON, or not the options of this version; names `origin`.
        """
        try:
            values = typed_json.read_object(text)
            _from_older_versions(values)
            _make_paths(typed_json.inner_object(values, "evaluation"), EVAL_PATHS)
            for name, group in _GROUPS.items():
                values[name] = typed_json.fill(group, typed_json.inner_object(values, name), name)
            _make_paths(values, ("out", "resume"))
            config = typed_json.fill(cls, values, "a training run")
            typed_json.check_types(config)
            if config.dry_run or config.gpus:
                raise ValueError("dry_run and gpus are options of the command line alone: remove them here")
            config = dataclasses.replace(config, device=cls.device)  # older versions saved it without gpus too
            config.validate_values()  # a file that was edited by hand
        except (ValueError, TypeError) as error:
            raise ValueError(f"{origin} does not hold the options of a training run ({error})") from error
        return config


_GROUPS = {
    "process": ProcessConfig,
    "optimizer": OptimizerConfig,
    "ema": EmaConfig,
    "preview": PreviewConfig,
    "evaluation": EvalConfig,
}


def _make_paths(values: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        values[name] = Path(values[name]) if isinstance(values.get(name), str) else values.get(name)


def _from_older_versions(values: dict[str, Any]) -> None:
    """What older versions wrote, in today's names."""
    values.setdefault("evaluation", {})
    if "ema" not in values:
        optimizer = typed_json.inner_object(values, "optimizer")
        if "ema_decay" not in optimizer:
            raise ValueError("'ema' is missing")
        values["ema"] = {"ema_decay": [optimizer.pop("ema_decay")]}
    if values.get("compile") == "default":
        values["compile"] = "block"


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw samples from a run's averaged weights, or from a published checkpoint."""

    run: Path
    """Run directory of erdfast.train, or a published checkpoint: a .pt, .pth, .ckpt or .safetensors file of DiT, SiT,
    LightningDiT, JiT, U-ViT or ADM."""
    family: Literal["dit", "sit", "lightningdit", "jit", "uvit", "adm_unet", "erd"] | None = None
    """Of a published checkpoint: by default what its tensors' names say; a SiT looks like a DiT and must be named, and
    so must be networks of the ERD authors' code (erd)."""
    model: str | None = None
    """Of a published checkpoint: the preset that it is, where shapes do not tell its sizes (an ADM UNet; they tell
    whether it has classes, a null class and a learned variance)."""
    schedule: str | None = None
    """Of a published checkpoint: the schedule that it was trained on, by default its family's (dit: ddpm_linear; uvit:
    sd_linear; erd: cosine; sit, lightningdit, jit: flow)."""
    target: str | None = None
    """Of a published checkpoint: what it predicts, by default its family's target (dit, uvit, erd: eps; sit,
    lightningdit: u; jit: x0)."""
    num: int = 64
    """Number of samples."""
    classes: tuple[int, ...] = ()
    """Classes to draw, in turn; by default all."""
    cfg_scale: tuple[float, ...] = (1.0,)
    """Classifier-free guidance; 1 is none. Several make a file each, samples-cfg1.35.npz say, of the same noise."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Part of the noise axis on which guidance acts: 0 is clean, 1 pure noise."""
    steps: int = 50
    """Steps of the sampler."""
    sampler: str | None = None
    """edm_heun, edm_euler, heun, euler, ddim, dpmpp_2m; with fresh noise sde_euler, sde_heun; by default edm_heun
    (discrete schedules) or heun (continuous)."""
    level_set: str | None = None
    """Noise levels: edm, vp, logsnr, uniform (equal steps of time), iddpm (discrete schedules); by default edm for
    discrete schedules and for edm_heun and edm_euler, else uniform."""
    out: Path | None = None
    """grid.png or samples.npz (as ADM's: arr_0 uint8 NHWC, arr_1 labels); by default RUN/samples.png. An npz is made
    part by part in FILE.parts: a killed run goes on there."""
    seed: int = 0
    """Image i is a function of the seed and i."""
    batch_size: int = 256
    """Images per network call."""
    precision: SamplePrecision = "auto"
    """Of the network (fp8 is for training alone); the sampler's state is float32."""
    weights: Path | None = None
    """Averaged weights in place of the newest checkpoint's: a file that `python -m erdfast.ema` made."""
    compile: bool = False
    """Compile the network: a minute or more at first, then faster. For many samples."""
    cuda_graph: bool = False
    """Launch the network as one CUDA graph: for small networks on a GPU."""
    vae: Path | None = None
    """Folder of diffusers' AutoencoderKL, which makes pictures of latents; nothing is downloaded. Without it, latents
    are shown in false colours."""
    latent_scale: Literal["auto", "stored", "sd", "edm2"] = "auto"
    """How latents come from the VAE's own: as the data say, not at all, times its scaling factor, as EDM2 does."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which the VAE computes."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range, or options that do not go together."""
        _require("num", self.num, 1 <= self.num < 2**31, "at least 1 and below 2^31")
        for scale in self.cfg_scale:
            _require("cfg_scale", scale, scale >= 0, "at least 0 (1 is none)")
        if not self.cfg_scale or len(set(self.cfg_scale)) < len(self.cfg_scale):
            raise ValueError(f"cfg_scale is {self.cfg_scale}; it must be one or more different numbers")
        if self.run.is_dir():
            for name in ("family", "model", "schedule", "target"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} is for published checkpoints: {self.run} is a folder, a run knows its own"
                    )
        elif self.weights is not None:
            raise ValueError(f"weights {self.weights} go with a run: {self.run} is no folder")
        for name in ("latent_scale", "vae_precision"):
            if self.vae is None and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} goes with --vae FOLDER only")
        low, high = self.interval
        _require("interval", self.interval, 0 <= low <= high <= 1, "two numbers in [0, 1] in order")
        _require_sampling(self.steps, self.seed, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a run: for digits, Frechet distance in pixel space and label accuracy."""

    run: Path
    """Run directory of erdfast.train."""
    steps: int = 18
    """Steps of the sampler."""
    seed: int = 1
    """Seed of the samples."""
    batch_size: int = 600
    """Images per network call."""
    precision: SamplePrecision = "auto"
    """Of the network (fp8 is for training alone); the sampler's state is float32."""
    weights: Path | None = None
    """Averaged weights in place of the newest checkpoint's: a file that `python -m erdfast.ema` made."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        _require_sampling(self.steps, self.seed, self.batch_size)


@dataclass(frozen=True, kw_only=True)
class EmaReconstruction:
    """Make averaged weights of another width from a run's snapshots (train with --ema-std 0.05 0.1)."""

    run: Path
    """Run directory of erdfast.train."""
    std: float | None = None
    """Relative width of the wanted average, 0.01 to 0.25; without it, the snapshots are listed."""
    step: int | None = None
    """Step at which the average ends; by default that of the newest snapshot."""
    out: Path | None = None
    """File; by default RUN/model-std<width>-step<step>.safetensors."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        if self.std is not None:
            _require("std", self.std, 0.01 <= self.std <= 0.25, "in [0.01, 0.25]")
        if self.step is not None:
            _require("step", self.step, 1 <= self.step < 2**32, "at least 1 and below 2^32")
        if self.out is not None and self.out.suffix != ".safetensors":
            raise ValueError(f"out={self.out} must end in .safetensors")


def _require_sampling(steps: int, seed: int, batch_size: int) -> None:
    _require("steps", steps, steps >= 1, "at least 1")
    _require("seed", seed, 0 <= seed < 2**63, "at least 0 and below 2^63")
    _require("batch_size", batch_size, 1 <= batch_size < 2**31, "at least 1 and below 2^31")
