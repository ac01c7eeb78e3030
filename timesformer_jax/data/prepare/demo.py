"""The embedded data set: real H.264 videos in which only the order of the frames tells the class.

A patch of one photograph moves across another in one of 8 directions. By construction:

- A frame picked at random says nothing of the class: the path is the chord, in the direction of
  the class, through a point drawn uniformly from a disc. Whatever the direction, positions along
  such chords are uniform in the disc, and the disc itself lies anywhere that keeps the patch in
  the frame.
- The frames without their order cannot tell a direction from its opposite: a video is, in
  distribution, its opposite's run backwards. A model blind to time is right half the time at best.

The photographs come with scikit-image. Training takes its crops from their left part, validation
from their right part.
"""

import csv
import importlib.util
import io
import json
import math
import os
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from timesformer_jax.data.prepare.prepare import prepare
from timesformer_jax.errors import InputError
from timesformer_jax.storage import disk_errors, write_atomically
from timesformer_jax.workers import available_cores, worker_pool

# Clockwise from right, 45 degrees apart, in the frame's coordinates (y points down).
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")

WIDTH, HEIGHT = 48, 40
FRAMES = 22
FPS = 30

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)

# Which part of a photograph's width a split takes its crops from; the gap keeps them apart.
REGIONS = {"train": (0.0, 0.7), "validation": (0.72, 1.0)}

ANNOTATIONS = "annotations.csv"
SETTINGS = "demo.json"


def prepare_demo(
    directory: str | os.PathLike, train: int = 3200, validation: int = 800, seed: int = 0
) -> None:
    """Makes the videos in `directory`/videos and prepares `directory` from them.

    What is there already is not made again. See `make` for the arguments.

    Raises:
      InputError: the directory holds something else, or the disk is full.
    """
    videos = Path(directory) / "videos"
    make(videos, train, validation, seed)
    prepare(
        videos,
        directory,
        annotations=videos / ANNOTATIONS,
        short_side=HEIGHT,
        quality=95,
        clips_per_shard=400,
        name="demo",
    )


def make(
    directory: str | os.PathLike, train: int = 3200, validation: int = 800, seed: int = 0
) -> None:
    """Writes the videos and, when all are there, annotations.csv (path, label, split).

    Interrupted, it goes on where it was. The frames of each video follow from (seed, split, its
    number) alone.

    Args:
      directory: for the videos, `train/00000.mp4` and so on.
      train, validation: how many videos; the labels take turns.
      seed: of all that varies.

    Raises:
      InputError: the directory holds videos of other settings, or scikit-image is not there.
    """
    directory = Path(directory)
    counts = {"train": train, "validation": validation}
    with disk_errors(directory):
        for split in counts:
            (directory / split).mkdir(parents=True, exist_ok=True)
        _claim(directory, {**counts, "seed": seed})
        if (directory / ANNOTATIONS).exists():
            return
        names = [(split, i) for split, count in counts.items() for i in range(count)]
        missing = [name for name in names if not (directory / _path(*name)).exists()]
        _write_videos(directory, missing, seed)
        write_atomically(directory / ANNOTATIONS, _annotations(names))


def _path(split: str, index: int) -> str:
    return f"{split}/{index:05d}.mp4"


def _label(index: int) -> str:
    return DIRECTIONS[index % len(DIRECTIONS)]


def _claim(directory: Path, settings: dict) -> None:
    path = directory / SETTINGS
    if not path.exists():
        write_atomically(path, json.dumps(settings).encode())
    elif json.loads(path.read_text()) != settings:
        raise InputError(
            f"{directory} holds the demo's videos made otherwise ({path.read_text()});"
            " remove it or choose another directory"
        )


def _annotations(names: list[tuple[str, int]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    writer.writerows([_path(split, index), _label(index), split] for split, index in names)
    return text.getvalue().encode()


def _write_videos(directory: Path, names: list[tuple[str, int]], seed: int) -> None:
    if not names:
        return
    regions("train")  # here too, so that a missing photograph is an error of this process
    with (
        tqdm(total=len(names), unit="video", desc="making the demo's videos") as progress,
        worker_pool(available_cores()) as pool,
    ):
        for _ in pool.map(partial(_write_video, directory, seed), names, chunksize=32):
            progress.update()


def _write_video(directory: Path, seed: int, name: tuple[str, int]) -> None:
    write_atomically(directory / _path(*name), _encode(frames(*name, seed)))


# ---- a video ------------------------------------------------------------------------------------


def frames(split: str, index: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws the frames of a video, in order, as (HEIGHT, WIDTH, 3) uint8 RGB."""
    rng = np.random.default_rng((seed, list(REGIONS).index(split), index))
    size = int(rng.integers(11, 16))
    path = positions(rng, index % len(DIRECTIONS), size)
    photographs = regions(split)
    below, above = rng.choice(len(photographs), 2, replace=False)
    # Told apart by brightness, either way round: no colour or texture means anything.
    level = rng.uniform(90, 165)
    step = rng.uniform(55, 80) * (1 if level < 128 else -1)
    background = _crop(rng, photographs[below], WIDTH, HEIGHT, level)
    patch = _crop(rng, photographs[above], size, size, level + step)
    for x, y in path:
        yield _paste(background, patch, x, y)


def positions(rng: np.random.Generator, direction: int, size: int) -> np.ndarray:
    """Draws where the patch's upper left corner is, frame by frame.

    Args:
      direction: index in DIRECTIONS. size: the patch's side in pixels.

    Returns:
      (FRAMES, 2) float64 x, y in pixels, within the frame, evenly spaced.
    """
    radius = rng.uniform(7, 11)
    room = (np.array([WIDTH, HEIGHT]) - size) / 2 - radius
    middle = (np.array([WIDTH, HEIGHT]) - size) / 2 + rng.uniform(-room, room)
    angle = 2 * math.pi * direction / len(DIRECTIONS)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    # How far a uniform point of a disc is off the diameter along the direction.
    offset = radius * math.sqrt(rng.uniform()) * math.cos(rng.uniform(0, 2 * math.pi))
    half = math.sqrt(radius**2 - offset**2)
    # Sampled frames are truncated to whole ones, so that the last frame is never met: the frames
    # before it are the set that has to be the same backwards.
    time = (2 * np.arange(FRAMES) + 2) / FRAMES - 1
    return middle + offset * across + half * time[:, None] * along


def _crop(rng, photograph: Image.Image, width: int, height: int, level: float) -> np.ndarray:
    """A random piece of a photograph at a random scale, as (height, width, 3) float32.

    Its mean is `level`, its standard deviation 15 to 30 of 255.
    """
    largest = min(photograph.width / width, photograph.height / height, 6)
    scale = rng.uniform(0.4, 1) * largest
    x = rng.uniform(0, photograph.width - scale * width)
    y = rng.uniform(0, photograph.height - scale * height)
    box = (x, y, x + scale * width, y + scale * height)
    piece = photograph.resize((width, height), Image.Resampling.BICUBIC, box)
    piece = np.asarray(piece, np.float32)
    contrast = rng.uniform(15, 30) / (piece.std() + 1)
    return (piece - piece.mean()) * contrast + level


def _paste(background: np.ndarray, patch: np.ndarray, x: float, y: float) -> np.ndarray:
    """The background with the patch at a place between pixels, interpolated linearly."""
    column, row = math.floor(x), math.floor(y)
    opaque = np.ones((*patch.shape[:2], 1), np.float32)
    moved = _move(np.concatenate([patch, opaque], axis=2), x - column, y - row)
    frame = np.pad(background, ((0, 1), (0, 1), (0, 0)))
    region = frame[row : row + len(moved), column : column + len(moved)]
    region[:] = moved[..., :3] + (1 - moved[..., 3:]) * region
    return np.clip(np.rint(frame[:-1, :-1]), 0, 255).astype(np.uint8)


def _move(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Moves an image right and down by fractions of a pixel; it grows by a row and a column."""
    image = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    image = (1 - y) * image[1:] + y * image[:-1]
    return (1 - x) * image[:, 1:] + x * image[:, :-1]


def _encode(images: Iterator[np.ndarray]) -> bytes:
    """H.264 in MP4, with B-frames and several key frames as a camera's file would have.

    Little is lost (crf 12), so that what compression leaves behind a moving patch does not give
    its direction away. x264 now and then codes the same frames otherwise, in bits nobody sees.
    """
    buffer = io.BytesIO()
    options = {"crf": "12", "preset": "veryfast", "g": "12", "bf": "2", "threads": "1"}
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@cache
def regions(split: str) -> tuple[Image.Image, ...]:
    """The part of each of PHOTOGRAPHS that a split may show; read as files, importing nothing."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise InputError("the demo's photographs come with scikit-image; pip install scikit-image")
    folder = Path(package.origin).parent / "data"
    images = []
    for name in PHOTOGRAPHS:
        try:
            with Image.open(folder / name) as image:
                left, right = (round(share * image.width) for share in REGIONS[split])
                images.append(image.convert("RGB").crop((left, 0, right, image.height)))
        except OSError as error:
            raise InputError(
                f"cannot read {folder / name}, a photograph of the demo; install scikit-image anew"
            ) from error
    return tuple(images)
