"""Videos of three minutes whose class is told by two moments, two minutes apart.

Grey pieces of photographs move, scene after scene. Squares are shown over them, 12 to 16 seconds
each, of which only two have a colour: the cue, in the first minute, is red, green or blue, and the
answer, which begins 120 seconds or more after the cue has ended, is cyan, magenta or yellow. The
cue says which class an answer means: with each cue every answer is another class, and with each
answer every cue (a Latin square).

Cue and answer are independent, and each alone is independent of the class. So is all else in the
video. A clip of less than 120 seconds shows at most one of the two: the best prediction from it is
a third for each class, and so is the average of any number of such predictions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL.Image import Image

from timesformer_jax.data.demo.drawing import REGIONS, crop, load_photographs, random_of

CLASSES = ("first", "second", "third")
# What a square's brightness is multiplied with in red, green and blue.
CUES = {"red": (1.1, 0.3, 0.3), "green": (0.3, 1.1, 0.3), "blue": (0.3, 0.4, 1.3)}
ANSWERS = {"cyan": (0.3, 1.0, 1.0), "magenta": (1.0, 0.3, 1.0), "yellow": (1.0, 1.0, 0.3)}
GREY = (1.0, 1.0, 1.0)

WIDTH, HEIGHT = 48, 40
FPS = 4
SECONDS = 180
FRAMES = FPS * SECONDS

APART = 120.0  # least seconds from the end of the cue to the beginning of the answer
SHOWN = (12.0, 16.0)  # seconds of a square
SCENES = (4.0, 16.0)  # seconds of a scene
GREY_SQUARES = 3
SIDES = (24, 33)  # of a square, in pixels


class Square(NamedTuple):
    """When a square is shown, in seconds, and its colour: a name in CUES or ANSWERS, or "grey"."""

    begin: float
    end: float
    colour: str = "grey"


def colours(index: int) -> tuple[str, str]:
    """The colours of cue and answer of a video: all pairs in turn; the class is index modulo 3."""
    cue, label = index // 3 % 3, index % 3
    return list(CUES)[cue], list(ANSWERS)[(cue + label) % 3]


def draw_squares(rng: np.random.Generator, index: int) -> list[Square]:
    """Draws when the squares of a video are shown: the cue, the answer, and grey ones."""
    lengths = rng.uniform(*SHOWN, 2 + GREY_SQUARES)
    begin = rng.uniform(0, SECONDS - APART - lengths[0] - lengths[1])
    end = begin + lengths[0]
    late = rng.uniform(end + APART, SECONDS - lengths[1])
    cue, answer = colours(index)
    squares = [Square(begin, end, cue), Square(late, late + lengths[1], answer)]
    for length in lengths[2:]:
        begin = rng.uniform(0, SECONDS - length)
        squares.append(Square(begin, begin + length))
    return squares


def frames(split: str, index: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draws the frames of a video, in order, as (HEIGHT, WIDTH, 3) uint8 RGB."""
    rng = random_of(split, index, seed)
    photographs = load_photographs(REGIONS[split])
    squares = draw_squares(rng, index)
    drawn = [_draw_square(rng, photographs, square.colour) for square in squares]
    scene_end = 0.0
    for time in np.arange(FRAMES) / FPS:
        if time >= scene_end:
            begin, scene_end = time, time + rng.uniform(*SCENES)
            scene, path = _draw_scene(rng, photographs)
        moved = (time - begin) / (scene_end - begin)
        x, y = np.rint(path[0] + moved * (path[1] - path[0])).astype(int)
        frame = scene[y : y + HEIGHT, x : x + WIDTH].copy()
        # From the last on, so that the cue and the answer lie above the grey squares.
        for square, (patch, x, y) in zip(reversed(squares), reversed(drawn), strict=True):
            if square.begin <= time < square.end:
                frame[y : y + len(patch), x : x + len(patch)] = patch
        yield frame


def _draw_scene(
    rng: np.random.Generator, photographs: tuple[Image, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A piece of a photograph that is larger than a frame, and how the camera moves over it.

    Returns:
      (H, W, 3) uint8 grey, and (2, 2) float64: x, y of the frame's upper left corner in it, at the
      beginning and at the end of the scene.
    """
    scale = rng.uniform(1.1, 1.5)
    width, height = round(scale * WIDTH), round(scale * HEIGHT)
    photograph = photographs[rng.integers(len(photographs))]
    scene = crop(rng, photograph, width, height, rng.uniform(80, 175))
    return _tinted(scene, GREY), rng.uniform(0, (width - WIDTH, height - HEIGHT), (2, 2))


def _draw_square(
    rng: np.random.Generator, photographs: tuple[Image, ...], colour: str
) -> tuple[np.ndarray, int, int]:
    """The (S, S, 3) uint8 pixels of a square, and x, y of its upper left corner."""
    side = int(rng.integers(*SIDES))
    photograph = photographs[rng.integers(len(photographs))]
    patch = crop(rng, photograph, side, side, rng.uniform(90, 165))
    x, y = (int(v) for v in rng.integers(0, (WIDTH - side + 1, HEIGHT - side + 1)))
    return _tinted(patch, (CUES | ANSWERS).get(colour, GREY)), x, y


def _tinted(image: np.ndarray, tint: tuple[float, ...]) -> np.ndarray:
    """An image in shades of one colour, uint8."""
    grey = image.mean(-1, keepdims=True)
    return np.clip(np.rint(grey * np.array(tint)), 0, 255).astype(np.uint8)
