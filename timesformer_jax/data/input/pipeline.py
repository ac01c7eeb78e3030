"""From a split to batches of decoded clips.

NumPy chooses what each batch is made of: records, frames and crops (a `BatchRequest`). Every choice
follows from (seed, epoch, record) alone. `reading` then reads and decodes just that. So shuffling
keeps no clips in memory, and the state of the iterator is two numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import sampling
from timesformer_jax.data.input.in_flight import InFlight
from timesformer_jax.data.input.reading import BatchRequest, read_batches
from timesformer_jax.data.input.sampling import COVER, Views
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError

Batch = dict[str, np.ndarray]
Rows = np.ndarray | slice
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class IteratorState:
    """How far training has consumed its batches; batches read ahead do not count.

    Attributes:
      epoch: complete passes over the data.
      batches: batches of the current epoch.
    """

    epoch: int = 0
    batches: int = 0

    def after_batch(self, batches_per_epoch: int) -> IteratorState:
        """The state after one more batch."""
        if self.batches + 1 == batches_per_epoch:
            return IteratorState(self.epoch + 1)
        return IteratorState(self.epoch, self.batches + 1)


def train_batches(
    split: Split,
    spec: ClipSpec,
    *,
    batch_size: int,
    short_side_range: tuple[int, int],
    flip: bool,
    seed: int,
    state: IteratorState = IteratorState(),
    rows: Rows = ALL,
) -> Iterator[tuple[Batch, IteratorState]]:
    """Shuffled batches of randomly cropped clips, without end.

    Args:
      split: what to read.
      spec: sampling, frames, frame_stride and crop of a clip.
      batch_size: clips per global batch.
      short_side_range: least and largest short side, in pixels, that a clip is scaled to before it
        is cropped; drawn for each clip.
      flip: whether half of the clips are mirrored.
      seed: every random choice follows from it, the epoch and the record.
      state: where to start; a state that was yielded continues with the next batch.
      rows: the rows of every global batch that this process loads.

    Yields:
      A batch and the state after it. With b the number of `rows`, a batch has
        frames (b, T, S, S, 3) uint8,
        crop_boxes (b, 3) float32, top, left and side of the crop in pixels of `frames`,
        flip (b,) bool, record (b,) int32 (the row in `split`),
        label (b,) int32, or of multi-label data (b, classes) float32, 0 or 1,
        augment_seed (b,) uint32, the seed of the clip's augmentation on the device,
        valid (b,) bool, all True, and with clip.short "mask"
        valid_frames (b,) int32, the frames of each clip that count, from the first one; the others
        repeat the last of them.
      The last incomplete batch of an epoch is left out.

    Raises:
      InputError: there are fewer records than a batch, or short_side_range is below the crop.
    """
    per_epoch = batches_per_epoch(split, batch_size)
    sampling.check_short_side_range(short_side_range, spec.crop)
    requests = train_requests(
        split, spec, batch_size=batch_size, short_side_range=short_side_range, flip=flip, seed=seed,
        state=state, rows=rows,
    )  # fmt: skip
    side = train_side(split, spec, short_side_range)
    for request, frames in read_batches(requests, split, side):
        state = state.after_batch(per_epoch)
        yield _batch(request, frames[:, 0], request.crop_boxes[:, 0]), state


def train_in_flight(
    split: Split, spec: ClipSpec, rows: int, short_side_range: tuple[int, int]
) -> InFlight:
    """What `train_batches` has in memory, where this process loads so many rows of a batch."""
    side = train_side(split, spec, short_side_range)
    return InFlight.of(split, rows=rows, views=1, crops=1, frames=spec.frames, side=side)


def train_requests(
    split: Split,
    spec: ClipSpec,
    *,
    batch_size: int,
    short_side_range: tuple[int, int],
    flip: bool,
    seed: int,
    state: IteratorState = IteratorState(),
    rows: Rows = ALL,
) -> Iterator[BatchRequest]:
    """The requests of the batches of `train_batches`, without end."""
    per_epoch = batches_per_epoch(split, batch_size)
    side = train_side(split, spec, short_side_range)
    while True:
        order = random_generator(seed, state.epoch).permutation(len(split))
        for i in range(state.batches, per_epoch):
            records = order[i * batch_size : (i + 1) * batch_size][rows]
            clips = [
                _train_clip(
                    split, spec, record, short_side_range, flip,
                    random_generator(seed, state.epoch, record),
                )
                for record in records
            ]  # fmt: skip
            yield _batch_request(split, spec, records, clips, side)
        state = IteratorState(state.epoch + 1)


def train_side(split: Split, spec: ClipSpec, short_side_range: tuple[int, int]) -> int:
    """Side in pixels of the squares that training decodes."""
    return sampling.decoded_side(_short_side(split), spec.crop, short_side_range[0])


def eval_batches(
    split: Split,
    spec: ClipSpec,
    *,
    batch_size: int,
    views: Views = 1,
    crops: int = 1,
    rows: Rows = ALL,
) -> Iterator[Batch]:
    """Every record of the split, in order, from views x crops.

    Args:
      split, spec, rows: as for `train_batches`.
      batch_size: rows per global batch. A row is a record, and shows all its views; with "cover"
        it is one clip.
      views: clips along the record; or "cover", for those of `sampling.covering_indices`, however
        many they are: a record then has as many rows, one after the other.
      crops: squares along the longer side of each frame.

    Yields:
      Batches as in training, but with frames (b, V * crops, T, S, S, 3), crop_boxes
      (b, V * crops, 3), where V is `views`, and 1 for "cover"; and valid (b,) bool: False for rows
      that only fill up the last batch.
    """
    side = _short_side(split)
    requests = _eval_requests(split, spec, batch_size, views, crops, rows, side)
    for request, frames in read_batches(requests, split, side):
        # Crops vary fastest.
        boxes = np.tile(request.crop_boxes, (1, request.indices.shape[1], 1))
        yield _batch(request, frames, boxes)


def eval_in_flight(split: Split, spec: ClipSpec, rows: int, views: Views, crops: int) -> InFlight:
    """What `eval_batches` has in memory, where this process loads so many rows of a batch."""
    return InFlight.of(
        split, rows=rows, views=clips_a_row(views), crops=crops, frames=spec.frames,
        side=_short_side(split),
    )  # fmt: skip


def clips_a_row(views: Views) -> int:
    """Clips of a row of `eval_batches`."""
    return 1 if views == COVER else views


def eval_rows(split: Split, spec: ClipSpec, views: Views = 1) -> int:
    """How many rows the batches of `eval_batches` have, those that fill up the last one aside."""
    if views != COVER:
        return len(split)
    lengths = zip(split.num_frames.tolist(), split.fps.tolist())
    return sum(len(sampling.covering_pieces(*length, spec)) for length in lengths)


def _eval_requests(
    split: Split, spec: ClipSpec, batch_size: int, views: Views, crops: int, rows: Rows, side: int
) -> Iterator[BatchRequest]:
    everything = _eval_rows(split, spec, views)
    while batch := list(itertools.islice(everything, batch_size)):
        own = np.arange(batch_size)[rows]
        valid = own < len(batch)
        chosen = [batch[min(row, len(batch) - 1)] for row in own.tolist()]
        records = np.array([record for record, _ in chosen])
        clips = [_eval_clip(split, record, indices, crops) for record, indices in chosen]
        request = _batch_request(split, spec, records, clips, side)
        yield dataclasses.replace(request, valid=valid)


def _eval_rows(split: Split, spec: ClipSpec, views: Views) -> Iterator[tuple[int, np.ndarray]]:
    """The record and the source frames, (V, T), of every row."""
    for record in range(len(split)):
        length = int(split.num_frames[record]), float(split.fps[record])
        if views == COVER:
            for indices in sampling.covering_indices(*length, spec):
                yield record, indices[None]
        else:
            yield record, sampling.test_indices(*length, spec, views)


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Complete batches in one pass over the split."""
    if len(split) < batch_size:
        raise InputError(
            f"split {split.name!r} has {len(split)} clips, fewer than a batch of {batch_size}; "
            f"set --config.batch_size={len(split)} or less"
        )
    return len(split) // batch_size


def random_generator(seed: int, epoch: int, record: int | None = None) -> np.random.Generator:
    """The random numbers for the order of an epoch (record None), or for one record in it."""
    stream = 0 if record is None else record + 1
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, epoch, stream]))


def _short_side(split: Split) -> int:
    short = np.minimum(split.height, split.width)
    if short.min() != short.max():
        raise InputError(
            f"split {split.name!r} holds frames of short side {short.min()} to {short.max()}; "
            "make it again from the videos with `timesformer prepare` and one --short_side"
        )
    return int(short[0])


def _train_clip(
    split: Split,
    spec: ClipSpec,
    record: int,
    short_side_range: tuple[int, int],
    flip: bool,
    random: np.random.Generator,
) -> dict[str, Any]:
    """What a training clip of a record is made of; the crop box in pixels of the frame."""
    draws = random.random(5)
    augment_seed = random.integers(2**32)
    segment_draws = random.random(spec.frames)
    num_frames, fps = int(split.num_frames[record]), float(split.fps[record])
    indices = sampling.train_indices(num_frames, fps, spec, draws[0], segment_draws)
    size = int(split.height[record]), int(split.width[record])
    crop_box = sampling.random_crop_box(*size, spec.crop, short_side_range, draws[1:4])
    return {
        "indices": _stored_indices(split, record, indices)[None],
        "crop_boxes": crop_box[None],
        "flip": flip and draws[4] < 0.5,
        "augment_seed": augment_seed,
    }


def _eval_clip(split: Split, record: int, indices: np.ndarray, crops: int) -> dict[str, Any]:
    """What the views of a record are made of; crop boxes in pixels of the frame."""
    size = int(split.height[record]), int(split.width[record])
    return {
        "indices": _stored_indices(split, record, indices),
        "crop_boxes": sampling.test_crop_boxes(*size, crops),
        "flip": False,
        "augment_seed": 0,
    }


def _stored_indices(split: Split, record: int, indices: np.ndarray) -> np.ndarray:
    num_frames, stride = int(split.num_frames[record]), int(split.stride[record])
    return sampling.stored_indices(indices, stride, -(-num_frames // stride))


def _batch_request(
    split: Split, spec: ClipSpec, records: np.ndarray, clips: list[dict[str, Any]], side: int
) -> BatchRequest:
    """The request of a batch, with the squares to decode and the crop boxes within them."""
    crop_boxes = np.stack([clip["crop_boxes"] for clip in clips])  # b C 3
    size = np.stack([split.height[records], split.width[records]], axis=-1)[:, None]
    # A square is centred on its crop box as far as the frame allows.
    centre = crop_boxes[..., :2] + crop_boxes[..., 2:] / 2
    corners = np.clip(np.floor(centre - side / 2), 0, size - side)
    crop_boxes[..., :2] -= corners
    return BatchRequest(
        record=records.astype(np.int32),
        indices=np.stack([_filled(clip["indices"], spec.frames) for clip in clips]),
        corners=corners.astype(np.int32),
        crop_boxes=crop_boxes.astype(np.float32),
        flip=np.array([clip["flip"] for clip in clips], bool),
        augment_seed=np.array([clip["augment_seed"] for clip in clips], np.uint32),
        label=(
            split.label[records].astype(np.int32)
            if split.targets is None
            else split.targets[records].astype(np.float32)
        ),
        valid=np.ones(len(records), bool),
        valid_frames=(
            np.array([clip["indices"].shape[1] for clip in clips], np.int32)
            if spec.short == "mask"
            else None
        ),
    )


def _filled(indices: np.ndarray, frames: int) -> np.ndarray:
    """(V, k) to (V, frames) int32, filled up with the last of each view."""
    fill = frames - indices.shape[1]
    return np.pad(indices.astype(np.int32), ((0, 0), (0, fill)), mode="edge")


def _batch(request: BatchRequest, frames: np.ndarray, crop_boxes: np.ndarray) -> Batch:
    names = ("flip", "augment_seed", "label", "record", "valid")
    columns = {name: getattr(request, name) for name in names}
    if request.valid_frames is not None:
        columns["valid_frames"] = request.valid_frames
    return {"frames": frames, "crop_boxes": crop_boxes, **columns}
