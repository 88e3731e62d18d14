"""Inception score: published number, closed forms, groups, pieces."""

import numpy as np
import pytest
import torch

from erdfast.evaluation.inception_score import InceptionScore, inception_score
from tests.parity import load_parity


def by_definition(p: np.ndarray, split: int) -> float:
    scores = []
    for start in range(0, len(p), split):
        part = p[start : start + split]
        divergence = (part * (np.log(part) - np.log(part.mean(0)))).sum(1)
        scores.append(np.exp(divergence.mean()))
    return float(np.mean(scores))


def probabilities(count: int = 103) -> torch.Tensor:
    logits = torch.randn(count, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return logits.softmax(1)


def test_published_number():
    arrays = load_parity("metrics")
    found = inception_score(torch.from_numpy(arrays["probs"]))
    assert found == pytest.approx(float(arrays["inception_score"]), rel=1e-10)


@pytest.mark.parametrize("split", [10, 50, 5000])
def test_definition(split):
    assert inception_score(probabilities(), split) == pytest.approx(by_definition(probabilities().numpy(), split))


def test_extremes():
    assert inception_score(torch.full((9, 4), 0.25)) == pytest.approx(1.0)
    assert inception_score(torch.eye(4).repeat(3, 1)) == pytest.approx(4.0)  # 0 log 0 is 0
    assert inception_score(torch.eye(4)[:1].repeat(3, 1)) == pytest.approx(1.0)


def test_pieces_in_any_order():
    p, order = probabilities(), torch.randperm(103, generator=torch.Generator().manual_seed(1))
    score = InceptionScore(103, 7, split_size=20)
    for part in order.split(11):
        score.update(p[part], part)
    assert score.value() == pytest.approx(inception_score(p, 20), rel=1e-12)


def test_bad_input():
    score = InceptionScore(10, 7)
    with pytest.raises(ValueError, match="needs pictures"):
        score.value()
    with pytest.raises(ValueError, match=r"\(N, 7\), got \(2, 6\)"):
        score.update(torch.full((2, 6), 1 / 6), torch.arange(2))
    for wrong in (torch.randn(2, 7), torch.full((2, 7), float("nan")), torch.ones(2, 7)):
        with pytest.raises(ValueError, match="rows sum to 1"):
            score.update(wrong, torch.arange(2))
    with pytest.raises(ValueError, match="at least 1"):
        InceptionScore(0, 7)
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        inception_score(torch.zeros(3))
