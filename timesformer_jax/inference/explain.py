"""`timesformer explain`: a page, and a video, that show which patches a prediction comes from."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from timesformer_jax import storage
from timesformer_jax.data import decode
from timesformer_jax.data.encode import encode_jpeg, encode_mp4
from timesformer_jax.errors import InputError
from timesformer_jax.inference import clips, overlay, page
from timesformer_jax.inference.attention import class_index
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.inference.results import AttentionMap
from timesformer_jax.models import costs

# The clip as it is played: its shorter side, in pixels, and how many frames at most.
SHORT_SIDE = 360
FRAMES = 300
FPS = 30

THUMBNAIL = 72


class Played(NamedTuple):
    """The part of a video that a clip is sampled from, to be played.

    Attributes:
      frames: (F, H, W, 3) uint8 RGB.
      fps: frames per second.
      sampled: (T,), which of the F frames is nearest to each frame of the clip.
    """

    frames: np.ndarray
    fps: float
    sampled: np.ndarray

    @property
    def stops(self) -> list[float]:
        """Seconds within the part at which the frames of the clip are shown."""
        return [round((float(i) + 0.25) / self.fps, 4) for i in self.sampled]


def explain(
    file: str,
    checkpoint: str,
    output: str | None = None,
    video: str | None = None,
    start: float | None = None,
    end: float | None = None,
    top: int = 5,
    attention_kernels: str = "auto",
    **named: Any,
) -> None:
    """Writes a page, and on request a video, of what the model looks at in a clip.

    Args:
      file: the video.
      checkpoint: as for `Predictor`.
      output: the page; by default the video's name with .html, in the current folder, where
        no file may have this name.
      video: an MP4 of the clip with the heat over it.
      start, end: seconds; the clip lies in this part.
      top: how many classes the page shows, each with a map of its own.
      attention_kernels: as for `Predictor`.
      named: "class", a word of Python: the class whose map is shown first, and in `video`. By
        default that is attention rollout.

    Raises:
      InputError: if there is no such class, or a file cannot be read or written.
    """
    output = output or _default_output(file)
    for flag, path in (("--output", output), ("--video", video)):
        storage.check_output(flag, path, source=file)
    clock = Clock()
    predictor = Predictor(checkpoint, 1, 1, attention_kernels)
    chosen = named.get("class")
    chosen = None if chosen is None else predictor.labels[class_index(predictor.labels, chosen)]
    clock.lap("checkpoint read")
    spec = predictor.metadata.clip
    with _video_errors(file):
        clip = clips.read(file, spec, 1, 1, start, end)
    clock.lap("clip decoded")
    maps = [predictor.look(clip)]
    clock.lap("prediction and rollout, with compilation")
    shown = [p.label for p in predictor.top(maps[0].probabilities, top)]
    if chosen is not None and chosen not in shown:
        shown.append(chosen)
    maps += [predictor.look(clip, label) for label in shown]
    clock.lap(f"maps of {len(shown)} classes, with compilation")
    first = maps[0] if chosen is None else maps[1 + shown.index(chosen)]
    with _video_errors(file):
        played = play(file, clip.times[0])
    if video is not None:
        _write(video, overlay_video(played, first))
    clock.lap("clip decoded to be played, and encoded")
    page.write(output, report(predictor, checkpoint, file, played, maps, first, clock))
    for label in shown:
        print(f"  {maps[0].probabilities[predictor.labels.index(label)]:7.2%}  {label}")
    print(f"page   {output}")
    if video is not None:
        print(f"video  {video}")


@contextlib.contextmanager
def _video_errors(file: str) -> Iterator[None]:
    """Turns the error of a video that cannot be read into that of a wrong argument."""
    try:
        yield
    except decode.VideoError as error:
        raise InputError(f"{file}: {error}") from error


def _default_output(file: str) -> str:
    """The video's name with .html: a name that nobody chose, so it replaces no file."""
    output = f"{epath.Path(os.fspath(file).rstrip('/')).stem}.html"
    if os.path.lexists(output):
        raise InputError(f"{output} exists; give --output={output} to replace it, or another name")
    return output


def play(file: str, times: np.ndarray) -> Played:
    """Decodes the part of a video from the first to the last frame of a clip.

    Of a long part, or a high frame rate, some frames are left out.
    """
    info = decode.read_info(file)
    short_side = min(info.width, info.height, SHORT_SIDE)

    def step(count: int, fps: float) -> int:
        return max(math.ceil(fps / FPS - 0.01), math.ceil(count / FRAMES))

    def sample(count: int, fps: float) -> np.ndarray:
        return np.arange(0, count, step(count, fps))

    # A frame ends when the next one begins: half a millisecond is shorter than any frame.
    found = decode.decode_clip(
        file, times.min(), times.max() + 5e-4, sample=sample, short_side=short_side
    )
    fps = found.fps / step(found.num_frames, found.fps)
    return Played(found.frames, fps, overlay.nearest(found.times, times))


def overlay_video(played: Played, shown: AttentionMap) -> bytes:
    """The part as MP4, with the heat of the nearest frame of the clip over every frame."""
    index = overlay.nearest(played.sampled, np.arange(len(played.frames)))
    images = overlay.overlaid(
        played.frames, overlay.levels(shown.heat), index, box_in_shares(shown)
    )
    return encode_mp4(images, played.fps)


def box_in_shares(shown: AttentionMap) -> np.ndarray:
    """(3,), the crop box as shares of the frame's height, width and height."""
    height, width = shown.frames.shape[1:3]
    return shown.crop_box / np.array([height, width, height])


def report(
    predictor: Predictor,
    checkpoint: str,
    file: str,
    played: Played,
    maps: list[AttentionMap],
    first: AttentionMap,
    clock: Clock,
) -> str:
    """The page.

    Args:
      maps: rollout, then those of classes, the most probable first.
      first: the one that is shown first.
      clock: with the laps so far.
    """
    height, width = (side // 2 * 2 for side in played.frames.shape[1:3])
    thumbnails = decode.resize(maps[0].frames, THUMBNAIL)
    probabilities = maps[0].probabilities
    data = {
        "maps": [
            {"levels": overlay.levels(m.heat).reshape(len(m.heat), -1).tolist(),
             "time": np.round(m.by_frame, 5).tolist()}
            for m in maps
        ],
        "grid": maps[0].heat.shape[1:],
        "box": box_in_shares(maps[0]).tolist(),
        "stops": played.stops,
        "colours": overlay.COLOURS,
        "outside": overlay.OUTSIDE,
    }  # fmt: skip
    return page.render(
        "explain.html",
        kind="Attention",
        title=os.path.basename(os.fspath(file).rstrip("/")),
        subtitle=_summary(predictor, maps[0]),
        source=page.data_uri(encode_mp4(played.frames, played.fps), "video/mp4"),
        width=width,
        height=height,
        classes=[(m.target, float(probabilities[predictor.labels.index(m.target)]))
                 for m in maps[1:] if m.target is not None],
        first=next(i for i, m in enumerate(maps) if m is first),
        strength=overlay.STRENGTH,
        thumbnails=[page.data_uri(encode_jpeg(image), "image/jpeg") for image in thumbnails],
        times=[None if math.isnan(t) else float(t) for t in maps[0].times],
        facts={
            "Clip and sampling": _clip_facts(predictor, file, maps[0]),
            "Model": _model_facts(predictor, checkpoint),
            "Time taken": clock.facts(),
        },
        data=data,
    )  # fmt: skip


def _summary(predictor: Predictor, rollout: AttentionMap) -> str:
    label, probability = predictor.top(rollout.probabilities, 1)[0]
    return f"Predicted: {label}, {probability:.1%}"


def _clip_facts(predictor: Predictor, file: str, shown: AttentionMap) -> dict[str, str]:
    spec = predictor.metadata.clip
    top, left, side = shown.crop_box
    height, width = shown.frames.shape[1:3]
    info = decode.read_info(file)
    if spec.sampling == "segments":
        sampling = f"{spec.frames} frames, from the middle of as many equal parts"
    else:
        where = "the middle" if spec.start == "middle" else "the beginning"
        sampling = f"{spec.frames} frames, {spec.frame_stride}/30 s apart, from {where}"
    length = "" if info.duration is None else f", {info.duration:.1f} s"
    return {
        "File": f"{info.width} x {info.height}, {info.fps:.4g} fps{length}, {info.codec}",
        "Sampling": sampling,
        "Seen": f"{shown.times[0]:.2f} to {shown.times[-1]:.2f} s",
        "Resized to": f"{width} x {height}",
        "Crop": f"the square {left:.0f} from the left and {top:.0f} from the top, {side:.0f} wide, "
        f"as {spec.crop} x {spec.crop}",
        "Views": "1 clip and 1 crop; predict averages 3 crops, so its figures differ a little",
        "Normalisation": f"mean {_numbers(spec.mean)}, standard deviation {_numbers(spec.std)}, "
        f"{spec.channel_order.upper()}",
    }


def _model_facts(predictor: Predictor, checkpoint: str) -> dict[str, str]:
    model = predictor.metadata.model
    layers = ", ".join(layer.name for layer in model.scheme.layers)
    return {
        "Checkpoint": checkpoint,
        "Attention": f"{model.attention} ({layers})",
        "Size": f"{model.depth} blocks, {model.hidden_size} channels, {model.num_heads} heads",
        "Parameters": f"{costs.parameter_count(model) / 1e6:.4g} million",
        "Patches": f"{model.patch_size} x {model.patch_size} pixels",
        "Classes": f"{model.num_classes}",
        "Computed in": model.dtype,
        "Weights' license": predictor.metadata.license or "not stated in the checkpoint",
    }


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values))


def _write(path: str, content: bytes) -> None:
    with storage.disk_errors(path):
        storage.write_atomically(storage.absolute(path), content)


class Clock:
    """How long the parts of a command took."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._began = time.perf_counter()

    def lap(self, name: str) -> None:
        """Ends a part, which began when the one before it ended."""
        now = time.perf_counter()
        self._laps[name], self._began = now - self._began, now

    def facts(self) -> dict[str, str]:
        laps = {name.capitalize(): f"{seconds:.2f} s" for name, seconds in self._laps.items()}
        return laps | {"Device": f"{jax.devices()[0].device_kind}, JAX {jax.__version__}"}
