"""From decoded frames to the model's input, on the device; training and inference share it."""

from __future__ import annotations

import dataclasses

import dm_pix
import jax
import jax.numpy as jnp

from timesformer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """What a model expects of a clip; checkpoints carry it.

    Attributes:
      frames: frames a clip, T.
      sampling: "rate", frames at a fixed distance, or "segments", one from each of T equal parts
        of the whole video (the Something-Something recipes).
      rate: distance between frames of sampling "rate", in frames of a 30 fps video.
      crop: side of a clip, in pixels.
      mean, std: normalisation of each channel, of values in [0, 1].
      channel_order: "rgb", or "bgr" for weights trained with OpenCV's order (the release's
        Something-Something ones).
      start: of sampling "rate": "middle", the paper's test clip, or "first", the release's, which
        starts at frame 0.
      short_side: of the frames that clips are cut from; videos are scaled to it first.
    """

    frames: int = 8
    rate: int = 32
    crop: int = 224
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    channel_order: str = "rgb"
    start: str = "middle"
    short_side: int = 256
    sampling: str = "rate"

    def __post_init__(self):
        # JSON and configs hold lists; equality and hashing need tuples.
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"channel_order must be rgb or bgr, not {self.channel_order!r}")
        if self.sampling not in ("rate", "segments"):
            raise InputError(f"sampling must be rate or segments, not {self.sampling!r}")
        if self.start not in ("middle", "first"):
            raise InputError(f"start must be middle or first, not {self.start!r}")
        if min(self.frames, self.rate, self.crop) < 1:
            raise InputError("frames, rate and crop of a clip must be at least 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError("mean and std need three numbers each, std above 0")


def preprocess(
    frames: jax.Array, windows: jax.Array, spec: ClipSpec, flip: jax.Array | None = None
) -> jax.Array:
    """Crops, resizes, flips and normalises clips in one antialiased resampling.

    Args:
      frames: (B, T, H, W, 3) uint8 RGB.
      windows: (B, 3) float32, the square to keep: top, left and side in pixels of `frames`.
      spec: size of the result and its normalisation.
      flip: (B,) bool, which clips to mirror; None for none.

    Returns:
      (B, T, crop, crop, 3) float32.
    """
    return normalise(crop(frames, windows, spec.crop, flip), spec)


def crop(
    frames: jax.Array, windows: jax.Array, size: int, flip: jax.Array | None = None
) -> jax.Array:
    """Crops, resizes and flips clips; `frames`, `windows` and `flip` are those of `preprocess`.

    Returns:
      (B, T, size, size, 3) float32 RGB in [0, 1], up to rounding.
    """
    clips = jax.vmap(lambda f, w: resample(f.astype(jnp.float32), w, size))(frames, windows)
    if flip is not None:
        clips = jnp.where(flip[:, None, None, None, None], dm_pix.flip_left_right(clips), clips)
    # Linear weights of a shrinking kernel stay within the frame's range up to rounding.
    return clips / 255


def normalise(clips: jax.Array, spec: ClipSpec) -> jax.Array:
    """(..., 3) float32 RGB in [0, 1], normalised and in the model's order of channels."""
    clips = (clips - jnp.asarray(spec.mean)) / jnp.asarray(spec.std)
    return clips[..., ::-1] if spec.channel_order == "bgr" else clips


def resample(frames: jax.Array, window: jax.Array, size: int) -> jax.Array:
    """Resizes a square window of frames to size x size with an antialiased linear kernel.

    Args:
      frames: (T, H, W, C) float.
      window: (3,) top, left and side, in pixels of the frames.
      size: side of the result.

    Returns:
      (T, size, size, C) float.
    """
    top, left, side = window
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
