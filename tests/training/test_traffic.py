"""What GPUs send, against sums by hand; links and hiding against cases that can be seen through."""

import dataclasses

import pytest

from erdfast.training import traffic
from erdfast.training.gpus import GPUS
from erdfast.training.traffic import Pass, Sent, Traffic, exposed_s, modes_for, step_traffic

MILLION = 10**6
NOTHING = Sent(0.0, 0.0, 0.0)
IDEAL = dataclasses.replace(
    GPUS["h200"],
    nvlink_bytes_per_s=100 / traffic.LINK_SHARE,
    network_bytes_per_s=10 / traffic.LINK_SHARE,
)
"""Links of 100 and 10 bytes a second, after what is lost."""


def test_modes_that_a_number_of_gpus_has() -> None:
    assert modes_for(1) == ("none",)
    assert modes_for(2) == modes_for(8) == ("ddp", "fsdp")
    assert modes_for(16) == ("ddp", "hsdp", "fsdp")


@pytest.mark.parametrize("gpus", [-8, 0, 9, 12, 100])
def test_numbers_of_gpus_that_do_not_fill_machines(gpus: int) -> None:
    with pytest.raises(ValueError, match=rf"gpus is {gpus}; it must be 1 to 8 or a multiple of 8"):
        modes_for(gpus)


def test_bytes_by_hand_on_one_machine() -> None:
    # A ring of 8 passes 7/8; all-reduce is a reduction and a gathering.
    gather, reduce = step_traffic("ddp", MILLION, 10, 8)
    assert (gather, reduce[:2]) == (NOTHING, (2 * 7 / 8 * 4e6, 0.0))
    assert step_traffic("ddp", MILLION, 10, 8, gradient_bytes=2).reduce.nvlink == 2 * 7 / 8 * 2e6
    gather, reduce = step_traffic("fsdp", MILLION, 10, 8)
    assert (gather[:2], reduce[:2]) == ((7 / 8 * 2e6, 0.0), (7 / 8 * 4e6, 0.0))
    assert step_traffic("fsdp", MILLION, 10, 8, weight_bytes=4).gather.nvlink == 7 / 8 * 4e6
    assert step_traffic("none", MILLION, 10, 1) == Traffic(NOTHING, NOTHING)


def test_bytes_by_hand_on_four_machines() -> None:
    # 31/32 of the gradients, twice; each of a machine's 8 cards carries an eighth of what leaves it.
    sent = 2 * 31 / 32 * 4e6
    assert step_traffic("ddp", MILLION, 10, 32).reduce[:2] == (sent, sent / 8)
    gather, reduce = step_traffic("fsdp", MILLION, 10, 32)
    assert gather[:2] == (31 / 32 * 2e6, 31 / 32 * 2e6 / 8)
    assert reduce[:2] == (31 / 32 * 4e6, 31 / 32 * 4e6 / 8)
    # Within a machine as fsdp on 8; across, an eighth of the gradients is summed over 4.
    gather, reduce = step_traffic("hsdp", MILLION, 10, 32)
    assert gather[:2] == (7 / 8 * 2e6, 0.0)
    assert reduce[:2] == pytest.approx((7 / 8 * 4e6, 2 * 3 / 4 * 4e6 / 8))


def test_latency_by_hand() -> None:
    gather, _ = step_traffic("fsdp", MILLION, 10, 32)  # 31 hops, 3 of them between machines
    assert gather.latency_s == pytest.approx(10 * (14e-6 + 28 * 1.9e-6 + 3 * 4e-6))
    # 4e7 bytes are two buckets; down and up a tree: 7 GPUs and 2 levels of machines.
    _, reduce = step_traffic("ddp", 10 * MILLION, 10, 32)
    assert reduce.latency_s == pytest.approx(2 * (14e-6 + 2 * (7 * 1.25e-6 + 2 * 8.5e-6)))
    gather, reduce = step_traffic("hsdp", MILLION, 10, 32)
    assert reduce.latency_s - gather.latency_s == pytest.approx(10 * (14e-6 + 2 * 2 * 8.5e-6))


def test_total_counts_two_gathers_per_micro_batch_and_one_reduction() -> None:
    both = Traffic(Sent(3.0, 1.0, 0.1), Sent(5.0, 2.0, 0.2))
    assert both.total() == pytest.approx((11.0, 4.0, 0.4))
    assert both.total(accumulation=4) == pytest.approx((29.0, 10.0, 1.0))


@pytest.mark.parametrize(("mode", "gpus"), [("none", 8), ("ddp", 1), ("hsdp", 8), ("tensor", 16)])
def test_a_mode_that_does_not_suit_is_refused(mode: str, gpus: int) -> None:
    with pytest.raises(
        ValueError, match=rf"parallel {mode} does not suit {gpus} GPUs; choose from {modes_for(gpus)[0]}"
    ):
        step_traffic(mode, MILLION, 10, gpus)


def test_the_slower_link_counts() -> None:
    assert Sent(100.0, 0.0, 0.5).seconds(IDEAL) == pytest.approx(1.5)
    assert Sent(100.0, 5.0, 0.0).seconds(IDEAL) == pytest.approx(1.0)
    assert Sent(100.0, 30.0, 0.0).seconds(IDEAL) == pytest.approx(3.0)


def test_hidden_is_what_fits_behind_the_other_blocks() -> None:
    reduce_only = Traffic(NOTHING, Sent(400.0, 0.0, 0.0))  # 4 s
    # Ten blocks: the last one's 0.4 s always remain; nine tenths of backward hide the others.
    assert exposed_s(reduce_only, IDEAL, Pass(1.0, 100.0), blocks=10) == pytest.approx(0.4)
    assert exposed_s(reduce_only, IDEAL, Pass(1.0, 2.0), blocks=10) == pytest.approx(4 - 1.8)
    assert exposed_s(reduce_only, IDEAL, Pass(1.0, 100.0), blocks=1) == pytest.approx(4.0)
    assert exposed_s(Traffic(NOTHING, NOTHING), IDEAL, Pass(1.0, 2.0), blocks=10) == 0


def test_every_micro_batch_gathers() -> None:
    both = Traffic(Sent(100.0, 0.0, 0.0), Sent(200.0, 0.0, 0.0))  # 1 s, twice a micro-batch; 2 s
    long = Pass(100.0, 200.0)
    assert exposed_s(both, IDEAL, long, blocks=10) == pytest.approx(0.1 + 0.3)
    assert exposed_s(both, IDEAL, long, blocks=10, accumulation=3) == pytest.approx(3 * 0.1 + 2 * 0.1 + 0.3)
