"""Temporal attention (equation 8) on a TPU: every position attends to itself along the frames."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


class Plan(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
      frames: T; positions: N; heads: h; channels: d of a head.
      cls: whether every position has a class token, one more token of its sequence.
      group: positions whose sequences share a product.
      block: positions of a step of the grid, a multiple of the rows of a tile.
      interpret: as `pallas_call` takes it.
    """

    frames: int
    positions: int
    heads: int
    channels: int
    cls: bool
    group: int
    block: int
    interpret: Any

    @property
    def width(self) -> int:
        return self.heads * self.channels

    @property
    def tokens(self) -> int:
        return self.frames + self.cls

    @property
    def slab(self) -> int:
        """Channels whose heads are loaded and stored together: whole heads and whole lane rows."""
        slab = math.lcm(self.channels, LANES)
        return slab if self.width % slab == 0 else self.width


def rows_of(dtype: Any) -> int:
    """The rows of a tile in memory: values of 16 bits lie in pairs."""
    return 32 // jnp.dtype(dtype).itemsize


def unsupported(shape: tuple[int, ...], dtype: Any, cls: bool = False) -> str | None:
    """Why the kernels do not support qkv (B, T, N, 3, h, d) of a dtype; None if they do."""
    _, t, _, _, _, d = shape
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"no product of {jnp.dtype(dtype).name}"
    if d % 8 or d > LANES:
        return f"heads have {d} channels; the kernel takes multiples of 8 up to {LANES}"
    if t + cls > 32:
        return f"{t + cls} tokens; the kernel takes up to 32"
    return None


def plan(shape: tuple[int, ...], dtype: Any, cls: bool, heads: int, interpret: Any) -> Plan:
    _, t, n, width = shape
    rows = rows_of(dtype)
    tokens = t + cls
    group = 8
    while group < 128 and 2 * group * tokens <= LANES:
        group *= 2
    group = min(group, max(8, 1 << (n - 1).bit_length()))
    loaded = max(group, rows)
    # Of qkv, the result and their gradients, each twice: one is computed on while one is moved.
    row = tokens * (2 * width + 2 * width // 3) * jnp.dtype(dtype).itemsize
    block = max(1, min(pl.cdiv(n, loaded), 24 * 2**20 // (row * loaded)))
    block = pl.cdiv(pl.cdiv(n, loaded), pl.cdiv(pl.cdiv(n, loaded), block)) * loaded
    return Plan(t, n, heads, width // 3 // heads, cls, group, block, interpret)


def attention(
    patches: jax.Array, cls: jax.Array | None, heads: int, interpret: Any = False
) -> tuple[jax.Array, jax.Array | None]:
    """softmax(q k^T / sqrt(d)) v along the frames, for every clip, position and head.

    Args:
      patches: (B, T, N, 3 * h * d), the projection of queries, keys and values, side by side.
      cls: (B, N, 3 * h * d), the projection of each position's class token; None if there is none.

    Returns:
      (B, T, N, h * d), and (B, N, h * d) or None.
    """
    how = plan(patches.shape, patches.dtype, cls is not None, heads, interpret)
    out = _attention(how, (patches,) if cls is None else (patches, cls))
    return out if cls is not None else (out[0], None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: Plan, qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return _call(how, _forward, (qkv,), how.width)


def _vjp_forward(how: Plan, qkv: tuple) -> tuple:
    return _attention(how, qkv), qkv


def _vjp_backward(how: Plan, qkv: tuple, g: tuple) -> tuple:
    return (_call(how, _backward, (qkv, g), 3 * how.width),)


_attention.defvjp(_vjp_forward, _vjp_backward)


def _call(how: Plan, body: Any, inputs: tuple, width: int) -> tuple[jax.Array, ...]:
    """Runs `body` on blocks of positions of each clip.

    Args:
      inputs: tuples of an array (B, T, N, C) and, where there is a class token, one of (B, N, C).
      width: C of the tuple that is returned.
    """

    def spec(c: int, whole: bool) -> pl.BlockSpec:
        if whole:
            return pl.BlockSpec((1, how.frames, how.block, c), lambda b, i: (b, 0, i, 0))
        return pl.BlockSpec((1, how.block, c), lambda b, i: (b, i, 0))

    first = inputs[0][0]
    b, dtype = len(first), first.dtype
    shapes = [(b, how.frames, how.positions, width), (b, how.positions, width)]
    out_shape = tuple(jax.ShapeDtypeStruct(s, dtype) for s in shapes[: 1 + how.cls])
    return pl.pallas_call(
        functools.partial(_kernel, how, body, len(inputs)),
        grid=(b, pl.cdiv(how.positions, how.block)),
        in_specs=[spec(a.shape[-1], i == 0) for pair in inputs for i, a in enumerate(pair)],
        out_specs=tuple(spec(width, i == 0) for i in range(1 + how.cls)),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=64 * 2**20
        ),
        interpret=how.interpret,
    )(*(a for pair in inputs for a in pair))


def _kernel(how: Plan, body: Any, inputs: int, *refs: Any) -> None:
    parts = [refs[i : i + 1 + how.cls] for i in range(0, len(refs), 1 + how.cls)]
    rows = max(how.group, rows_of(refs[0].dtype))
    start = pl.program_id(1) * how.block

    def step(i: jax.Array, _: None) -> None:
        at = pl.multiple_of(i * rows, rows)
        tiles = [Tile(how, part, at, rows, how.positions - start - at) for part in parts]
        stages = [body(how, lane, *tiles) for lane in range(0, how.width, how.slab)]
        _in_turn(stages)

    steps = jnp.minimum(how.block, how.positions - start + rows - 1) // rows
    jax.lax.fori_loop(0, steps, step, None)


class Tile(NamedTuple):
    """Some positions of a block (1, T, block, C), of class tokens (1, block, C) too."""

    how: Plan
    refs: tuple
    at: jax.Array
    rows: int
    valid: jax.Array  # positions of the tile that are there

    def load(self, lane: int, clean: bool = True) -> list[jax.Array]:
        """Channels from `lane` on, of group after group: (tokens * group, slab).

        What lies behind the last position is not defined, and set to zero if `clean`.
        """
        how = self.how
        lanes, rows = slice(lane, lane + how.slab), pl.ds(self.at, self.rows)
        x = self.refs[0][0, :, rows, lanes]
        if how.cls:
            x = jnp.concatenate([x, self.refs[1][:, rows, lanes]])
        if how.positions % self.rows and clean:
            x = _keep(x, lambda row, _: row < self.valid)
        if self.rows == how.group:
            return [x.reshape(-1, how.slab)]
        wide = x.astype(jnp.float32)
        return [
            wide[:, i : i + how.group].reshape(-1, how.slab).astype(x.dtype)
            for i in range(0, self.rows, how.group)
        ]

    def store(self, lane: int, parts: list[jax.Array]) -> None:
        how = self.how
        lanes, rows = slice(lane, lane + how.slab), pl.ds(self.at, self.rows)
        parts = [part.reshape(how.tokens, how.group, how.slab) for part in parts]
        x = jnp.concatenate(parts, axis=1).astype(self.refs[0].dtype)
        self.refs[0][0, :, rows, lanes] = x[: how.frames]
        if how.cls:
            self.refs[1][:, rows, lanes] = x[how.frames :]


def _keep(x: jax.Array, keep: Any) -> jax.Array:
    """x where keep(row, lane), zero elsewhere, also where x is NaN."""
    bits = pltpu.bitcast(x, jnp.int32)
    row, lane = (
        jax.lax.broadcasted_iota(jnp.int32, bits.shape, i) for i in (x.ndim - 2, x.ndim - 1)
    )
    if x.dtype.itemsize == 4:
        mask = jnp.where(keep(row, lane), -1, 0)
    else:  # two rows in a word, the first in its low half
        low, high = keep(2 * row, lane), keep(2 * row + 1, lane)
        mask = jnp.where(low, 0xFFFF, 0) | jnp.where(high, -0x10000, 0)
    return pltpu.bitcast(bits & mask, x.dtype)


def _head(how: Plan, x: jax.Array, head: int) -> jax.Array:
    """(rows, slab) with zeros in the channels of the other heads."""
    if how.channels == how.slab:
        return x
    first = head * how.channels
    return _keep(x, lambda _, lane: (lane >= first) & (lane < first + how.channels))


def _weights(how: Plan, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(logits - largest) of keys x queries, and the sums over the keys (1, queries)."""
    queries = logits.shape[1]
    logits = logits.reshape(how.tokens, how.group, queries)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, i) for i in (1, 2))
    logits = jnp.where(row == column & (how.group - 1), logits, -jnp.inf)
    largest = logits.max(axis=(0, 1), keepdims=True)
    weights = jnp.exp2((logits - largest) * (math.log2(math.e) / math.sqrt(how.channels)))
    weights = weights.reshape(-1, queries)
    return weights, weights.sum(axis=0, keepdims=True)


AHEAD = int(__import__("os").environ.get("AHEAD", "2"))


def _in_turn(stages: list) -> None:
    live = []
    stages = iter(stages)
    done = False
    while not done or live:
        if not done:
            new = next(stages, None)
            if new is None:
                done = True
            else:
                live.append(new)
        for g in list(live):
            if next(g, StopIteration) is StopIteration:
                live.remove(g)


def _dot(a: jax.Array, b: jax.Array, i: int, j: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (([i], [j]), ([], [])), preferred_element_type=jnp.float32)


def _transposed_heads(how: Plan, x: jax.Array) -> list[jax.Array]:
    """(rows, slab) to an array (d, rows) for each head."""
    x = x.T
    return [x[i : i + how.channels] for i in range(0, how.slab, how.channels)]


def _forward(how: Plan, lane: int, qkv: Tile, out: Tile) -> Any:
    parts = [qkv.load(part * how.width + lane, clean=part == 2) for part in range(3)]
    logits = [
        [_dot(k, _head(how, q, head), 1, 1) for head in range(how.slab // how.channels)]
        for q, k, _ in zip(*parts)
    ]
    v_t = [_transposed_heads(how, v) for v in parts[2]]
    yield 1
    weights = [[_weights(how, s) for s in heads] for heads in logits]
    yield 2
    results = [
        [
            _dot(v, w.astype(v.dtype), 1, 0) * (1 / total)
            for (w, total), v in zip(heads, values)
        ]
        for heads, values in zip(weights, v_t)
    ]
    yield 3
    dtype = parts[0][0].dtype
    out.store(lane, [jnp.concatenate(heads).astype(dtype).T for heads in results])


def _backward(how: Plan, lane: int, qkv: Tile, g: Tile, out: Tile) -> Any:
    groups = list(zip(*(qkv.load(part * how.width + lane) for part in range(3)), g.load(lane)))
    count = range(how.slab // how.channels)
    logits = [[_dot(k, _head(how, q, head), 1, 1) for head in count] for q, k, _, _ in groups]
    bars = [[_dot(v, _head(how, do, head), 1, 1) for head in count] for _, _, v, do in groups]
    yield 1
    t = [[_transposed_heads(how, x) for x in (q, k, do)] for q, k, _, do in groups]
    saved = []
    dtype = groups[0][0].dtype
    for heads, heads_bar in zip(logits, bars):
        saved.append([])
        for s, weights_bar in zip(heads, heads_bar):
            weights, total = _weights(how, s)
            weights = weights * (1 / total)
            product = weights * weights_bar
            along = product.sum(axis=0, keepdims=True)
            logits_bar = (product - weights * along).astype(dtype)
            saved[-1].append((weights.astype(dtype), logits_bar))
    yield 2
    scale = 1 / math.sqrt(how.channels)
    results = [
        [
            (
                _dot(k, logits_bar, 1, 0) * scale,
                _dot(q, logits_bar, 1, 1) * scale,
                _dot(do, weights, 1, 1),
            )
            for (weights, logits_bar), q, k, do in zip(heads, *ts)
        ]
        for heads, ts in zip(saved, t)
    ]
    yield 3
    for part in range(3):
        out.store(
            part * how.width + lane,
            [jnp.concatenate([h[part] for h in heads]).astype(dtype).T for heads in results],
        )
