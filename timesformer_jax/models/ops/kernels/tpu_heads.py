"""What the attention kernels for TPUs share: heads within lanes, products, the order of the work.

A TPU's registers and its matrix unit are 128 lanes wide. A "slab" is the fewest heads whose
channels fill whole lanes of 128, such as two heads of 64 or four of 96. Lanes are never cut within:
where a head's logits are computed, the queries of the slab's other heads in the same lanes are
zero. Rows are cut freely, so that what is transposed, channels in rows, has a head's d rows only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

LANES = 128
QUERIES = 256  # of one product, at most: 50 registers of logits for 197 keys
STEP_LOGITS = 1_500_000  # of one step of the grid, about: the compiler's time grows with them
MASKED = -1e30  # a logit of a key that is not attended to; finite, so that no NaN arises
VMEM = 56 * 2**20  # bytes that a kernel may use: a core of v5p and v7x has 64 MiB, others 128
LOG2_E = math.log2(math.e)

NT = (((1,), (1,)), ((), ()))  # x y^T
NN = (((1,), (0,)), ((), ()))  # x y
# Values of `jax.default_matmul_precision` with which a product is one pass of bfloat16.
ONE_PASS = (None, "default", "fastest", "bfloat16", "BF16_BF16_F32")


def dot(x: Float[Array, "_ _"], y: Float[Array, "_ _"], dimensions: tuple) -> Float[Array, "_ _"]:
    """The product of matrices of one dtype, in float32.

    Of float32 matrices it is one pass of bfloat16, as in the rest of the model, unless
    `jax.default_matmul_precision` asks for more: the compiler for TPUs knows these two alone, and
    for bfloat16 the first alone.

    Args:
      dimensions: `NN` or `NT`.
    """
    is_one_pass = x.dtype == jnp.bfloat16 or jax.default_matmul_precision.value in ONE_PASS
    precision = lax.Precision.DEFAULT if is_one_pass else lax.Precision.HIGHEST
    return lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


class Head(NamedTuple):
    """A head of a slab: the `number`-th, of d channels."""

    number: int
    d: int

    @property
    def channels(self) -> slice:
        """Of the slab."""
        return slice(self.number * self.d, (self.number + 1) * self.d)

    @property
    def lanes(self) -> slice:
        """The whole lanes of 128 that have the head's channels."""
        channels = self.channels
        return slice(channels.start // LANES * LANES, round_up(channels.stop, LANES))

    def logits(
        self, keys: Float[Array, "k slab"], queries: Float[Array, "q slab"]
    ) -> Float[Array, "k q"]:
        """The products of keys (k, slab) and queries (q, slab), (k, q) in float32."""
        lane = self.lanes.start + lax.broadcasted_iota(
            jnp.int32, (1, self.lanes.stop - self.lanes.start), 1
        )
        inside = (lane >= self.channels.start) & (lane < self.channels.stop)
        own = jnp.where(inside, queries[:, self.lanes], jnp.zeros((), queries.dtype))
        return dot(keys[:, self.lanes], own, NT)


def slab_lanes(d: int) -> int:
    return math.lcm(d, LANES)


def slab_heads(d: int) -> list[Head]:
    return [Head(number, d) for number in range(slab_lanes(d) // d)]


def tile_rows(dtype: Any) -> int:
    """Rows of a tile, in which rows are stored and kept in registers."""
    return 32 // jnp.dtype(dtype).itemsize


def chunks(queries: int) -> list[slice]:
    """The lanes of queries that are multiplied together."""
    starts = range(0, queries, QUERIES)
    return [slice(start, min(start + QUERIES, queries)) for start in starts]


def stack(parts: Iterable[Float[Array, "_ columns"]]) -> Float[Array, "rows columns"]:
    """Rows after one another, of which some may be none."""
    parts = [part for part in parts if part.shape[0]]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 0)


def pipeline(
    items: list[Any], first: Callable, second: Callable, third: Callable, lead: int = 1
) -> None:
    """Runs three stages on each item, the later ones beside the earlier ones of the next items.

    The compiler keeps to the order of the program, mostly: with the stages of one item after
    another the matrix unit waits for the vector unit.

    Args:
      lead: by how many items the first stage is ahead of the second.
    """
    products, weights = {}, {}
    for i in range(len(items) + lead + 1):
        if i < len(items):
            products[i] = first(items[i])
        if 0 <= i - lead < len(items):
            weights[i - lead] = second(items[i - lead], products.pop(i - lead))
        if i > lead:
            third(items[i - lead - 1], weights.pop(i - lead - 1))


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def multiple(x: Any, of: int) -> Any:
    """x, which is known to be a multiple, also where it is computed by the kernel."""
    return x if isinstance(x, int) else pl.multiple_of(x, of)
