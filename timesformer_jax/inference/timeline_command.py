"""`timesformer timeline`: what happens when in a video."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm

from timesformer_jax import storage
from timesformer_jax.data.decode import VideoError
from timesformer_jax.errors import InputError
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.inference.timeline import page
from timesformer_jax.inference.timeline.find import SWITCH_COST
from timesformer_jax.inference.timeline.page import clock
from timesformer_jax.inference.timeline.result import VideoTimeline

FORMATS = (".json", ".csv", ".vtt", ".html")


def timeline(
    video: str,
    checkpoint: str,
    stride: float | None = None,
    window: float | None = None,
    switch_cost: float = SWITCH_COST,
    output: list[str] | None = None,
    crops: int = 1,
    start: float | None = None,
    end: float | None = None,
    attention_kernels: str = "auto",
) -> None:
    """Prints the segments of a video, and writes them to files.

    Args:
      video: a video file or a folder of images.
      checkpoint: as for `Predictor`.
      stride, window, switch_cost, start, end: as for `Predictor.timeline`.
      output: files to write, each in the format of its ending: .json, .csv, .vtt or .html.
      crops, attention_kernels: as for `Predictor`.

    Raises:
      InputError: if the video cannot be read, or an option is not right.
    """
    outputs = output or []
    for path in outputs:
        storage.check_output("--output", path, FORMATS)
    predictor = Predictor(checkpoint, crops=crops, attention_kernels=attention_kernels)
    with tqdm(unit="clip", desc=os.path.basename(os.path.abspath(video)), leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        try:
            found = predictor.timeline(
                video, stride, window=window, switch_cost=switch_cost, start=start, end=end,
                progress=progress,
            )  # fmt: skip
        except VideoError as error:
            raise InputError(str(error)) from error
    for segment in found.segments:
        times = f"{clock(segment.start):>9}  {clock(segment.end):>9}"
        print(f"{times}  {segment.score:7.2%}  {segment.label}")
    for gap in found.gaps:
        print(f"{video}: {gap}", file=sys.stderr)
    for path in outputs:
        text = _as_text(found, path, video, predictor, checkpoint)
        with storage.disk_errors(path):
            storage.write_atomically(storage.absolute(path), text.encode())
        print(f"written to {path}")


def _as_text(
    found: VideoTimeline, path: str, video: str, predictor: Predictor, checkpoint: str
) -> str:
    """The content of an output file, by the ending of its name."""
    match storage.extension(path):
        case ".json":
            return found.to_json(video=video, checkpoint=checkpoint, crops=predictor.crops)
        case ".csv":
            return found.to_csv()
        case ".vtt":
            return found.to_vtt()
    model, clip = predictor.metadata.model, predictor.metadata.clip
    facts = [
        ("Checkpoint", checkpoint),
        ("Model", f"{model.attention}, {clip.frames} frames of {clip.crop} x {clip.crop} pixels"),
        ("Crops of a clip", str(predictor.crops)),
        *([("License", predictor.metadata.license)] if predictor.metadata.license else []),
    ]
    try:
        source = page.find_source(video, os.path.dirname(os.path.abspath(path)))
    except VideoError as error:
        raise InputError(
            f"{video}: {error}; the other kinds of --output need less of it"
        ) from error
    return page.render(found, os.path.basename(os.path.abspath(video)), source, facts)
