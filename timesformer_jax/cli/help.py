"""The help texts of the command line."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping

from absl import flags

from timesformer_jax import __version__
from timesformer_jax.cli.flags import Command

# One line a step: VIDEOS is a folder with one folder of videos per class.
WAY = """
  timesformer check --videos=VIDEOS                    names the files that cannot be used
  timesformer prepare --videos=VIDEOS --output=DATA    writes the others as records for training
  timesformer train --config=finetune --config.data.directory=DATA --workdir=RUN
                                                       fine-tunes a pretrained model on them
  timesformer evaluate --checkpoint=RUN                its accuracy, class by class
  timesformer predict VIDEO --checkpoint=RUN           the most probable classes of a video
"""


def overview(commands: Mapping[str, Command]) -> str:
    """The help text of `timesformer` alone: the way to a model, then all commands."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(
        ["usage: timesformer <command> [--flag=value ...]", "",
         "From videos to a model:", "", WAY.strip("\n"), "",
         "All commands:", "", *lines, "",
         "timesformer <command> --help lists the flags of a command, timesformer --version the"
         " versions."]
    )  # fmt: skip


def version() -> str:
    """One line: the versions of this package and of what it computes with."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "av")]
    return f"timesformer {__version__} ({', '.join(versions)}, Python {platform.python_version()})"


def of_command(name: str, command: Command, values: flags.FlagValues) -> str:
    """The help text of one command: its arguments and flags, with their defaults."""
    arguments = "".join(f" {argument.upper()}" for argument in command.positional)
    lines = [f"usage: timesformer {name}{arguments} [--flag=value ...]: {command.summary}", ""]
    for flag in values:
        note = ""
        if flag in command.required:
            note = " (required)"
        elif (default := values[flag].default) is not None:
            note = f" (default: {default})"
        lines.append(f"  --{flag}: {values[flag].help}{note}")
    return "\n".join(lines)
