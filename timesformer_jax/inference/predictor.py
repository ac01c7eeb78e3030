"""`Predictor`: from videos to class probabilities and features. A checkpoint is all it needs."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from timesformer_jax.checkpoints.load import load
from timesformer_jax.data.decode import DecodedVideo, VideoError, isolated_for
from timesformer_jax.data.input.sampling import COVER, Views
from timesformer_jax.errors import InputError
from timesformer_jax.inference import clips as clips_lib
from timesformer_jax.inference.attention import class_index, trace
from timesformer_jax.inference.clip_model import ClipInputs, ClipModel, Outputs
from timesformer_jax.inference.clips import Clips, Video
from timesformer_jax.inference.decoding import decode_ahead
from timesformer_jax.inference.results import AttentionMap, Features, Prediction
from timesformer_jax.inference.streams import Covering
from timesformer_jax.inference.timeline.find import SWITCH_COST, Progress, find_timeline
from timesformer_jax.inference.timeline.result import VideoTimeline
from timesformer_jax.models.embedding import cut_off
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.timesformer import TimeSformer, with_parameters
from timesformer_jax.workers import available_cores

T = TypeVar("T")


class Predictor:
    """Classifies videos with a checkpoint, and gives their features.

    It decodes, crops and normalises as the checkpoint says, and puts clips together in batches. A
    predictor may be used from several threads: they decode at the same time, and the model computes
    one batch at a time. Each size of a batch is compiled once, when it is first used. Files are
    decoded in processes of their own, which live as long as the predictor: one that crashes or
    hangs the decoder is a VideoError. An open file that is no plain file, such as io.BytesIO, is
    copied to memory for them.

        predictor = Predictor("runs/mine")
        predictor.predict("jump.mp4")     # [jump 97.3%, run 1.9%, ...]
        predictor.features("jump.mp4").video

    Every method takes, as `video`, the path of a file or of a folder of images; a binary file that
    is open; frames, (T, H, W, 3) uint8 RGB, with their rate as `fps`; or a list of these, for which
    it returns a list. Without `fps`, frames must be one clip that is sampled already.

    Args:
      checkpoint: a run of ours or one of its steps, a Hugging Face directory, a `.pyth` of the
        authors' release, or a name; as for `from_pretrained`.
      views: clips along a video whose probabilities are averaged; or "cover", for clips that do
        not overlap along the whole video, which is decoded as a stream, whatever its length.
      crops: crops of each clip: 3 for left, centre and right, 1 for the centre.
      attention_kernels: "auto" for the fastest on the device, "xla", or the name of a kernel (see
        docs/kernels.md).
      labels: class names in the order of the logits, in place of the checkpoint's.
      batch_size: clips that go through the model at a time, each with all its crops; None: 8, or 1
        on a CPU, where more would not be faster.
      needs_head: refuse a checkpoint without a classifier of videos, such as an image ViT. False:
        accept it; only its features mean anything.

    Attributes:
      metadata: what the checkpoint says about itself: `metadata.model`, `.clip`, `.labels`,
        `.license` and `.config`.
      labels: class names, in the order of the probabilities. "class 17" and so on if the
        checkpoint has no names.
      model: the network, with the checkpoint's parameters, for normalised clips.

    Raises:
      InputError: if the checkpoint cannot be read, or an argument is out of range.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        views: Views = 1,
        crops: int = 3,
        attention_kernels: str = "auto",
        *,
        labels: Sequence[str] | None = None,
        batch_size: int | None = None,
        needs_head: bool = True,
    ):
        if (views != COVER and (isinstance(views, str) or views < 1)) or crops not in (1, 3):
            raise InputError(
                f"views must be at least 1, or cover, and crops 1 or 3, not {views} and {crops}"
            )
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        select.check_name(attention_kernels)
        self.metadata, self._params = load(checkpoint, needs_head=needs_head)
        model = self.metadata.model
        if labels is not None and len(labels) != model.num_classes:
            raise InputError(
                f"{len(labels)} labels for a checkpoint of {model.num_classes} classes; "
                "give one name per class, in the order of the logits"
            )
        names = labels or self.metadata.labels or [f"class {i}" for i in range(model.num_classes)]
        self.labels = tuple(names)
        self.views: Any = views
        self.crops, self.attention_kernels = crops, attention_kernels
        self._clips = ClipModel(self.metadata, self._params, crops, batch_size, attention_kernels)
        self.batch_size = self._clips.batch_size
        isolated_for(self)

    @functools.cached_property
    def model(self) -> TimeSformer:
        return with_parameters(self.metadata.model, self._params)

    def _model_for(self, frames: int) -> TimeSformer:
        """`model`; for a shorter clip with `ClipSpec.short` "mask", of so many frames."""
        spec = self.metadata.clip
        if spec.short != "mask" or frames >= spec.frames:
            return self.model
        return with_parameters(*cut_off(self.metadata.model, self._params, spec.frames, frames))

    @property
    def fingerprint(self) -> str:
        """Eight hexadecimal digits that tell checkpoints apart: a CRC-32 of final norm and head."""
        arrays = jax.tree.leaves([self._params[name] for name in ("norm", "head")])
        return f"{zlib.crc32(b''.join(np.asarray(x).tobytes() for x in arrays)):08x}"

    def predict(
        self,
        video: Video | list[Video],
        top: int = 5,
        *,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
    ) -> Any:
        """The most probable classes of a video, or of its part [start, end).

        Args:
          video: as the class says.
          top: how many classes.
          start: seconds; None: the beginning.
          end: seconds; None: the end.
          fps: of frames in memory.

        Returns:
          A list of `Prediction`, (label, probability), the most probable first; of a list of
          videos, a list of such lists.

        Raises:
          VideoError: if a video cannot be decoded; it names the video.
          InputError: if frames in memory have another shape or dtype.
        """
        if isinstance(video, list):
            return [self.top(p, top) for p in self.probabilities(video, start, end, fps=fps)]
        return self.top(self.probabilities(video, start, end, fps=fps), top)

    def probabilities(
        self,
        video: Video | list[Video],
        start: float | None = None,
        end: float | None = None,
        *,
        fps: float | None = None,
    ) -> np.ndarray:
        """(classes,) float32 probabilities of a video; of n videos in a list, (n, classes).

        They are the mean over the views and crops. Arguments and errors are those of `predict`.
        """
        found = [p.mean(axis=0) for p in self._of(self.classify, video, start, end, fps)]
        if not found:
            return np.zeros((0, len(self.labels)), np.float32)
        return np.stack(found) if isinstance(video, list) else found[0]

    def features(
        self,
        video: Video | list[Video],
        *,
        frames: bool = False,
        positions: bool = False,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
    ) -> Any:
        """The `Features` of a video, or of its part [start, end); of a list of videos, a list.

        Args:
          video: as the class says.
          frames: with the mean of the patches of every frame.
          positions: with the mean over the frames of the patches of every position.
          start: as for `predict`.
          end: as for `predict`.
          fps: as for `predict`.

        Raises:
          VideoError, InputError: as `predict`.
        """
        encode = functools.partial(self.encode, frames=frames, positions=positions)
        found = [as_features(f) for f in self._of(encode, video, start, end, fps)]
        return found if isinstance(video, list) else found[0]

    def attention(
        self,
        video: Video,
        target: str | int | None = None,
        *,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
    ) -> AttentionMap:
        """What the model looks at in the middle clip of a video, or of its part [start, end).

        Args:
          video: as the class says, but no list. Of its frames the centre square is taken.
          target: None for attention rollout, or a class, by name or number: attentions are then
            weighted by their gradients for this class. See docs/explain.md.
          start: as for `predict`.
          end: as for `predict`.
          fps: as for `predict`.

        Raises:
          VideoError, InputError: as `predict`; InputError if there is no such class.
        """
        clip = clips_lib.read(video, self.metadata.clip, 1, 1, start, end, fps=fps)
        return self.look(clip, target)

    def timeline(
        self,
        video: Video,
        stride: float | None = None,
        *,
        window: float | None = None,
        switch_cost: float = SWITCH_COST,
        start: float | None = None,
        end: float | None = None,
        fps: float | None = None,
        progress: Progress | None = None,
    ) -> VideoTimeline:
        """What happens when in one video of any length, or in its part [start, end).

        Clips slide along the video, which is decoded once. Arguments and errors are those of
        `find_timeline`; frames in memory need `fps`.
        """
        if self.metadata.multilabel:
            raise InputError(
                "a timeline has one class at a time, and a video of this checkpoint any number of"
                " labels; use predict with --start and --end"
            )
        try:
            return find_timeline(
                video, self.classify, self.metadata.clip, self.labels, stride, window, switch_cost,
                start, end, fps=fps, crops=self.crops, batch_size=self.batch_size,
                progress=progress,
            )  # fmt: skip
        except VideoError as error:
            raise VideoError(f"{_name(video)}: {error}") from error

    def top(self, probabilities: np.ndarray, count: int) -> list[Prediction]:
        """The `count` most probable classes of (classes,) probabilities, the first one first."""
        order = np.argsort(-probabilities, kind="stable")[:count]
        return [Prediction(self.labels[i], float(probabilities[i])) for i in order]

    # ---- for the commands, and for other ways to look at a video -------------------------------

    def read(self, video: Video, *arguments: Any, **options: Any) -> Clips | Covering:
        """The clips of one video; see `clips.read`, which says the other arguments."""
        spec = self.metadata.clip
        if self.views == COVER:
            # One video at a time is a stream: all cores decode it.
            return Covering(video, spec, self.crops, *arguments, **options | {"threads": 0})
        return clips_lib.read(video, spec, self.views, self.crops, *arguments, **options)

    def inputs(self, frames: np.ndarray, crop_boxes: np.ndarray) -> jax.Array:
        """The crops of one clip as `model` takes them; see `ClipModel.inputs`."""
        return self._clips.inputs(frames, crop_boxes)

    def classify(self, clips: ClipInputs) -> np.ndarray:
        """Probabilities of clips, (n, classes); see `ClipModel.classify`."""
        return self._clips.classify(clips)

    def encode(
        self, clips: ClipInputs, *, frames: bool = False, positions: bool = False
    ) -> Outputs:
        """Features of clips; see `ClipModel.encode`."""
        return self._clips.encode(clips, frames=frames, positions=positions)

    def look(self, clip: Clips, target: str | int | None = None) -> AttentionMap:
        """`attention` of one clip with one crop box, which is decoded already."""
        index = None if target is None else class_index(self.labels, target)
        video = self.inputs(clip.frames[0], clip.crop_boxes)
        with self._clips.alone():
            model = self._model_for(video.shape[1])
            heat, probabilities = trace(model, video, index, self.metadata.multilabel)
        name = None if index is None else self.labels[index]
        clip_of_it = clip.frames[0], clip.times[0], clip.crop_boxes[0]
        return AttentionMap(heat, probabilities, name, *clip_of_it)

    def stream(
        self,
        compute: Callable[[list], T],
        reads: Iterable[Callable[[], Clips | Covering]],
        workers: int | None = None,
    ) -> Iterator[T | VideoError]:
        """What `compute` gives for the clips of each video, in order, as soon as it is known.

        Videos are decoded ahead in threads while the model computes. Clips of several videos share
        a batch.

        Args:
          compute: `classify` or `encode`.
          reads: a function for each video that decodes it: `functools.partial(self.read, path)`.
          workers: threads that decode; None: one per core; 0: no threads.

        Yields:
          For each video a tree of arrays, whose first axis is its clips; or the VideoError.
        """
        group: list[Clips | VideoError] = []
        for found in decode_ahead(reads, available_cores() if workers is None else workers):
            if isinstance(found, Covering):
                yield from self._computed(compute, group)
                group = []
                yield self._cover(compute, found)
                continue
            group.append(found)
            if sum(len(c.frames) for c in group if isinstance(c, Clips)) >= self.batch_size:
                yield from self._computed(compute, group)
                group = []
        yield from self._computed(compute, group)

    def _cover(self, compute: Callable[[Any], Any], clips: Covering) -> Any:
        """What `compute` gives for the clips of a stream, or the VideoError."""
        try:
            outputs = [compute(batch) for batch in clips.batches(self.batch_size)]
        except VideoError as error:
            return error
        return jax.tree.map(lambda *x: np.concatenate(x), *outputs)

    def _computed(
        self, compute: Callable[[list], Any], group: list[Clips | VideoError]
    ) -> Iterator[Any]:
        """What `compute` gives for each member of a group, computed together."""
        clips = [c for c in group if isinstance(c, Clips)]
        if not clips:
            yield from group
            return
        outputs = compute([(frames, c.crop_boxes) for c in clips for frames in c.frames])
        first = 0
        for member in group:
            if isinstance(member, VideoError):
                yield member
                continue
            own = slice(first, first + len(member.frames))
            first = own.stop
            yield jax.tree.map(lambda x: x[own], outputs)  # noqa: B023  # called at once

    def _of(
        self,
        compute: Callable[[list], T],
        video: Video | list[Video],
        start: float | None,
        end: float | None,
        fps: float | None,
    ) -> Iterator[T]:
        """What `compute` gives for one video or for each of a list; raises their errors."""
        videos = video if isinstance(video, list) else [video]
        alone = len(videos) == 1  # the cores decode this one together
        threads, workers = (0, 0) if alone else (1, None)
        reads = []
        for each in videos:
            rate = None if clips_lib.is_file(each) else fps
            reads.append(functools.partial(self.read, each, start, end, fps=rate, threads=threads))
        for each, found in zip(videos, self.stream(compute, reads, workers)):
            if isinstance(found, VideoError):
                raise VideoError(f"{_name(each)}: {found}") from found
            yield found


def as_features(outputs: Outputs) -> Features:
    """The features of a video from those of its clips, as `Predictor.encode` gives them."""
    return Features(video=outputs["clips"].mean(axis=(0, 1)), **outputs)


def _name(video: Video) -> str:
    """A video in an error message."""
    if isinstance(video, str | os.PathLike):
        return os.fspath(video)
    in_memory = isinstance(video, np.ndarray | DecodedVideo)
    return "frames in memory" if in_memory else str(getattr(video, "name", "open file"))
