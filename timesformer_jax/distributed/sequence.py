"""Several devices share a clip: each holds whole frames, or whole positions, and they exchange.

Attention within frames, norms and MLPs need nothing of another frame, attention through time
nothing of another position. So a clip lies over the mesh axis "sequence" by frames, and while its
patches attend through time by positions: one all-to-all before and one after, each of the device's
part of the clip. No value changes: one model serves every mesh, and draws the same random numbers.
"""

from __future__ import annotations

import functools

import jax

from timesformer_jax.distributed.sharding import mesh_size, spec

AXIS = "sequence"


def to_positions(patches: jax.Array) -> jax.Array:
    """Patches (B, T, N, D) that lie by frames, laid by positions."""
    return _exchange(patches, "frames", "positions")


def to_frames(patches: jax.Array) -> jax.Array:
    """Patches (B, T, N, D) that lie by positions, laid by frames."""
    return _exchange(patches, "positions", "frames")


def _exchange(patches: jax.Array, now: str, then: str) -> jax.Array:
    if mesh_size(AXIS) == 1:
        return patches
    before, after = (spec(f"activations/{name}", patches.ndim) for name in (now, then))
    # Written out: from constraints alone the partitioner makes several times as many exchanges.
    swap = functools.partial(
        jax.lax.all_to_all,
        axis_name=AXIS,
        split_axis=after.index(AXIS),
        concat_axis=before.index(AXIS),
        tiled=True,
    )
    return jax.shard_map(swap, in_specs=before, out_specs=after)(patches)
