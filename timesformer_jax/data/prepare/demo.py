"""The demo data set: H.264 videos whose class depends only on the order of the frames.

A patch of one photograph moves across another in one of 8 directions, which is the class:

- A single random frame is independent of the class. The patch moves along a chord of a disc, in the
  direction of the class, through a point drawn uniformly from the disc. In any direction the
  positions on such chords are uniform in the disc. The disc is placed at random in the frame.
- The set of frames, without their order, does not separate a direction from the opposite one: a
  video played backwards has the distribution of the opposite class. So a model that ignores time
  reaches at most 50% accuracy between the two.

The photographs are part of scikit-image. Training uses crops of their left part, validation crops
of their right part.
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

import numpy as np
from PIL import Image
from tqdm import tqdm

from timesformer_jax.data.encode import encode_mp4
from timesformer_jax.data.prepare.prepare import prepare
from timesformer_jax.errors import InputError
from timesformer_jax.storage import disk_errors, is_remote, write_atomically
from timesformer_jax.workers import available_cores, worker_pool

# Clockwise from the right in steps of 45 degrees, in image coordinates (y points down).
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")

WIDTH, HEIGHT = 48, 40
FRAMES = 22
FPS = 30

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)

# The part of a photograph's width that each split uses; the gap keeps the crops apart.
REGIONS = {"train": (0.0, 0.7), "validation": (0.72, 1.0)}

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


def prepare_demo(
    directory: str | os.PathLike, train: int = 3200, validation: int = 800, seed: int = 0
) -> None:
    """Makes the videos in `directory`/videos, and prepares `directory` from them.

    Existing files are kept. See `make_videos` for the arguments.

    Raises:
      InputError: the directory holds another data set, or the disk is full.
    """
    videos = Path(directory) / "videos"
    make_videos(videos, train, validation, seed)
    prepare(
        videos,
        directory,
        annotations=videos / ANNOTATIONS,
        short_side=HEIGHT,
        quality=95,
        clips_per_shard=400,
        name="demo",
    )


def make_videos(
    directory: str | os.PathLike, train: int = 3200, validation: int = 800, seed: int = 0
) -> None:
    """Writes the videos and, after all of them, annotations.csv (path, label, split).

    An interrupted call is continued by the next one. The frames of a video depend only on the seed,
    the split and the video's number.

    Args:
      directory: for the videos `train/00000.mp4` and so on.
      train, validation: numbers of videos; video i has class i modulo 8.
      seed: of all random choices.

    Raises:
      InputError: the directory holds videos of other settings, or scikit-image is not installed.
    """
    directory = Path(directory)
    counts = {"train": train, "validation": validation}
    with disk_errors(directory):
        for split in counts:
            (directory / split).mkdir(parents=True, exist_ok=True)
        _check_settings(directory, {**counts, "seed": seed})
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


def _annotations(names: list[tuple[str, int]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split"])
    writer.writerows([_path(split, index), _label(index), split] for split, index in names)
    return text.getvalue().encode()


def _write_videos(directory: Path, names: list[tuple[str, int]], seed: int) -> None:
    if not names:
        return
    load_photographs("train")  # so that a missing photograph is an error of this process
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
    path = patch_positions(rng, index % len(DIRECTIONS), size)
    photographs = load_photographs(split)
    below, above = rng.choice(len(photographs), 2, replace=False)
    # Only brightness separates patch and background, and either may be the brighter one.
    level = rng.uniform(90, 165)
    step = rng.uniform(55, 80) * (1 if level < 128 else -1)
    background = _crop(rng, photographs[below], WIDTH, HEIGHT, level)
    patch = _crop(rng, photographs[above], size, size, level + step)
    for x, y in path:
        yield _paste(background, patch, x, y)


def patch_positions(rng: np.random.Generator, direction: int, size: int) -> np.ndarray:
    """Draws the positions of the patch's upper left corner in all frames.

    Args:
      direction: index in DIRECTIONS.
      size: the patch's side in pixels.

    Returns:
      (FRAMES, 2) float64 x, y in pixels: evenly spaced, with the patch inside the frame.
    """
    radius = rng.uniform(7, 11)
    room = (np.array([WIDTH, HEIGHT]) - size) / 2 - radius
    middle = (np.array([WIDTH, HEIGHT]) - size) / 2 + rng.uniform(-room, room)
    angle = 2 * math.pi * direction / len(DIRECTIONS)
    along = np.array([math.cos(angle), math.sin(angle)])
    across = np.array([-along[1], along[0]])
    # The distance of a uniform point of the disc from the diameter in this direction.
    offset = radius * math.sqrt(rng.uniform()) * math.cos(rng.uniform(0, 2 * math.pi))
    half = math.sqrt(radius**2 - offset**2)
    # Clip sampling truncates to whole frames and never uses the last one. So the frames before it
    # are the ones that must be symmetric in time.
    time = (2 * np.arange(FRAMES) + 2) / FRAMES - 1
    return middle + offset * across + half * time[:, None] * along


def _crop(rng, photograph: Image.Image, width: int, height: int, level: float) -> np.ndarray:
    """A random crop of a photograph at a random scale, as (height, width, 3) float32.

    Its mean is `level`; its standard deviation is 15 to 30, of 255.
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
    """The background with the patch at a fractional position, by linear interpolation."""
    column, row = math.floor(x), math.floor(y)
    opaque = np.ones((*patch.shape[:2], 1), np.float32)
    moved = _shift(np.concatenate([patch, opaque], axis=2), x - column, y - row)
    frame = np.pad(background, ((0, 1), (0, 1), (0, 0)))
    region = frame[row : row + len(moved), column : column + len(moved)]
    region[:] = moved[..., :3] + (1 - moved[..., 3:]) * region
    return np.clip(np.rint(frame[:-1, :-1]), 0, 255).astype(np.uint8)


def _shift(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Shifts an image right and down by fractions of a pixel; adds a row and a column."""
    image = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    image = (1 - y) * image[1:] + y * image[:-1]
    return (1 - x) * image[:, 1:] + x * image[:, :-1]


def _encode(images: Iterator[np.ndarray]) -> bytes:
    """Encodes frames as H.264 in MP4, with B-frames and several key frames like a camera's file.

    The quality is high (crf 12), so that compression artefacts behind the patch do not reveal its
    direction.
    """
    return encode_mp4(images, FPS, crf=12, preset="veryfast", g="12", bf="2", threads="1")


@cache
def load_photographs(split: str) -> tuple[Image.Image, ...]:
    """Loads the part of each of PHOTOGRAPHS that a split uses, without importing scikit-image."""
    package = importlib.util.find_spec("skimage")
    if package is None:
        raise InputError(
            "the demo's photographs are part of scikit-image; pip install scikit-image"
        )
    assert package.origin is not None  # a package with an __init__.py
    folder = Path(package.origin).parent / "data"
    images = []
    for name in PHOTOGRAPHS:
        try:
            with Image.open(folder / name) as image:
                left, right = (round(share * image.width) for share in REGIONS[split])
                images.append(image.convert("RGB").crop((left, 0, right, image.height)))
        except OSError as error:
            raise InputError(
                f"cannot read {folder / name}, a photograph of the demo; reinstall scikit-image"
            ) from error
    return tuple(images)
