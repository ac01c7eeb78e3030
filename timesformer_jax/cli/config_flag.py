"""The config that a command line names: the file, its arguments, and changes of its fields."""

from __future__ import annotations

import difflib
import glob
import inspect
import os
import re
import runpy
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from flax import traverse_util
from ml_collections import ConfigDict, config_flags

from timesformer_jax.errors import InputError, did_you_mean


def parse(name: str, source: str, words: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Loads a config and changes the fields that a command line changes.

    Args:
      name: of the flag: --NAME names the config, --NAME.FIELD changes a field of it.
      source: as for `load`.
      words: the command line, with all flags but the changes parsed.
      values: gets the config as its flag NAME, in place of the source.

    Returns:
      The words that are no flags.

    Raises:
      InputError: if the file cannot be used, or a field not be changed so.
      flags.Error: if a value is not of the field's kind.
    """
    config = load(source)
    before = _fields(config)
    changed = [m[1] for word in words if (m := re.match(rf"--?(?:no)?{name}\.([^=]*)", word))]
    for field in changed:
        if field not in before:
            raise InputError(f"no config field {field}{_hint(name, field, before)}")
        # ml_collections would append one to the other.
        if isinstance(before[field], tuple) and changed.count(field) > 1:
            raise InputError(
                f"--{name}.{field} is given twice; give it once, all its values with commas between"
            )
    delattr(values, name)
    config_flags.DEFINE_config_dict(name, config, flag_values=values, sys_argv=list(words))
    rest = values(words)
    after = _fields(config)
    for field in changed:
        if not _alike(before[field], after[field]):
            raise InputError(
                f"--{name}.{field} must be like {_written(before[field])}, "
                f"not {_written(after[field])}"
            )
    return rest


def load(source: str) -> ConfigDict:
    """The config of "FILE" or "FILE:ARGUMENTS": what `get_config` there returns.

    Raises:
      InputError: if there is no such file, or it fails; then it says where.
    """
    path, _, arguments = source.partition(":")
    if not os.path.isfile(path):
        there = glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "*.py"))
        there += glob.glob("configs/*.py")
        raise InputError(f"there is no config file {path}{did_you_mean(path, there)}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config is None:
            raise InputError("it defines no get_config; see configs/k400_base.py")
        if arguments and not inspect.signature(get_config).parameters:
            raise InputError(f"it takes no arguments; leave out :{arguments}")
        config = get_config(*([arguments] if arguments else []))
    except InputError as e:
        raise InputError(f"{path}: {e}") from e
    except Exception as e:  # the file may be anyone's, and do anything
        raise InputError(f"{path}{_line(e, path)}: {type(e).__name__}: {e}") from e
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config must return a ConfigDict, not {config!r}")
    return config


def _line(error: Exception, path: str) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _fields(config: ConfigDict) -> dict[str, Any]:
    """Every single field, by its dotted name."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def _hint(name: str, field: str, fields: Iterable[str]) -> str:
    """What was meant by a field that is not there: the nearest one, else those of its group."""
    if inside := [f for f in fields if f.startswith(f"{field}.")]:
        return f": it is a group; change one of {', '.join(f'--{name}.{f}' for f in inside)}"
    near = max(fields, key=lambda known: _likeness(field, known))
    if _likeness(field, near)[0] >= 0.6:
        return f"; did you mean --{name}.{near}?"
    group = field.rpartition(".")[0]
    siblings = [f for f in fields if f.rpartition(".")[0] == group] or list(fields)
    return f"; there are: {', '.join(siblings)}"


def _likeness(field: str, known: str) -> tuple[float, float]:
    """Of the last parts of two names, then of the whole names; initials are as good (lr, wd)."""
    ours, theirs = field.rpartition(".")[2], known.rpartition(".")[2]
    initials = "".join(word[:1] for word in theirs.split("_"))
    likeness = 1.0 if ours == initials else _ratio(ours, theirs)
    return likeness, _ratio(field, known)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _alike(before: Any, after: Any) -> bool:
    """Whether the items of a tuple are still of one kind; other fields' kinds the flags check."""
    if not isinstance(before, tuple) or not before:
        return True
    kinds = (int, float) if isinstance(before[0], float) else type(before[0])
    return isinstance(after, tuple) and all(isinstance(x, kinds) for x in after)


def _written(value: tuple) -> str:
    return ",".join(map(str, value))
