"""fp32, bf16, fp16 or fp8: what the hardware does well, autocast, and the loss scale."""

from __future__ import annotations

import contextlib
import itertools
from typing import NamedTuple

import torch

from erdfast.ops.fp8_linear import fp8_reason

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


class PrecisionPolicy(NamedTuple):
    """How the network computes. Weights, optimiser and averages are float32 always."""

    name: str
    """fp32, bf16, fp16 or fp8."""
    device_type: str
    """cpu or cuda."""
    fp8_backend: str | None = None
    """fp8: the back end of `erdfast.ops.fp8_linear`."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix products; in fp8 of those that are not in float8."""
        return _DTYPES[self.name]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """For torch.autocast; None in fp32."""
        return None if self.name == "fp32" else self.dtype

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network runs."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.autocast_dtype)


def resolve_precision(name: str, device: torch.device) -> PrecisionPolicy:
    """`auto` becomes bf16 where the hardware multiplies it natively, fp32 elsewhere.

    Raises:
        ValueError: unknown, or a precision that this device does not have.
    """
    if name != "auto" and name not in _DTYPES:
        raise ValueError(f"unknown precision {name!r}; choose from auto, {', '.join(_DTYPES)}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 is ten times slower than fp32 on a CPU; choose bf16, fp32 or auto")
    if name == "auto":
        name = "bf16" if _has_fast_bf16(device) else "fp32"
    return PrecisionPolicy(name, device.type, _fp8_backend(device) if name == "fp8" else None)


def _fp8_backend(device: torch.device) -> str:
    """Never the emulation, which is for tests: it is slower than bf16."""
    if reason := fp8_reason(device):
        raise ValueError(f"precision fp8 needs {reason}; choose bf16, fp32 or auto")
    return "scaled_mm"


def _has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Only AMD's AVX-512 BF16 outruns float32. Intel's has half its rate (4096x4096 products on two cores: 0.16 against
    # 0.31 TFLOP/s; a training step of dit_s2 takes 1.8 times as long): there AMX is what counts. Without either,
    # oneDNN converts to float32 and back.
    processor = _cpu_info()
    amd = "AuthenticAMD" in processor.get("vendor_id", "")
    return "amx_bf16" in processor.get("flags", "") or (amd and "avx512_bf16" in processor.get("flags", ""))


def _cpu_info() -> dict[str, str]:
    """What Linux says of the first processor; empty on other systems."""
    try:
        with open("/proc/cpuinfo") as stream:
            lines = itertools.takewhile(str.strip, stream)
            return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    except OSError:
        return {}
