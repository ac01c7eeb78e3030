"""The help texts of the command line."""

from __future__ import annotations

from collections.abc import Mapping

from absl import flags

from timesformer_jax.cli.flags import Command


def overview(commands: Mapping[str, Command]) -> str:
    """The help text of `timesformer` alone: all commands, each with its summary."""
    width = max(map(len, commands))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(
        ["usage: timesformer <command> [--flag=value ...]", "", *lines, "",
         "timesformer <command> --help lists the flags of a command."]
    )  # fmt: skip


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
