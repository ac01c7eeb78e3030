"""Fits a recipe to a checkpoint and to the data: pure functions that say what they would change.

A recipe's `defaults` holds the automatic fields, with the recipe's own values. Such a field is
automatic until somebody sets it: a value that differs from the default is kept, and the command
line and the arguments of a config take what they set out of `defaults`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from ml_collections import ConfigDict

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.problems import some
from timesformer_jax.models.config import TimeSformerConfig

# The shape of a model and its clips, which a checkpoint decides. An image model leaves the rest to
# the recipe: it has no frames.
OF_IMAGE_MODEL = (
    "model.patch_size", "model.hidden_size", "model.depth", "model.num_heads", "model.mlp_ratio",
    "clip.crop", "clip.mean", "clip.std", "clip.channel_order",
)  # fmt: skip
OF_VIDEO_MODEL = (
    *OF_IMAGE_MODEL,
    "model.attention", "model.position_embedding", "model.position_resize", "model.init",
    "clip.frames", "clip.frame_stride", "clip.sampling", "clip.start", "clip.short",
)  # fmt: skip
# What the data decides.
OF_DATA = ("clip.frame_stride", "data.flip", "batch_size", "log_every_steps")

# One video in so many may be shorter than a clip.
SHORT_ONE_IN = 10
# A run reports at least so often.
REPORTS = 50
# Of AdamW where nothing pretrained is to be kept.
RATE_FROM_SCRATCH = 1e-3

# Words whose meaning a mirror changes.
_SIDED = re.compile(
    r"(?<![a-z])(left|right|leftwards?|rightwards?|(counter|anti)?[ _-]?clockwise)(?![a-z])"
)


class Change(NamedTuple):
    """What to change in a config.

    Attributes:
      fields: new values by dotted name.
      reason: a sentence for the log: why, and how to keep the old value.
      is_warning: the data is less than what the recipe is meant for.
    """

    fields: dict[str, Any]
    reason: str
    is_warning: bool = False


@dataclasses.dataclass(frozen=True)
class Clips:
    """The index of a split, as far as it decides on a recipe. The arrays have a row per record.

    Attributes:
      num_frames: (n,) int, frames of the source.
      fps: (n,) float, its frame rate.
    """

    num_frames: np.ndarray
    fps: np.ndarray

    def __len__(self) -> int:
        return len(self.num_frames)

    def shorter_than(self, frames: int, stride: int) -> int:
        """How many records have fewer frames than a clip spans, by more than one frame."""
        span = frames * stride / 30 * self.fps.astype(np.float64)
        return int((self.num_frames + 1 < span).sum())


def automatic(config: ConfigDict) -> set[str]:
    """The automatic fields: nobody set them, so that they have the recipe's default."""
    fields = flatten(config)
    return {
        name.removeprefix("defaults.")
        for name, default in fields.items()
        if name.startswith("defaults.") and fields.get(name.removeprefix("defaults.")) == default
    }


def flatten(config: ConfigDict) -> dict[str, Any]:
    """All fields by their dotted names, those of `defaults` too."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def make_automatic(config: ConfigDict, names: Iterable[str]) -> None:
    """Makes fields automatic: a checkpoint and the data change them from their present values."""
    fields = flatten(config)
    for name in names:
        group, _, last = name.rpartition(".")
        if group and group not in config.defaults:
            config.defaults[group] = ConfigDict()
        (config.defaults[group] if group else config.defaults)[last] = fields[name]


def decide(config: ConfigDict, names: Iterable[str]) -> None:
    """Takes fields out of `defaults`: somebody set them, perhaps to the same value."""
    if "defaults" not in config:
        return
    with config.unlocked():
        for name in names:
            group, _, last = name.rpartition(".")
            place = config.defaults.get(group, {}) if group else config.defaults
            if last in place:
                del place[last]


def apply(config: ConfigDict, changes: Iterable[Change]) -> None:
    """Sets the fields of changes."""
    for change in changes:
        for name, value in change.fields.items():
            group, _, last = name.rpartition(".")
            (config[group] if group else config)[last] = value


# ---- to a run that goes on ----------------------------------------------------------------------


def to_saved_run(config: ConfigDict, saved: Mapping[str, Any]) -> list[Change]:
    """A run that goes on keeps what it decided when it began.

    Args:
      config: the recipe.
      saved: the config in the run's checkpoint, by dotted name.
    """
    fields = flatten(config)
    kept = {
        name: tuple(saved[name]) if isinstance(fields[name], tuple) else saved[name]
        for name in sorted(automatic(config))
        if name in saved
    }
    changed = {name: value for name, value in kept.items() if value != fields[name]}
    return [Change(changed, "as the run began")] if changed else []


# ---- to a checkpoint ----------------------------------------------------------------------------


def to_checkpoint(
    config: ConfigDict, path: str, model: TimeSformerConfig, clip: ClipSpec, is_image_model: bool
) -> list[Change]:
    """Takes the shape of a checkpoint wherever the config does not say otherwise.

    Args:
      config: the recipe.
      path: of the checkpoint, for the sentence.
      model, clip: the checkpoint's.
      is_image_model: whether it has no frames, so that the recipe decides on them.
    """
    fields, automatic_fields = flatten(config), automatic(config)
    found = {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    found |= {f"clip.{name}": value for name, value in dataclasses.asdict(clip).items()}
    taken = {
        name: found[name]
        for name in (OF_IMAGE_MODEL if is_image_model else OF_VIDEO_MODEL)
        if name in automatic_fields and found[name] != fields[name]
    }
    frames = taken.get("clip.frames", fields["clip.frames"])
    if not is_image_model and frames != clip.frames and "clip.frame_stride" in automatic_fields:
        # Another number of frames, which somebody set, spans the checkpoint's time.
        taken["clip.frame_stride"] = clip.with_frames(frames).frame_stride
    said = [f"{name} {_text(value)}" for name, value in taken.items()]
    crop = taken.get("clip.crop", fields["clip.crop"])
    if "data.short_side_range" in automatic_fields and crop != fields["clip.crop"]:
        low, high = fields["data.short_side_range"]
        scale = crop / fields["clip.crop"]
        taken["data.short_side_range"] = (round(low * scale), round(high * scale))
    if not taken:
        return []
    return [Change(taken, f"as the checkpoint {path}: {', '.join(said)}")]


def without_checkpoint(config: ConfigDict) -> list[Change]:
    """What a run from random parameters changes: with AdamW, a higher learning rate."""
    if config.optimizer.name != "adamw" or "optimizer.learning_rate" not in automatic(config):
        return []
    if config.optimizer.learning_rate >= RATE_FROM_SCRATCH:
        return []
    return [
        Change(
            {"optimizer.learning_rate": RATE_FROM_SCRATCH},
            f"it starts from no checkpoint: optimizer.learning_rate {RATE_FROM_SCRATCH:g}, not "
            f"{config.optimizer.learning_rate:g}",
        )
    ]


# ---- to the data --------------------------------------------------------------------------------


def to_data(
    config: ConfigDict, train: Clips, labels: tuple[str, ...], batch_multiple: int = 1
) -> list[Change]:
    """What the recipe changes for its data: frame stride, flip, batch size, how often it reports.

    Args:
      config: the recipe, fitted to its checkpoint.
      train: the training records.
      labels: class names.
      batch_multiple: what a batch size must be a multiple of.
    """
    automatic_fields = automatic(config)
    changes = []
    if "clip.frame_stride" in automatic_fields:
        changes += _frame_stride(config.clip, train)
    if "data.flip" in automatic_fields and config.data.flip and (sided := sided_labels(labels)):
        changes.append(
            Change(
                {"data.flip": False},
                f"classes tell left from right ({some(sided)}): clips are not mirrored; "
                "--config.data.flip=true mirrors them",
            )
        )
    batch_size = config.batch_size
    if "batch_size" in automatic_fields and len(train) < batch_size:
        largest = len(train) // batch_multiple * batch_multiple
        if largest:
            batch_size = largest
            reason = f"there are {len(train)} clips: batch_size {largest}, not {config.batch_size}"
            changes.append(Change({"batch_size": largest}, reason, is_warning=True))
    if "log_every_steps" in automatic_fields:
        steps = config.epochs * (len(train) // batch_size)
        every = max(min(config.log_every_steps, steps // REPORTS), 1)
        if steps and every != config.log_every_steps:
            reason = f"the run has {steps} steps: log_every_steps {every}"
            changes.append(Change({"log_every_steps": every}, reason))
    return changes


def _frame_stride(clip: ConfigDict, train: Clips) -> list[Change]:
    """The largest stride, at most the config's, whose clips most videos are as long as."""
    if clip.sampling != "stride" or clip.short == "mask" or not len(train):
        return []
    short = train.shorter_than(clip.frames, clip.frame_stride)
    stride = clip.frame_stride
    while stride > 1 and train.shorter_than(clip.frames, stride) > len(train) // SHORT_ONE_IN:
        stride -= 1
    if stride == clip.frame_stride:
        return []
    before, after = (clip.frames * s / 30 for s in (clip.frame_stride, stride))
    return [
        Change(
            {"clip.frame_stride": stride},
            f"{short} of {len(train)} videos are shorter than a clip of {before:.1f} s: "
            f"clip.frame_stride {stride}, clips of {after:.1f} s; "
            f"--config.clip.frame_stride={clip.frame_stride} keeps the longer ones",
        )
    ]


def sided_labels(labels: Iterable[str]) -> list[str]:
    """The labels whose words change their meaning in a mirror: left, right, clockwise."""
    return [label for label in labels if _SIDED.search(_words(label))]


def _words(label: str) -> str:
    """Lower case, with turnLeft as "turn left"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label).lower()


# ---- what to tell -------------------------------------------------------------------------------


def warnings(config: ConfigDict, train: Clips, labels: tuple[str, ...]) -> list[str]:
    """Where the recipe does not fit the data, a sentence each.

    Args:
      config: the recipe, fitted to the data.
      train: the training records.
      labels: class names.
    """
    found = []
    clip = config.clip
    short = train.shorter_than(clip.frames, clip.frame_stride)
    is_repeated = clip.sampling == "stride" and clip.short == "repeat"
    if is_repeated and short > len(train) // SHORT_ONE_IN:
        found.append(
            f"{short} of {len(train)} videos are shorter than a clip of "
            f"{clip.frames * clip.frame_stride / 30:.1f} s: their last frame is repeated; a "
            "smaller --config.clip.frame_stride makes clips shorter"
        )
    if config.data.flip and (sided := sided_labels(labels)):
        found.append(
            f"classes tell left from right ({some(sided)}), but clips are mirrored; "
            "--config.data.flip=false leaves them as they are"
        )
    return found


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
