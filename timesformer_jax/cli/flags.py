"""The flags of a command: how they are defined, and how a command line is parsed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from absl import flags
from absl.flags import FlagValues

from timesformer_jax.errors import InputError
from timesformer_jax.ranges import RANGES, Range

# Defines one flag in a set of flags. Each command has its own set: names repeat across commands.
Define = Callable[[FlagValues], Any]


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
      summary: what it does, for the help text.
      function: "module:name" of the function that does it. The flags are its keyword arguments.
      flags: its flags.
      required: the names of the flags that must be given.
      positional: the names of its positional arguments. If the only name ends in "...", the
        argument is a list of any length.
      sweeps: whether fields of --config may have several values; the function then gets `configs`,
        one for each combination, by name.
      meant: the flags that words without a flag are likely meant for, in order.
    """

    summary: str
    function: str
    flags: Sequence[Define]
    required: Sequence[str] = ()
    positional: Sequence[str] = ()
    sweeps: bool = False
    meant: Sequence[str] = ()

    def define_flags(self) -> FlagValues:
        """Returns the command's flags, each with its default value."""
        values = FlagValues()
        for define in self.flags:
            define(values)
        return values


def string(name: str, default: str | None, text: str) -> Define:
    return _define(flags.DEFINE_string, name, default, text)


def integer(name: str, default: int | None, text: str) -> Define:
    """A whole number, in the range that `ranges.RANGES` gives for the name."""
    return _number(name, default, text, int, RANGES[name])


def integer_or(word: str, name: str, default: int, text: str) -> Define:
    """A whole number as for `integer`, or a word in place of it."""
    parser = _NumberParser(int, RANGES[name], word)
    return lambda values: flags.DEFINE(
        parser, name, default, text, flag_values=values, serializer=flags.ArgumentSerializer()
    )


def number(name: str, default: float | None, text: str) -> Define:
    """A number in the range that `ranges.RANGES` gives for the name."""
    return _number(name, default, text, float, RANGES[name])


def _number(
    name: str, default: float | None, text: str, kind: Callable[[Any], float], allowed: Range
) -> Define:
    parser = _NumberParser(kind, allowed)
    serializer: flags.ArgumentSerializer = flags.ArgumentSerializer()
    return lambda values: flags.DEFINE(
        parser, name, default, text, flag_values=values, serializer=serializer
    )


class _NumberParser(flags.ArgumentParser):
    """Parses a number and holds it to its range; absl's own bounds let NaN pass."""

    def __init__(self, kind: Callable[[Any], float], allowed: Range, word: str | None = None):
        self._kind, self._allowed, self._word = kind, allowed, word
        self.syntactic_help = str(allowed) if word is None else f"{allowed}, or {word}"

    def parse(self, argument: str | float) -> Any:
        if argument == self._word:
            return argument
        try:
            value = self._kind(argument)
        except ValueError:
            value = math.nan
        if value not in self._allowed:
            raise ValueError(f"it must be {self.syntactic_help}")
        return value

    def flag_type(self) -> str:
        return "number"


def boolean(name: str, text: str) -> Define:
    return _define(flags.DEFINE_bool, name, False, text)


def strings(name: str, text: str) -> Define:
    """A list, with commas between its items."""
    return _define(flags.DEFINE_list, name, None, text)


def _define(kind: Callable, name: str, default: Any, text: str) -> Define:
    return lambda values: kind(name, default, text, flag_values=values)


def parse(name: str, command: Command, values: FlagValues, words: Sequence[str]) -> dict[str, Any]:
    """Parses the words of a command line that follow the command's name.

    Args:
      name: of the command, for messages.
      command: the command.
      values: its flags, which get the values.
      words: flags and positional arguments, in any order.

    Returns:
      The keyword arguments of the command's function.

    Raises:
      InputError: if a flag or an argument is unknown, invalid or missing.
    """
    if command.sweeps:
        return _parse_sweep(name, command, words)
    try:
        # The fields of a config become flags only when the config is loaded.
        rest = values([name, *words], known_only=True)
        if "config" in values and values["config"].value is not None:
            from timesformer_jax.cli import config_flag  # needs ml_collections

            rest = config_flag.parse("config", values["config"].value, rest, values)
        else:
            rest = values(rest)
    except (flags.Error, InputError) as e:
        raise InputError(f"timesformer {name}: {' '.join(str(e).split())}") from e
    hint = _hint(command, values, rest[1:])
    if rest[1:] and not command.positional:
        raise InputError(f"timesformer {name} takes flags only, not {rest[1]!r:.200}{hint}")
    for flag in command.required:
        if values[flag].value is None:
            raise InputError(f"timesformer {name} needs --{flag} ({values[flag].help}){hint}")
    # The fields of a config, such as config.batch_size, are no arguments.
    arguments = {
        flag: values[flag].value
        for flag in values
        if "." not in flag and values[flag].value is not None
    }
    return arguments | _positional(name, command, rest[1:])


def _parse_sweep(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of a command with one config for each combination of the fields' values."""
    single = command._replace(sweeps=False)
    values = single.define_flags()
    try:
        values([name, *words], known_only=True)
        combinations = {"": list(words)}  # without --config, whose lack is then reported
        if values["config"].value is not None:
            from timesformer_jax.cli import config_flag  # needs ml_collections

            combinations = config_flag.combinations("config", values["config"].value, words)
    except (flags.Error, InputError) as e:
        raise InputError(f"timesformer {name}: {' '.join(str(e).split())}") from e
    arguments: dict[str, Any] = {}
    configs = {}
    for label, line in combinations.items():
        arguments = parse(name, single, single.define_flags(), line)
        configs[label] = arguments.pop("config")
    return arguments | {"configs": configs}


def _hint(command: Command, values: FlagValues, words: Sequence[str]) -> str:
    """Which flags words without a flag are meant for, to append to a message; "" if unknown."""
    missing = [flag for flag in command.meant if values[flag].value is None]
    if command.positional:  # whose words have their own meaning, unless one is a checkpoint
        words = [word for word in words if _is_checkpoint(word)][:1]
    known = {flag for flag in values if values[flag].value is not None}
    given = []
    for word in words:
        if (name := word.partition("=")[0]) in values or name.startswith("config."):
            given.append(f"--{word}" if name not in known else "")
        elif missing:
            given.append(f"--{missing.pop(0)}={word}")
    given = list(filter(None, given))
    return f"; did you mean {' '.join(given)}?" if given else ""


def _is_checkpoint(path: str) -> bool:
    """Whether a path is one of a checkpoint rather than of a video."""
    inside = ("checkpoints", "config.json", "metadata")
    return path.endswith((".pyth", ".pth", ".safetensors", ".bin", ".npz")) or any(
        os.path.exists(os.path.join(path, name)) for name in inside
    )


def _positional(name: str, command: Command, words: Sequence[str]) -> dict[str, Any]:
    names = command.positional
    if names and names[0].endswith("..."):
        return {names[0].removesuffix("..."): list(words)}
    if len(words) != len(names):
        takes = " ".join(names).upper() or "flags only"
        raise InputError(f"timesformer {name} takes {takes}, not {' '.join(words) or 'nothing'!r}")
    return dict(zip(names, words))
