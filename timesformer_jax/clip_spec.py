"""The clips that a model expects: length, sampling, size and normalisation."""

from __future__ import annotations

import dataclasses

from timesformer_jax import ranges
from timesformer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """The clips that a model expects. It is part of a checkpoint's metadata.

    Attributes:
      frames: frames per clip, T.
      frame_stride: with sampling "stride", the distance between frames, in frames of a 30 fps
        video.
      crop: height and width of a clip, in pixels.
      mean, std: normalisation of each channel, for values in [0, 1].
      channel_order: "rgb"; or "bgr" for weights that were trained on OpenCV's order, as those of
        the authors' release for Something-Something.
      start: with sampling "stride", where one test clip lies: "middle" of the video (the paper), or
        "first", from frame 0 (the authors' release).
      short_side: pixels that a video's shorter side is scaled to before it is cropped.
      sampling: "stride", frames at a fixed distance; or "segments", one frame from each of T equal
        parts of the whole video (the Something-Something recipes).
      short: what fills up the clip of a video that is shorter than it: "repeat", its last frame, as
        in the authors' release; or "mask", frames that no token attends to and no average includes.
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
    short: str = "repeat"

    def __post_init__(self):
        # JSON and configs give lists, which cannot be hashed.
        object.__setattr__(self, "mean", tuple(float(x) for x in self.mean))
        object.__setattr__(self, "std", tuple(float(x) for x in self.std))
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"channel_order must be rgb or bgr, not {self.channel_order!r}")
        if self.sampling not in ("stride", "segments"):
            raise InputError(f"sampling must be stride or segments, not {self.sampling!r}")
        if self.start not in ("middle", "first"):
            raise InputError(f"start must be middle or first, not {self.start!r}")
        if self.short not in ("repeat", "mask"):
            raise InputError(f"short must be repeat or mask, not {self.short!r}")
        for field in ("frames", "frame_stride", "crop", "short_side"):
            ranges.check(field, getattr(self, field))
        if len(self.mean) != 3 or len(self.std) != 3:
            raise InputError("mean and std need three numbers each")
        ranges.check("clip.mean", self.mean, "mean")
        ranges.check("clip.std", self.std, "std")

    def with_frames(self, frames: int) -> ClipSpec:
        """The clip with another number of frames, which span the same time.

        Raises:
          InputError: if no clip has so many frames.
        """
        ranges.check("frames", frames)
        stride = max(round(self.frames * self.frame_stride / frames), 1)
        return dataclasses.replace(self, frames=frames, frame_stride=stride)
