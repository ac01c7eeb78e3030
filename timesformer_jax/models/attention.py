"""Multi-head self-attention within the sequences of a clip (section 3, figures 1 and 2).

`attend` is softmax(q k^T / sqrt(d)) v for one sequence. Every other function cuts the clip into
sequences and applies it to each: `jax.vmap` runs over the axes that a token does not attend along,
over space for temporal attention and over time for spatial attention. Which functions make up a
block is in `schemes.py`.

Shapes: B clips, T frames, N = H * W patches a frame (H down, W across: the grid), S sequences,
h heads of d channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from timesformer_jax.distributed.sharding import target_device
from timesformer_jax.models.ops import long_attention
from timesformer_jax.models.ops.dot_product_attention import dot_product_attention
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.tokens import Grid, Numbers, Tokens, joined

# From frames and grid to the number of each patch's sequence; patches of one number attend to each
# other.
Partition = Callable[[int, Grid], Numbers]


def attend(
    qkv: Float[Array, "l 3 h d"], valid: Bool[Array, " l"] | None = None
) -> Float[Array, "l hd"]:
    """Multi-head self-attention of one sequence (equations 5 to 7).

    Args:
      qkv: (length, 3, h, d), the queries, keys and values of the sequence's tokens.
      valid: (length,), the tokens that are attended to; None: all.

    Returns:
      (length, h * d), the heads side by side. The softmax is float32 at least.
    """
    # The gradient of a split is one concatenation; those of slices would be padded and added.
    q, k, v = (part.squeeze(1) for part in jnp.split(qkv, 3, axis=1))
    q = q * q.shape[-1] ** -0.5
    return dot_product_attention(q, k, v, valid).reshape(len(qkv), -1)


def attend_along_frames(qkv: Float[Array, "b t n 3 h d"]) -> Float[Array, "b t n hd"]:
    """`attend` along T, for every clip and position."""
    return jax.vmap(jax.vmap(attend, in_axes=1, out_axes=1))(qkv)


def attend_along_patches(qkv: Float[Array, "b s n 3 h d"]) -> Float[Array, "b s n hd"]:
    """`attend` along N, for every clip and sequence."""
    return jax.vmap(jax.vmap(attend))(qkv)


# Each function takes the projections, cls (B, S, 3, h, d) or None and patches (B, T, N, 3, h, d),
# and returns the attended values, (B, S, h * d) or None and (B, T, N, h * d).


def over_time(qkv: Tokens, grid: Grid) -> Tokens:
    """Temporal attention (equation 8): a patch attends to its own position in every frame."""
    return select.attention("temporal", qkv, grid, _temporal)


def over_space(qkv: Tokens, grid: Grid) -> Tokens:
    """Spatial attention (equation 9): a patch attends to every patch of its frame."""
    return select.attention("spatial", qkv, grid, _spatial)


def over_space_time(qkv: Tokens, grid: Grid) -> Tokens:
    """Joint space-time attention: a patch attends to every patch of the clip."""
    return select.attention("joint", qkv, grid, _joint)


def over_width(qkv: Tokens, grid: Grid) -> Tokens:
    """Axial attention over width: a patch attends to its own row of its frame."""
    return select.attention("rows", qkv, grid, _rows)


def over_height(qkv: Tokens, grid: Grid) -> Tokens:
    """Axial attention over height: a patch attends to its own column of its frame."""
    return select.attention("columns", qkv, grid, _columns)


def over_partition(qkv: Tokens, grid: Grid, partition: Partition) -> Tokens:
    """Attention within the sequences of any partition of the clip's patches.

    The patches are gathered sequence by sequence and put back; sequences of one length run
    together (halves of an odd axis differ in length). There is no mask, and no masked product.
    """
    alike, index = zip(*sequences_by_length(partition(qkv.patches.shape[1], grid)))
    flat = _regroup(qkv.patches, -1)  # b t n ... -> b (t n) ...
    parts = [
        over_space(Tokens(None if qkv.cls is None else _take(qkv.cls, s), _take(flat, i)), grid)
        for s, i in zip(alike, index)
    ]
    tokens = [part.cls for part in parts if part.cls is not None]
    cls = _put_back(tokens, alike) if tokens else None
    patches = _put_back([_regroup(part.patches, -1) for part in parts], index)
    return Tokens(cls, patches.reshape(*qkv.patches.shape[:3], -1))


def sequences_by_length(number: Numbers) -> list[tuple[np.ndarray, np.ndarray]]:
    """The sequences of a partition, those of one length together.

    Args:
      number: of the sequence of every patch, as a `Partition` gives it.

    Returns:
      For each length l: the numbers of its s sequences, (s,), and the patches of each, (s, l)
      indices in T * N.
    """
    number = number.reshape(-1)
    lengths = np.bincount(number)
    members = np.split(np.argsort(number, kind="stable"), np.cumsum(lengths)[:-1])
    alike = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    return [(numbers, np.stack([members[s] for s in numbers])) for numbers in alike]


# What XLA compiles where no kernel is selected. `_joint` and `_rows` have sequences of patches that
# lie side by side, for which a kernel of spatial attention may be selected.


def _temporal(qkv: Tokens, grid: Grid) -> Tokens:
    if select.is_long(select.local_case("temporal", qkv, grid)):
        return select.on_each_device("temporal", qkv, grid, _temporal_by_blocks)
    return joined(qkv, attend_along_frames, axis=1)


def _spatial(qkv: Tokens, grid: Grid) -> Tokens:
    if select.is_long(select.local_case("spatial", qkv, grid)):
        return select.on_each_device("spatial", qkv, grid, _spatial_by_blocks)
    return joined(qkv, attend_along_patches, axis=2)


def _temporal_by_blocks(qkv: Tokens, grid: Grid) -> Tokens:
    return joined(qkv, _by_blocks, axis=1)


def _spatial_by_blocks(qkv: Tokens, grid: Grid) -> Tokens:
    def along_patches(qkv: Float[Array, "b s n 3 h d"]) -> Float[Array, "b s n hd"]:
        # b s n ... -> (b s) n 1 ...
        out = _by_blocks(qkv.reshape(-1, qkv.shape[2], 1, *qkv.shape[3:]))
        return out.reshape(*qkv.shape[:3], -1)

    return joined(qkv, along_patches, axis=2)


def _by_blocks(qkv: Float[Array, "a l s 3 h d"]) -> Float[Array, "a l s hd"]:
    return long_attention.attention(qkv, target_device().platform)


def _joint(qkv: Tokens, grid: Grid) -> Tokens:
    clip = Tokens(qkv.cls, _regroup(qkv.patches, 1, -1))  # b t n ... -> b 1 (t n) ...
    out = over_space(clip, grid)
    return Tokens(out.cls, out.patches.reshape(*qkv.patches.shape[:3], -1))


def _rows(qkv: Tokens, grid: Grid) -> Tokens:
    rows = Tokens(qkv.cls, _regroup(qkv.patches, -1, grid[1]))  # b t (y x) ... -> b (t y) x ...
    out = over_space(rows, grid)
    return Tokens(out.cls, out.patches.reshape(*qkv.patches.shape[:3], -1))


def _columns(qkv: Tokens, grid: Grid) -> Tokens:
    t = qkv.patches.shape[1]
    cls = None if qkv.cls is None else qkv.cls.reshape(-1, t, grid[1], *qkv.cls.shape[2:])
    frames = Tokens(cls, _regroup(qkv.patches, t, *grid))  # b t (y x) ... -> b t y x ...

    def columns(frame: Tokens) -> Tokens:  # (B, H, W, ...): along H, at every x
        return joined(frame, attend_along_frames, axis=1)

    out = jax.vmap(columns, in_axes=1, out_axes=1)(frames)
    cls = None if out.cls is None else out.cls.reshape(-1, t * grid[1], out.cls.shape[-1])
    return Tokens(cls, out.patches.reshape(*qkv.patches.shape[:3], -1))


def _regroup(x: Float[Array, "b t n *x"], *sizes: int) -> Float[Array, "b ..."]:
    """(B, T, N, ...) to (B, *sizes, ...)."""
    return x.reshape(x.shape[0], *sizes, *x.shape[3:])


def _take(x: Float[Array, "b n *x"], index: Int[np.ndarray, "*i"]) -> Float[Array, "b ..."]:
    """x[:, index]. No index comes twice, so that the gradient needs no atomic additions."""
    return x.at[:, index].get(unique_indices=True, mode="promise_in_bounds")


def _put_back(
    taken: list[Float[Array, "b ..."]], index: Sequence[Int[np.ndarray, "..."]]
) -> Float[Array, "b n *x"]:
    """Undoes `_take` with each of `index`, which together name every entry once."""
    order = np.concatenate([i.reshape(-1) for i in index])
    return _take(jnp.concatenate(taken, axis=1), np.argsort(order))
