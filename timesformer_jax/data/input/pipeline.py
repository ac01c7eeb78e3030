"""From a split to batches of decoded clips.

What a batch is made of (which records, frames and squares) is planned in numpy, statelessly from
(seed, epoch, record); `reading` reads just those records, by their offset in the shard, and decodes
just those frames and squares. So a shuffle holds no clips, and the iterator's state is two numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import reading, sampling
from timesformer_jax.data.records.split import Split
from timesformer_jax.errors import InputError

Batch = dict[str, np.ndarray]
Rows = np.ndarray | slice
ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class IteratorState:
    """Where a training iterator stands, by what was consumed and not what was prefetched.

    Attributes:
      epoch: passes over the data that are done.
      batches: batches of this epoch that are done.
    """

    epoch: int = 0
    batches: int = 0


def train_batches(
    split: Split,
    spec: ClipSpec,
    *,
    batch_size: int,
    short_side_range: tuple[int, int],
    flip: bool,
    seed: int,
    position: IteratorState = IteratorState(),
    rows: Rows = ALL,
) -> Iterator[tuple[Batch, IteratorState]]:
    """Shuffled, randomly cropped training batches, without end.

    Args:
      split: what to read.
      spec: frames, frame_stride and crop of a clip.
      batch_size: of all hosts together.
      short_side_range: least and largest scaled short side in pixels, drawn for each clip.
      flip: whether half of the clips are mirrored.
      seed: with the epoch and the record, decides every draw.
      position: where to start; a position that was yielded continues just after its batch.
      rows: those of every global batch that this process loads.

    Yields:
      A batch and the position after it. The batch holds frames (b, T, S, S, 3) uint8, crop_boxes
      (b, 3) float32 (top, left, side in pixels of those frames), flip (b,) bool, label (b,) int32,
      record (b,) int32, the index in `split`, and draw (b,) uint32, which seeds what the device
      draws for the clip, with b of `rows`. The last incomplete batch of an epoch is left out.

    Raises:
      InputError: if there are fewer records than a batch, or the short_side_range is too small for the crop.
    """
    per_epoch = batches_per_epoch(split, batch_size)
    sampling.check_short_side_range(short_side_range, spec.crop)
    plans = train_plans(
        split, spec, batch_size=batch_size, short_side_range=short_side_range, flip=flip, seed=seed,
        position=position, rows=rows,
    )  # fmt: skip
    at = position
    for plan, frames in reading.clips(plans, split, train_side(split, spec, short_side_range)):
        done = at.batches + 1
        at = IteratorState(at.epoch + 1) if done == per_epoch else IteratorState(at.epoch, done)
        yield _batch(plan, frames[:, 0], plan["crop_boxes"][:, 0]), at


def train_plans(
    split: Split,
    spec: ClipSpec,
    *,
    batch_size: int,
    short_side_range: tuple[int, int],
    flip: bool,
    seed: int,
    position: IteratorState = IteratorState(),
    rows: Rows = ALL,
) -> Iterator[reading.Plan]:
    """What the batches of `train_batches` are made of, without end."""
    per_epoch = batches_per_epoch(split, batch_size)
    side = train_side(split, spec, short_side_range)
    while True:
        order = _random(seed, position.epoch).permutation(len(split))
        for i in range(position.batches, per_epoch):
            mine = order[i * batch_size : (i + 1) * batch_size][rows]
            plans = [
                _train_plan(split, spec, r, short_side_range, flip, seed, position.epoch)
                for r in mine
            ]
            yield _stack(plans, mine, side, split)
        position = IteratorState(position.epoch + 1)


def train_side(split: Split, spec: ClipSpec, short_side_range: tuple[int, int]) -> int:
    """Side in pixels of the squares that training decodes."""
    return sampling.decoded_side(_short_side(split), spec.crop, short_side_range[0])


def eval_batches(
    split: Split,
    spec: ClipSpec,
    *,
    batch_size: int,
    views: int = 1,
    crops: int = 1,
    rows: Rows = ALL,
) -> Iterator[Batch]:
    """Every record of the split once, in order, seen from views x crops.

    Args:
      split, spec, rows: as for `train_batches`.
      batch_size: videos of all hosts together.
      views: clips along the video.
      crops: squares along the long side of each.

    Yields:
      Batches as in training, but frames (b, views * crops, T, S, S, 3), crop_boxes
      (b, views * crops, 3), and valid (b,) bool: False for the rows that fill up the last batch.
    """
    side = _short_side(split)
    steps = -(-len(split) // batch_size)
    order = np.arange(steps * batch_size)

    def plans() -> Iterator[reading.Plan]:
        for batch in order.reshape(steps, batch_size):
            mine = batch[rows]
            valid = mine < len(split)
            mine = np.where(valid, mine, 0)
            plans = [_test_plan(split, spec, row, views, crops) for row in mine]
            yield _stack(plans, mine, side, split) | {"valid": valid}

    for plan, frames in reading.clips(plans(), split, side):
        # One crop_box a clip: crops vary fastest.
        yield _batch(plan, frames, np.tile(plan["crop_boxes"], (1, views, 1)))


def batches_per_epoch(split: Split, batch_size: int) -> int:
    """Full batches in one pass over the split."""
    if len(split) < batch_size:
        raise InputError(
            f"split {split.name!r} has {len(split)} clips, fewer than a batch of {batch_size}; "
            f"set --config.batch_size={len(split)} or less"
        )
    return len(split) // batch_size


def _random(seed: int, epoch: int, record: int | None = None) -> np.random.Generator:
    """The draws of an epoch's order (record None), or of one record in it."""
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


def _train_plan(
    split: Split,
    spec: ClipSpec,
    row: int,
    short_side_range: tuple[int, int],
    flip: bool,
    seed: int,
    epoch: int,
) -> dict[str, Any]:
    random = _random(seed, epoch, row)
    draws, draw, in_segment = random.random(5), random.integers(2**32), random.random(spec.frames)
    n, fps = int(split.num_frames[row]), float(split.fps[row])
    indices = sampling.train_indices(n, fps, spec, draws[0], in_segment)
    size = int(split.height[row]), int(split.width[row])
    return {
        "indices": _stored(split, row, indices)[None],
        "crop_boxes": sampling.random_crop_box(*size, spec.crop, short_side_range, draws[1:4])[
            None
        ],
        "flip": flip and draws[4] < 0.5,
        "augment_seed": draw,
    }


def _test_plan(split: Split, spec: ClipSpec, row: int, views: int, crops: int) -> dict[str, Any]:
    n, fps = int(split.num_frames[row]), float(split.fps[row])
    size = int(split.height[row]), int(split.width[row])
    return {
        "indices": _stored(split, row, sampling.test_indices(n, fps, spec, views)),
        "crop_boxes": sampling.test_crop_boxes(*size, crops),
        "flip": False,
        "augment_seed": 0,
    }


def _stored(split: Split, row: int, indices: np.ndarray) -> np.ndarray:
    n, stride = int(split.num_frames[row]), int(split.stride[row])
    return sampling.stored_indices(indices, stride, -(-n // stride))


def _stack(plans: list[dict[str, Any]], rows: np.ndarray, side: int, split: Split) -> reading.Plan:
    """A batch's plans as arrays, and the corner of the square to decode for each crop_box."""
    crop_boxes = np.stack([plan["crop_boxes"] for plan in plans])  # b crops 3
    size = np.stack([split.height[rows], split.width[rows]], axis=-1)[:, None]
    # The square is centred on the crop_box as far as the frame allows.
    centre = crop_boxes[..., :2] + crop_boxes[..., 2:] / 2
    corners = np.clip(np.floor(centre - side / 2), 0, size - side)
    crop_boxes[..., :2] -= corners
    return {
        "indices": np.stack([plan["indices"] for plan in plans]).astype(np.int32),
        "corners": corners.astype(np.int32),
        "crop_boxes": crop_boxes.astype(np.float32),
        "flip": np.array([plan["flip"] for plan in plans], bool),
        "augment_seed": np.array([plan["augment_seed"] for plan in plans], np.uint32),
        "label": split.label[rows].astype(np.int32),
        "record": rows.astype(np.int32),
        "valid": np.ones(len(rows), bool),
    }


def _batch(plan: reading.Plan, frames: np.ndarray, crop_boxes: np.ndarray) -> Batch:
    kept = {key: plan[key] for key in ("flip", "augment_seed", "label", "record", "valid")}
    return kept | {"frames": frames, "crop_boxes": crop_boxes}
