"""RMSNorm of each head of q and k and their rotary embedding, straight from the output of the qkv Linear.

    y = w * x / sqrt(mean(x^2) + eps)                                      over the K numbers of a head
    (z_2i, z_2i+1) = (y_2i cos - y_2i+1 sin, y_2i+1 cos + y_2i sin)        RoPE with interleaved pairs

B batch, L tokens, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import KERNEL_DTYPES, launcher, resolve_backend
from .fused import FusedOp
from .source import refuse_gradients

Rope = tuple[Tensor, Tensor]
"""cos and sin, (L, K/2) float32 each."""


def rope_tables(
    grid: tuple[int, int],
    head_width: int,
    *,
    theta: float = 10000.0,
    extra_tokens: int = 0,
    device: torch.device | str | None = None,
) -> Rope:
    """Angles of the tokens of a grid, row by row: cos and sin, each (extra_tokens + rows*columns, K/2) float32.

    The first half of a head's pairs turns by the row, the second by the column, by position * theta^(-i/(K/4)) for
    i < K/4, as in LightningDiT and JiT. `extra_tokens` leading tokens (JiT's class tokens) are not turned.

    Raises:
        ValueError: a head width that is no multiple of 4, an empty grid, a negative number of tokens, theta <= 0, or a
            size that is no integer.
    """
    if not isinstance(grid, tuple | list) or len(grid) != 2 or not all(map(_is_integer, grid)):
        raise ValueError(f"grid must be two integers (rows, columns), not {grid!r}")
    rows, columns = grid
    if not _is_integer(extra_tokens):
        raise ValueError(f"extra_tokens must be an integer, not {extra_tokens!r}")
    if not _is_integer(head_width) or head_width < 4 or head_width % 4:
        raise ValueError(f"rotary embedding of a grid needs a head width that is a multiple of 4, not {head_width}")
    if rows < 1 or columns < 1 or extra_tokens < 0:
        raise ValueError(f"grid {rows} x {columns} with {extra_tokens} extra tokens: sizes must be at least 1, 1 and 0")
    if not theta > 0:
        raise ValueError(f"theta must be positive, not {theta}")
    quarter = head_width // 4
    frequencies = theta ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def turns(positions: int) -> Tensor:
        return torch.arange(positions, dtype=torch.float64, device=device)[:, None] * frequencies

    by_row = turns(rows)[:, None].expand(rows, columns, quarter)
    by_column = turns(columns).expand(rows, columns, quarter)
    angles = torch.cat([by_row, by_column], dim=2).reshape(rows * columns, 2 * quarter)
    angles = F.pad(angles, (0, 0, extra_tokens, 0))
    return angles.cos().float(), angles.sin().float()


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    rope: Rope | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v for attention from the output of their Linear; all arithmetic in float32.

    PyTorch's flash, efficient and cuDNN attention read any strides as long as a head's numbers are neighbours, and
    flash and cuDNN write their output in the layout of q. q and k therefore lie in memory as (B, L, H, K): the output
    of attention is then (B, L, D) for the next Linear without a copy. v is a view of qkv, since nothing changes in it;
    the gradients of all three are written into one dqkv. Without weights and rope, q and k are views of qkv as well.

    Args:
        qkv: (B, L, 3*H*K) contiguous; float32, bfloat16 or float16 (float64 for the reference). Along its last
            dimension it is ordered (q, k, v), then by head.
        num_heads: H.
        q_weight, k_weight: (K,) weights of the norms, any floating dtype; both or neither, which means no norm.
        eps: added to the mean square.
        rope: (cos, sin), each (L, K/2) float32 contiguous (or float64 for the reference), such as `rope_tables` makes;
            None for no rotation. Not differentiated.
        backend: "reference" or "triton"; by default the fastest of the device.

    Returns:
        (q, k, v), each (B, H, L, K) in the dtype of qkv, last stride 1. v always shares memory with qkv, q and k where
        nothing changes them: do not write into any of them in place. Differentiable once in qkv and the weights. A
        gradient whose last stride is not 1 (a broadcast scalar; never attention's) is copied first.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit, or the back end cannot run; the message says which.
    """
    head_width = _check_qkv(qkv, num_heads)
    _check_weights(qkv, head_width, q_weight, k_weight)
    cos, sin = _check_rope(qkv, head_width, rope)
    backend = resolve_backend(backend, qkv.device, qkv.dtype, op="qk_norm_rope", backends=("reference", "triton"))
    if q_weight is None and cos is None:
        q, k, v = _heads(qkv, num_heads)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "reference":
        return _reference(qkv, num_heads, q_weight, k_weight, cos, sin, eps)
    refuse_gradients(cos=cos, sin=sin)
    inputs = (qkv, num_heads, q_weight, k_weight, cos, sin, eps, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (qkv, q_weight, k_weight)):
        return _QKNormRope.apply(*inputs)
    return _forward(*inputs)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt)


def _check_qkv(qkv: Tensor, num_heads: int) -> int:
    """The head width."""
    if not _is_integer(num_heads) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer of at least 1, not {num_heads!r}")
    if qkv.dim() != 3 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be (B, L, 3*H*K) with H = num_heads = {num_heads}")
    if not qkv.is_contiguous():
        raise ValueError(f"qkv is not contiguous: strides {qkv.stride()} of shape {tuple(qkv.shape)}")
    if qkv.dtype not in (*KERNEL_DTYPES, torch.float64):
        raise ValueError(f"qkv is {qkv.dtype}; choose from {', '.join(map(str, KERNEL_DTYPES))} or torch.float64")
    return qkv.shape[2] // (3 * num_heads)


def _check_weights(qkv: Tensor, head_width: int, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must both be given, or neither for no norm")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        if weight.shape != (head_width,) or weight.device != qkv.device or not weight.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(weight.shape)}, {weight.dtype} on {weight.device}; "
                f"it must be ({head_width},), floating point, on {qkv.device}"
            )


def _check_rope(qkv: Tensor, head_width: int, rope: Rope | None) -> tuple[Tensor | None, Tensor | None]:
    if rope is None:
        return None, None
    if not isinstance(rope, tuple | list) or len(rope) != 2 or not all(isinstance(table, Tensor) for table in rope):
        raise ValueError(f"rope must be a pair of tensors (cos, sin), not {rope!r}")
    if head_width % 4:
        raise ValueError(f"rope needs a head width that is a multiple of 4, not {head_width}")
    shape = (qkv.shape[1], head_width // 2)
    for name, table in zip(("cos", "sin"), rope, strict=True):
        if table.shape != shape or table.device != qkv.device or not table.is_contiguous():
            raise ValueError(
                f"rope's {name} has shape {tuple(table.shape)} and strides {table.stride()} on {table.device}; "
                f"it must be {shape}, contiguous, on {qkv.device}"
            )
        if table.dtype != torch.float32 and not table.dtype == qkv.dtype == torch.float64:
            raise ValueError(f"rope's {name} is {table.dtype}; it must be torch.float32")
    cos, sin = rope
    return cos, sin


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Views q, k, v: (B, L, H, K)."""
    batch, length, width = qkv.shape
    return qkv.view(batch, length, 3, num_heads, width // (3 * num_heads)).unbind(2)


def _reference(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    compute = torch.promote_types(qkv.dtype, torch.float32)

    def embed(x_BLHK: Tensor, weight: Tensor | None) -> Tensor:
        y_BLHK = x_BLHK.to(compute)
        if weight is not None:
            y_BLHK = F.rms_norm(y_BLHK, y_BLHK.shape[-1:], weight.to(compute), eps)
        if cos is not None and sin is not None:
            even, odd = y_BLHK.unflatten(-1, (-1, 2)).unbind(-1)
            c, s = cos.to(compute)[:, None], sin.to(compute)[:, None]  # one angle for all heads
            y_BLHK = torch.stack([even * c - odd * s, odd * c + even * s], dim=-1).flatten(-2)
        return y_BLHK.to(qkv.dtype).transpose(1, 2)

    q, k, v = _heads(qkv, num_heads)
    return embed(q, q_weight), embed(k, k_weight), v.transpose(1, 2)


def _compute(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(q, k), (B, L, H, K) contiguous."""
    run = launcher(backend, "qk_norm_rope").qk_norm_rope
    return run(qkv, num_heads, _dense(q_weight), _dense(k_weight), cos, sin, eps)


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _fake(qkv, num_heads, q_weight, k_weight, cos, sin, eps, backend):
    batch, length, width = qkv.shape
    shape = (batch, length, num_heads, width // (3 * num_heads))
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _compute_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dqkv, gradients of both weights (2, K) float32, or an empty tensor without the norm)."""
    grads = [grad if grad.stride(3) == 1 else grad.contiguous() for grad in (dq, dk, dv)]
    run = launcher(backend, "qk_norm_rope").qk_norm_rope_backward
    dqkv, dw = run(*grads, qkv, num_heads, _dense(q_weight), _dense(k_weight), cos, sin, eps)
    return dqkv, qkv.new_empty(0, dtype=torch.float32) if dw is None else dw


def _fake_backward(dq, dk, dv, qkv, num_heads, q_weight, k_weight, cos, sin, eps, backend):
    shape = (0,) if q_weight is None else (2, q_weight.shape[0])
    return torch.empty_like(qkv), qkv.new_empty(shape, dtype=torch.float32)


_qk_norm_rope = FusedOp("qk_norm_rope", _compute, _fake)
_qk_norm_rope_backward = FusedOp("qk_norm_rope_backward", _compute_backward, _fake_backward)


def _forward(qkv: Tensor, num_heads: int, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k = _qk_norm_rope(qkv, num_heads, *options)
    return q.transpose(1, 2), k.transpose(1, 2), _heads(qkv, num_heads)[2].transpose(1, 2)


class _QKNormRope(torch.autograd.Function):
    """The two ops with v beside them: a custom op may not return a view of its input, and a gradient of v that came
    by another way would cost two more passes over dqkv. torch.compile traces it like everything else."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        qkv, num_heads, q_weight, k_weight, cos, sin, eps, backend = inputs
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.num_heads, ctx.options = num_heads, (eps, backend)
        return _forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "qk_norm_rope is differentiable once; use backend='reference' for second derivatives"
            )
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        dqkv, dw = _qk_norm_rope_backward(*grads, qkv, ctx.num_heads, q_weight, k_weight, cos, sin, *ctx.options)
        dq_weight = dk_weight = None
        if q_weight is not None:
            dq_weight, dk_weight = dw[0].to(q_weight.dtype), dw[1].to(k_weight.dtype)
        return dqkv, None, dq_weight, dk_weight, None, None, None, None
