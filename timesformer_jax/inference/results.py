"""What a `Predictor` returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Prediction(NamedTuple):
    """A class of a video, and its probability in [0, 1]."""

    label: str
    probability: float

    def __repr__(self) -> str:
        return f"{self.label} {self.probability:.1%}"


class Features(NamedTuple):
    """What the model computes of a video before it classifies, float32. D is the model's width.

    Attributes:
      video: (D,), the mean of `clips`.
      clips: (V, C, D), the classification token after the final norm, of each of V clips and C
        crops. The head of the model is a linear layer on it.
      frames: (V, C, T, D), the mean of the patches of every frame, after the final norm; None if
        not asked for. NaN for frames that a short video lacks (`ClipSpec.short` "mask").
      positions: (V, C, N, D), the mean of the patches of every position over the frames, row by
        row; None if not asked for.
    """

    video: np.ndarray
    clips: np.ndarray
    frames: np.ndarray | None = None
    positions: np.ndarray | None = None

    def __repr__(self) -> str:
        shapes = (f"{name}={x.shape}" for name, x in self._asdict().items() if x is not None)
        return f"Features({', '.join(shapes)})"


class AttentionMap(NamedTuple):
    """Which patches of a clip the prediction comes from, and the clip itself.

    Attributes:
      heat: (T, H', W') float32, the share of every frame and patch: at least 0, sums to 1 (all 0
        if no gradient of the target is positive).
      probabilities: (classes,) float32, of this one clip and crop.
      target: the class that attentions are weighted for; None for rollout.
      frames: (T, H, W, 3) uint8 RGB, the frames of the clip before they are cropped.
      times: (T,) float64, when each is shown, in seconds from the beginning of the video; NaN where
        only the frames are known.
      crop_box: (3,) float64, the square that the model sees, cut into H' x W' patches: top, left
        and side, in pixels of `frames`.
    """

    heat: np.ndarray
    probabilities: np.ndarray
    target: str | None
    frames: np.ndarray
    times: np.ndarray
    crop_box: np.ndarray

    @property
    def by_frame(self) -> np.ndarray:
        """(T,), the share of every frame."""
        return self.heat.sum(axis=(1, 2))

    def __repr__(self) -> str:
        return f"AttentionMap(heat={self.heat.shape}, target={self.target!r})"
