"""Sequence parallelism: the devices of mesh axis "sequence" split a clip.

Spatial attention, norms and MLPs work on each frame alone, temporal attention on each position
alone. So the devices split the patches by frames, and for temporal attention by positions: one
all-to-all before it and one after it. Attention across frames and positions works on each head
alone: the devices split the projections by heads, by one all-to-all, and get the result back by
another. Values and random draws are the same on every mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from timesformer_jax.distributed.sharding import BATCH_AXES, mesh_size, spec

AXIS = "sequence"


def to_positions(patches: jax.Array) -> jax.Array:
    """Reshards patches (B, T, N, D) from a split by frames to a split by positions.

    Where the devices do not divide N, positions of zeros make up the rest: (B, T, `positions(N)`,
    D). They attend to one another and are dropped by `to_frames`.
    """
    n = patches.shape[2]
    if (extra := positions(n) - n) > 0:
        patches = jnp.pad(patches, ((0, 0), (0, 0), (0, extra), (0, 0)))
    return _exchange(patches, "frames", "positions")


def to_frames(patches: jax.Array, n: int) -> jax.Array:
    """Reshards patches (B, T, N', D) from a split by positions to a split by frames.

    The first `n` positions are kept.
    """
    patches = _exchange(patches, "positions", "frames")
    return patches if patches.shape[2] == n else patches[:, :, :n]


def positions(n: int) -> int:
    """`n` or the next number that the devices which share a clip divide."""
    devices = mesh_size(AXIS)
    return -(-n // devices) * devices


def by_heads(
    attend: Callable[[jax.Array | None, jax.Array], tuple[jax.Array | None, jax.Array]],
    cls: jax.Array | None,
    patches: jax.Array,
) -> tuple[jax.Array | None, jax.Array]:
    """`attend(cls, patches)`, each device for some heads of the whole clip.

    A ring, in which the keys and values of each device visit all others, would not bound the
    devices by the heads. It sends more in training: 3.3 times the bytes with 4 devices, 9 times
    with 12 (docs/long-clips.md).

    Args:
      attend: attention, from the projections to the attended values.
      cls: (B, S, 3, h, d), the tokens of the sequences, which every device has; or None.
      patches: (B, T, N, 3, h, d), split by frames; their axes "tensor" and "sequence" together
        divide h.

    Returns:
      The attended values: cls (B, S, h * d), of which every device has all, or None; patches
      (B, T, N, h * d), split by frames.
    """
    if mesh_size(AXIS) == 1:
        return attend(cls, patches)
    exchange = functools.partial(jax.lax.all_to_all, axis_name=AXIS, tiled=True)

    def local(cls: jax.Array | None, patches: jax.Array) -> tuple[jax.Array | None, jax.Array]:
        cls, patches = attend(cls, exchange(patches, split_axis=4, concat_axis=1))
        return cls, exchange(patches, split_axis=1, concat_axis=3)

    def on_all(cls: jax.Array | None, axes: P) -> jax.Array | None:
        # Its gradient too: that of a part would go through the layer before as parts of sums.
        return None if cls is None else jax.lax.with_sharding_constraint(cls, axes)

    heads = ("tensor", AXIS)
    run = jax.shard_map(
        local,
        in_specs=(P(BATCH_AXES, None, None, heads), P(BATCH_AXES, AXIS, None, None, "tensor")),
        out_specs=(P(BATCH_AXES, None, heads), P(BATCH_AXES, AXIS, None, "tensor")),
        check_vma=False,  # kernels do not say what their results vary along
    )
    cls, patches = run(on_all(cls, P(BATCH_AXES, None, None, "tensor")), patches)
    return on_all(cls, P(BATCH_AXES, None, "tensor")), patches


def _exchange(patches: jax.Array, source: str, target: str) -> jax.Array:
    if mesh_size(AXIS) == 1:
        return patches
    before, after = (spec(f"activations/{name}", patches.ndim) for name in (source, target))
    # Explicit: from sharding constraints the partitioner makes several times as many exchanges.
    swap = functools.partial(
        jax.lax.all_to_all,
        axis_name=AXIS,
        split_axis=after.index(AXIS),
        concat_axis=before.index(AXIS),
        tiled=True,
    )
    return jax.shard_map(swap, in_specs=before, out_specs=after)(patches)
