"""The instrument: which calls are timed, what is counted, what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import harness
from bench.benchmarks import benchmark_names, load_benchmark
from bench.device import Ceilings, commit
from bench.harness import Case, Measurement, make_rows, measure, run_cases
from bench.timing import CudaClock, HostClock, Timing, interleave, ratio, spread, summarize

CEILINGS = Ceilings(copy_bytes_per_s=1e9, matmul_flops_per_s={"float32": 1e12})


def square_case(**options: Any) -> Case:
    def eager(x: Tensor) -> Tensor:
        return torch.exp(x).mul(2.0)

    defaults: dict[str, Any] = {
        "name": "4x3 float32",
        "fields": {"shape": [4, 3], "dtype": torch.float32},
        "make_inputs": lambda i: (torch.full((4, 3), float(i), requires_grad=True),),
        "sides": {"eager": eager, "fused": lambda x: 2 * torch.exp(x), "other": eager},
        "bytes": {"forward": 100, "backward": 200},
        "compile": False,
    }
    return Case(**(defaults | options))


def test_interleaving_calls_every_side_in_every_round_beginning_with_another() -> None:
    calls: list[tuple[str, int]] = []

    def side(name: str):
        return lambda i: lambda: calls.append((name, i))

    timings = interleave({name: side(name) for name in "ab"}, rounds=2, warmup=1, device="cpu")
    assert calls == [("a", 0), ("b", 1), ("b", 2), ("a", 3), ("a", 4), ("b", 5)]
    assert all(timing.rounds == 2 and timing.p20_ms <= timing.p50_ms <= timing.p80_ms for timing in timings.values())


def test_only_the_call_itself_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: next(now))
    prepared = []
    timings = interleave({"a": lambda i: prepared.append(next(now)) or (lambda: None)}, rounds=3, device="cpu")
    assert timings["a"].p50_ms == 1e3  # one tick a call; preparing took another, which does not count
    assert len(prepared) == 6


def test_a_gpu_is_timed_by_events_behind_a_flush_and_a_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append(self)

        def elapsed_time(self, end: Event) -> float:
            return float(queue.index(end) - queue.index(self))

    now = iter([0.0, 3.0, 10.0, 10.004, 20.0, 20.001])
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: next(now))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append(cycles))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = CudaClock(torch.ones(4))
    for _ in range(3):
        clock.call(lambda: queue.append("work"))
    assert not clock.flush.any()
    assert [entry for entry in queue if not isinstance(entry, Event)] == [
        *(400_000, "work"),  # nothing is known of the host yet
        *(40_000_000, "work"),  # the first call compiled for three seconds
        *(pytest.approx(12_000_000, abs=1), "work"),  # the second took 4 ms
    ]
    timing = clock.timing(warmup=1)
    assert (timing.p50_ms, timing.rounds) == (2.0, 2)  # between its events there is the work alone
    assert timing.host_ms == pytest.approx(2.5)


def test_quantiles_ratios_and_spread() -> None:
    assert summarize([1, 2, 3, 4, 5, 6]) == Timing(p20_ms=2.0, p50_ms=3.5, p80_ms=5.0, rounds=6)
    slow = Timing(p20_ms=8, p50_ms=10, p80_ms=12, rounds=5)
    fast = Timing(p20_ms=1, p50_ms=2, p80_ms=4, rounds=5)
    assert ratio(slow, fast) == {"median": 5.0, "low": 2.0, "high": 12.0}
    assert spread([slow, fast]) == pytest.approx((0.4 + 1.5) / 2)
    clock = HostClock()
    clock.calls_ms = [100.0, 1.0, 1.0]
    assert clock.timing(warmup=1).p80_ms == 1.0


def test_passes_and_their_traffic() -> None:
    case = square_case()
    assert case.all_passes() == ("forward", "backward", "both")
    assert [case.work(kind, case.bytes) for kind in case.all_passes()] == [100, 200, 300]
    assert square_case(bytes={"both": 250}).work("both", {"both": 250}) == 250
    assert square_case(passes=("forward",)).all_passes() == ("forward",)
    assert square_case(passes=("both",)).all_passes() == ("both",)
    with pytest.raises(ValueError, match="choose from forward, backward, both"):
        square_case(passes=("sideways",)).all_passes()


def test_each_pass_does_its_work_on_rotating_inputs() -> None:
    run = Measurement(square_case(), "cpu", compiled=False)
    assert len(run.sets) == harness.MAX_SETS  # twelve numbers fill no cache
    forward = [run.prepare("eager", "forward")(i)() for i in (0, 1, harness.MAX_SETS)]
    assert [float(out[0, 0].detach()) for out in forward] == pytest.approx([2.0, 2 * math.e, 2.0])  # type: ignore  # a pass may return anything
    (gradient,) = run.prepare("eager", "both")(1)()  # type: ignore  # a pass may return anything
    (again,) = run.prepare("fused", "backward")(1)()  # type: ignore  # a pass may return anything
    torch.testing.assert_close(gradient, again)
    torch.testing.assert_close(gradient / run._derivatives[1][1][0], torch.full((4, 3), 2 * math.e))
    assert run.peak_bytes("eager", "forward") is None  # a CPU does not say


def test_a_loss_is_differentiated_by_one() -> None:
    case = square_case(sides=dict.fromkeys(("eager", "fused"), lambda x: (3 * x).sum()))
    (gradient,) = Measurement(case, "cpu", compiled=False).prepare("eager", "both")(0)()  # type: ignore  # a pass may return anything
    assert torch.equal(gradient, torch.full((4, 3), 3.0))


def test_memory_kept_for_backward_counts_neither_inputs_nor_outputs_nor_parameters() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 3))
    sides = {
        "eager": lambda x: torch.exp(x).sin(),  # sin keeps exp(x)
        "fused": lambda x: torch.exp(x),  # keeps its output
        "weights": lambda x: x @ weight,
    }
    run = Measurement(square_case(sides=sides), "cpu", compiled=False)
    assert [run.kept_bytes(side) for side in sides] == [48, 0, 0]


def test_rows_compare_each_side_with_the_fused_side_of_its_own_run() -> None:
    def timing(m: float) -> Timing:
        return Timing(p20_ms=m, p50_ms=m, p80_ms=m, rounds=3)

    def run(alone: dict[str, Timing], **milliseconds: float) -> dict[str, Any]:
        timings = {side: timing(m) for side, m in milliseconds.items()}
        return {
            "timings": {"forward": timings},
            "peak_bytes": {"forward": {"eager": 7, "fused": None}},
            "kept_bytes": {},
            "failed": {},
            "alone": alone,
        }

    case = square_case(passes=("forward",), bytes={"forward": 10**6}, flops={"forward": 3 * 10**9})
    first, second = run({"forward": timing(3.5)}, eager=8.0, fused=4.0), run({}, compile=9.0, fused=3.0)
    (row,) = make_rows(case, [first, second], CEILINGS)
    assert row["timings"][0]["alone"]["p50_ms"] == 3.5
    assert "alone" not in row["timings"][1]
    assert {side: r["median"] for side, r in row["over"].items()} == {"eager": 2.0, "compile": 3.0}
    assert row["share"] == pytest.approx(3 / 4)  # 3 ms of operations, 1 ms of bytes
    assert (row["bytes_per_s"], row["flops_per_s"]) == (pytest.approx(2.5e8), pytest.approx(7.5e11))
    assert row["peak_bytes"] == {"eager": 7}
    assert row["fields"] == {"shape": [4, 3], "dtype": "float32"}
    assert "backend" not in row
    json.dumps(row)
    assert make_rows(case, [first, second], None)[0]["share"] is None
    half = square_case(passes=("forward",), bytes={"forward": 10**6}, fields={"dtype": "float16"})
    assert make_rows(half, [first], CEILINGS)[0]["share"] == pytest.approx(1 / 4)  # bytes have no dtype
    half = square_case(passes=("forward",), bytes={"forward": 1}, flops={"forward": 1}, fields={"dtype": "float16"})
    assert make_rows(half, [first], CEILINGS)[0]["share"] is None  # there is no rate of float16 products


def test_the_fused_side_is_also_timed_alone_and_elements_become_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    case = square_case(fields={"dtype": "float32", "elements": 12}, backend="reference")
    result = measure(case, "cpu", 2, compiled=False)
    assert set(result["alone"]) == {"forward", "backward", "both"}
    assert set(result["timings"]["both"]) == {"eager", "fused", "other"}
    assert measure(case, "cpu", 2, compiled=True)["alone"] == {}
    row = make_rows(case, [result], CEILINGS)[0]
    assert set(row["over"]) == {"eager", "other"}
    row["timings"][0]["fused"]["p50_ms"], row["timings"][0]["alone"]["p50_ms"] = 1e-6, 5e-7
    harness.print_row(row)
    text = capsys.readouterr().out
    assert "alone     0.000 ms" in text
    assert "12,000 (alone 24,000) million elements/s" in text
    assert "by reference (no compiled code on this device)" in text


def test_optional_sides_that_fail_are_named_and_left_out_and_the_fused_one_must_not() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel\nand more")

    sides = dict(square_case().sides)
    result = measure(square_case(sides=sides | {"other": broken}), "cpu", 2, compiled=False)
    assert result["failed"] == {"other": "RuntimeError: no such kernel"}
    assert set(result["timings"]["both"]) == {"eager", "fused"}
    with pytest.raises(RuntimeError, match="fused: RuntimeError: no such kernel"):
        measure(square_case(sides=sides | {"fused": broken}), "cpu", 2, compiled=False)
    with pytest.raises(ValueError, match="no side called fused"):
        measure(square_case(sides={"eager": broken}), "cpu", 2, compiled=False)


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    yield square_case()
    yield square_case(name="broken", sides=dict.fromkeys(("eager", "fused"), lambda x: x.no_such_method()))


def test_a_run_writes_what_it_has_and_says_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "default_device", lambda: "cpu")
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: CEILINGS)
    arguments = ["--rounds", "2", "--results", str(tmp_path)]
    with pytest.raises(SystemExit, match="broken: eager: AttributeError"):
        run_cases("square", cases, "doc", arguments)
    (path,) = tmp_path.glob("*/square.json")
    result = json.loads(path.read_text())
    assert (result["op"], result["complete"], len(result["rows"])) == ("square", False, 3)
    assert {"device", "threads", "torch", "triton", "python", "date", "commit"} <= result["environment"].keys()
    path.unlink()
    rows = run_cases("square", cases, "doc", [*arguments, "--only", "4x3"])
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"]
    assert not path.exists()  # a part is no result
    assert "x other" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no case of square has 'cubic'"):
        run_cases("square", cases, "doc", [*arguments, "--only", "cubic"])


def good_cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    yield square_case()


def test_a_full_run_is_replaced_by_another_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "default_device", lambda: "cpu")
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(harness, "DEFAULT_ROUNDS", 2)
    arguments = ["--results", str(tmp_path), "--rounds"]
    run_cases("square", good_cases, "doc", [*arguments, "1"])  # nothing is there yet
    (path,) = tmp_path.glob("*/square.json")
    assert json.loads(path.read_text())["missing"] == ["1 of 2 rounds"]
    run_cases("square", good_cases, "doc", [*arguments, "2"])
    full = path.read_text()
    assert json.loads(full)["complete"]
    for lacking, words in (
        (["1"], "1 of 2 rounds"),
        (["2", "--no-compile"], "torch.compile"),
        (["2", "--dtypes", "float32"], "bfloat16"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_cases("square", good_cases, "doc", [*arguments, *lacking])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert f"would lack {words}: say --no-save, --results FOLDER or --overwrite" in message
    with pytest.raises(SystemExit, match="broken: eager"):
        run_cases("square", cases, "doc", [*arguments, "2"])  # a case fails: the rest is kept beside it
    assert path.read_text() == full
    partial = path.with_name("square.partial.json")
    assert not json.loads(partial.read_text())["complete"]
    run_cases("square", good_cases, "doc", [*arguments, "2"])
    assert not partial.exists()
    run_cases("square", good_cases, "doc", [*arguments, "1", "--overwrite"])
    assert not json.loads(path.read_text())["complete"]


def test_a_quick_run_says_nothing_of_ceilings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "measure_ceilings", lambda device: pytest.fail("not in a quick run"))
    (row, *_) = run_cases("square", good_cases, "doc", ["--quick", "--no-compile"])
    assert row["share"] is None
    text = capsys.readouterr().out
    assert "does it run?" in text
    assert "%" not in text
    assert "FLOP/s" not in text


@pytest.mark.parametrize("value", ["0", "-3", "some"])
def test_rounds_are_counted_from_one(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cases("square", good_cases, "doc", ["--rounds", value])
    assert stop.value.code == 2
    assert "--rounds: must be " in capsys.readouterr().err


def test_ceilings_that_were_not_measured_are_said() -> None:
    assert harness._describe(CEILINGS, ["float32", "float16"]).endswith(
        "float32 1; not measured for float16: no share of the ceiling where those products matter"
    )
    assert "not measured" not in harness._describe(CEILINGS, ["float32"])


def test_the_commit_can_be_given_where_there_is_no_history(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERDFAST_COMMIT", "abc")
    assert commit() == "abc"


@pytest.mark.parametrize("name", benchmark_names())
def test_every_benchmark_is_one(name: str) -> None:
    benchmark = load_benchmark(name)
    assert name == f"bench.bench_{benchmark.OP}"
    found = list(benchmark.cases("cpu", [torch.float32, torch.bfloat16]))
    assert found
    assert len({case.name for case in found}) == len(found)
    for case in found:
        assert {"eager", "fused"} <= case.sides.keys()
        assert "dtype" in case.fields
        assert all(case.work(kind, case.bytes) > 0 for kind in case.all_passes())
        json.dumps({key: harness._plain(value) for key, value in case.fields.items()})
