"""What is believed of a checkpoint's description: types and ranges of all that is read from it.

Checkpoints come from other people. Whatever is not as expected is an `InputError` of one line that
names the field. Numbers have the ranges of `ranges.RANGES`, as those of a config do.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Mapping
from typing import Any

from timesformer_jax import ranges
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.config import TimeSformerConfig

MAX_DEPTH = 256  # the largest published vision transformers have 64 blocks or fewer
_MAX_LABEL = 1000  # characters
_MAX_TEXT = 1 << 20


def model_config(fields: Any) -> TimeSformerConfig:
    """The model's config in the metadata of a checkpoint.

    Raises:
      InputError: if a field has another type, or is out of its range.
      TypeError: if a field is unknown, as in the files of another version.
    """
    fields = json_object(fields, "model")
    for field in dataclasses.fields(TimeSformerConfig):
        if field.name in fields:
            _same_type(f"model.{field.name}", fields[field.name], field.default)
    config = TimeSformerConfig(**fields)
    check_depth(config.depth)
    return config


def check_depth(depth: int) -> None:
    """Raises an InputError if a checkpoint says that it has more blocks than anybody's."""
    if depth > MAX_DEPTH:
        raise InputError(f"it has {depth} blocks; more than {MAX_DEPTH} are not read")


def clip_spec(fields: Any) -> ClipSpec:
    """The clips in the metadata of a checkpoint; raises as `model_config`."""
    fields = dict(json_object(fields, "clip"))
    for field in dataclasses.fields(ClipSpec):
        if field.name in ("mean", "std") and field.name in fields:
            fields[field.name] = three_numbers(fields[field.name], f"clip.{field.name}")
        elif field.name in fields:
            _same_type(f"clip.{field.name}", fields[field.name], field.default)
    return ClipSpec(**fields)


def three_numbers(value: Any, name: str) -> tuple[float, float, float]:
    """A number for each channel; a single number stands for all three."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = [value] * 3
    if not isinstance(value, list | tuple) or len(value) != 3:
        raise InputError(f"{name} must be three numbers, not {shown(value)}")
    ranges.check("clip.std" if name.endswith("std") else "clip.mean", value, name)
    r, g, b = map(float, value)
    return r, g, b


def label_names(value: Any, name: str = "labels") -> tuple[str, ...]:
    """Class names: text without control characters, which would change a terminal."""
    if not isinstance(value, list | tuple):
        raise InputError(f"{name} must be a list of class names, not {shown(value)}")
    ranges.check("model.num_classes", len(value), f"the number of {name}")
    for label in value:
        if not isinstance(label, str) or len(label) > _MAX_LABEL:
            raise InputError(f"a class name in {name} must be a short text, not {shown(label)}")
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in label):
            raise InputError(f"a class name in {name} has control characters: {shown(label)}")
    return tuple(value)


def labels_by_index(value: Any, name: str) -> tuple[str, ...]:
    """Class names from {"0": name, "1": name, ...}, `id2label` in a config.json; () from null."""
    if value is None:
        return ()
    value = json_object(value, name)
    names = [value.get(str(i)) for i in range(len(value))]
    if None in names:
        raise InputError(
            f"{name} must have the keys 0 to {len(value) - 1}; it lacks {names.index(None)}"
        )
    return label_names(names, name)


def training_config(value: Any) -> dict[str, Any]:
    """The config of our own training run, {} for weights of others.

    Only what is used after training is checked: `data.directory`, `data.eval_split`, `data.fps` and
    `eval.batch_size`.
    """
    value = json_object(value, "config")
    for group, field, example in (
        ("data", "directory", ""), ("data", "eval_split", ""), ("data", "fps", 0.0),
        ("eval", "batch_size", 0),
    ):  # fmt: skip
        fields = json_object(value.get(group, {}), f"config.{group}")
        if field in fields:
            _same_type(f"config.{group}.{field}", fields[field], example)
            if not isinstance(example, str):
                ranges.check(f"{group}.{field}", fields[field], f"config.{group}.{field}")
    return value


def text(value: Any, name: str) -> str:
    """A text of reasonable length, without control characters but line ends and tabs."""
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise InputError(f"{name} must be a text, not {shown(value)}")
    return "".join(c for c in value if c in "\n\t" or unicodedata.category(c) != "Cc")


def whole_number(value: Any, name: str) -> int:
    """A whole number in the range of the first word of `name`."""
    if isinstance(value, list | tuple):
        raise InputError(f"{name} must be a whole number, not {shown(value)}")
    ranges.check(name.partition(" ")[0], value, name)
    return int(value)


def boolean(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, not {shown(value)}")
    return value


def json_object(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be a JSON object, not {shown(value)}")
    return dict(value)


def _same_type(name: str, value: Any, example: Any) -> None:
    """Raises an InputError unless a value has the type of the example."""
    types: Any = type(example)
    if isinstance(example, float):
        types = (int, float)
    if not isinstance(value, types) or isinstance(value, bool) != isinstance(example, bool):
        kind = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
        raise InputError(f"{name} must be {kind[type(example)]}, not {shown(value)}")


def printable(message: str) -> str:
    """A message that quotes a checkpoint: one line, not too long, without control characters."""
    message = message if len(message) <= 500 else f"{message[:300]} ... {message[-100:]}"
    return message if message.isprintable() else ascii(message)[1:-1]


def shown(value: Any) -> str:
    """A value for a message: its representation, if it is short."""
    if isinstance(value, str | int | float | bool) or value is None:
        try:
            text = repr(value)
        except ValueError:  # an integer of thousands of digits
            return "a huge number"
        return ascii(text)[1:-1] if len(text) <= 40 else f"{ascii(text)[1:41]}..."
    return f"a {type(value).__name__}"
