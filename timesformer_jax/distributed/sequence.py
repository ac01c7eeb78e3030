"""Sequence parallelism: the devices of mesh axis "sequence" split a clip.

Spatial attention, norms and MLPs work on each frame alone, temporal attention on each position
alone. So the devices split the patches by frames, and for temporal attention by positions: one
all-to-all before it and one after it. Values and random draws are the same on every mesh.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from timesformer_jax.distributed.sharding import mesh_size, spec

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
