"""Videos whose class depends only on the order of the frames.

A patch of one photograph moves across another in one of 8 directions, which is the class:

- A single random frame is independent of the class. The patch moves along a chord of a disc, in the
  direction of the class, through a point drawn uniformly from the disc. In any direction the
  positions on such chords are uniform in the disc. The disc is placed at random in the frame.
- The set of frames, without their order, does not separate a direction from the opposite one: a
  video played backwards has the distribution of the opposite class. So a model that ignores time
  reaches at most 50% accuracy between the two.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL.Image import Image

from timesformer_jax.data.demo.drawing import REGIONS, crop, load_photographs, paste, random_of

# Clockwise from the right in steps of 45 degrees, in image coordinates (y points down).
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")

WIDTH, HEIGHT = 48, 40
FRAMES = 22
FPS = 30


def frames(split: str, index: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws the frames of a video, in order, as (HEIGHT, WIDTH, 3) uint8 RGB."""
    rng = random_of(split, index, seed)
    size = int(rng.integers(11, 16))
    path = patch_positions(rng, index % len(DIRECTIONS), size)
    photographs = load_photographs(REGIONS[split])
    below, above = rng.choice(len(photographs), 2, replace=False)
    yield from moving_patch(rng, photographs[below], photographs[above], size, path)


def moving_patch(
    rng: np.random.Generator, below: Image, above: Image, size: int, path: np.ndarray, **piece: Any
) -> Iterator[np.ndarray]:
    """Draws a square piece of a photograph that moves across a piece of another.

    Args:
      rng: draws the pieces.
      below, above: the photographs of the background and of the patch.
      size: the patch's side in pixels.
      path: (frames, 2) x, y of the patch's upper left corner.
      piece: arguments of `crop`, which piece of `above` the patch is.

    Yields:
      (HEIGHT, WIDTH, 3) uint8 RGB.
    """
    # Only brightness separates patch and background, and either may be the brighter one.
    level = rng.uniform(90, 165)
    step = rng.uniform(55, 80) * (1 if level < 128 else -1)
    background = crop(rng, below, WIDTH, HEIGHT, level)
    patch = crop(rng, above, size, size, level + step, **piece)
    for x, y in path:
        yield paste(background, patch, x, y)


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
