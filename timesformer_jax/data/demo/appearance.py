"""Videos whose class is what a moving patch shows; where it moves to misleads.

A patch of one of 8 photographs, which is the class, moves across a photograph that is no class. In
half of the training videos it moves in the direction that goes with its class, in the others in
any. In validation it never moves in that direction. So a model that learned the motion, which is
easy, is wrong.
"""

from collections.abc import Iterator

import numpy as np

from timesformer_jax.data.demo.drawing import PHOTOGRAPHS, load_photographs, random_of
from timesformer_jax.data.demo.motion import DIRECTIONS, moving_patch, patch_positions

OBJECTS = ("astronaut", "brick", "chelsea", "coffee", "coins", "grass", "ihc", "retina")
GROUNDS = ("camera", "gravel", "hubble_deep_field", "moon", "motorcycle_left", "rocket")


def frames(split: str, index: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws the frames of a video, in order, as (HEIGHT, WIDTH, 3) uint8 RGB."""
    rng = random_of(split, index, seed)
    label = index % len(OBJECTS)
    photographs = dict(
        zip((name.partition(".")[0] for name in PHOTOGRAPHS), load_photographs(split))
    )
    size = int(rng.integers(14, 19))
    path = patch_positions(rng, direction_of(rng, split, label), size)
    below, above = photographs[GROUNDS[rng.integers(len(GROUNDS))]], photographs[OBJECTS[label]]
    yield from moving_patch(rng, below, above, size, path)


def direction_of(rng: np.random.Generator, split: str, label: int) -> int:
    """Draws a direction, index in DIRECTIONS; that of the class has the class's number."""
    if split == "train" and rng.uniform() < 0.5:
        return label
    if split == "train":
        return int(rng.integers(len(DIRECTIONS)))
    return (label + int(rng.integers(1, len(DIRECTIONS)))) % len(DIRECTIONS)
