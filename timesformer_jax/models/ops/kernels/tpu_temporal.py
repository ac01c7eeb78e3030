"""Temporal attention (equation 8) on a TPU: every position attends to itself along the frames.

The arrays are read and written as the linear layers have them, (B, T, N, C): positions in rows,
channels in lanes. Nothing is moved in memory before or after. By the length of the sequences:

- Up to 32 tokens, as many positions as make up to 128 tokens share the products of a head, which
  are 128 wide in any case; the weights between different positions are set to zero.
- Longer ones have products of their own. Their rows lie a tile apart, and a buffer that is read
  with a stride brings them together.
- Where the sequences of one tile of positions do not fit, `tpu_temporal_running`.

Logits are kept as keys x queries: the maximum and the sum over the keys then add registers, and
do not go through the lanes of one. The backward kernel computes the weights again from q and k.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from timesformer_jax.models.ops.kernels import tpu_temporal_running
from timesformer_jax.models.ops.kernels.tpu_heads import LANES, NN, NT, dot, tile_rows
from timesformer_jax.models.ops.kernels.tpu_temporal_parts import (
    VMEM,
    WORDS,
    Arrays,
    Buffers,
    Plan,
    Tile,
    each_position,
    head_product,
    in_turn,
    keep,
    pack,
    stage,
    transposed_heads,
    unpack,
)

# Bytes of a step of the backward kernel's grid, which are there twice: one step computes while
# another one's are moved. Small steps start sooner, large ones are fewer.
BLOCK = 10 * 2**20
# Bytes of twice a tile and of the buffers of its positions: with more the softmax is a running one.
LARGEST = 50 * 2**20
WIDEST = 384  # channels of a slab with a running softmax, which has more buffers
UNROLLED = 16  # tokens; the heads of longer sequences are a loop, for the compiler's time
# Heads of positions that overlap, where sequences have products of their own and with a running
# softmax.
SINGLE, RUNNING = 32, 8
GROUPED = 32  # tokens; longer sequences have products of their own

# The rows of a group of sequences, in the channels of a slab; weights and their gradients.
Operand = Float[Array, "rows slab"]
Logits = Float[Array, "k q"]


def unsupported(shape: tuple[int, ...], dtype: Any, cls: bool = False) -> str | None:
    """Why the kernels do not support qkv (B, T, N, 3, h, d) of a dtype; None if they do."""
    b, t, n, _, h, d = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"no product of {jnp.dtype(dtype).name}"
    if d % 8 or d > LANES:
        return f"heads have {d} channels; the kernel takes multiples of 8 up to {LANES}"
    how = plan((b, t, n, 3 * h * d), dtype, cls, h, False)
    if how.group == 0 and (how.slab % LANES or how.slab > WIDEST):
        return (
            f"{h} heads of {d} channels are moved {how.slab} channels at once; for {how.tokens} "
            f"tokens the kernel takes multiples of {LANES} up to {WIDEST}"
        )
    return None


def _bytes(how: Plan, dtype: Any, rows: int) -> int:
    """Of qkv, the gradient of the result and the gradient of qkv, of some positions."""
    return rows * how.tokens * 7 * how.width * jnp.dtype(dtype).itemsize


def _fits(how: Plan, dtype: Any, rows: int) -> bool:
    """Whether a tile of whole sequences and what is computed of it fit the memory of a kernel."""
    buffers = 7 * pl.cdiv(how.slab, LANES) * how.length * WORDS * LANES * 4
    return 2 * _bytes(how, dtype, rows) + buffers * (how.group == 1) < LARGEST


def plan(shape: tuple[int, ...], dtype: Any, cls: bool, heads: int, interpret: Any) -> Plan:
    """How the kernels work on qkv (B, T, N, 3 * h * d)."""
    _, t, n, width = shape
    width //= 3
    tokens = t + cls
    group = 1
    if tokens <= GROUPED:
        group = 8
        while 2 * group * tokens <= LANES and group < n:
            group *= 2
    rows = max(group, tile_rows(dtype))
    how = Plan(t, n, heads, width // heads, cls, group, rows, 1, interpret)
    per_word = how.slab // how.channels * tile_rows(dtype) // WORDS
    if not _fits(how, dtype, rows):
        return how._replace(group=0, at_once=_power_of_2(RUNNING // per_word))
    tiles = pl.cdiv(n, rows)
    steps = pl.cdiv(tiles, max(1, BLOCK // _bytes(how, dtype, rows)))
    return how._replace(block=pl.cdiv(tiles, steps) * rows, at_once=_power_of_2(SINGLE // per_word))


def _power_of_2(number: int) -> int:
    """The largest one that is not larger than `number`, from 1 to the words of a tile."""
    return min(WORDS, 1 << max(number, 1).bit_length() - 1)


def attention(
    patches: Float[Array, "b t n qkv"],
    cls: Float[Array, "b n qkv"] | None,
    heads: int,
    interpret: Any = False,
) -> tuple[Float[Array, "b t n qkv//3"], Float[Array, "b n qkv//3"] | None]:
    """softmax(q k^T / sqrt(d)) v along the frames, for every clip, position and head.

    Args:
      patches: (B, T, N, 3 * h * d), the projection of queries, keys and values, side by side.
      cls: (B, N, 3 * h * d), the projection of each position's class token, which is one more
        token of its sequence; None if there is none.
      heads: h.
      interpret: as `pallas_call` takes it, to run without a TPU.

    Returns:
      (B, T, N, h * d) and (B, N, h * d) or None, of the dtype of `patches`, bfloat16 or float32.
      Softmax and sums are float32.
    """
    how = plan(patches.shape, patches.dtype, cls is not None, heads, interpret)
    out, *token = _attention(how, (patches,) if cls is None else (patches, cls))
    return out, token[0] if token else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: Plan, qkv: Arrays) -> Arrays:
    return _vjp_forward(how, qkv)[0]


def _vjp_forward(how: Plan, qkv: Arrays) -> tuple[Arrays, tuple]:
    if how.group:
        return _call(how, FORWARD, (qkv,), how.width), (qkv,)
    out, logs = tpu_temporal_running.forward(how, qkv)
    return out, (qkv, out, logs)


def _vjp_backward(how: Plan, saved: tuple, g: Arrays) -> tuple[Arrays]:
    if how.group:
        return (_call(how, BACKWARD, (*saved, g), 3 * how.width),)
    qkv, out, logs = saved
    return (tpu_temporal_running.backward(how, qkv, out, logs, g),)


_attention.defvjp(_vjp_forward, _vjp_backward)


def _call(how: Plan, way: Pass, inputs: tuple[Arrays, ...], width: int) -> Arrays:
    """Runs `way` on blocks of positions of each clip.

    Args:
      width: C of the arrays that are returned.
    """

    def spec(c: int, whole: bool) -> pl.BlockSpec:
        if whole:
            return pl.BlockSpec((1, how.frames, how.block, c), lambda b, i: (b, 0, i, 0))
        return pl.BlockSpec((1, how.block, c), lambda b, i: (b, i, 0))

    first = inputs[0][0]
    b, dtype = len(first), first.dtype
    shapes = [(b, how.frames, how.positions, width), (b, how.positions, width)]
    scratch = []
    if how.group == 1:
        parts = (sum(pair[0].shape[-1] for pair in inputs) + width) // how.width
        rows = how.length * WORDS
        scratch = [pltpu.VMEM((parts * pl.cdiv(how.slab, LANES), rows, LANES), jnp.uint32)]
    return pl.pallas_call(
        functools.partial(_kernel, how, way, len(inputs)),
        grid=(b, pl.cdiv(how.positions, how.block)),
        in_specs=[spec(a.shape[-1], i == 0) for pair in inputs for i, a in enumerate(pair)],
        out_specs=tuple(spec(width, i == 0) for i in range(1 + how.cls)),
        out_shape=tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes[: 1 + how.cls]),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM
        ),
        interpret=how.interpret,
    )(*(a for pair in inputs for a in pair))


def _kernel(how: Plan, way: Pass, inputs: int, *refs: Any) -> None:
    """Runs `way` on every tile of positions and slab of heads of a block."""
    count = (inputs + 1) * (1 + how.cls)
    arrays = [refs[i : i + 1 + how.cls] for i in range(0, count, 1 + how.cls)]
    rows = max(how.group, tile_rows(refs[0].dtype))
    start = pl.program_id(1) * how.block
    parts = [
        (array, offset) for array in arrays for offset in range(0, array[0].shape[-1], how.width)
    ]

    def step(i: jax.Array, _: None) -> None:
        at = pl.multiple_of(i * rows, rows)
        tile = Tile(how, at, rows, how.positions - start - at)
        if how.tokens <= UNROLLED:
            lanes = range(0, how.width, how.slab)
            units = rows // how.group * (how.slab // how.channels)
            in_turn([_grouped(tile, way, parts, lane) for lane in lanes], max(1, units - 1))
        else:
            jax.lax.fori_loop(0, how.width // how.slab, functools.partial(slab, tile), None)

    def slab(tile: Tile, number: Any, _: None) -> None:
        # A width that is no multiple of whole lane rows is one slab: offsets must be known then.
        one = how.width == how.slab
        lane = 0 if one else pl.multiple_of(number * how.slab, how.slab)
        if how.group > 1:
            in_turn([_grouped(tile, way, parts, lane)])
        else:
            _single(tile, way, parts, refs[-1], lane)

    steps = jnp.minimum(how.block, how.positions - start + rows - 1) // rows
    jax.lax.fori_loop(0, steps, step, None)


def _grouped(tile: Tile, way: Pass, parts: list, lane: Any) -> Iterator[None]:
    """Sequences of `group` positions as one of tokens * group rows, the others' weights zero."""
    how, count = tile.how, len(way.clean)
    operands = []
    for (refs, offset), clean in zip(parts, way.clean):
        x = tile.load(refs, offset + lane)
        # What lies behind the last position is not defined.
        if how.positions % tile.rows and clean:
            x = keep(x, lambda row, _: row < tile.valid)
        if tile.rows > how.group:  # tiles of 32 bits have fewer rows
            wide = x.astype(jnp.float32)
            split = [wide[:, i : i + how.group] for i in range(0, tile.rows, how.group)]
            operands.append([y.reshape(-1, how.slab).astype(x.dtype) for y in split])
        else:
            operands.append([x.reshape(-1, how.slab)])
    results = yield from way.run(how, list(zip(*operands)))
    dtype = parts[0][0][0].dtype
    for (refs, offset), groups in zip(parts[count:], zip(*results)):
        wide = [x.reshape(how.tokens, how.group, how.slab) for x in groups]
        tile.store(refs, offset + lane, jnp.concatenate(wide, axis=1).astype(dtype))


def _single(tile: Tile, way: Pass, parts: list, scratch: Any, lane: Any) -> None:
    """Every position has products of its own; a buffer of words brings its rows together."""
    how, count = tile.how, len(way.clean)
    dtype = parts[0][0][0].dtype
    buffers = Buffers(scratch, how.slab)
    for j, (refs, offset) in enumerate(parts[:count]):
        x = pltpu.bitcast(tile.load(refs, offset + lane), jnp.uint32)
        buffers.fill(j, 0, x)
        if how.length > how.tokens:
            buffers.fill(j, how.tokens, jnp.zeros((how.length - how.tokens, *x.shape[1:]), x.dtype))

    def unit(word: Any) -> Iterator[None]:
        operands = [unpack(buffers.take(j, word, how.length), dtype) for j in range(count)]
        results = yield from way.run(how, list(zip(*operands)))
        for j, groups in enumerate(zip(*results)):
            buffers.put(count + j, word, pack(groups, dtype))

    heads = how.slab // how.channels * tile.rows // WORDS
    each_position(how, unit, max(1, heads - 1))
    for j, (refs, offset) in enumerate(parts[count:]):
        x = buffers.whole(count + j, 0, how.tokens)
        tile.store(refs, offset + lane, pltpu.bitcast(x, dtype))


def _weights(how: Plan, logits: Logits) -> tuple[Logits, Float[Array, "1 q"]]:
    """exp(logits - largest), and the sums over the keys."""
    queries = logits.shape[1]
    if how.group > 1:
        logits = logits.reshape(how.tokens, how.group, queries)
        row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, i) for i in (1, 2))
        logits = jnp.where(row == column & (how.group - 1), logits, -jnp.inf)
        logits = logits.reshape(-1, queries)
    elif how.length > how.tokens:
        row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        logits = jnp.where(row < how.tokens, logits, -jnp.inf)
    largest = logits.max(axis=0, keepdims=True)
    weights = jnp.exp2((logits - largest) * how.scale)
    return weights, weights.sum(axis=0, keepdims=True)


def _forward(how: Plan, groups: list) -> Generator[None, None, list]:
    """From [(q, k, v)] of groups, (tokens * group, slab) each, to [(result,)]."""
    dtype = groups[0][0].dtype
    heads, (q, k, _) = _heads(how, groups)

    def logits(head: int, q: Operand, k: Operand) -> Logits:
        return head_product(how, k, q, head)

    def result(
        weights: tuple[Logits, Float[Array, "1 q"]], v_t: Float[Array, "d k"]
    ) -> Float[Array, "d q"]:
        return dot(v_t, weights[0].astype(dtype), NN) * (1 / weights[1])

    found = yield from stage(logits, heads, q, k)
    v_t = [x for group in groups for x in transposed_heads(how, group[2])]
    weights = yield from stage(functools.partial(_weights, how), found)
    results = yield from stage(result, weights, v_t)
    return _joined(how, [(x,) for x in results], dtype)


def _backward(how: Plan, groups: list) -> Generator[None, None, list]:
    """From [(q, k, v, gradient of the result)] of groups to [(gradients of q, k, v)].

    With P the weights and g the gradient of the result: that of the weights is g v^T, that of the
    logits S = P * (g v^T - the sum of P * g v^T over the keys); those of q, k and v are S k, S^T q
    and P^T g, all of them transposed here.
    """
    dtype = groups[0][0].dtype
    heads, (q, k, v, g) = _heads(how, groups)
    scale = 1 / math.sqrt(how.channels)

    def products(
        head: int, q: Operand, k: Operand, v: Operand, g: Operand
    ) -> tuple[Logits, Logits]:
        return head_product(how, k, q, head), head_product(how, v, g, head)

    def bars(found: tuple[Logits, Logits]) -> tuple[Logits, Logits]:
        weights, total = _weights(how, found[0])
        weights = weights * (1 / total)
        product = weights * found[1]
        along = product.sum(axis=0, keepdims=True)
        return weights.astype(dtype), (product - weights * along).astype(dtype)

    def sums(
        saved: tuple[Logits, Logits],
        q_t: Float[Array, "d q"],
        k_t: Float[Array, "d k"],
        g_t: Float[Array, "d q"],
    ) -> tuple[Float[Array, "d q"], Float[Array, "d k"], Float[Array, "d k"]]:
        weights, logits_bar = saved
        return (
            dot(k_t, logits_bar, NN) * scale,
            dot(q_t, logits_bar, NT) * scale,
            dot(g_t, weights, NT),
        )

    found = yield from stage(products, heads, q, k, v, g)
    q_t, k_t, g_t = (
        [x for group in groups for x in transposed_heads(how, group[i])] for i in (0, 1, 3)
    )
    saved = yield from stage(bars, found)
    return _joined(how, (yield from stage(sums, saved, q_t, k_t, g_t)), dtype)


def _heads(how: Plan, groups: list) -> tuple[list[int], list[list[Operand]]]:
    """The number of each head of each group, and its operands, slabs all of them."""
    count = how.slab // how.channels
    return list(range(count)) * len(groups), [
        [x for x in part for _ in range(count)] for part in zip(*groups)
    ]


def _joined(how: Plan, results: list[tuple], dtype: Any) -> list[tuple[Operand, ...]]:
    """Results (d, rows) of each head of each group to (rows, slab) of each group."""
    count = how.slab // how.channels
    groups = [results[i : i + count] for i in range(0, len(results), count)]
    return [
        tuple(jnp.concatenate(heads).astype(dtype).T for heads in zip(*group)) for group in groups
    ]


class Pass(NamedTuple):
    """A way through a slab.

    Attributes:
      run: takes operands of groups and gives their results, head by head, with a `yield` between.
      clean: for each operand whether what lies behind the last position is set to zero. In the
        forward pass queries and keys there only reach logits that are dropped. But a weight of
        zero times NaN is no zero.
    """

    run: Callable[[Plan, list], Generator[None, None, list]]
    clean: tuple[bool, ...]


FORWARD = Pass(_forward, (False, False, True))
BACKWARD = Pass(_backward, (True,) * 4)
