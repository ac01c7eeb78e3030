"""What a model expects of a clip: length, sampling, size and normalisation. Numbers only, no JAX."""

from __future__ import annotations

import dataclasses

from timesformer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """What a model expects of a clip; checkpoints carry it.

    Attributes:
      frames: frames a clip, T.
      sampling: "stride", frames at a fixed distance, or "segments", one from each of T equal parts
        of the whole video (the Something-Something recipes).
      frame_stride: distance between frames of sampling "stride", in frames of a 30 fps video.
      crop: side of a clip, in pixels.
      mean, std: normalisation of each channel, of values in [0, 1].
      channel_order: "rgb", or "bgr" for weights trained with OpenCV's order (the release's
        Something-Something ones).
      start: of sampling "stride": "middle", the paper's test clip, or "first", the release's, which
        starts at frame 0.
      short_side: of the frames that clips are cut from; videos are scaled to it first.
    """

    frames: int = 8
    frame_stride: int = 32
    crop: int = 224
    mean: tuple[float, float, float] = (0.45, 0.45, 0.45)
    std: tuple[float, float, float] = (0.225, 0.225, 0.225)
    channel_order: str = "rgb"
    start: str = "middle"
    short_side: int = 256
    sampling: str = "stride"

    def __post_init__(self):
        # JSON and configs hold lists; equality and hashing need tuples.
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"channel_order must be rgb or bgr, not {self.channel_order!r}")
        if self.sampling not in ("stride", "segments"):
            raise InputError(f"sampling must be stride or segments, not {self.sampling!r}")
        if self.start not in ("middle", "first"):
            raise InputError(f"start must be middle or first, not {self.start!r}")
        if min(self.frames, self.frame_stride, self.crop) < 1:
            raise InputError("frames, frame_stride and crop of a clip must be at least 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError("mean and std need three numbers each, std above 0")
