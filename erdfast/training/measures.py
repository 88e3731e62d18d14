"""What images are measured by during training, opened and checked before it begins.

    digits, mixture         Frechet distance to what is known of the data, label accuracy: in the network's own space
    with an eval_reference  FID, sFID, Inception score, precision, recall: of pictures, by way of the VAE for latents

A `Measure` is opened once per run; each evaluation gets `Sums` of its own, which processes fill apart and then join.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from erdfast.config import EvalConfig, TrainConfig
from erdfast.data import Dataset, Digits, FileDataset, GaussianMixture
from erdfast.data.rows import Rows
from erdfast.data.vae import Decoder
from erdfast.evaluation.digits import KnownDigits
from erdfast.evaluation.features import ImageSums, Summary, Wanted, own_batches
from erdfast.evaluation.files import open_images
from erdfast.evaluation.frechet import FeatureStatistics, Gaussian
from erdfast.evaluation.inception import InceptionNetwork
from erdfast.evaluation.inception_weights import SOURCE, load_inception
from erdfast.evaluation.measure import measure, wanted_of_samples
from erdfast.evaluation.mixture import KnownMixture
from erdfast.evaluation.reference import Reference, complete, read_reference
from erdfast.tensor_files import checksum

from .parallel import World

PICTURES_PER_CALL = 64
"""Of the Inception network: 6 MB each in its first convolutions, beside everything that training keeps."""
DECODED_AT_ONCE = 8
"""By the VAE: 0.3 GB each at 256 pixels."""

Progress = Callable[[int], object]
"""Is told how many pictures more this process is done with."""


class Sums(Protocol):
    """One evaluation."""

    def add(self, images: Tensor, ids: Tensor, labels: Tensor | None) -> None:
        """Take in images.

        Args:
            images: (B, C, H, W) float32 on the device, in the network's units, not clipped.
            ids: (B,) int64 on the CPU, their numbers among all.
            labels: (B,) int64 on the CPU; None where the network knows none.
        """

    def values(self) -> dict[str, float]:
        """By metric, from the images of all processes, which must all call it."""
        ...


class Measure(Protocol):
    """What a run's images are measured by."""

    def prepare(self) -> ReferencePictures | None:
        """What remains to be done before the first evaluation; None if nothing does."""
        ...

    def begin(self, total: int) -> Sums:
        """An evaluation of so many images, of all processes together."""
        ...


def open_measure(
    config: TrainConfig, dataset: Dataset, world: World, say: Callable[[str], None] = lambda _line: None
) -> Measure | None:
    """What the options ask for, checked; None if they ask for no evaluation. All processes call it.

    Raises:
        ValueError: files that are missing or of another kind, an option that is missing or has no effect; says which.
        ImportError: a package that is missing.
    """
    options = config.evaluation
    if not options.eval_every:
        return None
    _check_guidance(config, dataset)
    is_known = isinstance(dataset, (Digits, GaussianMixture))
    if not is_known or options.eval_reference is not None or options.eval_metrics == ("is",):
        return _open_pictures(options, config.data or "", dataset, world, say)
    for name in ("eval_inception", "eval_vae", "eval_metrics"):
        if getattr(options, name) != getattr(EvalConfig, name):
            raise ValueError(
                f"{name} {getattr(options, name)} has no effect: without eval_reference, {config.data} is measured in "
                "the network's own space; name a reference, or leave it out"
            )
    return KnownMeasure(KnownMixture(dataset) if isinstance(dataset, GaussianMixture) else KnownDigits(), world)


def _check_guidance(config: TrainConfig, dataset: Dataset) -> None:
    scale = config.evaluation.eval_cfg_scale
    if scale != 1.0 and (dataset.num_classes == 0 or config.label_drop == 0):
        why = "the data have no labels" if dataset.num_classes == 0 else "label_drop is 0"
        raise ValueError(f"eval_cfg_scale {scale:g} guides by labels that are dropped in training, but {why}: choose 1")


# ---------------------------------------------------------------------- data that are known


class KnownData(Protocol):
    """`KnownDigits`, `KnownMixture`."""

    gaussian: Gaussian

    def features(self, images: Tensor, /) -> Tensor:
        """(B, C, H, W) => (B, D)."""
        ...

    def num_recognised(self, images: Tensor, labels: Tensor, /) -> int:
        """How many images look like their labels."""
        ...


@dataclass(frozen=True)
class KnownMeasure:
    """Frechet distance (fd) and label accuracy."""

    data: KnownData
    world: World

    def prepare(self) -> None:
        """See `Measure`."""
        return

    def begin(self, total: int) -> KnownSums:
        """See `Measure`."""
        return KnownSums(self.data, self.world, total)


class KnownSums:
    """Sums of `KnownMeasure`, on the CPU."""

    def __init__(self, data: KnownData, world: World, total: int) -> None:
        self._data, self._world, self._total = data, world, total
        self._statistics = FeatureStatistics(data.gaussian.mean.numel())
        self._recognised = 0

    def add(self, images: Tensor, ids: Tensor, labels: Tensor | None) -> None:
        """See `Sums`."""
        del ids
        assert labels is not None  # these data have labels
        images = images.cpu()
        self._statistics.update(self._data.features(images))
        self._recognised += self._data.num_recognised(images, labels)

    def values(self) -> dict[str, float]:
        """See `Sums`."""
        if self._world.size > 1:
            self._statistics.join_processes(self._world.all_reduce)
        recognised = int(self._world.all_reduce(torch.tensor(self._recognised)))
        distance = self._statistics.gaussian().distance(self._data.gaussian)
        return {"fd": distance, "accuracy": recognised / self._total}


# ---------------------------------------------------------------------- pictures


def _open_pictures(
    options: EvalConfig, data: str, dataset: Dataset, world: World, say: Callable[[str], None]
) -> PictureMeasure:
    metrics, asked = options.eval_metrics, f"eval_every {options.eval_every}"
    if options.eval_reference is None and metrics != ("is",):
        raise ValueError(
            f"{asked}: {', '.join(metrics)} compare with pictures of the data: name an npz of ADM's, or one that "
            "erdfast.evaluate --save-reference wrote, with --eval-reference"
        )
    if options.eval_inception is None:
        raise ValueError(
            f"{asked}: {', '.join(metrics)} need the FID Inception network: name its weights with --eval-inception. "
            f"{SOURCE}"
        )
    to_pictures = _picture_maker(options, data, dataset, world, say)
    network = load_inception(options.eval_inception, world.device)
    if "fid" in metrics and options.eval_num <= network.pool_features:
        say(
            f"eval_num {options.eval_num:,} is no more than the {network.pool_features:,} features: FID is far too "
            "large; compare it with that of equally many images alone"
        )
    opened = PictureMeasure(network, metrics, to_pictures, world)
    if options.eval_reference is not None:
        opened.read_reference(options.eval_reference, checksum(options.eval_inception))
    return opened


def _picture_maker(
    options: EvalConfig, data: str, dataset: Dataset, world: World, say: Callable[[str], None]
) -> Callable[[Tensor], np.ndarray]:
    """(B, C, H, W) in the network's units => (B, H', W', 1 or 3) uint8."""
    pixels = isinstance(dataset, Digits) or (isinstance(dataset, FileDataset) and dataset.kind == "pixels")
    if pixels:
        if options.eval_vae is not None:
            raise ValueError(f"eval_vae {options.eval_vae} is for latents, but {data} holds pictures: leave it out")
        return dataset.to_images
    if options.eval_vae is None:
        raise ValueError(
            f"eval_every {options.eval_every}: {data} holds latents, and pictures are measured: name a folder of "
            "diffusers' AutoencoderKL with --eval-vae"
        )
    units = dataset.vae_units
    decoder = Decoder(options.eval_vae, world.device, torch.float32, units, batch=DECODED_AT_ONCE)
    decoder.shape(dataset.shape)
    if units is None:
        say(f"eval_vae: {data} does not say how its latents were scaled: taken as times the VAE's own scaling factor")
    return decoder.pictures


class PictureMeasure:
    """FID and its relatives.

    Args:
        network: on the processes' device.
        metrics: out of PICTURE_METRICS.
        to_pictures: from the network's units to (B, H, W, 1 or 3) uint8.
        world: the processes.
    """

    def __init__(
        self,
        network: InceptionNetwork,
        metrics: tuple[str, ...],
        to_pictures: Callable[[Tensor], np.ndarray],
        world: World,
    ) -> None:
        self.network, self.metrics, self.to_pictures, self.world = network, metrics, to_pictures, world
        self.reference = Reference()
        self._pending: ReferencePictures | None = None

    def read_reference(self, path: Path, inception_crc32: int) -> None:
        """Take what a file holds; what its pictures must be asked for waits for the first evaluation.

        Raises:
            ValueError: see `evaluation.reference.read_reference`; or its covariance is none.
        """
        self.reference, missing = read_reference(path, self.metrics, inception_crc32)
        if missing != Wanted():
            self._pending = ReferencePictures(self, open_images(path), missing)
        try:
            self.world.first(self.reference.check)  # which decomposes it, for the process that computes distances
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def prepare(self) -> ReferencePictures | None:
        """See `Measure`."""
        return self._pending

    def complete(self, summary: Summary) -> None:
        """Take what the reference's pictures gave."""
        self.reference, self._pending = complete(self.reference, summary), None

    def begin(self, total: int) -> PictureSums:
        """See `Measure`."""
        return PictureSums(self, total)


class PictureSums:
    """Sums of `PictureMeasure`."""

    def __init__(self, of: PictureMeasure, total: int) -> None:
        self._of = of
        self._sums = ImageSums(total, of.network, wanted_of_samples(of.metrics), of.world.device)

    def add(self, images: Tensor, ids: Tensor, labels: Tensor | None) -> None:
        """See `Sums`."""
        del labels
        for part, numbers in zip(images.split(PICTURES_PER_CALL), ids.split(PICTURES_PER_CALL), strict=True):
            pictures = torch.from_numpy(self._of.to_pictures(part))
            self._sums.add(pictures.expand(-1, -1, -1, 3), numbers)

    def values(self) -> dict[str, float]:
        """See `Sums`."""
        of = self._of
        summary = self._sums.joined(of.world)
        return measure(summary, of.reference, of.metrics, device=of.world.device, group=of.world)


class ReferencePictures:
    """Pictures of a reference that holds no statistics of them, whose features all processes compute together.

    Args:
        of: what is to be completed.
        pictures: (H, W, 3) uint8.
        wanted: what of them.
    """

    def __init__(self, of: PictureMeasure, pictures: Rows, wanted: Wanted) -> None:
        self._of, self._pictures, self._wanted = of, pictures, wanted
        self.total = len(pictures)
        self._sums: ImageSums | None = None

    def work(self, progress: Progress) -> bool:
        """This process's part; true at its end."""
        self._sums = ImageSums(self.total, self._of.network, self._wanted, self._of.world.device)
        for indices in own_batches(self.total, PICTURES_PER_CALL, self._of.world):
            self._sums.add(self._pictures.take(indices), indices)
            progress(len(indices))
        return True

    def join(self) -> bool:
        """Once it is done in all processes, which must all call it; true at its end."""
        assert self._sums is not None
        self._of.complete(self._sums.joined(self._of.world))
        return True
