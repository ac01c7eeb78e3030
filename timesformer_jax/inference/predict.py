"""`timesformer predict`: the most probable classes of video files."""

from __future__ import annotations

import functools

from timesformer_jax.data.decode import VideoError
from timesformer_jax.errors import InputError
from timesformer_jax.inference.predictor import Predictor


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
    reads = [functools.partial(predictor.read, video, start, end, threads=1) for video in videos]
    failed = []
    for video, found in zip(videos, predictor.stream(predictor.classify, reads)):
        if isinstance(found, VideoError):
            failed.append(f"{video} ({found})")
            continue
        print(video)
        for label, probability in predictor.top(found.mean(axis=0), top):
            print(f"  {probability:7.2%}  {label}")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(videos)} videos not predicted: {'; '.join(failed)}"
        )
