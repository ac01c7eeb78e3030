"""The range of every number of a config and of the command line, in one table.

What is outside is refused before work begins. A bound that no law of the field gives is far beyond
what anybody uses, and there because numbers beyond it overflow or exhaust the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from timesformer_jax.errors import InputError


class Range(NamedTuple):
    """The numbers that a name can have.

    Attributes:
      low, high: the bounds; both belong to the range unless `above` or `below` is set.
      whole: only whole numbers.
      above, below: `low`, `high` themselves do not belong to the range.
      also: one more number, for a special meaning such as "none"; None: no other.
      only: the numbers themselves, where there are but a few.
    """

    low: float
    high: float
    whole: bool = False
    above: bool = False
    below: bool = False
    also: float | None = None
    only: tuple[int, ...] = ()

    def __contains__(self, value: Any) -> bool:
        """Whether a number is in the range; NaN and infinities are in none."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        number: Any = value  # of NumPy's types too
        if self.also is not None and value == self.also:
            return True
        if self.only:
            return value in self.only
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return over and under

    def __str__(self) -> str:
        """The range in words: "a whole number from 1 to 100", "a number above 0 and below 1"."""
        if self.only:
            return " or ".join(map(_shown, self.only))
        kind = "a whole number" if self.whole else "a number"
        low = f"above {_shown(self.low)} and" if self.above else f"from {_shown(self.low)}"
        high = _shown(self.high)
        if self.above:
            high = f"below {high}" if self.below else f"at most {high}"
        else:
            high = f"to below {high}" if self.below else f"to {high}"
        also = "" if self.also is None else f", or {_shown(self.also)}"
        return f"{kind} {low} {high}{also}"


def _shown(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


MILLION = 1_000_000
YEAR = 366 * 24 * 3600  # seconds

_COUNT = Range(1, MILLION, whole=True)
_COUNT_OR_NONE = Range(0, MILLION, whole=True)
_FRACTION = Range(0, 1)
_EPOCHS = Range(0, MILLION)

# By the name of the flag or of the config's field; the name with its group goes before the last
# part alone: "data.fps", or "fps". In a list every item is in the range.
RANGES: dict[str, Range] = {
    # videos and their clips
    "fps": Range(0.001, 1000),
    "data.fps": Range(0.001, 1000, also=0),  # 0: the records' own
    "start": Range(0, YEAR),
    "end": Range(0, YEAR, above=True),
    "short_side": Range(1, 8192, whole=True),
    "short_side_range": Range(1, 8192, whole=True),
    "quality": Range(1, 100, whole=True),
    "store_stride": Range(1, 100_000, whole=True),
    "segment_seconds": Range(0.01, YEAR, also=0),  # 0: not cut
    "clips_per_shard": Range(1, 100_000, whole=True),
    "workers": Range(0, 1024, whole=True),  # 0: one for each core
    "max_failures": Range(0, 1 << 40, whole=True),
    "validation_fraction": Range(0, 1, below=True),
    "train_fraction": Range(0, 1, above=True),
    "decode_fraction": _FRACTION,
    "frames": Range(1, 16_384, whole=True),
    "num_frames": Range(1, 16_384, whole=True),
    "frame_stride": Range(1, 100_000, whole=True),
    "crop": Range(1, 8192, whole=True),
    "clip.mean": Range(-1000, 1000),
    "clip.std": Range(0, 1000, above=True),
    # the model
    "num_classes": Range(1, MILLION, whole=True),
    "model.num_classes": Range(0, MILLION, whole=True),  # 0: the data's
    "image_size": Range(1, 8192, whole=True),
    "patch_size": Range(1, 8192, whole=True),
    "hidden_size": Range(1, 65_536, whole=True),
    "depth": Range(1, 1024, whole=True),
    "num_heads": Range(1, 65_536, whole=True),
    "mlp_ratio": Range(0, 64, above=True),
    "drop_path": Range(0, 1, below=True),
    # batches and results
    "batch_size": _COUNT,
    "views": Range(1, 10_000, whole=True),
    "crops": Range(1, 3, whole=True, only=(1, 3)),
    "top": _COUNT,
    "threshold": _FRACTION,
    "batches": _COUNT,
    "stride": Range(0.001, YEAR),
    "window": Range(0.001, YEAR),
    "switch_cost": Range(0, 1000),
    # training
    "seed": Range(0, (1 << 32) - 1, whole=True),
    "epochs": _COUNT,
    "optimizer.epochs": Range(0, MILLION, above=True),
    "log_every_steps": _COUNT,
    "accumulate_steps": _COUNT,
    "ema_decay": Range(0, 1, below=True),
    "learning_rate": Range(0, 1000, above=True),
    "reference_batch_size": _COUNT,
    "momentum": Range(0, 1, below=True),
    "weight_decay": Range(0, 1000),
    "warmup_epochs": _EPOCHS,
    "decay_epochs": _EPOCHS,
    "decay_factors": Range(0, 1000),
    "clip_norm": Range(0, MILLION),
    "layer_decay": Range(0, 1, above=True),
    "every_epochs": _COUNT_OR_NONE,
    "every_steps": Range(0, 1 << 40, whole=True),
    "keep_newest": _COUNT,
    "keep_best": _COUNT_OR_NONE,
    "start_step": Range(1, 1 << 40, whole=True),
    "profile.steps": _COUNT_OR_NONE,
    "color_jitter": Range(0, 1000),
    "grayscale": _FRACTION,
    "randaugment_layers": Range(0, 14, whole=True),
    "randaugment_magnitude": Range(0, 10),
    "erasing": _FRACTION,
    "label_smoothing": _FRACTION,
    "mixup": Range(0, 1000),
    "cutmix": Range(0, 1000),
    # devices and processes
    "mesh.data": Range(1, MILLION, whole=True, also=-1),  # -1: those left over
    "mesh.fsdp": Range(1, MILLION, whole=True, also=-1),
    "mesh.tensor": Range(1, MILLION, whole=True, also=-1),
    "mesh.sequence": Range(1, MILLION, whole=True, also=-1),
    "num_processes": Range(1, 100_000, whole=True),
    "process_id": Range(0, 99_999, whole=True),
    "startup_seconds": Range(1, 7 * 24 * 3600),
    "heartbeat_seconds": Range(1, 7 * 24 * 3600),
    "memory": Range(0.001, 1 << 20),  # GiB
    "seconds": Range(0, YEAR),
    "video_seconds": Range(1, 24 * 3600, whole=True),
    "minutes": Range(0, YEAR / 60),
}


def range_of(name: str) -> Range | None:
    """The range of a flag or of a config's field, by its dotted name; None: it has none."""
    return RANGES.get(name) or RANGES.get(name.rpartition(".")[2])


def check(name: str, value: Any, shown: str | None = None) -> None:
    """Checks one number of the table, or each of a list of them.

    Args:
      name: of the flag or field, with its group if it has one.
      value: a number, or a tuple or list of numbers.
      shown: the name in the message; None: `name`.

    Raises:
      InputError: it is not in its range.
    """
    allowed = RANGES.get(name) or RANGES[name.rpartition(".")[2]]
    for number in value if isinstance(value, tuple | list) else (value,):
        if number not in allowed:
            raise InputError(f"{shown or name} must be {allowed}, not {_short(number)}")


def check_given(**values: Any) -> None:
    """Checks the arguments that are not None, by their names.

    Raises:
      InputError: one is not in its range.
    """
    for name, value in values.items():
        if value is not None:
            check(name, value)


def check_fields(fields: Mapping[str, Any], prefix: str = "") -> None:
    """Checks the numbers of a config.

    Args:
      fields: values by dotted name. What is no number is passed over; of numbers that the table
        does not have, those that are not finite are refused.
      prefix: of the names in messages, such as "--config.".

    Raises:
      InputError: one is not in its range.
    """
    for name, value in fields.items():
        numbers = value if isinstance(value, tuple | list) else (value,)
        for number in numbers:
            if not isinstance(number, Real) or isinstance(number, bool):
                continue
            if range_of(name) is not None:
                check(name, number, prefix + name)
            elif not math.isfinite(number):
                raise InputError(f"{prefix}{name} must be a finite number, not {number}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
