"""Temporal attention (section 3, equation 8) for NVIDIA's Hopper GPUs, in Pallas (Mosaic GPU).

For attention along a middle axis XLA transposes queries, keys and values, and writes and reads the
logits. This kernel reads the projection in its own layout and writes only the result. The memory
traffic is a lower bound of its time:

    forward   4 B T N h d s bytes / bandwidth    (queries, keys, values; output)
    backward  7 B T N h d s bytes / bandwidth    (these and the output's gradient; qkv's)

for s bytes a number: base at 8 x 224 in bfloat16 moves 9.6 MB a clip and layer forward, 2.9 us at
3.35 TB/s. The matrix products take less, although most of their results are discarded: one tile has
the sequences of several positions, at least the 64 rows that the tensor core instruction (wgmma)
needs. All its logits are computed, and those between different positions are masked.

B clips, T frames, N positions, h heads of d channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

WGMMA_ROWS = 64  # of one tensor core product
SHARED_MEMORY = 227 * 1024  # bytes of a block on an H100 or H200
LOG2_E = math.log2(math.e)  # the GPU has an instruction for exp2, not for exp

QKV = Float[Array, "b t n 3 h d"]
Result = Float[Array, "b t n hd"]
# What tensor cores compute for a chunk of queries (WGMMA_ROWS) and all rows of a tile: logits,
# weights and their gradients, in registers.
Logits = Float[Array, "64 rows"]


def unsupported(shape: tuple[int, ...], dtype: Any, heads_per_block: int = 1) -> str | None:
    """Why this kernel does not support qkv (B, T, N, 3, h, d) of a dtype; None if it does.

    It supports the frames of every recipe of the paper, 8, 16, 32, 64 and 96, and 24, 48 and 128.
    """
    *_, t, _, _, h, d = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"tensor cores round {jnp.dtype(dtype).name}; it takes bfloat16 and float16"
    if d not in (32, 64, 128):
        return f"heads have {d} channels; it takes 32, 64 and 128"
    rows = tile_rows(t)
    if rows is None:
        return f"{t} frames make no tile; it takes multiples of 8 that divide 64, 96 or 128"
    if h % heads_per_block:
        return f"{h} heads are not a multiple of {heads_per_block}"
    backward = 7 * rows * heads_per_block * d * jnp.dtype(dtype).itemsize + 8192
    if backward > SHARED_MEMORY:
        return f"{t} frames of {heads_per_block} x {d} channels exceed the shared memory"
    return None


def tile_rows(t: int) -> int | None:
    """Rows of a tile, which holds whole sequences of t frames; None if no tile size fits."""
    return next((rows for rows in (64, 96, 128) if t % 8 == 0 and rows % t == 0), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(qkv: QKV, heads_per_block: int = 1, interpret: Any = None) -> Result:
    """Attention of every patch to its own position in all frames.

    Args:
      qkv: (B, T, N, 3, h, d), of a shape and dtype for which `unsupported` returns None. Products
        take their operands in its dtype; sums and the softmax are float32.
      heads_per_block: heads that one block of threads computes. Their channels are contiguous: more
        heads make fewer and larger copies, and leave shared memory for fewer blocks at a time.
      interpret: Pallas's `InterpretGPUParams`, to run on the host with simulated memory, copies and
        barriers.

    Returns:
      (B, T, N, h * d), the heads side by side.
    """
    shape = (*qkv.shape[:3], math.prod(qkv.shape[4:]))
    return _run(_forward_kernel, (qkv,), shape, heads_per_block, interpret)


def _forward(qkv: QKV, heads_per_block: int, interpret: Any) -> tuple[Result, QKV]:
    # The weights are not saved: computing them again is faster than reading them.
    return attention(qkv, heads_per_block, interpret), qkv


def _backward(heads_per_block: int, interpret: Any, qkv: QKV, g: Result) -> tuple[QKV]:
    shape = (*qkv.shape[:3], math.prod(qkv.shape[3:]))
    gradient = _run(_backward_kernel, (qkv, g), shape, heads_per_block, interpret)
    return (gradient.reshape(qkv.shape),)


attention.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """The tokens of one block of threads: `heads_per_block` heads at `positions` positions.

    Of its `rows` rows, row p * t + i is frame i at the tile's position p. A "chunk" is the
    WGMMA_ROWS rows of one product.
    """

    t: int
    n: int
    heads: int
    d: int
    dtype: Any
    rows: int
    heads_per_block: int
    interpret: bool

    @property
    def positions(self) -> int:
        return self.rows // self.t

    def chunks(self) -> Iterator[tuple[Any, int]]:
        """The channels of the head, and the first row, of each chunk.

        The two chunks of 96 rows overlap, and compute equal values there.
        """
        for head in range(self.heads_per_block):
            for start in sorted({0, self.rows - WGMMA_ROWS}):
                yield pl.ds(head * self.d, self.d), start

    def statistics_slice(self, rows: Any, head: Any) -> Any:
        """The slice of a statistics array, one number a row and head, for rows of one head."""
        return pl.ds(head.start // self.d * self.rows + rows.start, rows.size)

    def shared_memory(self) -> Any:
        """(rows, heads_per_block * d) of shared memory, in the layout that tensor cores read."""
        # Products contract rows in whole swizzle blocks, which are square.
        swizzle = min(128, self.d * self.dtype.itemsize) if self.rows % 64 == 0 else 64
        tiling = plgpu.TilingTransform((8, swizzle // self.dtype.itemsize))
        return plgpu.SMEM(
            (self.rows, self.heads_per_block * self.d),
            self.dtype,
            transforms=(tiling, plgpu.SwizzleTransform(swizzle)),
        )

    def _global_slice(self, array: Any, part: int, position: Any) -> Any:
        """(t, heads_per_block * d) of an array (B, T, N, parts * h * d): a part is q, k or v."""
        width = self.heads_per_block * self.d
        first = (part * (self.heads // self.heads_per_block) + lax.axis_index("heads")) * width
        return array.at[lax.axis_index("clip"), :, position, pl.ds(first, width)]

    def load(self, array: Any, part: int, target: Any, barrier: Any) -> None:
        """Starts copying the rows of every position to shared memory.

        The last tile repeats the last position where it has fewer positions than others.
        """
        for p in range(self.positions):
            position = lax.axis_index("tile") * self.positions + p
            source = self._global_slice(array, part, jnp.minimum(position, self.n - 1))
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(p * self.t, self.t)], barrier)

    def store(self, source: Any, array: Any, part: int) -> None:
        """Starts copying the rows of every position that exists from shared memory."""
        for p in range(self.positions):
            position = lax.axis_index("tile") * self.positions + p

            @pl.when(position < self.n)
            def _(p: int = p, position: Any = position) -> None:
                target = self._global_slice(array, part, position)
                plgpu.copy_smem_to_gmem(
                    source.at[pl.ds(p * self.t, self.t)], target, commit_group=False
                )

    def matmul(self, a: Any, b: Any) -> Float[Array, "64 d"]:
        """a b, summed in float32; a (WGMMA_ROWS, rows) registers, b (rows, d) shared memory."""
        if self.interpret:  # the interpreter has no tensor cores
            return jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return _wgmma(a, b)

    def matmul_transposed(self, a: Any, b: Any) -> Logits:
        """a b^T, summed in float32; a (WGMMA_ROWS, d) and b (rows, d) in shared memory."""
        if self.interpret:
            return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)
        return _wgmma(a, b.T)

    def logits(self, a: Any, b: Any, start: int) -> Logits:
        """a b^T / sqrt(d) log2(e), -inf between different positions; a's first row is `start`."""
        shape = (WGMMA_ROWS, self.rows)
        logits = self.matmul_transposed(a, b) * (self.d**-0.5 * LOG2_E)
        if self.positions == 1:
            return logits
        row, column = (
            lax.broadcasted_iota(jnp.int32, shape, axis)
            if self.interpret
            else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        return jnp.where((row + start) // self.t == column // self.t, logits, -jnp.inf)

    def statistics_as_row(self, statistics: Any, head: Any) -> Logits:
        """The statistics of a head's rows, along the columns of (WGMMA_ROWS, rows)."""
        row = statistics[self.statistics_slice(pl.ds(0, self.rows), head)]
        if not self.interpret:
            row = plgpu.layout_cast(row, plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(row, (WGMMA_ROWS, self.rows), (1,))


def _wgmma(a: Any, b: Any) -> Float[Array, "64 columns"]:
    """a b, of registers or shared memory (64, k) and shared memory (k, columns)."""

    def run(accumulator: Any) -> Float[Array, "64 columns"]:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _as_column(x: Float[Array, " rows"], shape: tuple[int, ...]) -> Float[Array, "rows columns"]:
    """A number for each row, along all columns of `shape`."""
    return lax.broadcast_in_dim(x, shape, (0,))


def _run(
    kernel: Callable, inputs: tuple, shape: tuple[int, ...], heads_per_block: int, interpret: Any
) -> Float[Array, "b t n _"]:
    """Runs `kernel` for all heads, positions and clips; returns an array of `shape`.

    Args:
      kernel: of a tile, the inputs and the output, each (B, T, N, channels) in global memory.
      inputs: qkv (B, T, N, 3, h, d) first.
    """
    b, t, n, _, heads, d = inputs[0].shape
    dtype = inputs[0].dtype
    rows = tile_rows(t)
    assert rows is not None  # `unsupported` refuses such a length
    tile = _Tile(t, n, heads, d, dtype, rows, heads_per_block, interpret is not None)
    run = plgpu.kernel(
        functools.partial(kernel, tile),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(heads // heads_per_block, pl.cdiv(n, tile.positions), b),
        grid_names=("heads", "tile", "clip"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return run(*(x.reshape(b, t, n, -1) for x in inputs))


def _forward_kernel(tile: _Tile, qkv: Any, out: Any) -> None:
    """Writes the result of a tile.

    Refs: qkv (B, T, N, 3 * h * d) and out (B, T, N, h * d) in global memory; q, k, v and o (rows,
    heads_per_block * d) in shared memory.
    """

    def run(q: Any, k: Any, v: Any, o: Any, barrier: Any) -> None:
        for part, ref in enumerate((q, k, v)):
            tile.load(qkv, part, ref, barrier)
        plgpu.barrier_wait(barrier)
        for head, start in tile.chunks():
            chunk, all_rows = (pl.ds(start, WGMMA_ROWS), head), (slice(None), head)
            logits = tile.logits(q.at[chunk], k.at[all_rows], start)
            weights = jnp.exp2(logits - _as_column(logits.max(axis=1), logits.shape))
            attended = tile.matmul(weights.astype(tile.dtype), v.at[all_rows])
            attended /= _as_column(weights.sum(axis=1), attended.shape)
            o[chunk] = attended.astype(tile.dtype)
        plgpu.commit_smem()
        tile.store(o, out, 0)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    barrier = plgpu.Barrier(num_arrivals=3 * tile.positions)
    pl.run_scoped(run, *[tile.shared_memory()] * 4, barrier)


def _backward_kernel(tile: _Tile, qkv: Any, g: Any, out: Any) -> None:
    """The gradients of q, k and v.

    With the weights P, their gradient dP = g v^T, and D = sum(P dP) of each query:

        dS = P (dP - D); dq = dS k / sqrt(d); dk = dS^T q / sqrt(d); dv = P^T g

    A first loop over chunks of queries computes dq, and saves two statistics of each query: D, and
    log2 of the sum of its exponentials. A second loop over chunks of keys computes the transposed
    weights from the transposed logits and these statistics, and from them dk and dv.

    Refs: qkv and out (B, T, N, 3 * h * d) and g (B, T, N, h * d) in global memory; q, k, v, their
    gradients and do, which is a copy of g, (rows, heads_per_block * d), log_sums and inner
    (heads_per_block * rows,) float32 in shared memory.
    """

    def run(q, k, v, do, dq, dk, dv, log_sums, inner, barrier) -> None:
        for part, ref in enumerate((q, k, v)):
            tile.load(qkv, part, ref, barrier)
        tile.load(g, 0, do, barrier)
        plgpu.barrier_wait(barrier)
        _query_gradients(tile, q, k, v, do, dq, log_sums, inner)
        _key_value_gradients(tile, q, k, v, do, dk, dv, log_sums, inner)
        plgpu.commit_smem()
        for part, ref in enumerate((dq, dk, dv)):
            tile.store(ref, out, part)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    statistics = plgpu.SMEM((tile.heads_per_block * tile.rows,), jnp.float32)
    barrier = plgpu.Barrier(num_arrivals=4 * tile.positions)
    pl.run_scoped(run, *[tile.shared_memory()] * 7, statistics, statistics, barrier)


def _query_gradients(tile: _Tile, q, k, v, do, dq, log_sums, inner) -> None:
    """Writes dq and the statistics of the queries, all refs as in `_backward_kernel`."""
    for head, start in tile.chunks():
        queries, all_rows = (pl.ds(start, WGMMA_ROWS), head), (slice(None), head)
        logits = tile.logits(q.at[queries], k.at[all_rows], start)
        largest = logits.max(axis=1)
        weights = jnp.exp2(logits - _as_column(largest, logits.shape))
        sums = weights.sum(axis=1)
        weights /= _as_column(sums, weights.shape)
        d_weights = tile.matmul_transposed(do.at[queries], v.at[all_rows])
        products = (weights * d_weights).sum(axis=1)
        d_logits = (weights * (d_weights - _as_column(products, weights.shape))).astype(tile.dtype)
        d_queries = tile.matmul(d_logits, k.at[all_rows]) * tile.d**-0.5
        dq[queries] = d_queries.astype(tile.dtype)
        log_sums[tile.statistics_slice(*queries)] = largest + jnp.log2(sums)
        inner[tile.statistics_slice(*queries)] = products


def _key_value_gradients(tile: _Tile, q, k, v, do, dk, dv, log_sums, inner) -> None:
    """Writes dk and dv, from the statistics of `_query_gradients`."""
    for head, start in tile.chunks():
        keys, all_rows = (pl.ds(start, WGMMA_ROWS), head), (slice(None), head)
        logits = tile.logits(k.at[keys], q.at[all_rows], start)
        weights = jnp.exp2(logits - tile.statistics_as_row(log_sums, head))
        d_values = tile.matmul(weights.astype(tile.dtype), do.at[all_rows])
        dv[keys] = d_values.astype(tile.dtype)
        d_weights = tile.matmul_transposed(v.at[keys], do.at[all_rows])
        inner_row = tile.statistics_as_row(inner, head)
        d_logits = (weights * (d_weights - inner_row)).astype(tile.dtype)
        d_keys = tile.matmul(d_logits, q.at[all_rows]) * tile.d**-0.5
        dk[keys] = d_keys.astype(tile.dtype)
