"""Class probabilities of video files. A checkpoint is all that is needed."""

from __future__ import annotations

import os

import jax
import numpy as np

from timesformer_jax.checkpoints import store as checkpoints
from timesformer_jax.data import decode
from timesformer_jax.data.input import sampling
from timesformer_jax.errors import InputError
from timesformer_jax.models import tuning
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.timesformer import with_parameters
from timesformer_jax.transforms.preprocess import preprocess


class Predictor:
    """Predicts the classes of videos with a checkpoint.

    Args:
      checkpoint: of a run of ours, as for `checkpoints.load_parameters`.
      views: clips along a video whose probabilities are averaged.
      crops: crops of each clip: 3 for left, centre and right, 1 for the centre.
      attention_kernels: "auto" for the fastest on the device, "xla", or the name of a kernel (see
        docs/kernels.md).

    Attributes:
      labels: class names, in the order of the probabilities. "class 17" and so on if the
        checkpoint has no names.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        views: int = 1,
        crops: int = 3,
        attention_kernels: str = "auto",
    ):
        if views < 1 or crops not in (1, 3):
            raise InputError(f"views must be at least 1 and crops 1 or 3, not {views} and {crops}")
        select.check_name(attention_kernels)
        self.metadata, params = checkpoints.load_parameters(checkpoint)
        model = self.metadata.model
        self.labels = self.metadata.labels or tuple(f"class {i}" for i in range(model.num_classes))
        self.views, self.crops = views, crops
        self._kernels, clip = attention_kernels, self.metadata.clip
        with tuning.using(self._kernels):
            tuning.choose_kernels(model, views * crops, clip.frames, clip.crop, gradients=False)
        forward = with_parameters(model, params)

        def probabilities(frames: jax.Array, crop_boxes: jax.Array) -> jax.Array:
            video = preprocess(frames, crop_boxes, clip)
            return jax.nn.softmax(forward(video)).mean(axis=0)

        self._probabilities = jax.jit(probabilities)

    def __call__(
        self, video: str | os.PathLike, start: float | None = None, end: float | None = None
    ) -> np.ndarray:
        """(classes,) float32 probabilities of a video file, or of its part [start, end) seconds.

        Raises:
          decode.VideoError: if it cannot be decoded.
        """
        clip = self.metadata.clip

        def sample(num_frames: int, fps: float) -> np.ndarray:
            return sampling.test_indices(num_frames, fps, clip, self.views).reshape(-1)

        frames = decode.decode_clip(
            video, start, end, sample=sample, short_side=clip.short_side
        ).frames
        crop_boxes = sampling.test_crop_boxes(frames.shape[1], frames.shape[2], self.crops)
        clips = frames.reshape(self.views, clip.frames, *frames.shape[1:])
        clips = np.repeat(clips, self.crops, axis=0)  # crops vary fastest
        with tuning.using(self._kernels):
            found = self._probabilities(clips, np.tile(crop_boxes, (self.views, 1)))
        return np.asarray(found)


def predict(
    videos: list[str],
    checkpoint: str,
    views: int = 1,
    crops: int = 3,
    start: float | None = None,
    end: float | None = None,
    top: int = 5,
    attention_kernels: str = "auto",
) -> None:
    """Prints the most probable classes of each video, or of its part [start, end) seconds.

    Raises:
      InputError: after all videos, naming those that could not be read.
    """
    if not videos:
        raise InputError("no video given: timesformer predict VIDEO... --checkpoint=DIR")
    predictor = Predictor(checkpoint, views, crops, attention_kernels)
    failed = []
    for video in videos:
        try:
            probabilities = predictor(video, start, end)
        except decode.VideoError as e:
            failed.append(f"{video} ({e})")
            continue
        print(video)
        for i in np.argsort(-probabilities)[:top]:
            print(f"  {probabilities[i]:7.2%}  {predictor.labels[i]}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(videos)} videos not predicted: {'; '.join(failed)}"
        )
