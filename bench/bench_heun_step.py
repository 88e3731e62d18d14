"""What a sampler does between two calls of its network: the fused step beside the way samplers write it.

eager takes the prediction's channels, guides them, converts them to a slope, steps, and makes the network's next input:
scaled, cast and, for a guided call, twice. Its Heun step keeps the first slope; the numbers lie on the device.

`python -m bench.bench_heun_step` prints a table and writes bench/results/<device>/heun_step.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.harness import Case, backend_of, run_cases
from erdfast.ops.heun_step import HeunRow, heun_step

OP = "heun_step"
SHAPES = {"cuda": ((64, 4, 32, 32), (256, 4, 32, 32), (64, 3, 256, 256)), "cpu": ((64, 4, 32, 32), (4, 3, 256, 256))}
ROW = HeunRow(1.5, -0.4, 0.9, -0.3, 0.6)


def eager(guided: bool, corrector: bool) -> Callable[..., tuple[Tensor, ...]]:
    """x_in is what the network saw; `first` is the slope at x, kept by the predictor for the corrector."""

    def run(pred: Tensor, x: Tensor, x_in: Tensor, first: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        cfg_scale, pred_factor, state_factor, step, input_scale = row.unbind()
        output = pred[:, : x.shape[1]].float()
        if guided:
            cond, uncond = output.chunk(2)
            output = uncond + cfg_scale * (cond - uncond)
        slope = pred_factor * output + state_factor * (x_in if corrector else x)
        x_new = x + step * (0.5 * first + 0.5 * slope) if corrector else x + step * slope
        network_input = input_scale * x_new
        if guided:
            network_input = torch.cat([network_input, network_input])
        return x_new, network_input.to(pred.dtype), *(() if corrector else (slope,))

    return run


def fused(guided: bool, corrector: bool) -> Callable[..., tuple[Tensor, ...]]:
    """The same through the op."""

    def run(pred: Tensor, x: Tensor, x_in: Tensor, first: Tensor, row: Tensor) -> tuple[Tensor, ...]:
        state, network_input = heun_step(pred, x, row, x_in=x_in if corrector else None, input_copies=1 + guided)
        assert network_input is not None
        return state, network_input

    return run


def make_inputs(shape: tuple[int, ...], guided: bool, dtype: torch.dtype, device: str) -> Callable[[int], tuple]:
    """A network's output, three states and a row."""
    batch, *rest = shape

    def make(_: int) -> tuple:
        pred = torch.randn((1 + guided) * batch, *rest, device=device).to(dtype)
        states = [torch.randn(shape, device=device) for _ in range(3)]
        return pred, *states, torch.tensor(ROW, device=device)

    return make


def cases(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Predictor and corrector, guided and not."""
    for dtype in dtypes:
        for shape in SHAPES[device]:
            for guided in (True, False):
                for corrector in (False, True):
                    kind = f"{'guided ' * guided}{'corrector' if corrector else 'predictor'}"
                    # The states in float32, the prediction and the network's input in the network's dtype.
                    per_element = 4 * (2 + corrector) + 2 * (1 + guided) * dtype.itemsize
                    numel = torch.Size(shape).numel()
                    yield Case(
                        name=f"{'x'.join(map(str, shape))} {kind} {str(dtype).removeprefix('torch.')}",
                        fields={"shape": list(shape), "dtype": dtype, "guided": guided, "corrector": corrector},
                        make_inputs=make_inputs(shape, guided, dtype, device),
                        sides={"eager": eager(guided, corrector), "fused": fused(guided, corrector)},
                        passes=("forward",),
                        bytes={"forward": per_element * numel},
                        backend=backend_of(OP, device, torch.float32),
                    )


def main() -> None:
    """Measure, print, save."""
    run_cases(OP, cases, __doc__)


if __name__ == "__main__":
    main()
