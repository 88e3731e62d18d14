"""From files to rows of a comparison: pictures by way of the Inception network, or features as stored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from erdfast.data.rows import Rows
from erdfast.group import ALONE, Group
from erdfast.tensor_files import checksum

from .comparison import Row
from .digits import KnownDigits, load_real_digits, recognised_share
from .digits_files import open_digits
from .features import Progress, Summary, Wanted, summarise_features, summarise_images
from .files import open_arrays, open_features, open_images, read_array
from .frechet import FeatureStatistics, Gaussian
from .inception_weights import load_inception
from .measure import measure, wanted_of_samples, warnings_of
from .precision_recall import precision_recall
from .reference import Reference, complete, read_reference, save_reference

OpenProgress = Callable[[str, int], contextlib.AbstractContextManager[Progress]]
"""(what, number of samples) -> a progress bar that is told how many more are done."""
Warn = Callable[[str], object]


@contextlib.contextmanager
def silent(_what: str, _total: int) -> Iterator[Progress]:
    """No bar."""
    yield lambda _more: None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How to measure files."""

    batch_size: int = 64
    """Pictures at a time, in each process."""
    device: torch.device
    group: Group = ALONE
    progress: OpenProgress = silent
    warn: Warn = lambda _line: None
    """Is told about too few samples."""

    def pictures(
        self,
        samples: Sequence[Path],
        reference: Path | None,
        inception: Path,
        metrics: tuple[str, ...],
        save: Path | None = None,
    ) -> list[Row]:
        """Metrics of files of pictures; every file is opened and checked before the work begins.

        Args:
            samples: see `files.open_images`; none where only the reference is to be saved.
            reference: see `reference.read_reference`; not needed for the Inception score alone.
            inception: the weights.
            metrics: of PICTURE_METRICS.
            save: where to write the reference, once it is complete.

        Raises:
            ValueError: naming a file and what is wrong with it.
        """
        pictures = [open_images(path) for path in samples]
        known, missing = Reference(), Wanted()
        crc32 = checksum(inception) if inception.is_file() else 0
        if reference is not None:
            known, missing = read_reference(reference, metrics, crc32)
        asked = missing != Wanted()
        its_pictures = open_images(reference) if reference is not None and asked else None
        network = load_inception(inception, self.device)

        def summarise(path: Path, images: Rows, wanted: Wanted) -> Summary:
            options = {"batch_size": self.batch_size, "device": self.device, "group": self.group}
            with _named(path), self.progress(path.name, len(images)) as progress:
                summary = summarise_images(images, network, wanted, **options, progress=progress)
            for line in warnings_of(summary):
                self.warn(f"{path}: {line}")
            return summary

        if reference is not None and its_pictures is not None:
            known = complete(known, summarise(reference, its_pictures, missing))
        if reference is not None and self.group.rank == 0:
            with _named(reference):
                known.check()
            if save is not None:
                save_reference(save, known, crc32)
        rows = []
        for path, images in zip(samples, pictures, strict=True):
            summary = summarise(path, images, wanted_of_samples(metrics))
            with _named(path):
                values = measure(summary, known, metrics, device=self.device, group=self.group)
            rows.append(Row(file=path, count=summary.count, values=values))
        return rows

    def features(self, samples: Sequence[Path], reference: Path, metrics: Sequence[str] = ("fd",)) -> list[Row]:
        """Frechet distances (fd), precision and recall between files or folders of features.

        Args:
            samples: see `files.open_features`.
            reference: the same; for fd alone also an .npz with `mu` and `sigma`.
            metrics: of KINDS["features"].

        Raises:
            ValueError: naming a file and what is wrong with it, also where the number of features differs.
        """
        opened = [open_features(path) for path in samples]
        wants_all = "precision" in metrics or "recall" in metrics
        theirs = self._all_features(reference, open_features(reference)) if wants_all else None
        known = self._feature_statistics(reference) if "fd" in metrics else None
        with _named(reference):
            _ = known and known.factor  # which checks it, before the samples are read
        rows = []
        for path, features in zip(samples, opened, strict=True):
            values: dict[str, float] = {}
            if known is not None:
                gaussian = self._summarise_features(path, features)
                with _named(path):
                    values["fd"] = gaussian.distance(known)
            if theirs is not None:
                values |= self._shares(path, self._all_features(path, features), theirs)
            rows.append(Row(file=path, count=len(features), values={name: values[name] for name in metrics}))
        return rows

    def digits(self, samples: Sequence[Path], metrics: Sequence[str]) -> list[Row]:
        """Pictures of digits against the real ones of scikit-learn; their features are the 64 pixels in [-1, 1].

        Args:
            samples: .npz files with `arr_0`, (N, 8, 8, 3), and for accuracy `arr_1`.
            metrics: of KINDS["digits"].

        Raises:
            ValueError: naming a file and what is wrong with it. ImportError: without scikit-learn.
        """
        opened = [open_digits(path, labelled="accuracy" in metrics) for path in samples]
        known = KnownDigits()
        theirs = known.features(load_real_digits()[0])
        rows = []
        for path, (images, labels) in zip(samples, opened, strict=True):
            values: dict[str, float] = {}
            with _named(path):
                if "fd" in metrics:
                    values["fd"] = FeatureStatistics.of(images).gaussian().distance(known.gaussian)
                if labels is not None:
                    values["accuracy"] = recognised_share(images, labels)
            if "precision" in metrics or "recall" in metrics:
                values |= self._shares(path, known.features(images), theirs)
            rows.append(Row(file=path, count=len(images), values={name: values[name] for name in metrics}))
        return rows

    def _all_features(self, path: Path, rows: Rows) -> Tensor:
        """(N, D) float32, on the CPU."""
        with _named(path):
            return rows.take(torch.arange(len(rows))).flatten(1).float()

    def _shares(self, path: Path, ours: Tensor, theirs: Tensor) -> dict[str, float]:
        with _named(path):
            shares = precision_recall(ours.to(self.device), theirs.to(self.device), group=self.group)
        return shares._asdict()

    def _feature_statistics(self, path: Path) -> Gaussian:
        if path.suffix == ".npz" and path.is_file():
            arrays = open_arrays(path)
            if "mu" in arrays and "sigma" in arrays:
                mu = read_array(path, arrays, "mu", (None,)).double()
                sigma = read_array(path, arrays, "sigma", (len(mu), len(mu))).double()
                return Gaussian(mu, sigma)
        return self._summarise_features(path, open_features(path))

    def _summarise_features(self, path: Path, features: Rows) -> Gaussian:
        with _named(path), self.progress(path.name, len(features)) as progress:
            gaussian = summarise_features(features, device=self.device, group=self.group, progress=progress)
        if gaussian.warning:
            self.warn(f"{path}: FD: {gaussian.warning}")
        return gaussian


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors about what lies in a file begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
