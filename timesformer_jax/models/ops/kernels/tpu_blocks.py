"""What one step of the attention kernels for TPUs has: a whole frame, or blocks of a sequence.

Sequences of F frames with N patches each, h heads of d channels.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from timesformer_jax.models.ops.kernels import tpu_heads
from timesformer_jax.models.ops.kernels.tpu_heads import LANES, MASKED, Head


class Frame(NamedTuple):
    """The tokens of a frame: n patches, then c classification tokens.

    They fill `keys` rows where they are keys, whole tiles of the dtype, and `queries` lanes.
    """

    n: int
    c: int
    heads: int
    d: int
    dtype: Any

    @classmethod
    def of(
        cls,
        patches: Float[Array, "b t n qkv"],
        tokens: Float[Array, "b t c qkv"] | None,
        heads: int,
    ) -> Frame:
        c = 0 if tokens is None else tokens.shape[2]
        return cls(patches.shape[2], c, heads, patches.shape[3] // 3 // heads, patches.dtype)

    @property
    def tokens(self) -> int:
        return self.n + self.c

    @property
    def keys(self) -> int:
        return tpu_heads.round_up(self.tokens, self.tile)

    @property
    def queries(self) -> int:
        return tpu_heads.round_up(self.tokens, LANES)

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return tpu_heads.tile_rows(self.dtype)

    @property
    def whole(self) -> int:
        """Rows of the tiles that have patches only."""
        return self.n - self.n % self.tile

    @property
    def tail(self) -> int:
        """Rows after the whole tiles of patches: the last patches, the tokens, empty rows."""
        return self.keys - self.whole

    @property
    def width(self) -> int:
        return self.heads * self.d

    @property
    def slab(self) -> int:
        """Lanes of a slab."""
        return tpu_heads.slab_lanes(self.d)

    @property
    def slabs(self) -> int:
        return self.width // self.slab

    @property
    def slab_logits(self) -> int:
        return self.keys * self.queries * len(tpu_heads.slab_heads(self.d))

    @property
    def slabs_per_step(self) -> int:
        few = max(1, tpu_heads.STEP_LOGITS // self.slab_logits)
        return max(s for s in range(1, self.slabs + 1) if self.slabs % s == 0 and s <= few)

    @property
    def steps(self) -> int:
        return self.slabs // self.slabs_per_step

    @property
    def vmem(self) -> int:
        """Bytes of the backward kernel, about: two of each block, and 6 arrays of logits."""
        rows = self.keys * 7 * self.width * self.dtype.itemsize
        return 2 * rows + 6 * 4 * self.keys * min(tpu_heads.QUERIES, self.queries)


def sequence_numbers(frame: Frame, sequences: tuple[int, ...] | None) -> list[Any]:
    """The number of each key's sequence (keys, 1) and of each query's (1, queries), int32.

    Rows beyond the tokens belong to no query's sequence. Lanes beyond them follow sequence 0, and
    are dropped. None and None if all tokens attend to each other.
    """
    if sequences is None:
        return [None, None]
    tokens = [*sequences, *range(frame.c)]
    keys, queries = np.full(frame.keys, -1, np.int32), np.zeros(frame.queries, np.int32)
    keys[: len(tokens)] = queries[: len(tokens)] = tokens
    return [jnp.asarray(keys[:, None]), jnp.asarray(queries[None])]


class FrameMask(NamedTuple):
    """Gives logits (keys, queries) of keys that a query does not attend to the value MASKED."""

    frame: Frame
    key_number: Any
    query_number: Any

    def __call__(self, s: Float[Array, "k q"], queries: slice) -> Float[Array, "k q"]:
        if self.key_number is not None:
            return jnp.where(self.key_number[...] == self.query_number[:, queries], s, MASKED)
        # Only the last tile has rows of no token: the others are left as they are.
        whole, tokens = self.frame.whole, self.frame.tokens
        if tokens == self.frame.keys:
            return s
        row = whole + lax.broadcasted_iota(jnp.int32, (self.frame.tail, s.shape[1]), 0)
        return tpu_heads.stack([s[:whole], jnp.where(row < tokens, s[whole:], MASKED)])


class Block(NamedTuple):
    """Tokens that are multiplied together: `rows` patches of each of `frames` frames, and a token.

    They are packed in order. The row after them is for the classification token, which the last
    block has; further rows fill up whole registers.
    """

    frames: int
    rows: int
    f: int
    n: int
    has_cls: bool

    @property
    def patches(self) -> int:
        return self.frames * self.rows

    @property
    def tokens(self) -> int:
        return self.patches + self.has_cls

    @property
    def per_frame(self) -> int:
        return pl.cdiv(self.n, self.rows)

    @property
    def total(self) -> int:
        return pl.cdiv(self.f, self.frames) * self.per_frame

    @property
    def is_ragged(self) -> bool:
        """Whether some blocks have fewer patches."""
        return self.f % self.frames > 0 or self.n % self.rows > 0

    def valid(self, i: Any) -> Any:
        """Patches of block i."""
        if self.frames > 1:
            return jnp.minimum(self.frames, self.f - i * self.frames) * self.rows
        return jnp.minimum(self.rows, self.n - i % self.per_frame * self.rows)

    def place(self, i: Any) -> tuple[Any, Any]:
        """Block i along F and N."""
        return i // self.per_frame, i % self.per_frame


class Sequence(NamedTuple):
    """The sizes of a sequence, and the blocks it is cut in."""

    f: int
    n: int
    has_cls: bool
    heads: int
    d: int
    dtype: Any

    @classmethod
    def of(
        cls, patches: Float[Array, "g f n qkv"], tokens: Float[Array, "g 1 qkv"] | None, heads: int
    ) -> Sequence:
        _, f, n, width = patches.shape
        return cls(f, n, tokens is not None, heads, width // 3 // heads, patches.dtype)

    @property
    def slab(self) -> int:
        return tpu_heads.slab_lanes(self.d)

    @property
    def slabs(self) -> int:
        return self.heads * self.d // self.slab

    @property
    def per_slab(self) -> list[Head]:
        return tpu_heads.slab_heads(self.d)

    def key_rows(self, block: Block) -> int:
        return tpu_heads.round_up(block.tokens, tpu_heads.tile_rows(self.dtype))

    def query_lanes(self, block: Block) -> int:
        return tpu_heads.round_up(block.tokens, LANES)

    @property
    def resident_bytes(self) -> int:
        q, _ = self.blocks
        return q.total * self.query_lanes(q) * self.slab * 4

    @property
    def blocks(self) -> tuple[Block, Block]:
        """Of queries and of keys: those with the fewest products, of the size of a step."""
        return _choose_blocks(self, tpu_heads.STEP_LOGITS)

    def logits(self, q: Block, k: Block) -> int:
        """Of a step, for all heads of a slab."""
        return self.query_lanes(q) * self.key_rows(k) * len(self.per_slab)

    @property
    def vmem(self) -> int:
        """Bytes of the backward kernel, about, beside the gradient that waits.

        Of its compiler's count: 21 arrays of a block in the dtype, two of each that is copied among
        them, 4 in float32, and 9 of the logits of some queries.
        """
        q, k = self.blocks
        of_arrays = self.query_lanes(q) * self.slab * (21 * self.dtype.itemsize + 4 * 4)
        return of_arrays + 9 * 4 * self.key_rows(k) * tpu_heads.QUERIES

    def items(self) -> list[tuple[Head, slice]]:
        """The work of a step: a head and a chunk of queries each."""
        lanes = tpu_heads.chunks(self.query_lanes(self.blocks[0]))
        return [(head, queries) for queries in lanes for head in self.per_slab]


@functools.lru_cache(maxsize=256)
def _choose_blocks(sequence: Sequence, step_logits: int) -> tuple[Block, Block]:
    f, n, has_cls = sequence[:3]
    heads = len(sequence.per_slab)
    # With a token, 112 rows fill one register of 128 lanes, 240 two. The gradient of a frame's last
    # rows is copied by itself, as whole registers of 8 rows: other frames are not cut.
    sizes = (rows for rows in range(LANES - 16, 2048, LANES) if rows < n and n % rows % 8 == 0)
    cut = [Block(1, rows, f, n, has_cls) for rows in sizes]
    counts = {pl.cdiv(f, frames) for frames in range(1, f + 1)}
    whole = [Block(pl.cdiv(f, count), n, f, n, has_cls) for count in counts]
    smallest = min(cut + whole, key=lambda block: block.tokens)
    options = [block for block in cut + whole if block.tokens <= 2048]

    def cost(blocks: tuple[Block, Block]) -> int:
        """Rows that the matrix unit streams, forward and backward, and 8,000 for each step."""
        q, k = blocks
        rows = sequence.key_rows(k)
        of_head = 3 * rows + 4 * sequence.d * pl.cdiv(rows, LANES)
        step = heads * of_head * sequence.query_lanes(q) // LANES + 8_000
        return q.total * k.total * step

    pairs = [(q, k) for q in options for k in options if sequence.logits(q, k) <= step_logits]
    return min(pairs, key=cost, default=(smallest, smallest))


class Specs(NamedTuple):
    """The blocks of the arrays, for a grid over sequences, slabs and two loops.

    Attributes:
      iq, ik: the block of queries and of keys, from the numbers in the two loops.
    """

    sequence: Sequence
    iq: Any
    ik: Any

    def of_queries(self, part: int) -> pl.BlockSpec:
        return self._patches(self.sequence.blocks[0], self.iq, part)

    def patches(self) -> list[pl.BlockSpec]:
        """Of queries, keys and values in the projection."""
        of_keys = (self._patches(self.sequence.blocks[1], self.ik, part) for part in (1, 2))
        return [self.of_queries(0), *of_keys]

    def token(self, part: int) -> pl.BlockSpec:
        lane = part * self.sequence.slabs
        return pl.BlockSpec((None, 1, self.sequence.slab), lambda g, s, i, j: (g, 0, lane + s))

    def tokens(self) -> list[pl.BlockSpec]:
        return [self.token(part) for part in range(3)]

    def log_sums(self) -> pl.BlockSpec:
        lanes = self.sequence.query_lanes(self.sequence.blocks[0])
        shape = (None, None, None, len(self.sequence.per_slab), lanes)
        return pl.BlockSpec(shape, lambda g, s, i, j: (g, s, self.iq(i, j), 0, 0))

    def _patches(self, block: Block, number: Any, part: int) -> pl.BlockSpec:
        lane = part * self.sequence.slabs

        def index(g: Any, s: Any, i: Any, j: Any) -> tuple:
            return g, *block.place(number(i, j)), lane + s

        return pl.BlockSpec((None, block.frames, block.rows, self.sequence.slab), index)


def pack(block: Block, i: Any, patches: Any, cls: Any, packed: Any) -> None:
    """Packs the tokens of block i, with zeros in rows of no token.

    Args:
      patches: a ref (frames, rows, slab), undefined beyond the sequence.
      cls: a ref (1, slab) or None.
      packed: a ref (block.tokens or more, slab).
    """
    for frame in range(block.frames):
        packed[frame * block.rows : (frame + 1) * block.rows, :] = patches[frame]
    if packed.shape[0] > block.patches:
        rest = (packed.shape[0] - block.patches, packed.shape[1])
        packed[block.patches :, :] = jnp.zeros(rest, packed.dtype)
    if block.is_ragged:
        row = lax.broadcasted_iota(jnp.int32, packed.shape, 0)
        packed[...] = jnp.where(row < block.valid(i), packed[...], jnp.zeros((), packed.dtype))
    if cls is not None:

        @pl.when(i == block.total - 1)
        def _() -> None:
            packed[pl.ds(block.patches, 1), :] = cls[...]


def mask(block: Block, i: Any, s: Float[Array, "k q"]) -> Float[Array, "k q"]:
    """Logits (keys, queries) with MASKED in rows of no token."""
    # Only rows that may have none are compared.
    start = 0 if block.is_ragged else block.patches - block.patches % 8
    if start == s.shape[0]:
        return s
    row = start + lax.broadcasted_iota(jnp.int32, (s.shape[0] - start, s.shape[1]), 0)
    is_token = row < (block.valid(i) if block.is_ragged else block.patches)
    if block.has_cls:
        token_row = jnp.where(i == block.total - 1, block.patches, -1)
        is_token |= row == token_row
    return tpu_heads.stack([s[:start], jnp.where(is_token, s[start:], MASKED)])


def call(
    kernel: Any, name: str, sequence: Sequence, grid: tuple, inputs: list, in_specs: list,
    outputs: list, out_specs: list, scratch: list, products: int, interpret: Any,
    completes: bool = False,
) -> tuple:  # fmt: skip
    """Runs a kernel; inputs and outputs that are None stay so.

    Args:
      completes: whether the first output is the last input, which the kernel completes in place.
    """
    present = [(x, spec) for x, spec in zip(inputs, in_specs) if x is not None]
    made = [(x, spec) for x, spec in zip(outputs, out_specs) if x is not None]

    def body(*refs: Any) -> None:
        refs = iter(refs)
        kernel(*(next(refs) if x is not None else None for x in (*inputs, *outputs)), *refs)

    logits = grid[0] * sequence.heads * (sequence.f * sequence.n) ** 2
    results = pl.pallas_call(
        body,
        name=name,
        grid=grid,
        in_specs=[spec for _, spec in present],
        out_specs=[spec for _, spec in made],
        out_shape=[x for x, _ in made],
        scratch_shapes=scratch,
        input_output_aliases={len(present) - 1: 0} if completes else {},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu_heads.VMEM,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products * logits * sequence.d,
            transcendentals=logits,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x, _ in made),
        ),
        interpret=interpret,
    )(*(x for x, _ in present))
    results = iter(results)
    return tuple(next(results) if x is not None else None for x in outputs)
