"""Pieces of photographs, pasted on each other, as frames of videos.

The photographs are part of scikit-image. Training uses crops of their left part, validation crops
of their right part.
"""

import importlib.util
import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from timesformer_jax.errors import InputError

PHOTOGRAPHS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)

# The part of a photograph's width that each split uses; the gap keeps the crops apart.
REGIONS = {"train": (0.0, 0.7), "validation": (0.72, 1.0)}


def random_of(split: str, index: int, seed: int) -> np.random.Generator:
    """The random numbers of a video: they depend only on the split, its number and the seed."""
    return np.random.default_rng((seed, list(REGIONS).index(split), index))


@cache
def load_photographs(region: tuple[float, float]) -> tuple[Image.Image, ...]:
    """Loads a part of each of PHOTOGRAPHS, without importing scikit-image.

    region: the left and the right end, as shares of the width; one of REGIONS, or (0.0, 1.0).
    """
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
                left, right = (round(share * image.width) for share in region)
                images.append(image.convert("RGB").crop((left, 0, right, image.height)))
        except OSError as error:
            raise InputError(
                f"cannot read {folder / name}, a photograph of the demo; reinstall scikit-image"
            ) from error
    return tuple(images)


def crop(
    rng: np.random.Generator, photograph: Image.Image, width: int, height: int, level: float,
    scales: tuple[float, float] = (0.4, 1), largest: float = 6,
) -> np.ndarray:  # fmt: skip
    """A random crop of a photograph at a random scale, as (height, width, 3) float32.

    Its mean is `level`; its standard deviation is 15 to 30, of 255. A pixel of it is at most
    `largest` pixels of the photograph wide, and of that a share of `scales`.
    """
    largest = min(photograph.width / width, photograph.height / height, largest)
    scale = rng.uniform(*scales) * largest
    x = rng.uniform(0, photograph.width - scale * width)
    y = rng.uniform(0, photograph.height - scale * height)
    box = (x, y, x + scale * width, y + scale * height)
    piece = photograph.resize((width, height), Image.Resampling.BICUBIC, box)
    piece = np.asarray(piece, np.float32)
    contrast = rng.uniform(15, 30) / (piece.std() + 1)
    return (piece - piece.mean()) * contrast + level


def paste(background: np.ndarray, patch: np.ndarray, x: float, y: float) -> np.ndarray:
    """The background with the patch at a fractional position, by linear interpolation."""
    column, row = math.floor(x), math.floor(y)
    opaque = np.ones((*patch.shape[:2], 1), np.float32)
    moved = shift(np.concatenate([patch, opaque], axis=2), x - column, y - row)
    frame = np.pad(background, ((0, 1), (0, 1), (0, 0)))
    region = frame[row : row + len(moved), column : column + len(moved)]
    region[:] = moved[..., :3] + (1 - moved[..., 3:]) * region
    return np.clip(np.rint(frame[:-1, :-1]), 0, 255).astype(np.uint8)


def shift(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Shifts an image right and down by fractions of a pixel; adds a row and a column."""
    image = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    image = (1 - y) * image[1:] + y * image[:-1]
    return (1 - x) * image[:, 1:] + x * image[:, :-1]
