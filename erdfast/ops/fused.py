"""How a fused function becomes a custom op with a fake and gradients, and a short way past the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import in_plain_eager


class FusedOp:
    """`op(*inputs)`: a custom op named erdfast::NAME for tracers and subclasses, the plain function for eager code.

    Args:
        name: of the custom op; the annotations of `compute` are its schema.
        compute: runs the launcher of the back end that is its last input; returns tensors that alias no input.
        fake: the same on tensors without data: shapes, dtypes and strides of the results.
        setup_context, backward: as for `torch.autograd.Function`; without them the op has no gradient. `backward`
            runs its kernel through a FusedOp of its own, so that torch.compile sees it too.
    """

    def __init__(
        self,
        name: str,
        compute: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        setup_context: Callable[[Any, tuple, Any], None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        self.compute = compute
        self.op = torch.library.custom_op(f"erdfast::{name}", compute, mutates_args=())
        self.op.register_fake(fake)
        self._direct: Callable[..., Any] = compute
        if backward is not None:
            assert setup_context is not None
            self.op.register_autograd(backward, setup_context=setup_context)
            self._direct = _function(name, compute, setup_context, backward).apply

    def __call__(self, *inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if not all(map(in_plain_eager, tensors)):
            return self.op(*inputs)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self._direct(*inputs)
        return self.compute(*inputs)


def _function(
    name: str, compute: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = compute(*inputs)
        setup(ctx, inputs, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"Fused_{name}", (torch.autograd.Function,), members)
