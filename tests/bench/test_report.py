"""README says what the committed results say."""

from bench import report
from bench.harness import Timing, interleave, ratio


def test_readme_is_rendered_from_committed_results() -> None:
    text = report.README.read_text()
    assert report.MARKED.search(text)
    assert report.render(text) == text


def test_interleaving_calls_every_side_in_every_round() -> None:
    calls: list[tuple[str, int]] = []
    timings = interleave({name: lambda i, n=name: calls.append((n, i)) for name in "ab"}, rounds=2, warmup=1)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert all(timing.rounds == 2 and timing.p20_ms <= timing.p50_ms <= timing.p80_ms for timing in timings.values())


def test_ratio_compares_quantiles_crosswise() -> None:
    slow = Timing(p20_ms=8, p50_ms=10, p80_ms=12, rounds=5)
    fast = Timing(p20_ms=1, p50_ms=2, p80_ms=4, rounds=5)
    assert ratio(slow, fast) == {"median": 5.0, "low": 2.0, "high": 12.0}
