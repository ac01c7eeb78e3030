"""Long clips in pieces of frames: what is computed for each frame alone holds a few at a time.

Preprocessing, the patch embedding and MLPs make arrays that are several times as large as the
tokens between blocks. For a short clip these are gone after a step's peak; of a long one they would
be the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from timesformer_jax.distributed.sharding import (
    BATCH_AXES,
    axis_size,
    constrain,
    current_mesh,
    mesh_size,
)

# Tokens of a clip on one device above which it is cut. No recipe of the paper reaches it: 96 frames
# of 224 x 224 are 18,816.
LONG = 2**15
# Tokens of a piece. Products with as many rows are as fast as with more; a piece of the MLP of the
# base model holds 0.1 GB an array, bfloat16.
PIECE = 2**14


def tokens_of(side: int) -> int:
    """What a frame of side x side pixels counts as before it is cut: patches of 16 x 16 pixels."""
    return math.ceil(side / 16) ** 2


def is_long(frames: int, tokens: int) -> bool:
    """Whether a clip of `frames` of `tokens` each is cut, on the current mesh."""
    return frames // _devices(frames) * tokens > LONG


def in_pieces(function: Callable[[Any], Any], clip: Any, tokens: int) -> Any:
    """`function(clip)`, for a few frames at a time if the clip is long.

    The backward pass computes a piece again, so that only the clip is saved for it.

    Args:
      function: from a tree of (B, T', ...) to a tree of (B, T', ...), every frame for itself.
      clip: a tree of (B, T, ...); the leading axis may be 1 where all clips share an array.
      tokens: of a frame.
    """
    frames = jax.tree.leaves(clip)[0].shape[1]
    if not is_long(frames, tokens):
        return function(clip)
    devices = _devices(frames)

    def merged(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1, *x.shape[3:])
        return constrain(x, "frames") if x.ndim > 3 and devices > 1 else x

    @jax.checkpoint
    def piece(x: Any) -> Any:
        out = function(jax.tree.map(merged, x))
        return jax.tree.map(lambda y: y.reshape(len(y), devices, -1, *y.shape[2:]), out)

    def unstacked(y: jax.Array) -> jax.Array:
        y = jnp.moveaxis(y, 0, 2)
        return y.reshape(*y.shape[:2], -1, *y.shape[4:])

    stacked, rest = _split(clip, devices, tokens)
    out = jax.tree.map(unstacked, jax.lax.map(piece, stacked))
    if rest is not None:
        out = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=2), out, piece(rest))
    return jax.tree.map(merged, out)


def reduced(
    function: Callable[[jax.Array], Any],
    merge: Callable[[Any, Any], Any],
    clip: jax.Array,
    tokens: int,
) -> Any:
    """`function` of all frames of a clip (T, ...), merged from that of pieces if it is long.

    Args:
      function: from some frames to an array or a tree of them, such as their sum.
      merge: makes one of two.
      clip: whole on every device.
    """
    if not is_long(len(clip), tokens):
        return function(clip)
    stacked, rest = _split(clip[None], 1, tokens)
    first, others = function(stacked[0, 0, 0]), stacked[1:, 0, 0]
    if rest is not None:
        first = merge(first, function(rest[0, 0]))
    return jax.lax.scan(lambda sofar, x: (merge(sofar, function(x)), None), first, others)[0]


def _split(clip: Any, devices: int, tokens: int) -> tuple[Any, Any]:
    """(pieces, B, devices, T', ...) of (B, T, ...), and a shorter last one or None.

    A piece has frames of every device that shares a clip.
    """
    leaves = jax.tree.leaves(clip)
    own = leaves[0].shape[1] // devices
    length = _piece_length(max(len(x) for x in leaves), own, tokens)
    whole = own // length * length

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), devices, own, *x.shape[2:])

    def stacked(x: jax.Array) -> jax.Array:
        x = split(x)[:, :, :whole].reshape(len(x), devices, -1, length, *x.shape[2:])
        return jnp.moveaxis(x, 2, 0)

    rest = jax.tree.map(lambda x: split(x)[:, :, whole:], clip) if whole < own else None
    return jax.tree.map(stacked, clip), rest


def _devices(frames: int) -> int:
    """How many devices share the frames of a clip, in a program of all of them."""
    devices = mesh_size("sequence")
    return devices if frames % devices == 0 else 1


def _piece_length(batch: int, frames: int, tokens: int) -> int:
    """Frames of a piece, of `frames` on each device.

    A divisor, if there is one of about the right size; if not, the last piece is shorter.
    """
    clips = max(1, batch // axis_size(BATCH_AXES, current_mesh()))
    most = max(1, min(frames, PIECE // (clips * tokens)))
    divisors = (n for n in range(most, most // 2, -1) if frames % n == 0)
    return next(divisors, most)
