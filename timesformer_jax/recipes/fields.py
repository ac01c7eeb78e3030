"""Checks that a config has the fields of a recipe, with values of their kinds."""

from __future__ import annotations

import re
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from timesformer_jax import ranges
from timesformer_jax.errors import InputError
from timesformer_jax.recipes.recipes import recipe


def check_fields(config: ConfigDict) -> None:
    """Checks a config as a whole, before any of its values is used.

    Args:
      config: of a person, who may have left out anything.

    Raises:
      InputError: a field of `recipe` is missing, or its value is of another kind or out of range;
        the name is one of another folder.
    """
    known, given = (
        traverse_util.flatten_dict(fields.to_dict(), sep=".") for fields in (recipe(), config)
    )
    for name, example in known.items():
        if name.startswith("defaults."):  # values of other fields; whoever sets one removes it
            continue
        if name not in given:
            group = next((g for g in _groups(name) if not any(_inside(f, g) for f in given)), name)
            raise InputError(
                f"the config has no field {group}; start from a recipe of timesformer_jax.recipes"
            )
        if _kind(given[name]) != _kind(example):
            raise InputError(f"config.{name} must be like {example!r}, not {given[name]!r:.60}")
    # The arguments of a config follow its name after a colon.
    if not re.fullmatch(r"[\w-][\w.-]{0,99}(:[\w.,=-]{0,300})?", given["name"]):
        raise InputError(
            f"config.name {given['name']!r:.60} must be letters and digits, with _ . - in between"
        )
    ranges.check_fields(given, "--config.")


def _groups(name: str) -> list[str]:
    """The groups of a field, from the outermost: optimizer of optimizer.name."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _inside(name: str, group: str) -> bool:
    return name.startswith(f"{group}.")


def _kind(value: Any) -> type:
    """The type of a value; all numbers are of one kind, and so are lists and tuples."""
    if isinstance(value, bool):
        return bool
    if isinstance(value, int | float):
        return float
    return tuple if isinstance(value, list | tuple) else type(value)
