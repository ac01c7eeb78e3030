"""What the kernels of temporal attention on a TPU have in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from timesformer_jax.models.ops.kernels.tpu_heads import LANES, LOG2_E, NT, dot, round_up

VMEM = 60 * 2**20  # a v5p has 64 MiB, a v5e and a v6e 128
WORDS = 8  # rows of 32 bits in a tile

# An array (B, T, N, C) and, where there is a class token, one of (B, N, C).
Arrays = tuple[Float[Array, "b ... _"], ...]


class Plan(NamedTuple):
    """What the kernels are compiled for.

    Attributes:
      frames: T; positions: N; heads: h; channels: d of a head.
      cls: whether every position has a class token, one more token of its sequence.
      group: positions whose sequences share a product; 0 for a running softmax.
      block: positions of a step of the grid, a multiple of the rows of a tile.
      at_once: words of a tile whose positions overlap; the others are a loop.
      interpret: as `pallas_call` takes it.
    """

    frames: int
    positions: int
    heads: int
    channels: int
    cls: bool
    group: int
    block: int
    at_once: int
    interpret: Any

    @property
    def width(self) -> int:
        return self.heads * self.channels

    @property
    def tokens(self) -> int:
        return self.frames + self.cls

    @property
    def length(self) -> int:
        """Rows of a sequence that has products of its own: whole tiles in every dtype."""
        return round_up(self.tokens, 16)

    @property
    def scale(self) -> float:
        """What logits are multiplied by, whose exponentials are powers of 2."""
        return LOG2_E / math.sqrt(self.channels)

    @property
    def slab(self) -> int:
        """Channels whose heads are loaded and stored together: whole heads and whole lane rows."""
        slab = math.lcm(self.channels, LANES)
        return slab if self.width % slab == 0 else self.width


class Tile(NamedTuple):
    """Some positions of a block (1, T, block, C), and of class tokens (1, block, C).

    Attributes:
      at: the first of them; rows: their number; valid: how many of them are there.
    """

    how: Plan
    at: jax.Array
    rows: int
    valid: jax.Array

    def load(self, refs: tuple, lane: Any) -> Float[Array, "tokens rows slab"]:
        """The channels from `lane` on."""
        at = (pl.ds(self.at, self.rows), pl.ds(lane, self.how.slab))
        x = refs[0][0, :, *at]
        return jnp.concatenate([x, refs[1][:, *at]]) if self.how.cls else x

    def store(self, refs: tuple, lane: Any, x: Float[Array, "tokens rows slab"]) -> None:
        at = (pl.ds(self.at, self.rows), pl.ds(lane, self.how.slab))
        refs[0][0, :, *at] = x[: self.how.frames]
        if self.how.cls:
            refs[1][:, *at] = x[self.how.frames :]


class Buffers(NamedTuple):
    """Arrays of words in VMEM that are written tile by tile and read position by position.

    The rows of a position lie a tile apart in a block (T, rows, C). Only arrays of one lane row and
    of 32 bits can be read with a stride, hence the copy.

    Attributes:
      ref: (arrays * lane rows of a slab, rows * WORDS, LANES) uint32.
      slab: channels of an array.
    """

    ref: Any
    slab: int

    def _columns(self, j: int) -> list[tuple[Any, slice, int]]:
        count = pl.cdiv(self.slab, LANES)
        sizes = [min(LANES, self.slab - i * LANES) for i in range(count)]
        return [
            (self.ref.at[j * count + i], slice(i * LANES, i * LANES + size), size)
            for i, size in enumerate(sizes)
        ]

    def fill(self, j: int, row: int, x: UInt32[Array, "rows 8 slab"]) -> None:
        """Writes x from row `row` on."""
        for ref, lanes, size in self._columns(j):
            ref[row * WORDS : (row + len(x)) * WORDS, :size] = x[..., lanes].reshape(-1, size)

    def whole(self, j: int, row: int, rows: int) -> UInt32[Array, "{rows} 8 slab"]:
        """(rows, WORDS, slab), from row `row` on."""
        columns = self._columns(j)
        x = [ref[row * WORDS : (row + rows) * WORDS, :size] for ref, _, size in columns]
        return jnp.concatenate(x, axis=1).reshape(rows, WORDS, self.slab)

    def take(self, j: int, word: Any, rows: int) -> UInt32[Array, "{rows} slab"]:
        """(rows, slab), the rows of the positions in word `word`."""
        at = pl.ds(word, rows, stride=WORDS)
        x = [ref[at, :] for ref, _, _ in self._columns(j)]
        return jnp.concatenate(x, axis=1)[:, : self.slab]

    def put(self, j: int, word: Any, x: UInt32[Array, "rows slab"]) -> None:
        """Undoes `take`."""
        at = pl.ds(word, len(x), stride=WORDS)
        for ref, lanes, size in self._columns(j):
            ref[at, :size] = x[:, lanes]


def unpack(x: UInt32[Array, "rows slab"], dtype: Any) -> list[Float[Array, "rows slab"]]:
    """Words to an array of each value in them: two positions in bfloat16, one in float32."""
    if dtype.itemsize == 4:
        return [pltpu.bitcast(x, dtype)]
    halves = (x << 16, x & jnp.uint32(0xFFFF0000))
    return [pltpu.bitcast(half, jnp.float32).astype(dtype) for half in halves]


def pack(parts: tuple[Float[Array, "rows slab"], ...], dtype: Any) -> UInt32[Array, "rows slab"]:
    """Undoes `unpack`."""
    if dtype.itemsize == 4:
        return pltpu.bitcast(parts[0], jnp.uint32)
    low, high = (pltpu.bitcast(part.astype(jnp.float32), jnp.uint32) for part in parts)
    return (low >> 16) | high


def keep(x: Float[Array, "*t rows lanes"], where: Any) -> Float[Array, "*t rows lanes"]:
    """x where `where(row, lane)`, zero elsewhere, also where x is NaN."""
    bits = pltpu.bitcast(x, jnp.int32)
    row, lane = (
        jax.lax.broadcasted_iota(jnp.int32, bits.shape, i) for i in (x.ndim - 2, x.ndim - 1)
    )
    if x.dtype.itemsize == 4:
        mask = jnp.where(where(row, lane), -1, 0)
    else:  # two rows in a word, the first in its low half
        low, high = where(2 * row, lane), where(2 * row + 1, lane)
        mask = jnp.where(low, 0xFFFF, 0) | jnp.where(high, -0x10000, 0)
    return pltpu.bitcast(bits & mask, x.dtype)


def head_product(
    how: Plan, a: Float[Array, "m slab"], b: Float[Array, "n slab"], head: int
) -> Float[Array, "m n"]:
    """a b^T over the channels of a head, float32.

    The other channels of b are set to zero in the lane rows that the head is in. The unit of
    products is 128 wide: fewer channels would take no less time, and would have to be moved first.
    """
    if how.channels == how.slab:
        return dot(a, b, NT)
    first, end = head * how.channels, (head + 1) * how.channels
    lane_rows = slice(first // LANES * LANES, min(pl.cdiv(end, LANES) * LANES, how.slab))
    first, end = first - lane_rows.start, end - lane_rows.start
    only = keep(b[:, lane_rows], lambda _, lane: (lane >= first) & (lane < end))
    return dot(a[:, lane_rows], only, NT)


def stage(run: Callable, *lists: list) -> Generator[None, None, list]:
    """run(*items) of each of the lists' items, one a step."""
    results = []
    for items in zip(*lists):
        results.append(run(*items))
        yield
    return results


_END = object()


def in_turn(generators: list[Iterator[None]], apart: int = 1) -> None:
    """Runs generators to their ends, each `apart` steps behind the one before it.

    The compiler schedules what lies close in the program together: while one head waits for its
    products, the softmax of another is computed.
    """
    live: list[Iterator[None]] = []
    step = 0
    while generators or live:
        if step % apart == 0:
            live, generators = live + generators[:1], generators[1:]
        live = [generator for generator in live if next(generator, _END) is not _END]
        step += 1


def each_position(how: Plan, run: Callable[[Any], Iterator[None]], apart: int = 1) -> None:
    """Runs the generators `run(word)` of every word of a tile, `at_once` in turn."""

    def some(step: jax.Array, _: None) -> None:
        in_turn([run(step * how.at_once + i) for i in range(how.at_once)], apart)

    jax.lax.fori_loop(0, WORDS // how.at_once, some, None)


def transposed_heads(how: Plan, x: Float[Array, "rows slab"]) -> list[Float[Array, "d rows"]]:
    """(rows, slab) to an array (d, rows) for each head."""
    x = x.T
    return [x[i : i + how.channels] for i in range(0, how.slab, how.channels)]
