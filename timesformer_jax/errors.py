"""The one kind of error that a person can cause and put right."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something given to the program (a path, a flag, a file, a config) cannot be used.

    The message is one line that says what is wrong and what to do. The command line prints it
    without a traceback and exits with status 2; as a library it is an ordinary ValueError.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?" of the known name nearest to a misspelt one, or "" if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
