"""Temporal attention on a TPU for any number of frames: a running softmax over blocks of keys.

A step of the grid takes one tile of positions, one slab of heads, a block of queries and one of
keys. The forward kernel keeps the largest logit, the sum and the weighted values of its queries
while the blocks of keys pass, and writes the logarithm of the sum for the backward kernel. That
one first holds a block as queries while the keys pass, then the same block as keys while the
queries pass, so that it writes the gradients of q, k and v into one array.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from timesformer_jax.models.ops.kernels.tpu_heads import LANES, NN, NT, dot, tile_rows
from timesformer_jax.models.ops.kernels.tpu_temporal_parts import (
    VMEM,
    WORDS,
    Arrays,
    Buffers,
    Plan,
    each_position,
    head_product,
    pack,
    transposed_heads,
    unpack,
)

LogSums = Float[Array, "b slabs rows tokens"]

_LOOPS: Any = ("parallel",) * 3 + ("arbitrary",) * 2
PARAMS = pltpu.CompilerParams(dimension_semantics=_LOOPS, vmem_limit_bytes=VMEM)


class Blocks(NamedTuple):
    """How the sequences are cut.

    Attributes:
      how: heads and sizes; its `block` is the positions of a tile.
      size: tokens of a block of queries or keys.
    """

    how: Plan
    size: int

    @property
    def number(self) -> int:
        return pl.cdiv(self.how.tokens, self.size)

    @property
    def last(self) -> int:
        """Tokens of the last block."""
        return self.how.tokens - (self.number - 1) * self.size

    @property
    def heads(self) -> int:
        return self.how.slab // self.how.channels

    @property
    def slabs(self) -> int:
        return self.how.width // self.how.slab


def blocks(how: Plan) -> Blocks:
    """Blocks of which the last has room for the class token beside its frames."""
    size = LANES
    while how.cls and how.frames % size == 0:
        size -= 16
    return Blocks(how, size)


def forward(how: Plan, qkv: Arrays) -> tuple[Arrays, LogSums]:
    """The result (B, T, N, C) and, where there is a class token, (B, N, C); and log-sums.

    The logarithms to base 2 of the sums of exp(logits) are (B, slabs, positions * heads of a slab,
    tokens) float32, whole tiles and 128 lanes for each block.
    """
    cut = blocks(how)
    b, dtype = len(qkv[0]), qkv[0].dtype
    tiles, group = pl.cdiv(how.positions, how.block), how.block * cut.heads
    specs = [_spec(cut, part, index) for part, index in ((0, "i"), (1, "j"), (2, "j"))]
    shapes = [(b, how.frames, how.positions, how.width), (b, how.positions, how.width)]
    out = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes[: 1 + how.cls]]
    sums = (b, cut.slabs, tiles * group, cut.number * LANES)
    *out, logs = pl.pallas_call(
        functools.partial(_forward, cut),
        grid=(b, tiles, cut.slabs, cut.number, cut.number),
        in_specs=[spec for pair in specs for spec in pair],
        out_specs=[
            *_spec(cut, 0, "i"),
            pl.BlockSpec((1, 1, group, LANES), lambda b, n, s, i, j: (b, s, n, i)),
        ],
        out_shape=[*out, jax.ShapeDtypeStruct(sums, jnp.float32)],
        scratch_shapes=[
            _words(cut, 4),
            pltpu.VMEM((group, cut.size), jnp.float32),
            pltpu.VMEM((group, cut.size), jnp.float32),
            pltpu.VMEM((how.block, how.slab, cut.size), jnp.float32),
        ],
        compiler_params=PARAMS,
        interpret=how.interpret,
    )(*qkv * 3)
    return tuple(out), logs


def backward(how: Plan, qkv: Arrays, out: Arrays, logs: LogSums, g: Arrays) -> Arrays:
    """The gradients of qkv from those of `out`."""
    cut = blocks(how)
    b = len(qkv[0])
    tiles, group = pl.cdiv(how.positions, how.block), how.block * cut.heads
    operands = (qkv, qkv, qkv, g, out)
    places = ((0, "q"), (1, "k"), (2, "k"), (0, "q"), (0, "q"))
    specs = [spec for place in places for spec in _spec(cut, *place)]
    at = functools.partial(_index, cut, "q")
    logs_spec = pl.BlockSpec((1, 1, group, LANES), lambda b, n, s, i, u: (b, s, n, at(i, u)))
    return tuple(
        pl.pallas_call(
            functools.partial(_backward, cut),
            grid=(b, tiles, cut.slabs, cut.number, 2 * cut.number + 1),
            in_specs=[*specs, logs_spec],
            out_specs=_spec(cut, None, "i"),
            out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in qkv],
            scratch_shapes=[
                _words(cut, 6),
                pltpu.VMEM((2, how.block, how.slab, cut.size), jnp.float32),
            ],
            compiler_params=PARAMS,
            interpret=how.interpret,
        )(*(x for operand in operands for x in operand), logs)
    )


def _words(cut: Blocks, arrays: int) -> Any:
    columns = pl.cdiv(cut.how.slab, LANES)
    return pltpu.VMEM((arrays * columns, cut.size * WORDS, LANES), jnp.uint32)


def _index(cut: Blocks, kind: str, i: Any, j: Any) -> Any:
    """The block that step (i, j) of the inner axes of the grid works on.

    "i" and "j" are the axes themselves. In the backward kernel block i has the role of the queries
    ("q") in the first `number` steps and that of the keys ("k") in the next; one step more writes.
    """
    if kind in "ij":
        return i if kind == "i" else j
    other = jnp.where(j < cut.number, j, jnp.minimum(j - cut.number, cut.number - 1))
    return jnp.where((j < cut.number) == (kind == "q"), i, other)


def _spec(cut: Blocks, part: int | None, kind: str) -> list[pl.BlockSpec]:
    """Blocks of an array (B, T, N, parts * h * d), and of (B, N, parts * h * d) of the class token.

    `part` None is that of the gradient which the step of the backward kernel writes.
    """
    how = cut.how

    def lanes(s: Any, u: Any) -> Any:
        if part is not None:
            return part * cut.slabs + s
        now = (u >= cut.number).astype(jnp.int32) + (u >= 2 * cut.number).astype(jnp.int32)
        return now * cut.slabs + s

    def patches(b: Any, n: Any, s: Any, i: Any, j: Any) -> tuple:
        return b, _index(cut, kind, i, j), n, lanes(s, j)

    def token(b: Any, n: Any, s: Any, i: Any, j: Any) -> tuple:
        return b, n, lanes(s, j)

    specs = [
        pl.BlockSpec((1, cut.size, how.block, how.slab), patches),
        pl.BlockSpec((1, how.block, how.slab), token),
    ]
    return specs[: 1 + how.cls]


def _fill(cut: Blocks, buffers: Buffers, array: int, refs: tuple, index: Any) -> None:
    """Brings block `index` to `buffers`: what lies behind the last token is set to zero."""
    buffers.fill(array, 0, pltpu.bitcast(refs[0][0], jnp.uint32))

    @pl.when(index == cut.number - 1)
    def _() -> None:
        how, at = cut.how, cut.last
        if how.cls:
            buffers.fill(array, at - 1, pltpu.bitcast(refs[1][...], jnp.uint32))
        if at < cut.size:
            zeros = jnp.zeros((cut.size - at, WORDS, how.slab), jnp.uint32)
            buffers.fill(array, at, zeros)


def _write(cut: Blocks, buffers: Buffers, array: int, refs: tuple, index: Any) -> None:
    """Writes a block from `buffers`; of the last one what lies behind the frames is dropped."""
    dtype = refs[0].dtype
    refs[0][0] = pltpu.bitcast(buffers.whole(array, 0, cut.size), dtype)
    if cut.how.cls:

        @pl.when(index == cut.number - 1)
        def _() -> None:
            refs[1][...] = pltpu.bitcast(buffers.whole(array, cut.last - 1, 1), dtype)


def _masked(cut: Blocks, logits: Float[Array, "k q"], keys: Any) -> Float[Array, "k q"]:
    """Logits of keys x queries without those of the keys that are not there."""
    if cut.last == cut.size:
        return logits
    row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    return jnp.where(row < cut.how.tokens - keys * cut.size, logits, -jnp.inf)


def _forward(cut: Blocks, *refs: Any) -> None:
    """Takes one block of keys for one block of queries; writes the result after the last keys.

    Args:
      refs: q, k, v and the result, each (1, size, positions, slab) and, where there is a class
        token, (1, positions, slab); the log-sums (1, 1, positions * heads, LANES). Then VMEM: the
        words of `Buffers`; of each query the largest logit and the sum, (positions * heads, size)
        float32; the weighted values, (positions, slab, size) float32.
    """
    how, per = cut.how, 1 + cut.how.cls
    q, k, v, out = (refs[i * per : (i + 1) * per] for i in range(4))
    logs, words, largest, total, weighted = refs[4 * per :]
    i, j = pl.program_id(3), pl.program_id(4)
    buffers, dtype = Buffers(words, how.slab), q[0].dtype
    values = tile_rows(dtype) // WORDS  # of a word

    @pl.when(j == 0)
    def _() -> None:
        _fill(cut, buffers, 0, q, i)
        largest[...] = jnp.full_like(largest, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    _fill(cut, buffers, 1, k, j)
    _fill(cut, buffers, 2, v, j)

    state = (largest, total, weighted)
    each_position(how, functools.partial(_take_keys, cut, buffers, state, dtype, j))

    @pl.when(j == cut.number - 1)
    def _() -> None:
        def finish(word: Any) -> Iterator[None]:
            results = []
            for p in range(values):
                position = word * values + p
                heads = []
                for h in range(cut.heads):
                    channels = slice(h * how.channels, (h + 1) * how.channels)
                    heads.append(
                        weighted[position, channels]
                        * (1 / total[pl.ds(position * cut.heads + h, 1)])
                    )
                results.append(jnp.concatenate(heads).astype(dtype).T)
            yield
            buffers.put(3, word, pack(tuple(results), dtype))

        each_position(how, finish)
        logs[0, 0, :, : cut.size] = largest[...] * how.scale + jnp.log2(total[...])
        _write(cut, buffers, 3, out, i)


def _take_keys(
    cut: Blocks, buffers: Buffers, state: tuple, dtype: Any, j: Any, word: Any
) -> Iterator[None]:
    """Block j of the keys for the queries of one word's positions."""
    how, (largest, total, weighted) = cut.how, state
    values = tile_rows(dtype) // WORDS

    queries, keys, v_ts = (unpack(buffers.take(a, word, cut.size), dtype) for a in range(3))
    logits = [
        [head_product(how, key, query, h) for h in range(cut.heads)]
        for query, key in zip(queries, keys)
    ]
    v_ts = [transposed_heads(how, v) for v in v_ts]
    yield
    weights = []
    for p, heads in enumerate(logits):
        position = word * values + p
        for h, s in enumerate(heads):
            row = pl.ds(position * cut.heads + h, 1)
            s = _masked(cut, s, j)
            new = jnp.maximum(largest[row], s.max(axis=0, keepdims=True))
            keep = jnp.exp2((largest[row] - new) * how.scale)
            exponentials = jnp.exp2((s - new) * how.scale)
            largest[row] = new
            total[row] = total[row] * keep + exponentials.sum(axis=0, keepdims=True)
            weights.append((keep, exponentials.astype(dtype)))
    yield
    for p, heads in enumerate(v_ts):
        position = word * values + p
        for h, v_t in enumerate(heads):
            keep, exponentials = weights[p * cut.heads + h]
            at = (position, slice(h * how.channels, (h + 1) * how.channels))
            weighted[at] = weighted[at] * keep + dot(v_t, exponentials, NN)


def _backward(cut: Blocks, *refs: Any) -> None:
    """Adds what one block of queries and one of keys give to the gradients; writes complete ones.

    Args:
      refs: q, k, v, the gradient of the result, the result and the log-sums as in `_forward`; the
        gradient, of one of q, k and v at a time; the words of `Buffers`, and the sums of two
        gradients, (2, positions, slab, size) float32.
    """
    how, per = cut.how, 1 + cut.how.cls
    operands = [refs[i * per : (i + 1) * per] for i in range(5)]
    logs, out, (words, sums) = refs[5 * per], refs[5 * per + 1 : -2], refs[-2:]
    i, u = pl.program_id(3), pl.program_id(4)
    buffers, dtype = Buffers(words, how.slab), out[0].dtype
    values = tile_rows(dtype) // WORDS
    roles = "qkkqq"

    for array, operand in enumerate(operands):
        # The block i stays where it is while the others pass.
        moves = u < 2 * cut.number
        first = (u == 0) | (u == cut.number)
        own = (u < cut.number) == (roles[array] == "q")

        @pl.when(moves & (first | ~own))
        def _(array: int = array, operand: tuple = operand) -> None:
            _fill(cut, buffers, array, operand, _index(cut, roles[array], i, u))

    @pl.when((u == 0) | (u == cut.number))
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    keys = _index(cut, "k", i, u)
    run = functools.partial(_sum_gradients, cut, buffers, (logs, sums), dtype, keys)

    def finish(array: int, scale: float, word: Any) -> Iterator[None]:
        results = [(sums[array, word * values + p] * scale).astype(dtype).T for p in range(values)]
        yield
        buffers.put(5, word, pack(tuple(results), dtype))

    def write(array: int, scale: float) -> None:
        each_position(how, functools.partial(finish, array, scale))
        _write(cut, buffers, 5, out, i)

    @pl.when(u < cut.number)
    def _() -> None:
        each_position(how, functools.partial(run, True))

    @pl.when((u >= cut.number) & (u < 2 * cut.number))
    def _() -> None:
        each_position(how, functools.partial(run, False))

    @pl.when((u == cut.number - 1) | (u == 2 * cut.number - 1))
    def _() -> None:
        write(0, 1 / math.sqrt(how.channels))

    @pl.when(u == 2 * cut.number)
    def _() -> None:
        write(1, 1.0)


def _sum_gradients(
    cut: Blocks, buffers: Buffers, refs: tuple, dtype: Any, keys: Any, as_queries: bool, word: Any
) -> Iterator[None]:
    """Adds one pair of blocks to the gradient of q, or to those of k and v, for a word's positions.

    Args:
      keys: the block of keys; as_queries: whether the gradient is that of the queries.
    """
    how, (logs, sums) = cut.how, refs
    values = tile_rows(dtype) // WORDS

    parts = [unpack(buffers.take(a, word, cut.size), dtype) for a in range(5)]
    heads = range(cut.heads)
    logits = [
        [head_product(how, key, query, h) for h in heads] for query, key in zip(parts[0], parts[1])
    ]
    bars = [[head_product(how, value, g, h) for h in heads] for value, g in zip(parts[2], parts[3])]
    o_ts, do_ts = ([transposed_heads(how, x) for x in parts[a]] for a in (4, 3))
    x_ts = [transposed_heads(how, x) for x in parts[1 if as_queries else 0]]
    yield
    saved = []
    for p in range(values):
        for h in heads:
            row = pl.ds((word * values + p) * cut.heads + h, 1)
            s = _masked(cut, logits[p][h], keys)
            weights = jnp.exp2(s * how.scale - logs[0, 0, row, : cut.size])
            product = o_ts[p][h].astype(jnp.float32) * do_ts[p][h].astype(jnp.float32)
            along = product.sum(axis=0, keepdims=True)
            logits_bar = (weights * (bars[p][h] - along)).astype(dtype)
            saved.append((weights.astype(dtype), logits_bar))
    yield
    for p in range(values):
        for h in heads:
            weights, logits_bar = saved[p * cut.heads + h]
            at = (word * values + p, slice(h * how.channels, (h + 1) * how.channels))
            sums[0, *at] += dot(x_ts[p][h], logits_bar, NN if as_queries else NT)
            if not as_queries:
                sums[1, *at] += dot(do_ts[p][h], weights, NT)
