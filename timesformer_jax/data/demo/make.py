"""Makes the embedded data sets: real H.264 videos of a task, prepared for training."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from timesformer_jax.data.demo import appearance, long, motion
from timesformer_jax.data.demo.drawing import REGIONS, load_photographs
from timesformer_jax.data.encode import encode_mp4
from timesformer_jax.data.prepare.prepare import prepare
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.storage import disk_errors, is_remote, write_atomically
from timesformer_jax.workers import available_cores, worker_pool


class Task(NamedTuple):
    """A data set to be made.

    Attributes:
      labels: the classes; video i has class i modulo their number.
      frames: draws a video, of a split, a number and a seed: (H, W, 3) uint8 RGB, in order.
      fps: frames per second.
      height: of a frame, in pixels; not above the width.
      train, validation: numbers of videos.
      store_stride: every store_stride-th frame is stored, as by `prepare`.
    """

    labels: tuple[str, ...]
    frames: Callable[[str, int, int], Iterator[np.ndarray]]
    fps: int
    height: int
    train: int = 3200
    validation: int = 800
    store_stride: int = 1


TASKS = {
    "motion": Task(motion.DIRECTIONS, motion.frames, motion.FPS, motion.HEIGHT),
    "appearance": Task(appearance.OBJECTS, appearance.frames, motion.FPS, motion.HEIGHT),
    "long": Task(long.CLASSES, long.frames, long.FPS, long.HEIGHT, 720, 540, store_stride=long.FPS),
}

ANNOTATIONS = "annotations.csv"
SETTINGS = "demo.json"


def is_free(directory: str | os.PathLike) -> bool:
    """Whether the demo may write into a directory: it has no files, or the demo's."""
    if is_remote(directory) or os.fspath(directory).startswith("tfds:"):
        return False
    directory = Path(directory)
    if (directory / "videos" / SETTINGS).exists():
        return True
    # `rglob` does not follow links, which may lead to a person's files.
    return not any(path.is_file() or path.is_symlink() for path in directory.rglob("*"))


def prepare_demo(directory: str | os.PathLike, task: str = "motion", **settings: Any) -> None:
    """Makes the videos in `directory`/videos, and prepares `directory` from them.

    Existing files are kept. The task and the settings are those of `make_videos`.

    Raises:
      InputError: the directory holds another data set, or the disk is full.
    """
    videos = Path(directory) / "videos"
    make_videos(videos, task, **settings)
    prepare(
        videos,
        directory,
        annotations=videos / ANNOTATIONS,
        short_side=TASKS[task].height,
        quality=95,
        store_stride=TASKS[task].store_stride,
        clips_per_shard=400,
        name="demo",
    )


def make_videos(
    directory: str | os.PathLike,
    task: str = "motion",
    *,
    train: int | None = None,
    validation: int | None = None,
    seed: int = 0,
) -> None:
    """Writes the videos and, after all of them, annotations.csv (path, label, split).

    An interrupted call is continued by the next one. The frames of a video depend only on the task,
    the seed, the split and the video's number.

    Args:
      directory: for the videos `train/00000.mp4` and so on.
      task: a name of `TASKS`.
      train, validation: numbers of videos; by default those of the task.
      seed: of all random choices.

    Raises:
      InputError: there is no such task, the directory holds videos of other settings, or
        scikit-image is not installed.
    """
    if task not in TASKS:
        raise InputError(
            f"no embedded data set {task!r}, there are: {', '.join(TASKS)}"
            f"{did_you_mean(task, TASKS)}"
        )
    directory = Path(directory)
    counts = {
        "train": TASKS[task].train if train is None else train,
        "validation": TASKS[task].validation if validation is None else validation,
    }
    with disk_errors(directory):
        for split in counts:
            (directory / split).mkdir(parents=True, exist_ok=True)
        _check_settings(directory, {"task": task, **counts, "seed": seed})
        if (directory / ANNOTATIONS).exists():
            return
        names = [(split, i) for split, count in counts.items() for i in range(count)]
        missing = [name for name in names if not (directory / _path(*name)).exists()]
        _write_videos(directory, task, missing, seed)
        write_atomically(directory / ANNOTATIONS, _annotations(names, TASKS[task].labels))


def _path(split: str, index: int) -> str:
    return f"{split}/{index:05d}.mp4"


def _check_settings(directory: Path, settings: dict) -> None:
    """Writes the settings, or compares them with those of an earlier call."""
    path = directory / SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings).encode())
    elif json.loads(path.read_text()) != settings:
        raise InputError(
            f"{directory} holds demo videos of other settings ({path.read_text()});"
            " remove it, or choose another directory"
        )


def _annotations(names: list[tuple[str, int]], labels: tuple[str, ...]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    writer.writerows(
        [_path(split, index), labels[index % len(labels)], split] for split, index in names
    )
    return text.getvalue().encode()


def _write_videos(directory: Path, task: str, names: list[tuple[str, int]], seed: int) -> None:
    if not names:
        return
    load_photographs(REGIONS["train"])  # so that a missing photograph is an error of this process
    with (
        tqdm(total=len(names), unit="video", desc="making the demo's videos") as progress,
        worker_pool(available_cores()) as pool,
    ):
        for _ in pool.map(partial(_write_video, directory, task, seed), names, chunksize=32):
            progress.update()


def _write_video(directory: Path, task: str, seed: int, name: tuple[str, int]) -> None:
    frames = TASKS[task].frames(*name, seed)
    write_atomically(directory / _path(*name), _encode(frames, TASKS[task].fps))


def _encode(images: Iterator[np.ndarray], fps: int) -> bytes:
    """Encodes frames as H.264 in MP4, with B-frames and several key frames like a camera's file.

    The quality is high (crf 12), so that compression artefacts behind a patch do not reveal where
    it came from.
    """
    return encode_mp4(images, fps, crf=12, preset="veryfast", g="12", bf="2", threads="1")
