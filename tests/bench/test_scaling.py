"""Weak scaling: times by hand, nothing to send for one GPU, and an efficiency that only falls."""

from __future__ import annotations

import pytest

from bench import scaling
from bench.scaling import FLOOR_SHARE, SIZES, floor_s, scaling_row
from erdfast import presets
from erdfast.training.gpus import GPUS
from erdfast.training.traffic import LINK_SHARE, modes_for

H2, H200 = presets.model_config("uvit_h2"), GPUS["h200"]
P = 500_832_164


def test_one_gpu_sends_nothing() -> None:
    row = scaling_row(H2, 128, H200, "none", 1, 0.25)
    assert tuple(row.sent) == (0, 0, 0)
    assert (row.communication_s, row.exposed_s, row.hidden) == (0, 0, 1)
    assert (row.step_s, row.images_per_s) == (0.25, 512)
    assert row.efficiency(row) == 1


def test_ddp_on_one_machine_by_hand() -> None:
    row = scaling_row(H2, 128, H200, "ddp", 8, 0.24)
    assert row.sent.nvlink == 2 * 7 / 8 * 4 * P
    assert row.sent.network == 0
    # 2.003 GB are 77 buckets of 25 MiB; a tree of 8 GPUs.
    latency_s = 77 * (14e-6 + 2 * 7 * 1.25e-6)
    communication_s = latency_s + 7 * P / (LINK_SHARE * 450e9)
    assert row.communication_s == pytest.approx(communication_s)
    assert row.exposed_s == pytest.approx(communication_s / 29)  # backward is long: the last block's alone
    assert row.hidden == pytest.approx(28 / 29)
    assert row.images_per_s == pytest.approx(8 * 128 / (0.24 + communication_s / 29))


def test_fast_steps_hide_less() -> None:
    long, short = (scaling_row(H2, 1, H200, "ddp", 64, compute_s) for compute_s in (0.2, 0.003))
    assert long.communication_s == short.communication_s
    assert short.exposed_s == pytest.approx(short.communication_s - 0.002 * 28 / 29)
    assert short.hidden < 0.2 < long.hidden


def test_fewer_bytes_take_less_time() -> None:
    whole, half = (scaling_row(H2, 1, H200, "ddp", 64, 0.01, gradient_bytes=size) for size in (4, 2))
    assert half.sent.nvlink == whole.sent.nvlink / 2
    assert half.step_s < whole.step_s


@pytest.mark.parametrize("mode", ["ddp", "hsdp", "fsdp"])
@pytest.mark.parametrize("compute_s", [0.005, 0.06, 0.25])
def test_efficiency_falls_with_the_number_of_gpus(mode: str, compute_s: float) -> None:
    rows = [scaling_row(H2, 32, H200, mode, gpus, compute_s) for gpus in SIZES if mode in modes_for(gpus)]
    efficiencies = [row.efficiency(rows[0]) for row in rows]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert len(set(efficiencies)) == len(rows)
    speeds = [row.images_per_s for row in rows]
    assert speeds == sorted(speeds) or mode == "fsdp"  # rings of 512 GPUs can lose more than they gain


def test_a_mode_that_one_machine_does_not_have() -> None:
    with pytest.raises(ValueError, match="parallel hsdp does not suit 8 GPUs; choose from ddp, fsdp"):
        scaling_row(H2, 32, H200, "hsdp", 8, 0.1)


def test_the_command_prints_an_aligned_table(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--model", "dit_xl2", "--device", "a100", "--batch", "32"])
    lines = capsys.readouterr().out.splitlines()
    compute_ms = 1e3 * floor_s(presets.model_config("dit_xl2"), 32, "a100") / FLOOR_SHARE
    assert lines[0] == (
        f"dit_xl2 on a100: 32 images and {compute_ms:.1f} ms a step on each GPU "
        "(assumed: the floor of bench.roofline at 60%)"
    )
    assert lines[1].startswith("model, not measured: 80% of NVLink's 300 and the network's 25 GB/s per GPU")
    table = lines[3:]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[:2] for line in table[1:]] == [
        [mode, str(gpus)] for mode in ("ddp", "hsdp", "fsdp") for gpus in SIZES if (mode, gpus) != ("hsdp", 8)
    ]
    assert table[1].endswith(" 100.0%")


def test_a_measured_step_takes_the_place_of_the_floor(capsys: pytest.CaptureFixture[str]) -> None:
    scaling.main(["--step-ms", "250", "--ddp-bf16"])
    shown = capsys.readouterr().out
    assert "uvit_h2 on h200: 128 images and 250.0 ms a step on each GPU (given)" in shown
    assert "ddp       8      1.753" in shown
    for arguments, message in (
        (["--step-ms", "0"], "--step-ms: must be above 0 and finite, not 0"),
        (["--step-ms", "nan"], "must be above 0 and finite, not nan"),
        (["--step-ms", "fast"], "must be a number, not 'fast'"),
        (["--batch", "0"], "--batch: must be at least 1, not 0"),
        (["--device", "cpu"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            scaling.main(arguments)
        assert message in capsys.readouterr().err
