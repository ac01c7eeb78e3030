"""When the frames of a clip are shown, at a constant number of ticks per second."""

import itertools
from dataclasses import dataclass

import numpy as np

from timesformer_jax.data.decode.container import VideoError
from timesformer_jax.data.decode.limits import LIMITS


@dataclass(frozen=True)
class Timeline:
    """The ticks of a clip, evenly spaced in time, and the frame that each tick shows.

    If the frame rate is constant, each tick shows one frame and each frame is shown once. If it
    varies, there are as many ticks as frames: equal numbers of ticks are equal times, some frames
    are shown twice and some never.

    Attributes:
      times: (frames,) float64, ascending. When each frame of the clip is shown in the file, in
        seconds from the beginning of the video.
      frame_indices: (ticks,) int64, ascending. The index in `times` of the frame that a tick shows.
      fps: ticks per second.
    """

    times: np.ndarray
    frame_indices: np.ndarray
    fps: float

    def __len__(self) -> int:
        """The number of ticks."""
        return len(self.frame_indices)

    @classmethod
    def from_times(
        cls,
        times: np.ndarray,
        nominal_fps: float,
        fps: float | None = None,
        most: int = LIMITS.frames,
    ) -> "Timeline":
        """Makes the timeline of frames that are shown at `times`.

        Args:
          times: (frames,) seconds, ascending; at least one.
          nominal_fps: the frame rate in the file's header. It is the exact rate of the timeline
            if the times agree with it to 1%.
          fps: ticks per second; None: the frame rate of the clip.
          most: ticks.

        Raises:
          VideoError: it has more ticks.
        """
        count = len(times)
        mean = (count - 1) / (times[-1] - times[0]) if times[-1] > times[0] else nominal_fps
        native = nominal_fps if abs(mean / nominal_fps - 1) < 0.01 else mean
        constant = times[0] + np.arange(count) / mean
        if fps is None and np.abs(times - constant).max() * mean < 0.5:
            return cls(times, np.arange(count), native)
        fps = fps or native
        if (ticks := count / mean * fps) > most:
            raise VideoError(f"{ticks:.3g} frames at {fps:g} a second; at most {most:,} are read")
        tick_times = times[0] + np.arange(max(round(ticks), 1)) / fps
        # Containers round times. So a tick shows a frame that starts up to half a period after it.
        latest = tick_times + 0.5 / max(fps, mean)
        return cls(times, np.searchsorted(times, latest, side="right") - 1, fps)


def equal_pieces(num_ticks: int, fps: float, seconds: float) -> list[tuple[int, int]]:
    """The [first, last) ticks of equal pieces of a clip, each as nearly `seconds` long as can be.

    Args:
      num_ticks: of the clip's timeline, at least one.
      fps: ticks per second.
      seconds: wanted length of a piece.
    """
    count = min(max(round(num_ticks / fps / seconds), 1), num_ticks)
    return list(itertools.pairwise(i * num_ticks // count for i in range(count + 1)))
