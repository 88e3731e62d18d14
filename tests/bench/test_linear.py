"""The products of networks: every way to multiply gives the same, at the sizes that a step has."""

from __future__ import annotations

import pytest
import torch

from bench import bench_linear, harness
from bench.bench_linear import Shape, make_case
from bench.budget import step_budget
from bench.step_model import NETWORKS
from erdfast import presets


@pytest.mark.parametrize("rows", [264, 258, 259])
def test_every_side_multiplies_the_same(rows: int) -> None:
    shape = Shape(rows, 5, 7)
    case = make_case(shape, torch.float32, "cpu")
    assert set(case.sides) == {"eager", "fused"} | {264: {"split"}, 258: {"padded"}, 259: set()}[rows]
    x, weight, bias, grad = (t.double() for t in case.make_inputs(0))
    assert len(x) == len(grad) == (264 if rows == 258 else rows)
    expected = x[:rows] @ weight.t() + bias, grad[:rows] @ weight, grad[:rows].t() @ x[:rows]
    for name, side in case.sides.items():
        if name != "padded":
            for found, wanted in zip(side(x, weight, bias, grad), expected, strict=True):
                torch.testing.assert_close(found, wanted)
    assert case.work("forward", case.flops) == 3 * 2 * rows * 5 * 7
    assert case.work("forward", case.bytes) == 3 * 4 * (rows * 5 + 5 * 7 + rows * 7)


def test_a_padded_product_has_the_same_first_rows() -> None:
    case = make_case(Shape(258, 3, 4), torch.float32, "cpu")
    inputs = case.make_inputs(0)
    fused, padded = case.sides["fused"](*inputs), case.sides["padded"](*inputs)
    torch.testing.assert_close(padded[0][:258], fused[0])
    torch.testing.assert_close(padded[1][:258], fused[1])
    assert len(padded[0]) == 264


def test_widened_gradients_are_float32() -> None:
    inputs = [t.bfloat16() for t in make_case(Shape(8, 3, 4), torch.float32, "cpu").make_inputs(0)]
    out, _, grad_weight = bench_linear.widened(*inputs)
    assert (out.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("model", NETWORKS)
def test_nearly_all_of_a_steps_products_are_measured(model: str) -> None:
    """By the fields by which bench.roofline looks for them."""
    works = [work for work in step_budget(presets.model_config(model), 128) if work.op == bench_linear.OP]
    sizes = [list(shape) for shape in bench_linear.shapes(bench_linear.MODELS["cuda"])]
    measured = [work for work in works if (work.fields or {})["shape"] in sizes]
    assert sum(work.flops for work in measured) > 0.97 * sum(work.flops for work in works)


def test_more_sizes_than_a_function_may_be_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile gives up on a function after eight; the harness lets every case begin anew."""
    monkeypatch.setattr(harness, "MAX_SETS", 1)
    compiled: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _inputs: object):
        compiled.append(graph)
        return graph.forward

    for rows in range(3, 13):
        case = make_case(Shape(rows, 2, 2), torch.float32, "cpu")
        tuned = torch.compile(bench_linear.products, dynamic=False, backend=note)
        case.sides["tuned"] = bench_linear.first_rows(tuned, rows)
        run = harness.Measurement(case, "cpu", compiled=False)
        assert not run.drop_failing()
    assert len(compiled) == 10
