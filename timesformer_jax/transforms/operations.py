"""The operations that augmentation is made of: colours, RandAugment's fourteen, warps, erasing.

Clips are (T, H, W, 3) float32 RGB in [0, 1]. All frames of a clip are changed alike, and statistics
(the mean of contrast, the histogram of equalize) are those of the whole clip, so that nothing
flickers that did not flicker before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Bool, Float, Int, Key


class Whole(NamedTuple):
    """Statistics of a whole clip, for operations that are given some of its frames only.

    Attributes:
      gray: () the mean grey level.
      low, high: (3,) the least and the largest value of each channel.
      counts: (3, 256) how many pixels have each level.
    """

    gray: Any = 0.0
    low: Any = 0.0
    high: Any = 1.0
    counts: Any = None


Clip = Float[Array | np.ndarray, "t h w 3"]
Scalar = Float[Array, ""] | float
Color = tuple[float, float, float]

# Random erasing's share of the frame, and the height of the box over its width.
ERASED_AREA, ERASED_ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)


def jitter_colors(
    key: Key[Array, ""], clip: Clip, strengths: Sequence[float], whole: Whole | None = None
) -> Clip:
    """Changes brightness, contrast, saturation and hue by random amounts, in this order.

    Args:
      key: the random key.
      clip: (T, H, W, 3) in [0, 1].
      strengths: see `Augmentation.color_jitter`.
      whole: of the clip with its new brightness, if `clip` is a part of it.
    """
    *factors, turn = strengths
    draws = jax.random.uniform(key, (4,), minval=-1)
    for adjust, strength, draw in zip((brightness, contrast, saturation), factors, draws):
        if strength:
            low, high = max(0.0, 1 - strength), 1 + strength
            factor = low + (high - low) * (draw + 1) / 2
            clip = contrast(clip, factor, whole) if adjust is contrast else adjust(clip, factor)
    return jnp.clip(dm_pix.adjust_hue(clip, turn * draws[3]), 0, 1) if turn else clip


def erase(
    key: Key[Array, ""], clip: Float[Array | np.ndarray, "t s s 3"], probability: float, fill: Color
) -> Float[Array, "t s s 3"]:
    """Random Erasing (arXiv 1708.04896): fills a random box, the same in all frames.

    Args:
      key: the random key.
      clip: (T, S, S, 3).
      probability: probability that there is a box. Its area is uniform in ERASED_AREA, its aspect
        ratio log-uniform in ERASED_ASPECT, its position uniform. A side longer than the frame is
        cut to the frame.
      fill: colour of the box.
    """
    size = clip.shape[1]
    whether, area, aspect, place = jax.random.split(key, 4)
    area = size**2 * jax.random.uniform(area, minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = (math.log(x) / 2 for x in ERASED_ASPECT)
    tall = jnp.exp(jax.random.uniform(aspect, minval=low, maxval=high))
    sides = jnp.clip(jnp.round(jnp.sqrt(area) * jnp.stack([tall, 1 / tall])), 1, size)
    corner = jnp.floor(jax.random.uniform(place, (2,)) * (size - sides + 1))
    erased = box(size, corner, sides) & jax.random.bernoulli(whether, probability)
    return jnp.where(erased[..., None], jnp.asarray(fill), clip)


def randaugment(
    key: Key[Array, ""], clip: Clip, layers: int, magnitude: float, fill: Color
) -> Clip:
    """RandAugment (arXiv 1909.13719): applies `layers` of 14 operations, drawn uniformly.

    Args:
      key: the random key.
      clip: (T, H, W, 3) in [0, 1].
      layers: number of operations.
      magnitude: strength of the operations that have one, 0 to 10, in the ranges of AutoAugment
        (arXiv 1805.09501): 10 shears by 0.3, translates by 0.45 of the side, rotates by 30 degrees,
        keeps 4 bits, solarizes everything, and scales the others by 1.9 or 0.1. The direction is
        random.
      fill: colour of what comes in from outside the frame.
    """

    def layer(clip: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        drawn, signed = drawn_operation(key, magnitude)
        clip = jax.lax.switch(drawn, tuple(OPERATIONS.values()), clip, signed, jnp.asarray(fill))
        return clip, None

    return jax.lax.scan(layer, jnp.asarray(clip), jax.random.split(key, layers))[0]


def drawn_operation(key: Key[Array, ""], magnitude: float) -> tuple[jax.Array, jax.Array]:
    """The number of one of `OPERATIONS`, and its strength in a random direction."""
    which, sign = jax.random.split(key)
    drawn = jax.random.randint(which, (), 0, len(OPERATIONS))
    strength = magnitude / 10
    return drawn, jnp.where(jax.random.bernoulli(sign), strength, -strength)


# RandAugment's operations. Each takes a clip, a strength in [-1, 1] and a fill colour; some also
# take the `Whole` of a clip, if they are given a part of it.
OPERATIONS: dict[str, Callable[..., Clip]] = {
    "identity": lambda clip, s, fill: clip,
    "autocontrast": lambda clip, s, fill, whole=None: autocontrast(clip, whole),
    "equalize": lambda clip, s, fill, whole=None: equalize(clip, whole),
    "rotate": lambda clip, s, fill: rotate(clip, s * math.radians(30), fill),
    # Above 255, so that at strength 0 white stays white.
    "solarize": lambda clip, s, fill: dm_pix.solarize(clip, (1 - jnp.abs(s)) * 256 / 255),
    "color": lambda clip, s, fill: saturation(clip, 1 + 0.9 * s),
    "posterize": lambda clip, s, fill: posterize(clip, 8 - jnp.round(4 * jnp.abs(s))),
    "contrast": lambda clip, s, fill, whole=None: contrast(clip, 1 + 0.9 * s, whole),
    "brightness": lambda clip, s, fill: brightness(clip, 1 + 0.9 * s),
    "sharpness": lambda clip, s, fill: sharpness(clip, 1 + 0.9 * s),
    "shear_x": lambda clip, s, fill: warp(clip, [[1, 0], [0.3 * s, 1]], [0, 0], fill),
    "shear_y": lambda clip, s, fill: warp(clip, [[1, 0.3 * s], [0, 1]], [0, 0], fill),
    "translate_x": lambda clip, s, fill: translate(clip, [0, 0.45 * s], fill),
    "translate_y": lambda clip, s, fill: translate(clip, [0.45 * s, 0], fill),
}

# The colour operations are Pillow's, which the papers use: factor 0 gives a degenerate clip, factor
# 1 the clip itself. (dm_pix adds to the brightness, computes contrast for each channel, and
# saturates in HSV.)


def brightness(clip: Clip, factor: Scalar) -> Clip:
    """Blends the clip with black; the factor is at least 0."""
    return _blend(jnp.zeros_like(clip), clip, factor)


def contrast(clip: Clip, factor: Scalar, whole: Whole | None = None) -> Clip:
    """Blends the clip with the mean grey level of the clip."""
    return _blend(whole.gray if whole else grayscale(clip).mean(), clip, factor)


def saturation(clip: Clip, factor: Scalar) -> Clip:
    """Blends each pixel with its grey level."""
    return _blend(grayscale(clip), clip, factor)


def sharpness(clip: Clip, factor: Scalar) -> Clip:
    """Blends each frame with itself smoothed by a 3 x 3 kernel of ones around a 5.

    The border of the frame does not change.
    """
    rows = clip[:, :-2] + clip[:, 1:-1] + clip[:, 2:]
    boxes = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (boxes + 4 * clip[:, 1:-1, 1:-1]) / 13
    return _blend(jnp.asarray(clip).at[:, 1:-1, 1:-1].set(inner), clip, factor)


def autocontrast(clip: Clip, whole: Whole | None = None) -> Clip:
    """Stretches each channel of the clip to [0, 1]; a channel of one value does not change."""
    low, high = (whole.low, whole.high) if whole else extremes(clip)
    stretched = (clip - low) / jnp.where(high > low, high - low, 1)
    return jnp.where(high > low, stretched, clip)


def extremes(clip: Clip) -> tuple[jax.Array, jax.Array]:
    """The least and the largest value of each channel, (3,)."""
    return clip.min((0, 1, 2)), clip.max((0, 1, 2))


def histogram(clip: Clip) -> Int[Array, "3 256"]:
    """How many pixels of each channel have each of 256 levels."""
    return jax.vmap(lambda x: jnp.bincount(x.ravel(), length=256), -1)(_levels(clip))


def equalize(clip: Clip, whole: Whole | None = None) -> Clip:
    """Equalises the histogram of each channel of the clip, over 256 levels, as Pillow does."""

    def channel(levels: jax.Array, counts: jax.Array) -> jax.Array:
        brightest = 255 - jnp.argmax(counts[::-1] > 0)
        step = (counts.sum() - counts[brightest]) // 255
        below = jnp.cumsum(counts) - counts
        even = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, even, jnp.arange(256))[levels]

    counts = whole.counts if whole else histogram(clip)
    return jax.vmap(channel, (-1, 0), -1)(_levels(clip), counts).astype(clip.dtype) / 255


def posterize(clip: Clip, bits: Scalar) -> Clip:
    """Keeps only the highest `bits` of the 8 bits of each value."""
    step = 2 ** (8 - bits)
    return jnp.floor(_levels(clip) / step) * step / 255


def translate(clip: Clip, shares: list, fill: Float[Array, "3"]) -> Clip:
    """Moves a clip up and left by shares of its height and width."""
    return warp(
        clip, [[1, 0], [0, 1]], [shares[0] * clip.shape[1], shares[1] * clip.shape[2]], fill
    )


def rotate(clip: Clip, angle: Scalar, fill: Float[Array, "3"]) -> Clip:
    """Rotates a clip about its centre, counter-clockwise, by an angle in radians."""
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    y, x = clip.shape[1] / 2, clip.shape[2] / 2
    offset = [y - cosine * y - sine * x, x + sine * y - cosine * x]
    return warp(clip, [[cosine, sine], [-sine, cosine]], offset, fill)


def warp(clip: Clip, matrix: list, offset: list, fill: Float[Array, "3"]) -> Clip:
    """Resamples a clip bilinearly by an affine map.

    dm_pix.affine_transform treats an image as a volume and took 15 times as long.

    Args:
      clip: (T, H, W, 3).
      matrix, offset: (2, 2) and (2,). The pixel with centre p = (y, x) of the result, in pixels
        from the corner of the frame, is the value of the clip at matrix p + offset.
      fill: (3,) colour of what lies outside the frame.
    """
    _, height, width, _ = clip.shape
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    # Not a matrix product: accelerators round the factors of one.
    source = [row[0] * y + row[1] * x + shift for row, shift in zip(matrix, offset)]
    inside = (source[0] >= 0) & (source[0] < height) & (source[1] >= 0) & (source[1] < width)

    def channel(image: jax.Array) -> jax.Array:
        return map_coordinates(image, [at - 0.5 for at in source], order=1, mode="nearest")

    warped = jax.vmap(jax.vmap(channel, -1, -1))(jnp.asarray(clip))
    return jnp.where(inside[..., None], warped, fill)


def grayscale(clip: Clip) -> Float[Array, "t h w 3"]:
    """The grey level of each pixel, in all three channels."""
    with jax.default_matmul_precision("highest"):
        return dm_pix.rgb_to_grayscale(clip, keep_dims=True)


def _blend(other: jax.Array, clip: Clip, factor: Scalar) -> Clip:
    return jnp.clip(other + factor * (clip - other), 0, 1)


def _levels(clip: Clip) -> Int[Array, "t h w 3"]:
    """[0, 1] as int32 from 0 to 255."""
    return jnp.round(clip * 255).astype(jnp.int32)


def box(
    size: int, corner: Float[Array, "2"], sides: Float[Array, "2"]
) -> Bool[Array, "{size} {size}"]:
    """A mask (S, S) of the pixels of a box; parts of the box may lie outside the frame.

    Args:
      size: side of the frame, S.
      corner, sides: first row and column, height and width, in pixels.
    """
    at = jnp.arange(size)
    rows, columns = ((corner[i] <= at) & (at < corner[i] + sides[i]) for i in (0, 1))
    return rows[:, None] & columns
