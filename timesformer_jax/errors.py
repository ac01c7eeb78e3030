"""The errors that a person can put right, and suggestions for misspelt names."""

import difflib
import pathlib
import re
from collections.abc import Iterable


class InputError(ValueError):
    """An input of the program (a path, a flag, a file, a config) cannot be used.

    The message is one line that says what is wrong and what to do. The command line prints it
    without a traceback and exits with status 2. In a library it is an ordinary ValueError.
    """


class PartlyDone(Exception):
    """A command did its work, but not for all inputs; it has named those on the standard error.

    The command line prints the message, one line, and exits with status 1.
    """


class DeviceLost(RuntimeError):
    """A kernel ran for the first time, and the device has not answered since.

    The command line prints the message, one line, and exits with status 1.
    """


def first_line(error: Exception) -> str:
    """What an error says, in one line: without a file's name that Python adds, and without
    TensorFlow's name of the operation."""
    said = getattr(error, "strerror", None) or str(error)
    text = re.sub(r"^\{\{.*?\}\} | \[Op:.*", "", said, flags=re.DOTALL).strip()
    return text.splitlines()[0] if text else type(error).__name__


def install(extra: str) -> str:
    """The command that installs an extra of this package, to append to a message."""
    project = pathlib.Path(__file__).parents[1]
    if (project / "setup.py").is_file():
        return f"pip install '.[{extra}]' in {project}"
    return f"pip install 'timesformer_jax[{extra}]'"


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Suggests the known name that is most similar to a misspelt one.

    Args:
      cutoff: the least similarity, from 0 (any name) to 1 (equal names).

    Returns:
      "; did you mean 'x'?", to append to a message; "" if no name is similar enough.
    """
    similar = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {similar[0]!r}?" if similar else ""
