"""The digits report: what real digits, noise and wrong labels must score."""

import pytest
import torch
from torch import Tensor

from erdfast.evaluation.digits import digits_report, load_real_digits, real_halves_distance, recognised_share

REAL, LABELS = load_real_digits()


def real_digits(labels: Tensor, cfg_scale: float) -> Tensor:
    """Real digits of the classes asked for."""
    del cfg_scale
    by_class = [REAL[c == LABELS] for c in range(10)]
    return torch.stack([by_class[int(c)][(i // 10) % len(by_class[int(c)])] for i, c in enumerate(labels)])


def test_real_digits_are_as_trained_on() -> None:
    assert REAL.shape == (1797, 1, 8, 8)
    assert REAL.dtype == torch.float32
    assert (float(REAL.min()), float(REAL.max())) == (-1.0, 1.0)
    assert LABELS.shape == (1797,)
    assert LABELS.unique().tolist() == list(range(10))


def test_halves_of_the_real_digits() -> None:
    """The figure on record for this scale of pixels."""
    assert real_halves_distance(REAL) == pytest.approx(0.28, abs=0.01)


def test_report_on_real_digits() -> None:
    asked: list[tuple[int, float]] = []

    def sample_digits(labels: Tensor, cfg_scale: float) -> Tensor:
        asked.append((len(labels), cfg_scale))
        return real_digits(labels, cfg_scale)

    report = digits_report(sample_digits)
    assert asked == [(1797, 1.0), (500, 2.0)]
    assert report.frechet_distance < 0.02  # the same images but for a few repeated ones
    assert report.label_accuracy > 0.98
    assert (report.num_unguided, report.num_guided, report.cfg_scale) == (1797, 500, 2.0)


def test_report_tells_noise_and_wrong_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = digits_report(
        lambda labels, _: torch.randn(len(labels), 1, 8, 8, generator=generator),
        num_unguided=200,
        num_guided=50,
    )
    assert noise.frechet_distance > 5.0
    assert noise.label_accuracy < 0.3
    assert recognised_share(REAL[:200], (LABELS[:200] + 1) % 10) < 0.05


def test_classes_come_equally_often() -> None:
    counts: list[list[int]] = []

    def sample_digits(labels: Tensor, cfg_scale: float) -> Tensor:
        counts.append(labels.bincount(minlength=10).tolist())
        return real_digits(labels, cfg_scale)

    digits_report(sample_digits, num_unguided=100, num_guided=20)
    assert counts == [[10] * 10, [2] * 10]


def test_bad_samples() -> None:
    with pytest.raises(ValueError, match=r"\(1797, 1, 8, 8\)"):
        digits_report(lambda labels, _: torch.zeros(len(labels), 8, 8))
    with pytest.raises(ValueError, match="diverged"):
        digits_report(lambda labels, _: torch.full((len(labels), 1, 8, 8), float("nan")))
    with pytest.raises(ValueError, match="at least 2"):
        digits_report(real_digits, num_unguided=1)
