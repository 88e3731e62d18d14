"""GPUs by their data sheets, and how much of them published training runs have used."""

from __future__ import annotations

from dataclasses import dataclass

GPUS_PER_MACHINE = 8
"""Joined by NVLink, each with a network card of its own: DGX and HGX machines of all three kinds."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a GPU can do at most, and the share that is assumed."""

    name: str
    memory_bytes: int
    """As sold; the driver keeps about 1%."""
    flops_per_s: float
    """Dense bf16 and fp16 products."""
    fp32_flops_per_s: float
    """float32 without tensor cores: TF32 is off in this package."""
    bytes_per_s: float
    """Memory, read and written."""
    multiprocessors: int
    has_fp8: bool
    """Whether its tensor cores multiply float8."""
    nvlink_bytes_per_s: float
    """To the other GPUs of its machine, one way: half of what data sheets give for both."""
    network_bytes_per_s: float
    """Its network card's, one way: 200 Gbit/s in a DGX A100, 400 in a DGX H100 and H200."""
    mfu: float
    """Model FLOP utilisation that is assumed: the best that was published for a diffusion transformer."""
    mfu_source: str


_A100_RUN = "U-ViT-H/2's authors, fp16, 128 images per GPU: 146 images/s"
_HOPPER_RUN = "LightningDiT-XL/1's authors, bf16, compiled, 8 H800: about 284 images/s per GPU"

# fmt: off
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in (
    Gpu(name="a100", memory_bytes=80 << 30,  flops_per_s=312e12, fp32_flops_per_s=19.5e12, bytes_per_s=2.04e12,
        multiprocessors=108, has_fp8=False,
        nvlink_bytes_per_s=300e9, network_bytes_per_s=25e9, mfu=0.374, mfu_source=_A100_RUN),
    Gpu(name="h100", memory_bytes=80 << 30,  flops_per_s=989e12, fp32_flops_per_s=67e12,   bytes_per_s=3.35e12,
        multiprocessors=132, has_fp8=True,
        nvlink_bytes_per_s=450e9, network_bytes_per_s=50e9, mfu=0.205, mfu_source=_HOPPER_RUN),
    Gpu(name="h200", memory_bytes=141 << 30, flops_per_s=989e12, fp32_flops_per_s=67e12,   bytes_per_s=4.8e12,
        multiprocessors=132, has_fp8=True,
        nvlink_bytes_per_s=450e9, network_bytes_per_s=50e9, mfu=0.205, mfu_source=_HOPPER_RUN),
)}
# fmt: on
"""SXM modules by name."""
