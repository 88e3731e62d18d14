"""Calls of the network from fixed inputs, with a stand-in for the capture where there is no GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erdfast.process import Process
from erdfast.sampling.graphs import GraphedModel, check_graph
from erdfast.sampling.guidance import Guided
from erdfast.sampling.levels import make_levels
from erdfast.sampling.sample import sample
from erdfast.sampling.samplers import ASKS, SAMPLERS
from tests.sampling.gaussian import GaussianNetwork

SHAPE = (2, 3, 3)


class FakeCapture:
    """Repeats the work into one result, as a graph does, and counts."""

    def __init__(self) -> None:
        self.captures, self.replays = 0, 0
        self.cached: list[bool] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        self.captures += 1
        self.cached.append(torch.is_autocast_cache_enabled())
        result = torch.full_like(run(), torch.nan)

        def replay() -> None:
            self.replays += 1
            result.copy_(run())

        return replay, result


@pytest.mark.parametrize("schedule", ["cosine", "flow"])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_one_graph_for_each_kind_of_call(schedule: str, name: str) -> None:
    """Guided and unguided: two, whatever the steps and labels; the images are those without graphs, to the bit."""
    process = Process(schedule=schedule, target="v", weighting="constant")
    network, capture = GaussianNetwork(process, SHAPE), FakeCapture()
    levels = make_levels(process, 6, variable="ratio" if ASKS[name] == "denoise" else "time")
    latents = torch.randn(2, *SHAPE)
    labels = torch.tensor([0, 1])
    plain = Guided(network, process, labels, 2.0, (0.0, 0.8), null_class=3)
    graphed = Guided(GraphedModel(network, capture), process, labels, 2.0, (0.0, 0.8), null_class=3)
    with torch.no_grad():
        for y in (labels, torch.tensor([2, 0])):  # a second batch with other labels
            wanted, got = (
                SAMPLERS[name](
                    getattr(guided.with_labels(y), ASKS[name]),
                    latents,
                    levels,
                    noise=lambda i: torch.ones_like(latents),
                )
                for guided in (plain, graphed)
            )
            assert torch.equal(got, wanted)
    assert capture.captures == 2
    assert capture.replays == len(network.calls) // 2 - 1  # what the capture itself ran is not a replay


def test_autocast_keeps_no_weights_that_a_graph_reads() -> None:
    """Its cache is freed when its context ends: a graph that reads from it would read what lies there later."""
    capture = FakeCapture()
    model = GraphedModel(lambda x, time, y: x * 2.0, capture)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.ones(1, *SHAPE), torch.zeros(1), None)
        assert torch.is_autocast_cache_enabled()
    assert capture.cached == [False]


def test_graphs_are_refused_without_a_gpu() -> None:
    with pytest.raises(ValueError, match="cuda_graph needs a GPU, and the model is on cpu"):
        check_graph(torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_graphs_on_a_gpu(autocast_dtype: torch.dtype | None) -> None:
    from erdfast.presets import build_model

    torch.manual_seed(0)
    model = build_model("uvit_tiny").cuda()
    process = Process(schedule="cosine", target="v", weighting="constant").cuda()
    draws = [
        sample(
            model,
            process,
            num=7,
            batch_size=3,
            steps=6,
            cfg_scale=2.1,
            interval=(0.0, 0.8),
            autocast_dtype=autocast_dtype,
            cuda_graph=graph,
        )
        for graph in (False, True)
    ]
    torch.testing.assert_close(draws[1], draws[0], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_step_waits_for_a_gpu(name: str) -> None:
    from erdfast.presets import build_model
    from erdfast.sampling.sample import initial_latents, step_noise

    model = build_model("uvit_tiny").cuda().eval()
    process = Process(schedule="cosine", target="v", weighting="constant").cuda()
    levels = make_levels(process, 4, variable="ratio" if ASKS[name] == "denoise" else "time")
    y = torch.arange(2, device="cuda")
    guided = Guided(model, process, y, 2.1, (0.0, 0.8), null_class=10)
    guided.prepare(levels.times, y.device)
    latents, noise = initial_latents(0, y, model.input_shape), step_noise(0, y, model.input_shape)

    def draw() -> Tensor:
        with torch.inference_mode():
            return SAMPLERS[name](getattr(guided, ASKS[name]), latents, levels, noise=noise)

    draw()  # kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
