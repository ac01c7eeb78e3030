"""Videos whose class is what a moving patch shows; where it moves to misleads.

One of 8 photographs, which is the class, is drawn small, moving across a piece of a photograph that
is no class. Validation has other pieces of those, as well as other sizes, places and contrasts. In
half of the training videos it moves in the direction that goes with its class, in the others in
any. In validation it never moves in that direction. So a model that learned the motion, which is
easy, is wrong.
"""

import math
from collections.abc import Iterator

import numpy as np
from PIL.Image import Image

from timesformer_jax.data.demo.drawing import PHOTOGRAPHS, REGIONS, load_photographs, random_of
from timesformer_jax.data.demo.motion import DIRECTIONS, moving_patch, patch_positions

OBJECTS = (
    *("astronaut", "camera", "chelsea", "coffee", "coins", "ihc", "motorcycle_left", "retina"),
)
GROUNDS = ("brick", "grass", "gravel", "hubble_deep_field", "moon", "rocket")


def frames(split: str, index: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws the frames of a video, in order, as (HEIGHT, WIDTH, 3) uint8 RGB."""
    rng = random_of(split, index, seed)
    label = index % len(OBJECTS)
    size = int(rng.integers(14, 19))
    path = patch_positions(rng, direction_of(rng, split, label), size)
    below = _photograph(GROUNDS[rng.integers(len(GROUNDS))], REGIONS[split])
    above = _photograph(OBJECTS[label], (0.0, 1.0))
    # At least 0.7 of the photograph's shorter side, so that it can be recognised.
    yield from moving_patch(rng, below, above, size, path, scales=(0.7, 1), largest=math.inf)


def _photograph(name: str, region: tuple[float, float]) -> Image:
    names = [file.partition(".")[0] for file in PHOTOGRAPHS]
    return load_photographs(region)[names.index(name)]


def direction_of(rng: np.random.Generator, split: str, label: int) -> int:
    """Draws a direction, index in DIRECTIONS; that of the class has the class's number."""
    if split == "train" and rng.uniform() < 0.5:
        return label
    if split == "train":
        return int(rng.integers(len(DIRECTIONS)))
    return (label + int(rng.integers(1, len(DIRECTIONS)))) % len(DIRECTIONS)
