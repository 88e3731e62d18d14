"""Where the time of a training step goes: kernels by class, the gaps between them, and waits of the host.

    python -m bench.profile_step --model uvit_h2 --batch 128 --side ours_compile

Some steps under torch.profiler; what a GPU did is sorted into classes by the names of kernels. `gaps` is the step's
time less that of its kernels: the host was late, or kernels waited for each other. A step is also run with PyTorch's
warnings of synchronisation on: each is a place where the host waited. Written to
bench/results/<device>/profile_<model>_<batch>_<side>.json. On a CPU the classes are PyTorch's operations.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from bench.bench_train_step import head
from bench.device import device_name
from bench.harness import RESULTS
from bench.options import at_least
from bench.step_sides import ENVIRONMENT, SIDES, Step, StepOptions, build
from bench.store import ResultFile
from erdfast import presets

CLASSES = (
    ("norm and residual", r"^triton_.*norm"),
    ("elementwise", r"^triton_"),
    ("noise and loss", r"add_noise|diffusion_loss|weighted_mean|add_partials|^_?scale_kernel"),
    ("optimiser", r"adamw|prepare_kernel|sum_squares|^norm_kernel|multi_tensor|fused_adam|foreach"),
    ("attention", r"flash|fmha|attention|sdpa"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|::addmm|::mm$|::bmm|linear|_scaled_mm"),
    ("norm and residual", r"modulated_norm|add_sample_sums|add_channel_sums|layer_norm|rms_norm"),
    ("copies", r"memcpy|memset|direct_copy|aten::copy_"),
    ("communication", r"nccl|gloo|all_reduce|all_gather|reduce_scatter"),
)
"""(class, what the name of a kernel contains), the first that fits; "elementwise" is the rest. triton_ is inductor."""
REST = "elementwise"
TOP = 12
"""Kernels that are named one by one."""


def class_of(kernel: str) -> str:
    """The class of a kernel by its name."""
    return next((name for name, pattern in CLASSES if re.search(pattern, kernel.lower())), REST)


def count_syncs(step: Step) -> list[str]:
    """Places in one step where the host waited for the GPU, as PyTorch names them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def time_step(step: Step, steps: int, device: torch.device) -> float:
    """Milliseconds of a step without the profiler."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begun) / steps


def kernel_times(step: Step, steps: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """Kernel (or operation) => milliseconds and calls of a step."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    events: EventList = profiler.key_averages()
    us = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    calls = {event.key: event.count for event in events}
    return {name: (1e-3 * spent / steps, calls[name] / steps) for name, spent in us.items() if spent > 0}


def summarize(kernels: dict[str, tuple[float, float]], step_ms: float) -> dict[str, Any]:
    """By class and one by one, in milliseconds of a step."""
    by_class: dict[str, float] = defaultdict(float)
    for name, (ms, _) in kernels.items():
        by_class[class_of(name)] += ms
    by_class["gaps"] = max(0.0, step_ms - sum(by_class.values()))
    ranked = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "ms": step_ms,
        "classes": dict(sorted(by_class.items(), key=lambda item: -item[1])),
        "launches": sum(calls for _, calls in kernels.values()),
        "top": [{"kernel": name[:160], "ms": ms, "calls": calls} for name, (ms, calls) in ranked[:TOP]],
    }


def print_summary(row: dict[str, Any]) -> None:
    """For people."""
    print(f"{row['case']} {row['side']}: {row['ms']:.1f} ms a step, {row['launches']:.0f} launches")
    for name, ms in row["classes"].items():
        print(f"  {name:20} {ms:9.2f} ms  {ms / row['ms']:6.1%}")
    for entry in row["top"]:
        print(f"    {entry['ms']:9.3f} ms {entry['calls']:6.0f}x  {entry['kernel'][:100]}")
    for place in row["host_waits"] or []:
        print(f"  the host waited at {place}")


def main(argv: Sequence[str] | None = None) -> None:
    """Profile, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dit_b2", choices=list(presets.MODELS), metavar="PRESET")
    parser.add_argument("--batch", type=at_least(1), default=128, help="images per step")
    parser.add_argument("--side", default="ours_compile", choices=[side for side in SIDES if side not in ENVIRONMENT])
    parser.add_argument("--compile", default="block", choices=["block", "full", "max-autotune"])
    parser.add_argument("--steps", type=at_least(1), default=5, help="steps under the profiler")
    parser.add_argument("--warmup", type=at_least(1), default=8, help="steps before")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--no-save", dest="save", action="store_false", help="print only")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    step = build(args.side, StepOptions(model=args.model, batch=args.batch, compile=args.compile), device)
    for _ in range(args.warmup):
        step()
    row = {"case": f"{args.model} batch {args.batch}", "side": args.side}
    row |= summarize(kernel_times(step, args.steps, device), time_step(step, args.steps, device))
    row["host_waits"] = count_syncs(step) if device.type == "cuda" else None
    print_summary(row)
    if args.save:
        described = head() | {"op": "profile_step", "compile": args.compile}
        path = args.results / device_name() / f"profile_{args.model}_{args.batch}_{args.side}.json"
        print(f"written: {ResultFile(path, missing=[], overwrite=True).write(described, [row], finished=True)}")


if __name__ == "__main__":
    main()
