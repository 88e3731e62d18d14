"""Training steps of other people's repositories, from a checkout of yours: nothing of them is copied here.

erd           LilYau350/Elucidated-Representation-Diffusion: their models, process, loss and trainer, the whole step
uvit          baofff/U-ViT: their model; the step is a closure of their script and is done here as it is there
lightningdit  hustvl/LightningDiT: their model and transport; the loop is a script and is done here as it is there

Their loaders are replaced by a gather from memory, which is kinder to them. Modules that their files import and a
training step does not use (evaluation, encoders, logging) are stood in for when they are missing.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from erdfast.models import BackboneConfig, DiTConfig, LightningDiTConfig, UViTConfig

URLS = {
    "erd": "https://github.com/LilYau350/Elucidated-Representation-Diffusion",
    "uvit": "https://github.com/baofff/U-ViT",
    "lightningdit": "https://github.com/hustvl/LightningDiT",
}
EMA_DECAY = 0.9999


def build(
    side: str,
    path: str | None,
    config: BackboneConfig,
    batch: int,
    dataset: Callable[[BackboneConfig, int], Any],
    device: torch.device,
) -> Callable[[], object]:
    """The step of a repository on a network of this configuration.

    Raises:
        ValueError: no path, a file or package that is missing, or a network that the repository does not have.
    """
    files, make = PEERS[side]
    root = Path(path or "").expanduser()
    if path is None or not root.is_dir():
        raise ValueError(f"--{side} must be the folder of a checkout: git clone {URLS[side]}")
    if missing := [name for name in files if not (root / name).exists()]:
        raise ValueError(f"{root} has no {missing[0]}; is it a checkout of {URLS[side]}?")
    sys.path.insert(0, str(root))
    try:
        return make(config, Loader(dataset(config, 4096), batch), device)
    except ModuleNotFoundError as error:
        raise ValueError(f"{side} needs the package {error.name}: pip install {error.name}") from error


class Loader:
    """Batches without end; the interface that their trainers want of a DataLoader."""

    def __init__(self, data: Any, batch: int) -> None:
        self.data, self.batch = data, batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            x, y, _ = self.data.gather(torch.randint(len(self.data), (self.batch,)))
            yield (x.pin_memory(), y.pin_memory()) if torch.cuda.is_available() else (x, y)


class StandIn(types.ModuleType):
    """A module without code; whatever is imported from it by name is an empty class."""

    __all__: tuple[str, ...] = ()
    __path__: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):  # those are questions about the module itself
            raise AttributeError(name)
        return type(name, (), {})


def stand_in(*names: str) -> None:
    """Modules without code in place of packages that are not installed."""
    for name in names:
        parents = [name.rsplit(".", depth)[0] for depth in range(name.count("."), 0, -1)]
        for module in [*parents, name]:
            if module not in sys.modules and not _exists(module):
                sys.modules[module] = StandIn(module)
                package, _, last = module.rpartition(".")
                if package:
                    setattr(sys.modules[package], last, sys.modules[module])


def leave_out(*names: str) -> None:
    """Modules without code in place of some of theirs that a training step does not use."""
    sys.modules |= {name: StandIn(name) for name in names}


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


# ---------------------------------------------------------------------------- ERD


def _erd(config: BackboneConfig, loader: Loader, device: torch.device) -> Callable[[], object]:
    stand_in("torchdiffeq")
    leave_out("tools.utils", "tools.align_utils")  # evaluation and encoders, which import much more
    process = importlib.import_module("tools.gaussian_diffusion")
    trainer = importlib.import_module("tools.trainer")
    if not isinstance(config, DiTConfig | UViTConfig):
        raise ValueError(f"no preset of the ERD repository is a {config.backbone}: choose a dit or uvit preset")
    channels, side, _ = config.input_shape
    sizes = {
        "image_size": side,
        "patch_size": config.patch_size,
        "in_channels": channels,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
        "num_classes": config.num_classes,
        "class_dropout_prob": 0.1,
    }
    if isinstance(config, DiTConfig):
        model = importlib.import_module("models.dit").DiT(hidden_size=config.width, **sizes)
    else:
        model = importlib.import_module("models.uvit").UViT(embed_dim=config.width, **sizes)
    model = model.to(device)
    average = copy.deepcopy(model)
    args = argparse.Namespace(
        dataset="Latent",
        in_chans=channels,
        latent_scale=0.18215,
        class_cond=True,
        amp=device.type == "cuda",
        parallel=False,
        grad_accumulation=1,
        grad_clip=None,
        ema_decay=EMA_DECAY,
        learn_align=False,
        learn_sigma=False,
        path_type="cosine",
        diffusion_steps=1000,
        beta_range=(1e-4, 0.02),
        snr_range=(-10.0, 10.0),
        weight_type="lambda",
        time_dist=["uniform", -0.8, 0.8],
        gamma=0.0,
        p2_gamma=1,
        p2_k=1,
    )
    diffusion = process.GaussianDiffusion(
        args=args,
        betas=process.get_named_beta_schedule(args),
        model_mean_type=process.ModelMeanType["EPSILON"],
        model_var_type=process.ModelVarType["FIXED_LARGE"],
        loss_type=process.LossType["MSE"],
        rescale_timesteps=True,
        device=device,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, eps=1e-8)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: 1.0)
    bar = types.SimpleNamespace(update=lambda n: None, set_postfix=lambda *args, **kwargs: None)
    theirs = trainer.Trainer(args, device, model, average, optimizer, scheduler, diffusion, loader, bar)
    return lambda: theirs.train_step(0)


# ---------------------------------------------------------------------------- U-ViT


def _uvit(config: BackboneConfig, loader: Loader, device: torch.device) -> Callable[[], object]:
    if not isinstance(config, UViTConfig):
        raise ValueError(f"the U-ViT repository has no {config.backbone}: choose a uvit preset")
    channels, side, _ = config.input_shape
    model = importlib.import_module("libs.uvit").UViT(
        img_size=side,
        patch_size=config.patch_size,
        in_chans=channels,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes + 1,
        conv=getattr(config, "conv", True),
    )
    # The signal level of their discrete schedule, kept on the host and indexed there, as they do.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)

    def losses(model: nn.Module, z: Tensor, y: Tensor) -> Tensor:
        n = torch.randint(1000, (len(z),))
        alpha, sigma = (part[n].to(z).view(-1, 1, 1, 1) for part in (signal.sqrt(), (1 - signal).sqrt()))
        noise = torch.randn_like(z)
        pred = model(alpha * z + sigma * noise, (n + 1).to(z.device), y=y)
        return (noise - pred).square().flatten(1).mean(1)

    # Accelerate's fp16: autocast around the network, a loss scale; their average takes two small kernels a tensor.
    return _loop(model, losses, loader, device, dtype=torch.float16, betas=(0.99, 0.99), weight_decay=0.03)


# ---------------------------------------------------------------------------- LightningDiT


def _lightningdit(config: BackboneConfig, loader: Loader, device: torch.device) -> Callable[[], object]:
    if not isinstance(config, DiTConfig | LightningDiTConfig):
        raise ValueError(f"the LightningDiT repository has no {config.backbone}: choose a lightningdit or dit preset")
    stand_in("torchdiffeq", "fairscale.nn.model_parallel.initialize", "fairscale.nn.model_parallel.layers")
    channels, side, _ = config.input_shape
    model = importlib.import_module("models.lightningdit").LightningDiT(
        input_size=side,
        patch_size=config.patch_size,
        in_channels=channels,
        hidden_size=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        use_qknorm=isinstance(config, LightningDiTConfig) and config.qk_norm,
        use_swiglu=True,
        use_rope=True,
        use_rmsnorm=True,
    )
    transport = importlib.import_module("transport").create_transport(
        "Linear", "velocity", None, None, None, use_cosine_loss=True, use_lognorm=True
    )

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        terms = transport.training_losses(model, x, {"y": y})
        return terms["loss"] + terms["cos_loss"] if "cos_loss" in terms else terms["loss"]

    return _loop(model, losses, loader, device, dtype=torch.bfloat16, betas=(0.9, 0.95), weight_decay=0.0, item=True)


def _loop(
    model: nn.Module,
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor],
    loader: Loader,
    device: torch.device,
    *,
    dtype: torch.dtype,
    betas: tuple[float, float],
    weight_decay: float,
    item: bool = False,
) -> Callable[[], object]:
    """The step of a script: PyTorch's default AdamW, an average by a loop over tensors; `item` reads the loss."""
    model = model.to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=betas, weight_decay=weight_decay)
    if device.type == "cpu":
        dtype = torch.bfloat16
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    batches = iter(loader)
    latent = loader.data.is_latent

    def step() -> None:
        x, y = (part.to(device, non_blocking=True) for part in next(batches))
        if latent:
            mean, std = x.chunk(2, dim=1)
            x = 0.18215 * (mean + std * torch.randn_like(mean))
        with torch.autocast(device.type, dtype):
            loss = losses(model, x, y).float().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.mul_(EMA_DECAY).add_(parameter, alpha=1 - EMA_DECAY)
        if item:
            loss.item()

    return step


PEERS: dict[str, tuple[tuple[str, ...], Callable[[BackboneConfig, Loader, torch.device], Callable[[], object]]]] = {
    "erd": (("models/dit.py", "models/uvit.py", "tools/trainer.py", "tools/gaussian_diffusion.py"), _erd),
    "uvit": (("libs/uvit.py",), _uvit),
    "lightningdit": (("models/lightningdit.py", "transport/__init__.py"), _lightningdit),
}
"""By side: the files that must be there, and how the step is made."""
