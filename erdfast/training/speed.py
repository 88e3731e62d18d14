"""Images per second and model FLOP utilisation, without the time that pictures and checkpoints take."""

from __future__ import annotations

import time
from typing import Any

import torch

from .gpus import GPUS

PEAK_FLOPS: dict[str, float] = {
    # Dense bf16 by NVIDIA's data sheets.
    "A100": GPUS["a100"].flops_per_s,
    "H100 PCIe": 756e12,
    "H100": GPUS["h100"].flops_per_s,
    "H200": GPUS["h200"].flops_per_s,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU by its data sheet; None for a CPU or a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


class Speedometer:
    """Counts images over wall time.

    Args:
        device: what works.
        flops_per_image: forward and backward.
        devices: how many of them work together.
    """

    def __init__(self, device: torch.device, flops_per_image: float, devices: int = 1) -> None:
        peak = peak_flops(device)
        self.flops_per_image, self.peak = flops_per_image, None if peak is None else devices * peak
        self.elapsed = 0.0
        """Seconds of training so far, without pauses."""
        self.total_images = 0
        """Counted so far."""
        self._images = 0
        self._start = time.monotonic()
        self._window = 0.0

    def add(self, images: int) -> None:
        """Count a step, up to now."""
        now = time.monotonic()
        self._window += now - self._start
        self.elapsed += now - self._start
        self._start = now
        self._images += images
        self.total_images += images

    def pause(self) -> None:
        """What happened since the last step was not training."""
        self._start = time.monotonic()

    def read(self) -> float:
        """Images per second since the last reading."""
        rate = self._images / self._window if self._window else 0.0
        self._images, self._window = 0, 0.0
        return rate

    @property
    def flops_per_s(self) -> float:
        """Achieved over the whole run."""
        return self.total_images * self.flops_per_image / self.elapsed if self.elapsed else 0.0

    def describe(self, record: dict[str, Any]) -> str:
        """For the progress bar: loss, a learnt target, images/s and, on a known GPU, MFU."""
        rate = record["images_per_s"]
        text = f"loss {record['loss']:.4f}{_target(record)}, {_short(rate)} images/s"
        if self.peak:
            text += f", MFU {100 * rate * self.flops_per_image / self.peak:.1f}%"
        return text


def _short(rate: float) -> str:
    """1,351 or 0.28."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _target(record: dict[str, Any]) -> str:
    """As ", k 0.522", ", k 0.556 and 0.509" or ", k 0.310 to 0.560"; nothing for a fixed target."""
    for names, between in ((("k0", "k1"), " and "), (("k_min", "k_max"), " to "), (("k",), "")):
        if all(name in record for name in names):
            return ", k " + between.join(f"{record[name]:.3f}" for name in names)
    return ""
