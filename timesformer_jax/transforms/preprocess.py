"""From decoded frames to the model's input, on the device; training and inference share it."""

from __future__ import annotations

import dm_pix
import jax
import jax.numpy as jnp

from timesformer_jax.clip_spec import ClipSpec


def preprocess(
    frames: jax.Array, crop_boxes: jax.Array, spec: ClipSpec, flip: jax.Array | None = None
) -> jax.Array:
    """Crops, resizes, flips and normalises clips in one antialiased resampling.

    Args:
      frames: (B, T, H, W, 3) uint8 RGB.
      crop_boxes: (B, 3) float32, the square to keep: top, left and side in pixels of `frames`.
      spec: size of the result and its normalisation.
      flip: (B,) bool, which clips to mirror; None for none.

    Returns:
      (B, T, crop, crop, 3) float32.
    """
    return normalise(crop(frames, crop_boxes, spec.crop, flip), spec)


def crop(
    frames: jax.Array, crop_boxes: jax.Array, size: int, flip: jax.Array | None = None
) -> jax.Array:
    """Crops, resizes and flips clips; `frames`, `crop_boxes` and `flip` are those of `preprocess`.

    Returns:
      (B, T, size, size, 3) float32 RGB in [0, 1], up to rounding.
    """
    clips = jax.vmap(lambda f, w: resample(f.astype(jnp.float32), w, size))(frames, crop_boxes)
    if flip is not None:
        clips = jnp.where(flip[:, None, None, None, None], dm_pix.flip_left_right(clips), clips)
    # Linear weights of a shrinking kernel stay within the frame's range up to rounding.
    return clips / 255


def normalise(clips: jax.Array, spec: ClipSpec) -> jax.Array:
    """(..., 3) float32 RGB in [0, 1], normalised and in the model's order of channels."""
    clips = (clips - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)
    return clips[..., ::-1] if spec.channel_order == "bgr" else clips


def resample(frames: jax.Array, crop_box: jax.Array, size: int) -> jax.Array:
    """Resizes a square crop_box of frames to size x size with an antialiased linear kernel.

    Args:
      frames: (T, H, W, C) float.
      crop_box: (3,) top, left and side, in pixels of the frames.
      size: side of the result.

    Returns:
      (T, size, size, C) float.
    """
    top, left, side = crop_box
    scale = size / side
    return jax.image.scale_and_translate(
        frames,
        (frames.shape[0], size, size, frames.shape[3]),
        spatial_dims=(1, 2),
        scale=jnp.stack([scale, scale]),
        translation=jnp.stack([-top * scale, -left * scale]),
        method="linear",
        antialias=True,
    )
