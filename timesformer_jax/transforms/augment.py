"""Augmentation of training clips, on the device and inside the jitted step.

It changes RGB in [0, 1], after the crop and before normalisation. All random numbers of a clip come
from its `augment_seed`, which the input pipeline derives from (seed, epoch, record): a clip is
augmented in the same way wherever it lies in the batch or on the mesh, and after a restart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt32

from timesformer_jax.distributed.mesh import BATCH_SPEC
from timesformer_jax.distributed.pieces import in_pieces, is_long, tokens_of
from timesformer_jax.transforms import augment_long, operations
from timesformer_jax.transforms.augmentation import OFF, Augmentation

# Every augmentation has a random stream of its own, so that one does not change another.
_STREAMS = ("color_jitter", "grayscale", "randaugment", "erasing", "mixing")


Clips = Float[Array | np.ndarray, "b t s s 3"]
Clip = Float[Array | np.ndarray, "t s s 3"]
Targets = Float[Array | np.ndarray, "b classes"]
Seeds = UInt32[Array | np.ndarray, " b"]
Seed = UInt32[Array | np.ndarray, ""]


def augment(
    clips: Clips,
    labels: Int[Array, " b"] | Float[Array, "b classes"],
    seeds: Seeds,
    augmentation: Augmentation,
    *,
    fill: tuple[float, float, float],
    classes: int,
    mesh: Mesh,
) -> tuple[Clips, Targets]:
    """Augments a batch, which is sharded over its leading axis.

    Args:
      clips: (B, T, S, S, 3) float32 RGB in [0, 1]; float16 if they are long.
      labels: (B,) int32; of multi-label data (B, classes) float32, 0 or 1.
      seeds: (B,) uint32, one for each clip.
      augmentation: which augmentations.
      fill: colour of erased pixels and of those that come in from outside the frame. The mean of
        the normalisation becomes 0 in the input of the model.
      classes: number of classes.
      mesh: the devices.

    Returns:
      The clips, and soft labels (B, classes) float32. Without multi-label data their rows sum to 1.
    """
    if augmentation.distorts:
        # Under vmap a switch over the operations would run all of them on every clip and hold all
        # results. So each device maps over its clips and runs only the operations drawn for each.
        def one_by_one(clips: jax.Array, seeds: jax.Array) -> jax.Array:
            return jax.lax.map(
                lambda one: distort(one[0], one[1], augmentation, fill), (clips, seeds)
            )

        clips = _on_each_device(mesh, one_by_one)(clips, seeds)
    if labels.ndim == 1:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), augmentation.label_smoothing)
    else:  # each class is a choice between two
        smoothing = augmentation.label_smoothing
        targets = (1 - smoothing) * labels + smoothing / 2
    if augmentation.mixes:
        return mix(clips, targets, seeds, augmentation, mesh)
    return clips, targets


def distort(
    clip: Clip, seed: Seed, augmentation: Augmentation, fill: tuple[float, float, float]
) -> Clip:
    """Augments the pixels of one clip: colour jitter, greyscale, RandAugment, erasing.

    Args:
      clip: (T, S, S, 3) float RGB in [0, 1], float32 unless it is long.
      seed: () uint32.
      augmentation, fill: see `augment`.
    """
    tokens = tokens_of(clip.shape[1])
    if is_long(len(clip), tokens):
        return _distort_long(clip, seed, augmentation, fill, tokens)
    clip = jnp.clip(clip, 0, 1)
    if any(augmentation.color_jitter):
        key = _key(seed, "color_jitter")
        clip = operations.jitter_colors(key, clip, augmentation.color_jitter)
    if augmentation.grayscale:
        is_gray = jax.random.bernoulli(_key(seed, "grayscale"), augmentation.grayscale)
        clip = jnp.where(is_gray, operations.grayscale(clip), clip)
    if augmentation.randaugment_layers:
        layers, magnitude = augmentation.randaugment_layers, augmentation.randaugment_magnitude
        clip = operations.randaugment(_key(seed, "randaugment"), clip, layers, magnitude, fill)
    if augmentation.erasing:
        clip = operations.erase(_key(seed, "erasing"), clip, augmentation.erasing, fill)
    return clip


def _distort_long(
    clip: Clip,
    seed: Seed,
    augmentation: Augmentation,
    fill: tuple[float, float, float],
    tokens: int,
) -> Clip:
    """`distort`, in pieces of frames."""

    def only(**fields: Any) -> Callable[[jax.Array], Any]:
        return lambda frames: distort(frames, seed, dataclasses.replace(OFF, **fields), fill)

    if any(augmentation.color_jitter):
        key = _key(seed, "color_jitter")
        clip = augment_long.jitter_colors(key, clip, augmentation, tokens)
    if augmentation.grayscale:
        clip = augment_long.each(only(grayscale=augmentation.grayscale), clip, tokens)
    if augmentation.randaugment_layers:
        key = _key(seed, "randaugment")
        clip = augment_long.randaugment(key, clip, augmentation, fill, tokens)
    if augmentation.erasing:
        clip = augment_long.each(only(erasing=augmentation.erasing), clip, tokens)
    return clip


def mix(
    clips: Clips, targets: Targets, seeds: Seeds, augmentation: Augmentation, mesh: Mesh
) -> tuple[Clips, Targets]:
    """Mixes each clip of a batch with the clip before it, by mixup or CutMix.

    The clip before the first is the last of the global batch. So the neighbour is the same on every
    mesh, and each device receives one clip. The weights come from the clip's own seed.

    Args:
      clips: (B, T, S, S, 3) float.
      targets: (B, classes), rows that sum to 1.
      seeds: (B,) uint32.
      augmentation: mixup and cutmix, at least one of them above 0.
      mesh: the devices.

    Returns:
      Clips and targets of the same shapes; the weight of a clip's own target is the share of its
      own pixels.
    """
    # The beta distribution is sampled by loops that run until the slowest clip is done: each device
    # runs its own.
    mixing = jax.vmap(lambda seed: _mixing(seed, clips.shape[2], augmentation))
    weight, share = _on_each_device(mesh, mixing)(seeds)
    weight, share = weight[:, None, :, :, None], share[:, None]
    tokens = tokens_of(clips.shape[2])

    def mixed(pair: Any) -> jax.Array:
        return weight * pair[0] + (1 - weight) * pair[1]

    pair = clips, jnp.roll(clips, 1, axis=0)
    if is_long(clips.shape[1], tokens):
        clips = in_pieces(lambda x: mixed(x).astype(clips.dtype), pair, tokens)
    else:
        clips = mixed(pair)
    targets = share * targets + (1 - share) * jnp.roll(targets, 1, axis=0)
    return clips, targets


def _mixing(
    seed: Seed, size: int, augmentation: Augmentation
) -> tuple[Float[Array, "#s #s"], Float[Array, ""]]:
    """The weight of a clip's own pixels, (S, S) or (1, 1), and their share of the clip, ()."""
    which, amount, place = jax.random.split(_key(seed, "mixing"), 3)
    mixup, cutmix = augmentation.mixup, augmentation.cutmix
    cut = jax.random.bernoulli(which, 0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = jnp.where(cut, cutmix, mixup)
    own = jax.random.beta(amount, alpha, alpha)
    # CutMix's box may lie partly outside the frame; only the part inside counts.
    side = jnp.floor(size * jnp.sqrt(1 - own))
    corner = jax.random.randint(place, (2,), 0, size) - side // 2
    outside = 1.0 - operations.box(size, corner, jnp.stack([side, side]))
    return jnp.where(cut, outside, own), jnp.where(cut, outside.mean(), own)


def _on_each_device(mesh: Mesh, function: Callable) -> Callable:
    """Runs a function of arrays with a batch axis on each device's part of them."""
    return jax.shard_map(function, mesh=mesh, in_specs=BATCH_SPEC, out_specs=BATCH_SPEC)


def _key(seed: Seed, stream: str) -> Key[Array, ""]:
    # Threefry by name: other generators give other numbers under vmap.
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _STREAMS.index(stream))
