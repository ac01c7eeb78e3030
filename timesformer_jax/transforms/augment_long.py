"""Augmentation of long clips, a few frames at a time.

Contrast, autocontrast and equalize need to know something of all frames: a first pass over the clip
finds it, a second one changes the frames. Between the operations the clip is kept in float16, whose
11 bits are 8 times finer than the 8 of a decoded frame.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from timesformer_jax.distributed.pieces import in_pieces, reduced
from timesformer_jax.transforms import operations
from timesformer_jax.transforms.augmentation import Augmentation
from timesformer_jax.transforms.operations import OPERATIONS, Whole

Clip = Float[Array | np.ndarray, "t s s 3"]


def each(function: Callable[[jax.Array], Any], clip: Clip, tokens: int) -> Any:
    """`function` of float32 frames, for all frames of a clip (T, S, S, 3); returns such a clip."""

    def piece(frames: jax.Array) -> jax.Array:
        return function(frames[0].astype(jnp.float32)).astype(clip.dtype)[None]

    return in_pieces(piece, clip[None], tokens)[0]


def jitter_colors(key: Key[Array, ""], clip: Clip, augmentation: Augmentation, tokens: int) -> Clip:
    """`operations.jitter_colors` of a long clip."""
    strengths = augmentation.color_jitter
    bright = strengths[0], 0, 0, 0

    def sums(frames: jax.Array) -> jax.Array:
        frames = jnp.clip(frames.astype(jnp.float32), 0, 1)
        frames = operations.jitter_colors(key, frames, bright)
        return operations.grayscale(frames).sum()

    whole = Whole(gray=reduced(sums, jnp.add, jnp.asarray(clip), tokens) / clip.size)
    return each(lambda x: operations.jitter_colors(key, x, strengths, whole), clip, tokens)


def randaugment(
    key: Key[Array, ""],
    clip: Clip,
    augmentation: Augmentation,
    fill: tuple[float, float, float],
    tokens: int,
) -> Clip:
    """`operations.randaugment` of a long clip."""
    of = {name: i for i, name in enumerate(("contrast", "autocontrast", "equalize"), 1)}
    first_pass = jnp.asarray([of.get(name, 0) for name in OPERATIONS])
    with_whole = [
        operation if name in of else lambda x, s, fill, whole, f=operation: f(x, s, fill)
        for name, operation in OPERATIONS.items()
    ]

    def layer(clip: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        drawn, signed = operations.drawn_operation(key, augmentation.randaugment_magnitude)
        whole = jax.lax.switch(first_pass[drawn], _first_passes(tokens), clip)

        def change(frames: jax.Array) -> jax.Array:
            return jax.lax.switch(drawn, with_whole, frames, signed, jnp.asarray(fill), whole)

        return each(change, clip, tokens), None

    return jax.lax.scan(
        layer, jnp.asarray(clip), jax.random.split(key, augmentation.randaugment_layers)
    )[0]


def _first_passes(tokens: int) -> list[Callable[[jax.Array], Whole]]:
    """What nothing, contrast, autocontrast and equalize need to know, all of one shape."""

    def nothing(clip: jax.Array) -> Whole:
        zero = 0 * clip[0, 0, 0, 0].astype(jnp.float32)  # that differs among devices, as the others
        three, levels = jnp.broadcast_to(zero, 3), jnp.broadcast_to(zero, (3, 256))
        return Whole(zero, three, three + 1, levels.astype(jnp.int32))

    def over(function: Callable, merge: Callable, clip: jax.Array) -> Any:
        return reduced(lambda x: function(x.astype(jnp.float32)), merge, clip, tokens)

    def gray(clip: jax.Array) -> Whole:
        total = over(lambda x: operations.grayscale(x).sum(), jnp.add, clip)
        return nothing(clip)._replace(gray=total / clip.size)

    def extremes(clip: jax.Array) -> Whole:
        def merge(a: tuple, b: tuple) -> tuple:
            return jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])

        low, high = over(operations.extremes, merge, clip)
        return nothing(clip)._replace(low=low, high=high)

    def counts(clip: jax.Array) -> Whole:
        found = over(operations.histogram, jnp.add, clip)
        return nothing(clip)._replace(counts=found.astype(jnp.int32))

    return [nothing, gray, extremes, counts]
