import pytest
import torch

from erdfast.training import speed
from erdfast.training.speed import Speedometer, peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(speed.time, "monotonic", lambda: now[0])
    return now


def test_pauses_do_not_count(clock):
    meter = Speedometer(CPU, flops_per_image=10.0)
    clock[0] += 2.0
    meter.add(8)
    clock[0] += 50.0  # a checkpoint
    meter.pause()
    clock[0] += 2.0
    meter.add(8)
    assert meter.elapsed == 4.0
    assert meter.flops_per_s == 40.0
    assert meter.read() == 4.0
    clock[0] += 1.0
    meter.add(8)
    assert meter.read() == 8.0  # since the last reading alone
    assert meter.elapsed == 5.0


def test_nothing_done_yet(clock):
    meter = Speedometer(CPU, flops_per_image=10.0)
    assert (meter.read(), meter.flops_per_s) == (0.0, 0.0)


def test_description(clock, monkeypatch):
    record = {"images_per_s": 1234.5, "loss": 0.5}
    assert Speedometer(CPU, 1e9).describe(record) == "loss 0.5000, 1,234 images/s"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100-SXM4-80GB")
    text = Speedometer(torch.device("cuda"), 1e11).describe(record)
    assert text == "loss 0.5000, 1,234 images/s, MFU 39.6%"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda")) == peak
    assert peak_flops(CPU) is None
