"""Options of what is watched while a network trains: pictures, and measurements of the averaged weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from erdfast.typed_json import require

PICTURE_METRICS = ("fid", "sfid", "is", "precision", "recall")
"""As erdfast.evaluate names them."""


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """Pictures during training."""

    sample_every: int = 10_000
    """Steps between sample grids; 0 makes none."""
    sample_num: int = 20
    """Pictures in a grid, classes in turn."""
    sample_steps: int = 18
    """Steps of the sampler (Heun: two network calls each)."""
    sample_cfg_scale: float = 2.0
    """Guidance of the pictures; 1 is none."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range."""
        require("sample_every", self.sample_every, self.sample_every >= 0, "at least 0 (0 makes none)")
        require("sample_num", self.sample_num, self.sample_num >= 1, "at least 1")
        require("sample_steps", self.sample_steps, self.sample_steps >= 2, "at least 2")
        require("sample_cfg_scale", self.sample_cfg_scale, self.sample_cfg_scale >= 0, "at least 0")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Measurements during training, of the averaged weights, by all processes together."""

    eval_every: int = 0
    """Steps between evaluations, and one at the end: digits and mixture by Frechet distance and label accuracy, other
    data by FID and its relatives; 0 makes none."""
    eval_num: int = 5000
    """Images of an evaluation, classes in turn; compare only what was measured on as many."""
    eval_steps: int = 18
    """Steps of the sampler (Heun: two network calls each)."""
    eval_cfg_scale: float = 1.0
    """Guidance of the images; 1 is none."""
    eval_reference: Path | None = None
    """What pictures are compared with: npz of ADM (mu, sigma, mu_s, sigma_s, arr_0), or of pictures, or that
    erdfast.evaluate --save-reference wrote, or a folder of erdfast.prepare; digits and mixture need none."""
    eval_inception: Path | None = None
    """Weights of the FID Inception network, pt_inception-2015-12-05-6726825d.pth; nothing is downloaded."""
    eval_metrics: tuple[str, ...] = PICTURE_METRICS
    """Of pictures: out of fid, sfid, is, precision, recall."""
    eval_vae: Path | None = None
    """Folder of diffusers' AutoencoderKL (config.json and safetensors), where latents are trained on."""

    def validate(self) -> None:
        """Raise ValueError for a number out of range or an unknown metric."""
        require("eval_every", self.eval_every, self.eval_every >= 0, "at least 0 (0 makes none)")
        require("eval_num", self.eval_num, 4 <= self.eval_num < 2**31, "at least 4 and below 2^31")
        require("eval_steps", self.eval_steps, self.eval_steps >= 2, "at least 2")
        require("eval_cfg_scale", self.eval_cfg_scale, self.eval_cfg_scale >= 0, "at least 0 (1 is none)")
        metrics = self.eval_metrics
        if not metrics or len({*metrics}) < len(metrics) or not {*metrics} <= {*PICTURE_METRICS}:
            raise ValueError(f"eval_metrics is {metrics}; name each once, out of {', '.join(PICTURE_METRICS)}")

    def refuse_unused(self) -> None:
        """Raise ValueError for an option that has no effect without `eval_every`."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not self.eval_every and value != field.default:
                raise ValueError(
                    f"{field.name} {value} has no effect without eval_every: say with --eval-every how many steps lie "
                    "between evaluations"
                )

    def absolute(self) -> EvalConfig:
        """With whole paths: a resumed run may start from another folder."""
        paths = {name: getattr(self, name) for name in EVAL_PATHS}
        return dataclasses.replace(self, **{name: path and path.resolve() for name, path in paths.items()})


EVAL_PATHS = ("eval_reference", "eval_inception", "eval_vae")
"""Fields of EvalConfig that name files."""
