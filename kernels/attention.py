"""Attention over short sequences, without mask and dropout: forward and backward (FlashAttention-2, sec. 3.1).

    S = q k^T / sqrt(K)      P = softmax(S)      out = P v      lse = log2 of the sum of 2^(S log2 e)
    delta = sum_K out * dout      dS = P * (dout v^T - delta)
    dv = P^T dout      dk = dS^T q / sqrt(K)      dq = dS k / sqrt(K)

B batch, H heads, L queries, M keys, K head width. Two paddings that general kernels pay are trimmed, although Triton's
tiles are powers of two: 72 columns of a head are a tile of 64 and one of 16, together 80, where PyTorch's kernels take
96 or 128; and 258 keys in a program's loop are four tiles of 64, which need no mask, and one of 16, together 272, not
320. (A program's own rows are a multiple of 64, the least that Hopper's tensor cores take.)

A program has one tile of queries (or keys) of one head and walks over all keys (or queries). At 258 tokens of width 72
in bf16 a head reads and writes 149 KB and multiplies 19.2 MFLOP forward: memory (31 ns at 4.8 TB/s) and tensor cores
(32 ns at 600 TFLOP/s) want the same time. So programs are small, two or more on a multiprocessor, one computing while
another loads; those of one head run together and find its keys and values in the L2 cache. Per head, s bytes a number:

                read                     written               flops
    forward     s K (L + 2 M)            s K L + 4 L           4 L M K, and L M exponentials
    delta       2 s K L                  4 L                   2 L K
    backward    s K (2 L + 2 M) + 8 L    s K (L + 2 M)         14 L M K, and 2 L M exponentials

The backward takes seven products where five would do: programs that sum dk and dv over the queries make S and dout v^T,
and those that sum dq over the keys make them again, 9.6 MFLOP more (48 ns at 400 TFLOP/s). Five products need dq summed
across programs: float32 partials of 128 keys each write and read 480 KB (100 ns at 4.8 TB/s); an ordered
read-modify-write by one program a head moves 330 KB through the L2 cache (60 ns) and leaves a fifth of the programs;
atomics make results depend on the order. Here all sums have a fixed order: results repeat bit for bit and do not
depend on the batch.

16-bit numbers multiply in tensor cores with float32 sums. float32 is for comparisons, not for speed: ordinary units, in
small tiles (three TF32 products would spill 1 to 10 KB of registers). Lengths are compile-time constants: a new one
compiles anew. Triton's interpreter cannot multiply bf16; there, and only there, it becomes float32 first.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# fmt: off
# (an argument a line would triple the file)

@triton.jit
def load_head(ptr, rows, stride, count, MASKED: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
              REST: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a head as a main and a rest tile (the former again if there is none), with zeros beyond their ends."""
    start, columns = ptr + rows[:, None] * stride, tl.arange(0, MAIN)[None, :]
    if MASKED or MAIN > WIDTH:
        main = tl.load(start + columns, mask=(rows[:, None] < count) & (columns < WIDTH), other=0.0)
    else:
        main = tl.load(start + columns)
    main = main.to(tl.float32) if UPCAST else main
    rest = main
    if REST:
        columns = MAIN + tl.arange(0, REST)[None, :]
        rest = tl.load(start + columns, mask=(rows[:, None] < count) & (columns < WIDTH), other=0.0)
        rest = rest.to(tl.float32) if UPCAST else rest
    return main, rest


@triton.jit
def store_head(ptr, rows, stride, count, main, rest, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    start, columns = ptr + rows[:, None] * stride, tl.arange(0, MAIN)[None, :]
    tl.store(start + columns, main.to(ptr.dtype.element_ty), mask=(rows[:, None] < count) & (columns < WIDTH))
    if REST:
        columns = MAIN + tl.arange(0, REST)[None, :]
        tl.store(start + columns, rest.to(ptr.dtype.element_ty), mask=(rows[:, None] < count) & (columns < WIDTH))


@triton.jit
def dot_transposed(a, a_rest, b, b_rest, REST: tl.constexpr):
    """a b^T over the whole head."""
    product = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST:
        product = tl.dot(a_rest, tl.trans(b_rest), product, input_precision="ieee")
    return product


@triton.jit
def add_dot(total, total_rest, a, b, b_rest, REST: tl.constexpr):
    """total + a b, for the main and the rest tile of b."""
    a = a.to(b.dtype)
    total = tl.dot(a, b, total, input_precision="ieee")
    if REST:
        total_rest = tl.dot(a, b_rest, total_rest, input_precision="ieee")
    return total, total_rest


@triton.jit
def zeros_head(ROWS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr):
    return tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, REST if REST else 16], tl.float32)


@triton.jit
def attend_tile(
    top, total, out, out_rest, q, q_rest, k_ptr, v_ptr, k_l, v_l, first, scale, KEYS: tl.constexpr, TILE: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):
    """One step of the online softmax: TILE keys from `first` on."""
    keys = first + tl.arange(0, TILE)
    k, k_rest = load_head(k_ptr, keys, k_l, KEYS, MASKED, WIDTH, MAIN, REST, UPCAST)
    scores = dot_transposed(q, q_rest, k, k_rest, REST)
    if MASKED:
        scores = tl.where(keys[None, :] < KEYS, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1) * scale)
    p = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, axis=1)
    out = out * shrink[:, None]
    if REST:
        out_rest = out_rest * shrink[:, None]
    v, v_rest = load_head(v_ptr, keys, v_l, KEYS, MASKED, WIDTH, MAIN, REST, UPCAST)
    out, out_rest = add_dot(out, out_rest, p, v, v_rest, REST)
    return new_top, total, out, out_rest


@triton.jit
def attention_forward_kernel(
    out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, heads, scale, ALIGN: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    TAIL: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, UPCAST: tl.constexpr,
):
    """One program: one tile of queries of one head.

    Strides come in units of ALIGN elements: that makes them known multiples of 16 bytes, where Triton on its own
    looks for multiples of 16 elements and would read a head of 72 in pieces of two bytes.
    """
    BLOCKS: tl.constexpr = (QUERIES + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    block, bh = pid % BLOCKS, pid // BLOCKS
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q_ptr += (b * q_b + h * q_h) * ALIGN
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    out_ptr += (b * o_b + h * o_h) * ALIGN
    lse_ptr += bh.to(tl.int64) * QUERIES
    rows = block * ROWS + tl.arange(0, ROWS)
    q, q_rest = load_head(q_ptr, rows, q_l * ALIGN, QUERIES, True, WIDTH, MAIN, REST, UPCAST)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out, out_rest = zeros_head(ROWS, MAIN, REST)
    # The tail comes first, here and below: after the loop, its loads and the loop's last would hold registers together.
    if TAIL:
        top, total, out, out_rest = attend_tile(
            top, total, out, out_rest, q, q_rest, k_ptr, v_ptr, k_l * ALIGN, v_l * ALIGN, KEYS // TILE * TILE, scale,
            KEYS, TAIL, WIDTH, MAIN, REST, UPCAST, True,
        )
    for i in range(KEYS // TILE if TAIL else (KEYS + TILE - 1) // TILE):
        top, total, out, out_rest = attend_tile(
            top, total, out, out_rest, q, q_rest, k_ptr, v_ptr, k_l * ALIGN, v_l * ALIGN, i * TILE, scale,
            KEYS, TILE, WIDTH, MAIN, REST, UPCAST, TAIL == 0 and KEYS % TILE != 0,
        )
    inverse = 1.0 / total[:, None]
    store_head(out_ptr, rows, o_l * ALIGN, QUERIES, out * inverse, out_rest * inverse, WIDTH, MAIN, REST)
    tl.store(lse_ptr + rows, top + tl.log2(total), mask=rows < QUERIES)


DELTA_ROWS = 32
"""Twice 18 numbers of a head of 72 to each of 128 threads."""


@triton.jit
def attention_delta_kernel(
    delta_ptr, out_ptr, dout_ptr, o_b, o_h, o_l, do_b, do_h, do_l, heads,
    ALIGN: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr,
    REST: tl.constexpr,
):
    """delta = sum over the head of out * dout in float32; one program: ROWS queries of one head."""
    BLOCKS: tl.constexpr = (QUERIES + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    block, bh = pid % BLOCKS, pid // BLOCKS
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    out_ptr += (b * o_b + h * o_h) * ALIGN
    dout_ptr += (b * do_b + h * do_h) * ALIGN
    rows = block * ROWS + tl.arange(0, ROWS)
    out, out_rest = load_head(out_ptr, rows, o_l * ALIGN, QUERIES, True, WIDTH, MAIN, REST, True)
    dout, dout_rest = load_head(dout_ptr, rows, do_l * ALIGN, QUERIES, True, WIDTH, MAIN, REST, True)
    delta = tl.sum(out * dout, axis=1)
    if REST:
        delta += tl.sum(out_rest * dout_rest, axis=1)
    tl.store(delta_ptr + bh.to(tl.int64) * QUERIES + rows, delta, mask=rows < QUERIES)


@triton.jit
def grad_keys_tile(
    dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_l, do_l, first, scale,
    QUERIES: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    UPCAST: tl.constexpr, MASKED: tl.constexpr,
):
    """What TILE queries from `first` on add to dk and dv of a block of keys; everything transposed, (keys, queries)."""
    rows = first + tl.arange(0, TILE)
    q, q_rest = load_head(q_ptr, rows, q_l, QUERIES, MASKED, WIDTH, MAIN, REST, UPCAST)
    # Queries that do not exist add nothing: their q, dout and delta are 0.
    lse = tl.load(lse_ptr + rows, mask=rows < QUERIES, other=0.0)
    p = tl.exp2(dot_transposed(k, k_rest, q, q_rest, REST) * scale - lse[None, :])
    dout, dout_rest = load_head(dout_ptr, rows, do_l, QUERIES, MASKED, WIDTH, MAIN, REST, UPCAST)
    dv, dv_rest = add_dot(dv, dv_rest, p, dout, dout_rest, REST)
    delta = tl.load(delta_ptr + rows, mask=rows < QUERIES, other=0.0)
    ds = p * (dot_transposed(v, v_rest, dout, dout_rest, REST) - delta[None, :])
    dk, dk_rest = add_dot(dk, dk_rest, ds, q, q_rest, REST)
    return dk, dk_rest, dv, dv_rest


@triton.jit
def grad_keys_block(
    dk_ptr, dv_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, q_l, k_l, v_l, do_l, dk_l, first, scale, dscale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, UPCAST: tl.constexpr,
):
    """dk and dv of ROWS keys from `first` on; rows of keys that do not exist hold nonsense and are not stored."""
    keys = first + tl.arange(0, ROWS)
    k, k_rest = load_head(k_ptr, keys, k_l, KEYS, True, WIDTH, MAIN, REST, UPCAST)
    v, v_rest = load_head(v_ptr, keys, v_l, KEYS, True, WIDTH, MAIN, REST, UPCAST)
    dk, dk_rest = zeros_head(ROWS, MAIN, REST)
    dv, dv_rest = zeros_head(ROWS, MAIN, REST)
    if TAIL:
        dk, dk_rest, dv, dv_rest = grad_keys_tile(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_l, do_l,
            QUERIES // TILE * TILE, scale, QUERIES, TAIL, WIDTH, MAIN, REST, UPCAST, True,
        )
    for i in range(QUERIES // TILE if TAIL else (QUERIES + TILE - 1) // TILE):
        dk, dk_rest, dv, dv_rest = grad_keys_tile(
            dk, dk_rest, dv, dv_rest, k, k_rest, v, v_rest, q_ptr, dout_ptr, lse_ptr, delta_ptr, q_l, do_l, i * TILE,
            scale, QUERIES, TILE, WIDTH, MAIN, REST, UPCAST, TAIL == 0 and QUERIES % TILE != 0,
        )
    store_head(dk_ptr, keys, dk_l, KEYS, dk * dscale, dk_rest * dscale, WIDTH, MAIN, REST)
    store_head(dv_ptr, keys, dk_l, KEYS, dv, dv_rest, WIDTH, MAIN, REST)


@triton.jit
def grad_queries_tile(
    dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, k_l, v_l, first, scale, KEYS: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, UPCAST: tl.constexpr,
    MASKED: tl.constexpr,
):
    """What TILE keys from `first` on add to dq of a block of queries."""
    keys = first + tl.arange(0, TILE)
    k, k_rest = load_head(k_ptr, keys, k_l, KEYS, MASKED, WIDTH, MAIN, REST, UPCAST)
    p = tl.exp2(dot_transposed(q, q_rest, k, k_rest, REST) * scale - lse[:, None])
    if MASKED:  # 2^(0 - lse) may overflow
        p = tl.where(keys[None, :] < KEYS, p, 0.0)
    v, v_rest = load_head(v_ptr, keys, v_l, KEYS, MASKED, WIDTH, MAIN, REST, UPCAST)
    ds = p * (dot_transposed(dout, dout_rest, v, v_rest, REST) - delta[:, None])
    return add_dot(dq, dq_rest, ds, k, k_rest, REST)


@triton.jit
def grad_queries_block(
    dq_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, q_l, k_l, v_l, do_l, dq_l, first, scale, dscale,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, TAIL: tl.constexpr,
    WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, UPCAST: tl.constexpr,
):
    """dq of ROWS queries from `first` on."""
    rows = first + tl.arange(0, ROWS)
    q, q_rest = load_head(q_ptr, rows, q_l, QUERIES, True, WIDTH, MAIN, REST, UPCAST)
    dout, dout_rest = load_head(dout_ptr, rows, do_l, QUERIES, True, WIDTH, MAIN, REST, UPCAST)
    lse = tl.load(lse_ptr + rows, mask=rows < QUERIES, other=0.0)
    delta = tl.load(delta_ptr + rows, mask=rows < QUERIES, other=0.0)
    dq, dq_rest = zeros_head(ROWS, MAIN, REST)
    if TAIL:
        dq, dq_rest = grad_queries_tile(
            dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, k_l, v_l, KEYS // TILE * TILE, scale,
            KEYS, TAIL, WIDTH, MAIN, REST, UPCAST, True,
        )
    for i in range(KEYS // TILE if TAIL else (KEYS + TILE - 1) // TILE):
        dq, dq_rest = grad_queries_tile(
            dq, dq_rest, q, q_rest, dout, dout_rest, lse, delta, k_ptr, v_ptr, k_l, v_l, i * TILE, scale, KEYS, TILE,
            WIDTH, MAIN, REST, UPCAST, TAIL == 0 and KEYS % TILE != 0,
        )
    store_head(dq_ptr, rows, dq_l, QUERIES, dq * dscale, dq_rest * dscale, WIDTH, MAIN, REST)


@triton.jit
def attention_backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, do_b, do_h, do_l, dq_b, dq_h, dq_l, dk_b, dk_h, dk_l, heads, scale,
    dscale, ALIGN: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    QUERY_TAIL: tl.constexpr, KEY_TAIL: tl.constexpr, WIDTH: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One program: dk and dv of one tile of keys, or dq of one tile of queries, of one head."""
    KEY_BLOCKS: tl.constexpr = (KEYS + ROWS - 1) // ROWS
    BLOCKS: tl.constexpr = KEY_BLOCKS + (QUERIES + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    block, bh = pid % BLOCKS, pid // BLOCKS
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    q_ptr += (b * q_b + h * q_h) * ALIGN
    k_ptr += (b * k_b + h * k_h) * ALIGN
    v_ptr += (b * v_b + h * v_h) * ALIGN
    dout_ptr += (b * do_b + h * do_h) * ALIGN
    lse_ptr += bh.to(tl.int64) * QUERIES
    delta_ptr += bh.to(tl.int64) * QUERIES
    q_l, k_l, v_l, do_l = q_l * ALIGN, k_l * ALIGN, v_l * ALIGN, do_l * ALIGN
    if block < KEY_BLOCKS:
        start = (b * dk_b + h * dk_h) * ALIGN
        grad_keys_block(
            dk_ptr + start, dv_ptr + start, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, q_l, k_l, v_l, do_l,
            dk_l * ALIGN, block * ROWS, scale, dscale, QUERIES, KEYS, ROWS, TILE, QUERY_TAIL, WIDTH, MAIN, REST, UPCAST,
        )
    else:
        start = (b * dq_b + h * dq_h) * ALIGN
        grad_queries_block(
            dq_ptr + start, dout_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, q_l, k_l, v_l, do_l, dq_l * ALIGN,
            (block - KEY_BLOCKS) * ROWS, scale, dscale, QUERIES, KEYS, ROWS, TILE, KEY_TAIL, WIDTH, MAIN, REST, UPCAST,
        )
# fmt: on


class Config(NamedTuple):
    """How a launch is cut up."""

    rows: int
    """Queries (or keys) of one program."""
    tile: int
    """Keys (or queries) that it takes at once."""
    num_warps: int
    num_stages: int = 2


def config(width: int, dtype: torch.dtype, capability: int) -> Config:
    """Tiles for a head width, a dtype and a compute capability (80, 90), forward and backward.

    The largest tiles for which the compiler needs no spills and leaves room for two programs or more on a
    multiprocessor (65,536 registers), by `python -m bench.aot --kernel attention`: in bf16 at width 72, 168 registers
    forward and 255 backward on sm_80. `python -m bench.bench_attention --sweep` times others: an H200's best of 27.
    """
    if dtype == torch.float32:
        return Config(16, 16, 4 if width <= 80 else 8, 1)
    return Config(64, 64, 4, 3) if capability >= 90 and width <= 80 else Config(64, 32, 4)


def safe_config(width: int, dtype: torch.dtype, capability: int, queries: int, keys: int) -> Config:
    """`config`, but for what Triton 3.6 computes wrongly on sm_90, as seen on an H200: heads of two tiles with a single
    full tile of queries or keys. Programs of 32 rows take another instruction of the tensor cores and are right."""
    chosen = config(width, dtype, capability)
    counts = (queries, keys)
    suspect = any(count // chosen.tile == 1 or tail(count, chosen.tile) == chosen.tile for count in counts)
    return Config(32, chosen.tile, 4) if chosen.rows == 64 and suspect and head_tiles(width)[1] else chosen


def head_tiles(width: int) -> tuple[int, int]:
    """The powers of two that cover a head: 72 => (64, 16); a rest of 0 where one tile is as small."""
    whole = max(16, triton.next_power_of_2(width))
    if width == whole or width <= 16:
        return whole, 0
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole, 0) if whole // 2 + rest >= whole else (whole // 2, rest)


def tail(count: int, tile: int) -> int:
    """The tile for what full tiles leave: 258 rows in tiles of 64 leave 2, for which 16 do. 0: the loop takes all."""
    rest = count % tile
    return 0 if rest == 0 or tile == 16 else max(16, triton.next_power_of_2(rest))


_INTERPRETED = not isinstance(attention_forward_kernel, triton.JITFunction)


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def _layout(*tensors: Tensor) -> tuple[int, list[int]]:
    """(unit, strides of batch, head and row of each tensor in it); the unit is 8 elements, or 1 if 8 does not fit."""
    # The stride of a dimension of one means nothing and may be odd.
    strides = [t.stride(d) if t.shape[d] > 1 else 0 for t in tensors for d in range(3)]
    align = 8 if all(stride % 8 == 0 for stride in strides) else 1
    return align, [stride // align for stride in strides]


def empty_heads(like: Tensor) -> Tensor:
    """(B, H, L, K) in the memory order (B, L, H, K), in which the projections around attention want it."""
    B, H, L, K = like.shape
    return like.new_empty((B, L, H, K)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, tiles: Config | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax(q k^T / sqrt(K)) v.

    Args:
        q: (B, H, L, K) float32, bfloat16 or float16, K up to 128; any strides, but the last dimension contiguous.
        k, v: (B, H, M, K), likewise.
        tiles: in place of `config`'s.

    Returns:
        out: (B, H, L, K) in q's dtype, in the memory order (B, L, H, K).
        lse: (B, H, L) float32, log2 of the sums of exp(q k^T / sqrt(K)).
    """
    B, H, L, K = q.shape
    out, lse = empty_heads(q), q.new_empty((B, H, L), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    c = tiles or safe_config(K, q.dtype, _capability(q.device), L, k.shape[2])
    align, strides = _layout(q, k, v, out)
    main, rest = head_tiles(K)
    with torch.cuda.device_of(q):
        attention_forward_kernel[(B * H * triton.cdiv(L, c.rows),)](
            out, lse, q, k, v, *strides, H, math.log2(math.e) / math.sqrt(K),
            ALIGN=align, QUERIES=L, KEYS=k.shape[2], ROWS=c.rows, TILE=c.tile, TAIL=tail(k.shape[2], c.tile),
            WIDTH=K, MAIN=main, REST=rest, UPCAST=_INTERPRETED and q.dtype == torch.bfloat16,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    return out, lse


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grads: tuple[Tensor, Tensor, Tensor],
    tiles: Config | None = None,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v.

    Args:
        dout: (B, H, L, K), the gradient of `out`, in its dtype; last dimension contiguous.
        q, k, v, out, lse: what the forward pass read and returned.
        grads: where to write dq, dk and dv; their last dimension is contiguous, and dk and dv have equal strides.
        tiles: in place of `config`'s.
    """
    B, H, L, K = q.shape
    M = k.shape[2]
    dq, dk, dv = grads
    assert dk.stride() == dv.stride()
    if q.numel() == 0:
        dk.zero_()
        dv.zero_()
        return
    c = tiles or safe_config(K, q.dtype, _capability(q.device), L, M)
    main, rest = head_tiles(K)
    head = {"WIDTH": K, "MAIN": main, "REST": rest}
    delta = torch.empty_like(lse)
    with torch.cuda.device_of(q):
        align, strides = _layout(out, dout)
        attention_delta_kernel[(B * H * triton.cdiv(L, DELTA_ROWS),)](
            delta, out, dout, *strides, H, ALIGN=align, QUERIES=L, ROWS=DELTA_ROWS, **head, num_warps=4
        )
        align, strides = _layout(q, k, v, dout, dq, dk)
        blocks = triton.cdiv(M, c.rows) + triton.cdiv(L, c.rows)
        attention_backward_kernel[(B * H * blocks,)](
            dq, dk, dv, dout, q, k, v, lse, delta, *strides, H, math.log2(math.e) / math.sqrt(K), 1.0 / math.sqrt(K),
            ALIGN=align, QUERIES=L, KEYS=M, ROWS=c.rows, TILE=c.tile, QUERY_TAIL=tail(L, c.tile),
            KEY_TAIL=tail(M, c.tile), **head, UPCAST=_INTERPRETED and q.dtype == torch.bfloat16,
            num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
