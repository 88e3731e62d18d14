import builtins
import io

import pytest
import torch

from erdfast.training import precision
from erdfast.training.precision import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype", "autocast"),
    [("fp32", torch.float32, None), ("bf16", torch.bfloat16, torch.bfloat16)],
)
def test_what_a_cpu_can_do(name, dtype, autocast):
    policy = resolve_precision(name, CPU)
    assert (policy.name, policy.dtype, policy.autocast_dtype) == (name, dtype, autocast)
    a = torch.ones(2, 2)
    with policy.autocast():
        assert (a @ a).dtype == dtype


@pytest.mark.parametrize(
    ("vendor", "flags", "chosen"),
    [
        ("AuthenticAMD", "fpu avx2 avx512f avx512_bf16", "bf16"),
        ("GenuineIntel", "fpu avx2 avx512f avx512_bf16", "fp32"),
        ("GenuineIntel", "fpu avx512_bf16 amx_tile amx_bf16", "bf16"),
        ("AuthenticAMD", "fpu avx2 avx512f", "fp32"),
        (None, None, "fp32"),
    ],
)
def test_auto_asks_the_processor(monkeypatch, vendor, flags, chosen):
    info = {"vendor_id": vendor, "flags": flags} if vendor else {}
    monkeypatch.setattr(precision, "_cpu_info", lambda: info)
    assert resolve_precision("auto", CPU).name == chosen


def test_a_system_without_cpuinfo(monkeypatch):
    def missing(path, *_args, **_options):
        raise FileNotFoundError(path)

    monkeypatch.setattr(builtins, "open", missing)
    assert precision._cpu_info() == {}
    text = "model name\t: x\nflags\t\t: fpu\n\nmodel name\t: x\nflags\t\t: other\n"
    monkeypatch.setattr(builtins, "open", lambda *_args: io.StringIO(text))
    assert precision._cpu_info() == {"model name": "x", "flags": "fpu"}


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_asks_the_gpu(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    policy = resolve_precision("auto", torch.device("cuda"))
    assert (policy.name, policy.device_type) == (chosen, "cuda")


def test_fp16_is_for_gpus():
    assert resolve_precision("fp16", torch.device("cuda")).autocast_dtype == torch.float16
    with pytest.raises(ValueError, match=r"fp16 is ten times slower than fp32 on a CPU; choose bf16, fp32 or auto"):
        resolve_precision("fp16", CPU)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown precision 'int8'; choose from auto, fp32, bf16, fp16, fp8"):
        resolve_precision("int8", CPU)
