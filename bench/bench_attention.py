"""Attention: PyTorch's choice ("eager") beside the op and every other back end that can serve the shape.

"fused" is kernels/attention.py where there is a GPU and numbers have 16 bits, elsewhere what the op runs by default.

    python -m bench.bench_attention                 prints a table and writes bench/results/<device>/attention.json
    python -m bench.bench_attention --save-table    times all back ends and writes what `auto` takes from then on, for
                                                    this user (erdfast/ops/attention_table.py); options: --shapes
                                                    16x258x72 ..., --batch, --dtypes, --rounds, and --out
                                                    erdfast/ops/attention_table.json for rows that are to be committed
    python -m bench.bench_attention --sweep         times other tiles of our own kernels (GPU; minutes for each shape)
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.device import default_device
from bench.harness import Case, run_cases
from bench.options import at_least
from bench.store import one_line
from bench.timing import interleave
from erdfast.atomic import write_text
from erdfast.ops import attention_table
from erdfast.ops.attention import ATTENTION_BACKENDS, attention, attention_reason, attention_reference

OP = "attention"


class Shape(NamedTuple):
    """Self-attention of `tokens` by heads of `width`."""

    heads: int
    tokens: int
    width: int


SHAPES = (
    Shape(16, 258, 72),  # U-ViT-H
    Shape(16, 256, 72),  # DiT-XL
    Shape(16, 258, 64),  # U-ViT-L
    Shape(12, 256, 64),  # DiT-B
    Shape(4, 18, 32),  # digits
)
BATCH = {"cuda": 128, "cpu": 8}
MARGIN = 0.97
"""A back end must take less than this share of PyTorch's own choice to be named in the table: less is noise."""


def random_inputs(i: int, batch: int, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as (B, H, L, K), in memory as the projections write them: (B, L, H, K)."""
    size = (batch, shape.tokens, shape.heads, shape.width)
    q, k, v = (torch.randn(size, device=device).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    return q, k, v


def available(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Callable[..., Tensor]]:
    """Every back end that can serve the shape, "auto" being PyTorch's own choice."""
    inputs = random_inputs(0, 1, shape, dtype, device)
    left_out = ("auto", "reference") if device == "cuda" else ("auto", "reference", "triton")
    names = [name for name in ATTENTION_BACKENDS if name not in left_out]
    served = [name for name in names if attention_reason(name, *inputs) is None]
    return {"auto": F.scaled_dot_product_attention} | {name: partial(attention, backend=name) for name in served}


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """The presets' shapes in each dtype."""
    for shape in SHAPES:
        for dtype in dtypes:
            yield make_case(shape, dtype, device)


def make_case(shape: Shape, dtype: torch.dtype, device: str) -> Case:
    """Products: two forward, and five in the least backward (ours takes seven)."""
    batch = BATCH[device]
    sides = available(shape, dtype, device)
    eager = sides.pop("auto")
    own = device == "cuda" and dtype != torch.float32
    fused = sides.pop("triton") if own else attention
    rows = batch * shape.heads * shape.tokens
    numel, products = rows * shape.width, 2 * rows * shape.tokens * shape.width
    return Case(
        name=f"{batch}x{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}",
        fields={"batch": batch, **shape._asdict(), "dtype": dtype, "fused": "triton" if own else "auto"},
        make_inputs=lambda i: random_inputs(i, batch, shape, dtype, device),
        sides={"eager": eager, "fused": fused, **sides},
        bytes={
            "forward": 4 * numel * dtype.itemsize + 4 * rows,
            "backward": 8 * numel * dtype.itemsize + 4 * rows,
        },
        flops={"forward": 2 * products, "backward": 5 * products},
        backend="triton" if own else "auto",
        compile=False,  # torch.compile leaves PyTorch's attention as it is
    )


# ---------------------------------------------------------------------------- the table of `auto`


def measured_rows(
    shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], batch: int, device: str, rounds: int
) -> list[dict[str, Any]]:
    """A row per shape, dtype and mode; of shapes that share a row, the first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for shape, dtype, mode in itertools.product(shapes, dtypes, attention_table.MODES):
        bucket = attention_table.key_bucket(shape.tokens)
        if bucket is None:
            raise SystemExit(f"{shape.tokens} keys are more than the table has buckets for")
        label = attention_table.device_label(torch.device(device))
        name = str(dtype).removeprefix("torch.")
        key = (label, name, bucket, shape.width, mode)
        if key in rows:
            continue
        ms = time_backends(shape, dtype, batch, device, rounds, training=mode == "training")
        fields = dict(zip(("device", "dtype", "keys", "head_width", "mode"), key, strict=True))
        rows[key] = fields | {
            "backend": winner(ms),
            "shape": [batch, *shape],
            "ms": {side: round(value, 4) for side, value in ms.items()},
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }
        print("  ".join([*map(str, key), "=>", rows[key]["backend"], str(rows[key]["ms"])]), flush=True)
    return list(rows.values())


def winner(ms: Mapping[str, float]) -> str:
    """The fastest, unless PyTorch's own choice ("auto") is as good."""
    best = min(ms, key=lambda side: ms[side])
    return best if ms[best] < MARGIN * ms["auto"] else "auto"


def time_backends(
    shape: Shape, dtype: torch.dtype, batch: int, device: str, rounds: int, *, training: bool
) -> dict[str, float]:
    """Median milliseconds of each back end whose values are right, forward and backward or forward alone."""
    sets = [random_inputs(i, batch, shape, dtype, device) for i in range(2)]
    gradient = torch.randn_like(sets[0][0])

    def prepare(run: Callable[..., Tensor]) -> Callable[[int], Callable[[], object]]:
        def train(i: int) -> object:
            inputs = sets[i % 2]
            return torch.autograd.grad(run(*inputs), inputs, gradient)

        def infer(i: int) -> object:
            with torch.no_grad():
                return run(*sets[i % 2])

        return lambda i: partial(train if training else infer, i)

    sides = {name: run for name, run in available(shape, dtype, device).items() if is_right(name, run, sets[0])}
    timings = interleave({name: prepare(run) for name, run in sides.items()}, rounds, device=device)
    return {name: timing.p50_ms for name, timing in timings.items()}


def is_right(name: str, run: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether a back end runs here and agrees with the formula: a fast wrong answer must not win."""
    some = [x[:1].detach().requires_grad_() for x in inputs]
    wanted = attention_reference(*some)
    upstream = torch.randn_like(wanted)
    try:
        found = run(*some)
        results = [found.detach(), *torch.autograd.grad(found, some, upstream)]
    except Exception as error:
        print(f"    {name} left out: {one_line(error)}")
        return False
    right = [wanted.detach(), *torch.autograd.grad(wanted, some, upstream)]
    tolerance = 3e-2 if found.dtype != torch.float32 else 3e-3  # TF32 may be allowed
    wrong = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(results, right, strict=True))
    if not wrong < tolerance:
        print(f"    {name} left out: off by {wrong:.2g}")
    return wrong < tolerance


def save_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace these rows in a table and keep its others."""
    kept = attention_table.read_rows(path) | {attention_table.row_key(row): dict(row) for row in rows}
    write_text(path, attention_table.render_rows(kept.values()))
    attention_table.reload()


# ---------------------------------------------------------------------------- other tiles


def sweep(shapes: Sequence[Shape], dtypes: Sequence[torch.dtype], batch: int, rounds: int) -> None:
    """Times of our own kernels, forward and backward, by the cut of the launch: what `config` should say."""
    from erdfast.kernels import attention as kernels

    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    for shape, dtype in itertools.product(shapes, dtypes):
        chosen = kernels.config(shape.width, dtype, 10 * major + minor)
        cuts = itertools.product((32, 64, 128), (32, 64, 128), (2, 4, 8), (2, 3))
        found = []
        for c in {chosen, *(kernels.Config(*cut) for cut in cuts if cut[0] >= 8 * cut[2] and cut[0] <= 32 * cut[2])}:
            try:
                ms = time_cut(kernels, shape, dtype, batch, rounds, c)
            except Exception as error:  # too much shared memory, for instance
                print(f"    {c} left out: {type(error).__name__}")
                continue
            found.append((*ms, c))
        print(f"{shape} {dtype}, batch {batch}; chosen: {chosen}")
        for i, kind in enumerate(("forward", "backward")):
            for entry in sorted(found, key=lambda entry: entry[i])[:6]:
                print(f"    {kind:8} {entry[i]:8.4f} ms  {entry[2]}")
            of_chosen = next(entry[i] for entry in found if entry[2] == chosen)
            print(f"    {kind:8} {of_chosen:8.4f} ms  as chosen", flush=True)


def time_cut(kernels: Any, shape: Shape, dtype: torch.dtype, batch: int, rounds: int, c: Any) -> tuple[float, float]:
    """Median milliseconds, forward and backward."""
    q, k, v = (x.detach() for x in random_inputs(0, batch, shape, dtype, "cuda"))
    out, lse = kernels.attention(q, k, v, c)
    dout, grads = torch.randn_like(out), tuple(kernels.empty_heads(x) for x in (q, k, v))
    sides = {
        "forward": lambda _: partial(kernels.attention, q, k, v, c),
        "backward": lambda _: partial(kernels.attention_backward, dout, q, k, v, out, lse, grads, c),
    }
    timings = interleave(sides, rounds, device="cuda")
    return timings["forward"].p50_ms, timings["backward"].p50_ms


# ---------------------------------------------------------------------------- command line


def _shape(text: str) -> Shape:
    try:
        return Shape(*map(int, text.split("x")))
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no HEADSxTOKENSxWIDTH, such as 16x258x72") from error


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and save, or write the table, or sweep."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--save-table", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    special, rest = parser.parse_known_args(argv)
    if not (special.save_table or special.sweep):
        run_cases(OP, cases, __doc__, rest)
        return
    device = default_device()
    if special.sweep and device != "cuda":
        raise SystemExit("--sweep needs a GPU: in the interpreter, times mean nothing")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=SHAPES[:1] if special.sweep else SHAPES, metavar="HxLxK"
    )
    parser.add_argument("--batch", type=at_least(1), default=BATCH[device])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", *(["float32"] * (device == "cpu"))])
    parser.add_argument("--rounds", type=at_least(1), default=31)
    parser.add_argument("--out", type=Path, default=attention_table.user_path(), help="the table; default: this user's")
    options = parser.parse_args(rest)
    dtypes = [getattr(torch, name) for name in options.dtypes]
    torch.manual_seed(0)
    if special.sweep:
        sweep(options.shapes, dtypes, options.batch, options.rounds)
        return
    save_table(options.out, measured_rows(options.shapes, dtypes, options.batch, device, options.rounds))
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
