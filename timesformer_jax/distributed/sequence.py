"""Sequence parallelism: the devices of mesh axis "sequence" split a clip.

Spatial attention, norms and MLPs work on each frame alone, temporal attention on each position
alone. So the devices split the patches by frames, and for temporal attention by positions: one
all-to-all before it and one after it. Values and random draws are the same on every mesh.
"""

from __future__ import annotations

import functools

import jax

from timesformer_jax.distributed.sharding import mesh_size, spec

AXIS = "sequence"


def to_positions(patches: jax.Array) -> jax.Array:
    """Reshards patches (B, T, N, D) from a split by frames to a split by positions."""
    return _exchange(patches, "frames", "positions")


def to_frames(patches: jax.Array) -> jax.Array:
    """Reshards patches (B, T, N, D) from a split by positions to a split by frames."""
    return _exchange(patches, "positions", "frames")


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
