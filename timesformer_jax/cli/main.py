"""`timesformer <command>`: runs one command. An error in the input is one line."""

from __future__ import annotations

import errno
import functools
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from timesformer_jax.cli import help as help_texts
from timesformer_jax.cli import log
from timesformer_jax.cli.commands import COMMANDS
from timesformer_jax.cli.flags import parse
from timesformer_jax.errors import DeviceLost, InputError, PartlyDone, did_you_mean, install
from timesformer_jax.tensorflow_messages import hide_tensorflow_messages

# Reasons why a path that a person gave cannot be opened. Others are not theirs to put right.
PATH_ERRORS = (
    *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOSPC, errno.ENOTDIR, errno.ENXIO, errno.EPERM, errno.EROFS),
)

# Characters of an error that are printed: words of a command line can be very long.
MAX_ERROR = 2000


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that `argv` names, by default the program's own arguments.

    Raises:
      SystemExit: with status 2 for an error in the input, 1 if the work was done except for some
        inputs, or a kernel made the device useless, 130 after Ctrl-C, and 141 if the reader of the
        output has closed it. After SIGTERM, training exits with 143.
    """
    argv = list(sys.argv if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    log.set_up(argv[0])
    try:
        run = load_command(argv[1:])
        if "jax" in sys.modules:  # otherwise the command computes nothing
            importlib.import_module("timesformer_jax.host_memory").keep_freed()
        run()
        sys.stdout.flush()
    except InputError as e:
        _fail(str(e))
    except (PartlyDone, DeviceLost) as e:
        _fail(str(e), status=1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # as in `timesformer predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:
        if e.errno not in PATH_ERRORS or e.filename is None:
            raise
        _fail(f"{e.filename}: {e.strerror}; give another path")


def _fail(message: str, status: int = 2) -> NoReturn:
    line = " ".join(message.split())
    if len(line) > MAX_ERROR:
        line = f"{line[: MAX_ERROR // 2]} ... {line[-MAX_ERROR // 2 :]}"
    print(f"error: {line}", file=sys.stderr)
    sys.exit(status)


def load_command(words: Sequence[str]) -> Callable[[], None]:
    """Imports the module of a command and parses its flags.

    Args:
      words: the command line, without the program's name.

    Returns:
      A function without arguments that runs the command, or prints help.

    Raises:
      InputError: if the command line has an error, or a package is not installed.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        return functools.partial(print, help_texts.overview(COMMANDS))
    if words[0] in ("-v", "--version", "version"):
        return functools.partial(print, help_texts.version())
    if any("\0" in word for word in words):
        raise InputError("the command line has a null byte in it, which no path or value can have")
    name, rest = _split_name(words)
    command = COMMANDS[name]
    values = command.define_flags()
    if {"-h", "--help", "-help"} & set(rest):
        return functools.partial(print, help_texts.of_command(name, command, values))
    try:
        arguments = parse(name, command, values, rest)
        module, function = command.function.split(":")
        with hide_tensorflow_messages():
            run = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as e:
        if e.name and e.name.startswith("timesformer_jax"):
            raise
        raise InputError(f"{name} needs the package {e.name}: {install('data')}") from e
    return functools.partial(run, **arguments)


def _split_name(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Splits a command line into the command's name, of one or two words, and the rest."""
    for count in (2, 1):
        if (name := " ".join(words[:count])) in COMMANDS:
            return name, words[count:]
    group = [name for name in COMMANDS if name.startswith(f"{words[0]} ")]
    given = " ".join(words[: 2 if group else 1])
    # The name of a group alone is not misspelt.
    hint = did_you_mean(given, group or COMMANDS) if len(words) > 1 or not group else ""
    hint = hint or f"; there are: {', '.join(group or COMMANDS)}"
    raise InputError(f"no command {given!r:.60}{hint}")
