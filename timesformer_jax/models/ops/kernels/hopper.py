"""Temporal attention (section 3, equation 8) for NVIDIA's Hopper GPUs, in Pallas (Mosaic GPU).

XLA lays queries, keys and values out anew before attention over a middle axis, and writes and reads
the logits; here the projection is read where it lies and only the result is written. What is left
is the traffic, so no time can be under

    forward   4 B T N h d s bytes / bandwidth    (queries, keys, values; out)
    backward  7 B T N h d s bytes / bandwidth    (those and out's gradient; qkv's gradient)

of s bytes a number: base at 8 x 224 in bfloat16 moves 9.6 MB a clip and layer forward, 2.9 us at
3.35 TB/s. The products must then fit beside it, which on tensor cores they do although most of them
are thrown away: the sequences of several positions make one tile of at least 64 rows (the least
that the instruction takes), whose logits are all computed, and masked outside each position.

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

ROWS = 64  # of one tensor core product
SHARED_MEMORY = 227 * 1024  # bytes that a block can have on an H100 or H200
LOG2_E = math.log2(math.e)  # exp2 is an instruction, exp is not


def unsupported(shape: tuple[int, ...], dtype: Any, together: int = 1) -> str | None:
    """Why this kernel does not take qkv of a shape (B, T, N, 3, h, d) and dtype; None if it does.

    It takes the frames of every recipe of the paper: 8, 16, 32, 64 and 96, and 24, 48 and 128.
    """
    *_, t, _, _, h, d = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"tensor cores round {jnp.dtype(dtype).name}; it takes bfloat16 and float16"
    if d not in (32, 64, 128):
        return f"heads have {d} channels; it takes 32, 64 and 128"
    rows = _rows(t)
    if rows is None:
        return f"{t} frames make no tile; it takes multiples of 8 that divide 64, 96 or 128"
    if h % together:
        return f"{h} heads are not a multiple of {together}"
    if 7 * rows * together * d * jnp.dtype(dtype).itemsize + 8192 > SHARED_MEMORY:  # backward
        return f"{t} frames of {together} x {d} channels exceed the shared memory"
    return None


def _rows(t: int) -> int | None:
    """Rows of a tile, whole sequences of t frames; None if there is none."""
    return next((rows for rows in (64, 96, 128) if t % 8 == 0 and rows % t == 0), None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(qkv: jax.Array, together: int = 1, interpret: Any = None) -> jax.Array:
    """Attention of every patch to its own position in all frames, by the kernels here.

    Args:
      qkv: (B, T, N, 3, h, d), of which `unsupported` finds nothing to say. The products are taken
        in its dtype and summed in float32, as is the softmax.
      together: heads that a block of threads takes. Their channels lie side by side: more heads are
        fewer and larger copies, and fewer blocks at a time in the shared memory.
      interpret: `InterpretGPUParams` of Pallas, to run on the host, where the memory, the copies
        and the barriers are simulated.

    Returns:
      (B, T, N, h * d), the heads side by side.
    """
    shape = (*qkv.shape[:3], math.prod(qkv.shape[4:]))
    return _call(_forward_block, (qkv,), shape, together, interpret)


def _forward(qkv: jax.Array, together: int, interpret: Any) -> tuple[jax.Array, jax.Array]:
    return attention(qkv, together, interpret), qkv  # weights are cheaper computed again than kept


def _backward(together: int, interpret: Any, qkv: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    shape = (*qkv.shape[:3], math.prod(qkv.shape[3:]))
    return (_call(_backward_block, (qkv, g), shape, together, interpret).reshape(qkv.shape),)


attention.defvjp(_forward, _backward)


class _Tile(NamedTuple):
    """What a block of threads works on: `together` heads at `positions` positions, `rows` tokens.

    Rows count frames fastest: row p * t + i is frame i at the tile's position p.
    """

    t: int
    n: int
    heads: int
    d: int
    dtype: Any
    rows: int
    together: int
    interpret: bool

    @property
    def positions(self) -> int:
        return self.rows // self.t

    def products(self) -> Iterator[tuple[Any, int]]:
        """Each product of ROWS rows: the channels of its head, and the row where it starts.

        Of 96 rows the two overlap, and agree there.
        """
        for head in range(self.together):
            for start in sorted({0, self.rows - ROWS}):
                yield pl.ds(head * self.d, self.d), start

    def statistics(self, rows: Any, head: Any) -> Any:
        """Where the numbers are, one a row, of some rows of the head with these channels."""
        return pl.ds(head.start // self.d * self.rows + rows.start, rows.size)

    def shared(self) -> Any:
        """(rows, together * d) of shared memory, as the copy engine lays it for tensor cores."""
        # Rows are contracted in whole swizzled blocks, of as many rows as a block has columns.
        swizzle = min(128, self.d * self.dtype.itemsize) if self.rows % 64 == 0 else 64
        tiling = plgpu.TilingTransform((8, swizzle // self.dtype.itemsize))
        return plgpu.SMEM(
            (self.rows, self.together * self.d),
            self.dtype,
            transforms=(tiling, plgpu.SwizzleTransform(swizzle)),
        )

    def _slice(self, ref: Any, part: int, position: Any) -> Any:
        """(t, together * d) of `ref` (B, T, N, parts * h * d): this block's heads of one part."""
        width = self.together * self.d
        first = (part * (self.heads // self.together) + lax.axis_index("heads")) * width
        return ref.at[lax.axis_index("clip"), :, position, pl.ds(first, width)]

    def load(self, ref: Any, part: int, tile: Any, arrived: Any) -> None:
        """Starts the copies of every position's rows; the last one's, where positions end early."""
        for p in range(self.positions):
            position = lax.axis_index("tile") * self.positions + p
            source = self._slice(ref, part, jnp.minimum(position, self.n - 1))
            plgpu.copy_gmem_to_smem(source, tile.at[pl.ds(p * self.t, self.t)], arrived)

    def store(self, tile: Any, ref: Any, part: int) -> None:
        """Starts the copies back of every position that there is."""
        for p in range(self.positions):
            position = lax.axis_index("tile") * self.positions + p

            @pl.when(position < self.n)
            def _(p: int = p, position: Any = position) -> None:
                target = self._slice(ref, part, position)
                plgpu.copy_smem_to_gmem(
                    tile.at[pl.ds(p * self.t, self.t)], target, commit_group=False
                )

    def product(self, a: Any, b: Any) -> jax.Array:
        """a b, summed in float32; a (ROWS, rows) in registers, b (rows, d) in shared memory."""
        if self.interpret:  # which has no tensor cores
            return jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        return _wgmma(a, b)

    def product_transposed(self, a: Any, b: Any) -> jax.Array:
        """a b^T, summed in float32; a (ROWS, d) and b (rows, d) in shared memory."""
        if self.interpret:
            return jnp.dot(a[...], b[...].T, preferred_element_type=jnp.float32)
        return _wgmma(a, b.T)

    def logits(self, a: Any, b: Any, start: int) -> jax.Array:
        """a b^T in units of log 2, -inf where a row, from `start`, is of another position."""
        shape = (ROWS, self.rows)
        logits = self.product_transposed(a, b) * (self.d**-0.5 * LOG2_E)
        if self.positions == 1:
            return logits
        row, column = (
            lax.broadcasted_iota(jnp.int32, shape, axis)
            if self.interpret
            else plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        return jnp.where((row + start) // self.t == column // self.t, logits, -jnp.inf)

    def by_column(self, statistics: Any, head: Any) -> jax.Array:
        """The numbers of a head's rows, in shared memory, to (ROWS, rows)."""
        along = statistics[self.statistics(pl.ds(0, self.rows), head)]
        if not self.interpret:
            along = plgpu.layout_cast(along, plgpu.Layout.WGMMA.reduce(0))
        return lax.broadcast_in_dim(along, (ROWS, self.rows), (1,))


def _wgmma(a: Any, b: Any) -> jax.Array:
    def run(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(run, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def _by_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, (0,))


def _call(
    block: Callable, inputs: tuple, shape: tuple[int, ...], together: int, interpret: Any
) -> jax.Array:
    """Runs `block` for all heads, positions and clips: it reads `inputs`, the first of them qkv."""
    b, t, n, _, heads, d = inputs[0].shape
    dtype = inputs[0].dtype
    rows = _rows(t)
    assert rows is not None  # `unsupported` refuses such a length
    tile = _Tile(t, n, heads, d, dtype, rows, together, interpret is not None)
    kernel = plgpu.kernel(
        functools.partial(block, tile),
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(heads // together, pl.cdiv(n, tile.positions), b),
        grid_names=("heads", "tile", "clip"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(*(x.reshape(b, t, n, -1) for x in inputs))


def _forward_block(tile: _Tile, qkv: Any, out: Any) -> None:
    def run(q: Any, k: Any, v: Any, o: Any, arrived: Any) -> None:
        for part, ref in enumerate((q, k, v)):
            tile.load(qkv, part, ref, arrived)
        plgpu.barrier_wait(arrived)
        for head, start in tile.products():
            rows, every = (pl.ds(start, ROWS), head), (slice(None), head)
            logits = tile.logits(q.at[rows], k.at[every], start)
            weights = jnp.exp2(logits - _by_row(logits.max(axis=1), logits.shape))
            attended = tile.product(weights.astype(tile.dtype), v.at[every])
            attended /= _by_row(weights.sum(axis=1), attended.shape)
            o[rows] = attended.astype(tile.dtype)
        plgpu.commit_smem()
        tile.store(o, out, 0)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    arrived = plgpu.Barrier(num_arrivals=3 * tile.positions)
    pl.run_scoped(run, *[tile.shared()] * 4, arrived)


def _backward_block(tile: _Tile, qkv: Any, g: Any, out: Any) -> None:
    """Of weights P, whose gradient is dP = g v^T, and D = sum(P dP) of each query:

    dS = P (dP - D); dq = dS k / sqrt(d); dk = dS^T q / sqrt(d); dv = P^T g. The transposed weights
    are computed from the transposed logits and what the queries' pass leaves of each query: D, and
    log2 of the sum of its exponentials.
    """

    def run(q, k, v, do, dq, dk, dv, total, inner, arrived) -> None:
        for part, ref in enumerate((q, k, v)):
            tile.load(qkv, part, ref, arrived)
        tile.load(g, 0, do, arrived)
        plgpu.barrier_wait(arrived)
        scale = tile.d**-0.5
        for head, start in tile.products():  # of queries
            rows, every = (pl.ds(start, ROWS), head), (slice(None), head)
            logits = tile.logits(q.at[rows], k.at[every], start)
            most = logits.max(axis=1)
            weights = jnp.exp2(logits - _by_row(most, logits.shape))
            sums = weights.sum(axis=1)
            weights /= _by_row(sums, weights.shape)
            d_weights = tile.product_transposed(do.at[rows], v.at[every])
            each = (weights * d_weights).sum(axis=1)
            d_logits = (weights * (d_weights - _by_row(each, weights.shape))).astype(tile.dtype)
            dq[rows] = (tile.product(d_logits, k.at[every]) * scale).astype(tile.dtype)
            total[tile.statistics(*rows)] = most + jnp.log2(sums)
            inner[tile.statistics(*rows)] = each
        for head, start in tile.products():  # of keys
            rows, every = (pl.ds(start, ROWS), head), (slice(None), head)
            logits = tile.logits(k.at[rows], q.at[every], start)
            weights = jnp.exp2(logits - tile.by_column(total, head))
            dv[rows] = tile.product(weights.astype(tile.dtype), do.at[every]).astype(tile.dtype)
            d_weights = tile.product_transposed(v.at[rows], do.at[every])
            d_logits = (weights * (d_weights - tile.by_column(inner, head))).astype(tile.dtype)
            dk[rows] = (tile.product(d_logits, q.at[every]) * scale).astype(tile.dtype)
        plgpu.commit_smem()
        for part, ref in enumerate((dq, dk, dv)):
            tile.store(ref, out, part)
        plgpu.commit_smem_to_gmem_group()
        plgpu.wait_smem_to_gmem(0)

    statistics = plgpu.SMEM((tile.together * tile.rows,), jnp.float32)
    arrived = plgpu.Barrier(num_arrivals=4 * tile.positions)
    pl.run_scoped(run, *[tile.shared()] * 7, statistics, statistics, arrived)
