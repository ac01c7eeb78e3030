"""What happens when in a long video: `find` -> `result` -> text, or a `page`."""

from timesformer_jax.inference.timeline.result import VideoTimeline
from timesformer_jax.inference.timeline.smoothing import Segment

__all__ = ["Segment", "VideoTimeline"]
