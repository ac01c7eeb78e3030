"""--config=FILE:ARGUMENTS and --config.FIELD=VALUE: loads a config and changes its fields.

ml_collections defines and parses the flags of the fields. Its DEFINE_config_file is not used: it
takes fields only after --config, reports an error in a config as a traceback of many lines or
without the line, and suggests a name only for a small misspelling in the right group.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from timesformer_jax.errors import InputError
from timesformer_jax.recipes import fit
from timesformer_jax.recipes.fields import check_fields
from timesformer_jax.recipes.files import load


def parse(name: str, source: str, words: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Loads a config and sets the fields that the command line gives.

    Args:
      name: of the flag: --NAME gives the config, --NAME.FIELD sets one of its fields.
      source: as for `load`.
      words: the command line; only its flags --NAME.FIELD are parsed.
      values: its flag NAME, which has the value `source`, gets the config.

    Returns:
      The words that are not flags.

    Raises:
      InputError: if the file cannot be used, or a field does not exist or is set to a wrong type.
      flags.Error: if a value cannot be parsed as the field's type.
    """
    config = load(source)
    try:
        check_fields(config)
    except InputError as e:
        raise InputError(f"{source}: {e}") from e
    before = _fields(config)
    changed = [m[1] for word in words if (m := re.match(rf"--?(?:no)?{name}\.([^=]*)", word))]
    for field in changed:
        if field not in before:
            raise InputError(f"no config field {field}{_hint(name, field, before)}")
        # ml_collections would concatenate the values.
        if isinstance(before[field], tuple) and changed.count(field) > 1:
            raise InputError(
                f"--{name}.{field} is given twice; give it once, with commas between its values"
            )
    delattr(values, name)
    config_flags.DEFINE_config_dict(name, config, flag_values=values, sys_argv=list(words))
    rest = values(words)
    check_fields(config)
    after = _fields(config)
    for field in changed:
        if not _same_type(before[field], after[field]):
            raise InputError(
                f"--{name}.{field} must be like {_joined(before[field])}, "
                f"not {_joined(after[field])}"
            )
    fit.decide(config, changed)  # what is set here does not yield, even if it is the default
    return rest


def combinations(name: str, source: str, words: Sequence[str]) -> dict[str, list[str]]:
    """The command lines of a sweep, one for each combination of the values of fields.

    Args:
      name: of the flag.
      source: of the config, as for `load`.
      words: the command line; --NAME.FIELD=A,B,... gives several values. Values that have commas
        themselves are in brackets: (256,320),(224,256).

    Returns:
      A command line with one value a field for each combination, by a name that says the values.

    Raises:
      InputError: if no field has several values, or two combinations are the same.
    """
    fields = _fields(load(source))
    choices: list[list[tuple[str, str]]] = []  # for each word: what it sets, and the word
    for word in words:
        field = re.fullmatch(rf"(--?{name}\.([^=]*))=(.*)", word)
        values = _split(field[3], isinstance(fields.get(field[2]), tuple)) if field else []
        if field is None or len(values) < 2:
            choices.append([("", word)])
            continue
        if len(values) > len(set(values)):
            raise InputError(f"{word} gives a value twice")
        last = field[2].rpartition(".")[2]
        choices.append([(f"{last}={value}", f"{field[1]}={value}") for value in values])
    found = {}
    for chosen in itertools.product(*choices):
        label = ",".join(said for said, _ in chosen if said).replace("/", "_")
        if label in found:
            raise InputError(f"two runs would have one folder, {label}; sweep their values apart")
        found[label] = [word for _, word in chosen]
    if len(found) == 1:
        raise InputError(
            f"give several values of a field, as in --{name}.optimizer.learning_rate=1e-3,3e-3,1e-2"
        )
    return found


def _split(text: str, is_tuple: bool) -> list[str]:
    """The values of a field: split at the commas outside brackets; 256,320 is one tuple."""
    values = re.findall(r"(?:\([^)]*\)|\[[^\]]*\]|[^,(\[])+", text)
    return [text] if is_tuple and not all(value[0] in "([" for value in values) else values


def _fields(config: ConfigDict) -> dict[str, Any]:
    """The fields that may be set and are not groups of fields, by their dotted names."""
    return {k: v for k, v in fit.flatten(config).items() if not k.startswith("defaults.")}


def _hint(name: str, field: str, fields: Iterable[str]) -> str:
    """Suggests the known field most similar to an unknown one, or else lists its group."""
    if inside := [f for f in fields if f.startswith(f"{field}.")]:
        return f": it is a group; change one of {', '.join(f'--{name}.{f}' for f in inside)}"
    similar = max(fields, key=lambda known: _similarity(field, known))
    if _similarity(field, similar)[0] >= 0.6:
        return f"; did you mean --{name}.{similar}?"
    group = field.rpartition(".")[0]
    siblings = [f for f in fields if f.rpartition(".")[0] == group] or list(fields)
    return f"; there are: {', '.join(siblings)}"


def _similarity(field: str, known: str) -> tuple[float, float]:
    """The similarity of the last parts of two dotted names, and of the whole names.

    The group is often wrong or missing, so the last part counts first. Initials, such as lr for
    learning_rate, are an exact match.
    """
    given, last = field.rpartition(".")[2], known.rpartition(".")[2]
    initials = "".join(word[:1] for word in last.split("_"))
    return 1.0 if given == initials else _ratio(given, last), _ratio(field, known)


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _same_type(before: Any, after: Any) -> bool:
    """Whether the items of a tuple keep their type. ml_collections checks all other fields."""
    if not isinstance(before, tuple) or not before:
        return True
    types = (int, float) if isinstance(before[0], float) else type(before[0])
    return isinstance(after, tuple) and all(isinstance(x, types) for x in after)


def _joined(value: tuple) -> str:
    return ",".join(map(str, value))
