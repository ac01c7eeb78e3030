"""Augmentation of training clips, on the device and inside the jitted step.

It acts on RGB in [0, 1], after the crop and before normalisation. What is drawn for a clip comes
from the clip's own number, which the data made from (seed, epoch, record): a clip is augmented
alike wherever it lies in the batch or on the mesh, and after a restart. All its frames are treated
alike, statistics (contrast's mean, a histogram) being those of the whole clip, so that nothing
flickers that did not before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import dm_pix
import jax
import jax.numpy as jnp
import optax
from jax.scipy.ndimage import map_coordinates
from jax.sharding import Mesh

from timesformer_jax.distributed.mesh import BATCH_SPEC
from timesformer_jax.errors import InputError

# What is drawn for a clip; each has a stream of its own, so that one does not change another.
_STREAMS = ("color_jitter", "grayscale", "randaugment", "erasing", "mixing")

# Random erasing's share of the frame, and the height of the box over its width.
ERASED_AREA, ERASED_ASPECT = (0.02, 0.4), (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Which augmentations training uses, in the order they are applied; all off by default.

    Attributes:
      color_jitter: strengths s of brightness, contrast, saturation and hue, in this order. The
        first three are scaled by a factor from [max(0, 1 - s), 1 + s], the hue is turned by up to
        s (of a whole turn, at most 0.5) either way.
      grayscale: probability that a clip loses its colour.
      randaugment_layers: operations drawn for each clip, N of RandAugment (arXiv 1909.13719).
      randaugment_magnitude: their strength, 0 to 10; M of the same.
      erasing: probability that a box is filled with the mean colour, the same in all frames
        (Random Erasing, arXiv 1708.04896).
      label_smoothing: share of a label that is spread over all classes (arXiv 1512.00567).
      mixup: alpha of mixup (arXiv 1710.09412); 0 for none.
      cutmix: alpha of CutMix (arXiv 1905.04899); 0 for none. With mixup too, each clip gets one or
        the other, half of them each.

    Raises:
      InputError: for a value out of its range.
    """

    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    grayscale: float = 0.0
    randaugment_layers: int = 0
    randaugment_magnitude: float = 9.0
    erasing: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        # JSON and configs hold lists; hashing needs a tuple.
        object.__setattr__(self, "color_jitter", tuple(self.color_jitter))
        jitter = self.color_jitter
        numbers = all(isinstance(s, int | float) and 0 <= s < math.inf for s in jitter)
        if not numbers or len(jitter) != 4 or jitter[3] > 0.5:
            raise InputError(
                "augment.color_jitter must be four strengths of at least 0 (brightness, contrast, "
                f"saturation, hue), the hue's at most 0.5; not {jitter}"
            )
        most = {
            "grayscale": 1, "randaugment_layers": 14, "randaugment_magnitude": 10, "erasing": 1,
            "label_smoothing": 1, "mixup": 1000, "cutmix": 1000,
        }  # fmt: skip
        for name, bound in most.items():
            if not 0 <= (value := getattr(self, name)) <= bound:
                raise InputError(f"augment.{name} must be from 0 to {bound}, not {value}")

    @property
    def mixes(self) -> bool:
        return bool(self.mixup or self.cutmix)

    @property
    def distorts(self) -> bool:
        """Whether clips change one by one."""
        return bool(
            any(self.color_jitter) or self.grayscale or self.randaugment_layers or self.erasing
        )

    @property
    def on(self) -> bool:
        return self.distorts or self.mixes or bool(self.label_smoothing)


OFF = Augmentation()


def augment(
    clips: jax.Array,
    labels: jax.Array,
    draws: jax.Array,
    how: Augmentation,
    *,
    fill: tuple[float, float, float],
    classes: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch; its leading axis lies over the whole mesh.

    Args:
      clips: (B, T, S, S, 3) float32 RGB in [0, 1].
      labels: (B,) int32.
      draws: (B,) uint32, a number for each clip that decides all its draws.
      how: what to do.
      fill: colour of what is erased or comes in from outside the frame; normalisation makes its
        mean the model's 0.
      classes: of the labels.
      mesh: the devices.

    Returns:
      The clips, and soft labels (B, classes) float32 whose rows sum to 1.
    """
    if how.distorts:
        # A switch over operations under vmap would run all of them on every clip and hold all the
        # results: so each device goes through its clips one by one and runs only what was drawn.
        def one_by_one(*mine: jax.Array) -> jax.Array:
            return jax.lax.map(lambda one: distort(*one, how, fill), mine)

        clips = _on_each_device(mesh, one_by_one)(clips, draws)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), how.label_smoothing)
    return mix(clips, targets, draws, how, mesh) if how.mixes else (clips, targets)


def distort(
    clip: jax.Array, draw: jax.Array, how: Augmentation, fill: tuple[float, float, float]
) -> jax.Array:
    """What a clip goes through alone: colour jitter, greyscale, RandAugment, erasing.

    Args:
      clip: (T, S, S, 3) float32 RGB in [0, 1].
      draw: () uint32.
      how, fill: as for `augment`.
    """
    clip = jnp.clip(clip, 0, 1)
    if any(how.color_jitter):
        clip = jitter_colors(_key(draw, "color_jitter"), clip, how.color_jitter)
    if how.grayscale:
        drawn = jax.random.bernoulli(_key(draw, "grayscale"), how.grayscale)
        clip = jnp.where(drawn, _gray(clip), clip)
    if how.randaugment_layers:
        key = _key(draw, "randaugment")
        clip = randaugment(key, clip, how.randaugment_layers, how.randaugment_magnitude, fill)
    if how.erasing:
        clip = erase(_key(draw, "erasing"), clip, how.erasing, fill)
    return clip


def mix(
    clips: jax.Array, targets: jax.Array, draws: jax.Array, how: Augmentation, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Mixes each clip of a batch with the one before it, by mixup or CutMix.

    The neighbour in the global batch (the first's is the last) is the same on every mesh, and of
    each device's clips only one has to travel. How much is mixed comes from the clip's own draw.

    Args:
      clips: (B, T, S, S, 3) float.
      targets: (B, classes), rows that sum to 1.
      draws: (B,) uint32.
      how: mixup and cutmix, at least one of them above 0.
      mesh: the devices.

    Returns:
      Clips and targets of the same shapes; a target keeps the share of its own that its clip's
      pixels do.
    """
    # Beta is drawn by loops that last until all clips have theirs: on each device of its own.
    mixing = jax.vmap(lambda draw: _mixing(draw, clips.shape[2], how))
    weight, share = _on_each_device(mesh, mixing)(draws)
    weight, share = weight[:, None, :, :, None], share[:, None]
    clips = weight * clips + (1 - weight) * jnp.roll(clips, 1, axis=0)
    targets = share * targets + (1 - share) * jnp.roll(targets, 1, axis=0)
    return clips, targets


def _mixing(draw: jax.Array, size: int, how: Augmentation) -> tuple[jax.Array, jax.Array]:
    """The weight (S, S) of a clip's own pixels, and their share () of the clip."""
    which, amount, place = jax.random.split(_key(draw, "mixing"), 3)
    odds = 0.5 if how.mixup and how.cutmix else float(how.cutmix > 0)
    cut = jax.random.bernoulli(which, odds)
    alpha = jnp.where(cut, how.cutmix, how.mixup)
    kept = jax.random.beta(amount, alpha, alpha)
    # CutMix's box may stick out of the frame; what is seen of it counts.
    side = jnp.floor(size * jnp.sqrt(1 - kept))
    corner = jax.random.randint(place, (2,), 0, size) - side // 2
    outside = 1.0 - _box(size, corner, jnp.stack([side, side]))
    return jnp.where(cut, outside, kept), jnp.where(cut, outside.mean(), kept)


def jitter_colors(key: jax.Array, clip: jax.Array, strengths: tuple[float, ...]) -> jax.Array:
    """Brightness, contrast, saturation and hue by random amounts, in this order.

    Args:
      key: of the draws.
      clip: (T, H, W, 3) in [0, 1].
      strengths: as `Augmentation.color_jitter`.
    """
    *factors, turn = strengths
    draws = jax.random.uniform(key, (4,), minval=-1)
    for adjust, strength, draw in zip((brightness, contrast, saturation), factors, draws):
        if strength:
            low, high = max(0.0, 1 - strength), 1 + strength
            clip = adjust(clip, low + (high - low) * (draw + 1) / 2)
    return jnp.clip(dm_pix.adjust_hue(clip, turn * draws[3]), 0, 1) if turn else clip


def erase(
    key: jax.Array, clip: jax.Array, probability: float, fill: tuple[float, float, float]
) -> jax.Array:
    """Fills a random box, the same in all frames (arXiv 1708.04896, with the mean colour).

    Args:
      key: of the draws.
      clip: (T, S, S, 3).
      probability: of a box. Its area is uniform in ERASED_AREA, its aspect log-uniform in
        ERASED_ASPECT, its place uniform; a side longer than the frame is cut to it.
      fill: of the box.
    """
    size = clip.shape[1]
    whether, area, aspect, place = jax.random.split(key, 4)
    area = size**2 * jax.random.uniform(area, minval=ERASED_AREA[0], maxval=ERASED_AREA[1])
    low, high = (math.log(x) / 2 for x in ERASED_ASPECT)
    tall = jnp.exp(jax.random.uniform(aspect, minval=low, maxval=high))
    sides = jnp.clip(jnp.round(jnp.sqrt(area) * jnp.stack([tall, 1 / tall])), 1, size)
    corner = jnp.floor(jax.random.uniform(place, (2,)) * (size - sides + 1))
    box = _box(size, corner, sides) & jax.random.bernoulli(whether, probability)
    return jnp.where(box[..., None], jnp.asarray(fill), clip)


def randaugment(
    key: jax.Array,
    clip: jax.Array,
    layers: int,
    magnitude: float,
    fill: tuple[float, float, float],
) -> jax.Array:
    """Applies `layers` of the paper's 14 operations, drawn uniformly (arXiv 1909.13719).

    Args:
      key: of the draws.
      clip: (T, H, W, 3) in [0, 1].
      layers: how many.
      magnitude: strength of those that have one, 0 to 10, in the ranges of AutoAugment (arXiv
        1805.09501): 10 shears by 0.3, moves by 0.45 of the side, turns by 30 degrees, keeps 4 bits,
        solarizes everything, scales the rest by 1.9 or 0.1. The direction is drawn.
      fill: of what comes in from outside the frame.
    """
    strength = magnitude / 10

    def layer(clip: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        which, sign = jax.random.split(key)
        drawn = jax.random.randint(which, (), 0, len(OPERATIONS))
        signed = jnp.where(jax.random.bernoulli(sign), strength, -strength)
        clip = jax.lax.switch(drawn, tuple(OPERATIONS.values()), clip, signed, jnp.asarray(fill))
        return clip, None

    return jax.lax.scan(layer, clip, jax.random.split(key, layers))[0]


# RandAugment's operations: each takes a clip, a strength in [-1, 1] and the colour of the outside.
OPERATIONS = {
    "identity": lambda clip, s, fill: clip,
    "autocontrast": lambda clip, s, fill: autocontrast(clip),
    "equalize": lambda clip, s, fill: equalize(clip),
    "rotate": lambda clip, s, fill: rotate(clip, s * math.radians(30), fill),
    # Above 255, so that at strength 0 white stays white.
    "solarize": lambda clip, s, fill: dm_pix.solarize(clip, (1 - jnp.abs(s)) * 256 / 255),
    "color": lambda clip, s, fill: saturation(clip, 1 + 0.9 * s),
    "posterize": lambda clip, s, fill: posterize(clip, 8 - jnp.round(4 * jnp.abs(s))),
    "contrast": lambda clip, s, fill: contrast(clip, 1 + 0.9 * s),
    "brightness": lambda clip, s, fill: brightness(clip, 1 + 0.9 * s),
    "sharpness": lambda clip, s, fill: sharpness(clip, 1 + 0.9 * s),
    "shear_x": lambda clip, s, fill: warp(clip, [[1, 0], [0.3 * s, 1]], [0, 0], fill),
    "shear_y": lambda clip, s, fill: warp(clip, [[1, 0.3 * s], [0, 1]], [0, 0], fill),
    "translate_x": lambda clip, s, fill: translate(clip, [0, 0.45 * s], fill),
    "translate_y": lambda clip, s, fill: translate(clip, [0.45 * s, 0], fill),
}

# The colour operations are Pillow's, which the papers use: factor 0 gives a degenerate clip, 1 the
# clip itself. (dm_pix adds to brightness, takes contrast by channel, and saturates in HSV.)


def brightness(clip: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from black, by a factor () of at least 0; clips are (T, H, W, 3) in [0, 1]."""
    return _blend(jnp.zeros_like(clip), clip, factor)


def contrast(clip: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from the clip's mean grey."""
    return _blend(_gray(clip).mean(), clip, factor)


def saturation(clip: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from the grey of each pixel."""
    return _blend(_gray(clip), clip, factor)


def sharpness(clip: jax.Array, factor: jax.Array) -> jax.Array:
    """Away from each frame smoothed by a 3 x 3 kernel, ones about a 5; the border stays."""
    rows = clip[:, :-2] + clip[:, 1:-1] + clip[:, 2:]
    boxes = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (boxes + 4 * clip[:, 1:-1, 1:-1]) / 13
    return _blend(clip.at[:, 1:-1, 1:-1].set(inner), clip, factor)


def autocontrast(clip: jax.Array) -> jax.Array:
    """Stretches each channel of the clip to [0, 1]; one of a single value stays."""
    low, high = clip.min((0, 1, 2)), clip.max((0, 1, 2))
    stretched = (clip - low) / jnp.where(high > low, high - low, 1)
    return jnp.where(high > low, stretched, clip)


def equalize(clip: jax.Array) -> jax.Array:
    """Evens out the histogram, over 256 levels, of each channel of the clip, as Pillow does."""

    def channel(levels: jax.Array) -> jax.Array:
        counts = jnp.bincount(levels.ravel(), length=256)
        step = (levels.size - counts[levels.max()]) // 255
        below = jnp.cumsum(counts) - counts
        even = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, even, jnp.arange(256))[levels]

    return jax.vmap(channel, -1, -1)(_levels(clip)).astype(clip.dtype) / 255


def posterize(clip: jax.Array, bits: jax.Array) -> jax.Array:
    """Keeps the highest of a value's 8 bits, () of them."""
    step = 2 ** (8 - bits)
    return jnp.floor(_levels(clip) / step) * step / 255


def translate(clip: jax.Array, shares: list[float], fill: jax.Array) -> jax.Array:
    """Moves a clip up and left by shares of its height and width."""
    return warp(
        clip, [[1, 0], [0, 1]], [shares[0] * clip.shape[1], shares[1] * clip.shape[2]], fill
    )


def rotate(clip: jax.Array, angle: jax.Array, fill: jax.Array) -> jax.Array:
    """Turns a clip about its centre, counter-clockwise, by radians."""
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    y, x = clip.shape[1] / 2, clip.shape[2] / 2
    offset = [y - cosine * y - sine * x, x + sine * y - cosine * x]
    return warp(clip, [[cosine, sine], [-sine, cosine]], offset, fill)


def warp(clip: jax.Array, matrix: list, offset: list, fill: jax.Array) -> jax.Array:
    """Resamples a clip bilinearly where an affine map points.

    dm_pix.affine_transform takes an image for a volume and took 15 times as long.

    Args:
      clip: (T, H, W, 3).
      matrix, offset: (2, 2) and (2,); pixel centres p = (y, x) of the result, in pixels from the
        frame's corner, take what is at matrix p + offset.
      fill: (3,) colour of what lies outside.
    """
    _, height, width, _ = clip.shape
    y, x = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    # Not a matrix product: accelerators round the factors of one.
    source = [row[0] * y + row[1] * x + shift for row, shift in zip(matrix, offset)]
    inside = (source[0] >= 0) & (source[0] < height) & (source[1] >= 0) & (source[1] < width)

    def channel(image: jax.Array) -> jax.Array:
        return map_coordinates(image, [at - 0.5 for at in source], order=1, mode="nearest")

    warped = jax.vmap(jax.vmap(channel, -1, -1))(clip)
    return jnp.where(inside[..., None], warped, fill)


def _on_each_device(mesh: Mesh, function: Callable) -> Callable:
    """Runs a function of arrays that begin with the batch on each device's part of them."""
    return jax.shard_map(function, mesh=mesh, in_specs=BATCH_SPEC, out_specs=BATCH_SPEC)


def _key(draw: jax.Array, stream: str) -> jax.Array:
    # Threefry by name: other generators draw otherwise under vmap.
    return jax.random.fold_in(jax.random.key(draw, impl="threefry2x32"), _STREAMS.index(stream))


def _gray(clip: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return dm_pix.rgb_to_grayscale(clip, keep_dims=True)


def _blend(other: jax.Array, clip: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(other + factor * (clip - other), 0, 1)


def _levels(clip: jax.Array) -> jax.Array:
    """[0, 1] as 0 to 255, int32."""
    return jnp.round(clip * 255).astype(jnp.int32)


def _box(size: int, corner: jax.Array, sides: jax.Array) -> jax.Array:
    """(S, S) bool: the pixels from a corner (2,) on, sides (2,) of them; parts may lie outside."""
    at = jnp.arange(size)
    rows, columns = ((corner[i] <= at) & (at < corner[i] + sides[i]) for i in (0, 1))
    return rows[:, None] & columns
