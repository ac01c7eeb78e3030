"""The one kind of error that a person can cause and put right."""


class InputError(ValueError):
    """Something given to the program (a path, a flag, a file, a config) cannot be used.

    The message is one line that says what is wrong and what to do. The command line prints it
    without a traceback and exits with status 2; as a library it is an ordinary ValueError.
    """
