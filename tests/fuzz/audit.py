"""Notes the files that Python opens in this process, and its connections."""

import contextlib
import os
import sys
import threading

_watched: list["Opens"] = []
_lock = threading.Lock()


class Opens:
    """Paths that were opened outside of the allowed folders, and hosts that were connected to."""

    def __init__(self, allowed):
        self.allowed = tuple(os.path.realpath(os.fspath(path)) + os.sep for path in allowed)
        self._found: list[str] = []

    def pop_all(self) -> list[str]:
        with _lock:
            found, self._found = self._found, []
        return found

    def note(self, event: str, arguments: tuple) -> None:
        if event == "socket.connect":
            self._found.append(f"{event} {arguments[1:]}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((*self.allowed, "/proc/", "/sys/", "/dev/null", "/dev/urandom")):
                self._found.append(f"{event} {path}")


def _hook(event: str, arguments: tuple) -> None:
    if event in ("open", "socket.connect"):
        for each in _watched:
            with contextlib.suppress(ValueError):
                each.note(event, arguments)


@contextlib.contextmanager
def opens(allowed):
    """Watches while it is entered. Python cannot take an audit hook away again."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    watch = Opens(allowed)
    _watched.append(watch)
    try:
        yield watch
    finally:
        _watched.remove(watch)


_installed: list[bool] = []
