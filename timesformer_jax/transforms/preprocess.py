"""From decoded frames to the model's input, on the device: crop, resize, flip and normalise.

Training, evaluation and prediction share it.
"""

from __future__ import annotations

import functools

import dm_pix
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.pieces import in_pieces, is_long, tokens_of

Frames = UInt8[Array | np.ndarray, "b t h w 3"]
CropBoxes = Float[Array | np.ndarray, "b 3"]
Flip = Bool[Array | np.ndarray, " b"] | None


def preprocess(
    frames: Frames,
    crop_boxes: CropBoxes,
    spec: ClipSpec,
    flip: Flip = None,
    *,
    dtype: str = "float32",
) -> Float[Array, "b t s s 3"]:
    """Crops, resizes, flips and normalises clips in one antialiased resampling.

    Long clips go through it in pieces of frames.

    Args:
      frames: (B, T, H, W, 3) uint8 RGB.
      crop_boxes: (B, 3) float32, the square to keep: top, left and side in pixels of `frames`.
      spec: size of the result and its normalisation.
      flip: (B,) bool, which clips to mirror; None for none.
      dtype: of the model, which a long clip is rounded to.

    Returns:
      (B, T, crop, crop, 3) float32; a long clip of `dtype`.
    """

    def of(frames: Frames) -> jax.Array:
        return normalise(crop(frames, crop_boxes, spec.crop, flip), spec)

    tokens = tokens_of(spec.crop)
    if not is_long(frames.shape[1], tokens):
        return of(frames)
    return in_pieces(lambda x: of(x).astype(dtype), jnp.asarray(frames), tokens)


@jax.named_scope("preprocessing")
def crop(
    frames: Frames, crop_boxes: CropBoxes, size: int, flip: Flip = None
) -> Float[Array, "b t {size} {size} 3"]:
    """Crops, resizes and flips clips; see `preprocess` for the arguments.

    Returns:
      (B, T, size, size, 3) RGB in [0, 1], up to rounding: float32, or float16 of a long clip,
      which goes through it in pieces of frames.
    """
    tokens = tokens_of(size)
    if is_long(frames.shape[1], tokens):
        few = functools.partial(_crop, crop_boxes=crop_boxes, size=size, flip=flip)
        return in_pieces(lambda x: few(x).astype(jnp.float16), jnp.asarray(frames), tokens)
    return _crop(frames, crop_boxes, size, flip)


def _crop(frames: Frames, crop_boxes: CropBoxes, size: int, flip: Flip) -> jax.Array:
    clips = jax.vmap(lambda f, box: resample(f.astype(jnp.float32), box, size))(frames, crop_boxes)
    if flip is not None:
        clips = jnp.where(flip[:, None, None, None, None], dm_pix.flip_left_right(clips), clips)
    # The weights of the linear kernel are positive: values stay in the range of the frame's.
    return clips / 255


@jax.named_scope("preprocessing")
def normalise(
    clips: Float[Array, "b t s s 3"], spec: ClipSpec, dtype: str = "float32"
) -> Float[Array, "b t s s 3"]:
    """Clips of RGB in [0, 1], normalised and in the channel order of the model.

    Returns:
      Clips of the same shape: float32, or `dtype` of a long clip, which goes through it in pieces.
    """
    tokens = tokens_of(clips.shape[2])
    if is_long(clips.shape[1], tokens):
        return in_pieces(lambda x: normalise(x, spec).astype(dtype), clips, tokens)
    clips = (clips - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)
    return clips[..., ::-1] if spec.channel_order == "bgr" else clips


def resample(
    frames: Float[Array, "t h w c"], crop_box: Float[Array, "3"], size: int
) -> Float[Array, "t {size} {size} c"]:
    """Resizes a square of the frames to size x size with an antialiased linear kernel.

    Args:
      frames: (T, H, W, C) float.
      crop_box: (3,) top, left and side, in pixels of the frames.
      size: side of the result.

    Returns:
      (T, size, size, C) float.
    """
    # No stack of scalars: jax2onnx does not know it.
    scale = size / crop_box[2:]
    return jax.image.scale_and_translate(
        frames,
        (frames.shape[0], size, size, frames.shape[3]),
        spatial_dims=(1, 2),
        scale=jnp.concatenate([scale, scale]),
        translation=-crop_box[:2] * scale,
        method="linear",
        antialias=True,
    )
