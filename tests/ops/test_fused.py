"""FusedOp: which calls go past the dispatcher, and which must not."""

from typing import ClassVar

import pytest
import torch

from erdfast.ops.skip_linear import skip_linear


class Listener(torch.Tensor):
    """A tensor that notes which functions it passes through."""

    heard: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.heard.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def inputs() -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in ((3, 4), (3, 5), (2, 9), (2,))]


@pytest.mark.parametrize("place", range(4), ids=["x", "skip", "weight", "bias"])
def test_a_subclass_in_any_place_meets_the_custom_op(place) -> None:
    """Also a weight among plain tensors, as a distributed or a quantised one is."""
    tensors = inputs()
    wanted = skip_linear(*tensors, method="products")
    tensors[place] = tensors[place].as_subclass(Listener)
    Listener.heard.clear()
    out = skip_linear(*tensors, method="products")
    assert torch.ops.erdfast.skip_linear.default in Listener.heard
    torch.testing.assert_close(out.as_subclass(torch.Tensor), wanted)


def test_plain_tensors_go_past_the_dispatcher() -> None:
    def custom_ops() -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            tensors = [tensor.requires_grad_() for tensor in inputs()]
            skip_linear(*tensors, method="products").sum().backward()
        return sum(event.name.startswith("erdfast::") for event in profile.events() or [])

    assert custom_ops() == 0
