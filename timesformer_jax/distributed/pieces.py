"""Long clips in pieces of frames: what is computed for each frame alone holds a few at a time.

Preprocessing, the patch embedding and MLPs make arrays that are several times as large as the
tokens between blocks. For a short clip these are gone after a step's peak; of a long one they would
be the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from timesformer_jax.distributed.sharding import BATCH_AXES, axis_size, constrain, mesh_size

# Tokens of a clip on one device above which it is cut, and tokens of a piece. No recipe of the
# paper reaches it (96 frames of 224 x 224 are 18,816). Products with as many rows are as fast as
# with more; a piece of the base model's MLP holds 0.2 GB an array, bfloat16.
TOKENS = 2**15


def is_long(frames: int, tokens: int) -> bool:
    """Whether a clip of `frames` of `tokens` each is cut, on the current mesh."""
    return frames // _devices(frames) * tokens > TOKENS


def in_pieces(function: Callable[[Any], Any], clip: Any, tokens: int) -> Any:
    """`function(clip)`, for a few frames at a time if the clip is long.

    The backward pass computes a piece again, so that only the clip is saved for it.

    Args:
      function: from a tree of (B, T', ...) to a tree of (B, T', ...), every frame for itself.
      clip: a tree of (B, T, ...); the leading axis may be 1 where all clips share an array.
      tokens: of a frame.
    """
    leaves = jax.tree.leaves(clip)
    frames = leaves[0].shape[1]
    if not is_long(frames, tokens):
        return function(clip)
    devices = _devices(frames)
    own = frames // devices
    length = _piece_length(max(len(x) for x in leaves), own, tokens)
    whole = own // length * length

    def split(x: jax.Array) -> jax.Array:  # a piece has frames of every device
        return x.reshape(len(x), devices, own, *x.shape[2:])

    def merged(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1, *x.shape[3:])
        return constrain(x, "frames") if x.ndim > 3 else x

    @jax.checkpoint
    def piece(x: Any) -> Any:
        out = function(jax.tree.map(merged, x))
        return jax.tree.map(lambda y: y.reshape(len(y), devices, -1, *y.shape[2:]), out)

    def stacked(x: jax.Array) -> jax.Array:
        x = x[:, :, :whole].reshape(*x.shape[:2], -1, length, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0)

    def unstacked(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y, 0, 2)
        return y.reshape(*y.shape[:2], whole, *y.shape[4:])

    parts = jax.tree.map(split, clip)
    out = jax.tree.map(unstacked, jax.lax.map(piece, jax.tree.map(stacked, parts)))
    if whole < own:
        rest = piece(jax.tree.map(lambda x: x[:, :, whole:], parts))
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), out, rest)
    return jax.tree.map(merged, out)


def _devices(frames: int) -> int:
    """How many devices share the frames of a clip."""
    devices = mesh_size("sequence")
    return devices if frames % devices == 0 else 1


def _piece_length(batch: int, frames: int, tokens: int) -> int:
    """Frames of a piece, of `frames` on each device.

    A divisor, if there is one of about the right size; if not, the last piece is shorter.
    """
    clips = max(1, batch // axis_size(BATCH_AXES, jax.sharding.get_abstract_mesh()))
    most = max(1, min(frames, TOKENS // (clips * tokens)))
    divisors = (n for n in range(most, most // 2, -1) if frames % n == 0)
    return next(divisors, most)
