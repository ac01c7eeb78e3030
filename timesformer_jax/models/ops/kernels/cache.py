"""What was measured of the attention kernels, kept in the user's cache directory.

One JSON file maps the hash of what a measurement depends on to an entry: `about`, that in full;
`tried`, the seconds of a run of each implementation, or the reason why it is passed over; `chosen`,
the fastest. An entry without `chosen` was left by a process that ended while it measured.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jaxlib
from absl import logging
from etils import epath

from timesformer_jax import storage
from timesformer_jax.models.ops.kernels.registry import Case

NAME = "attention_kernels.json"
ENTRIES = 1000  # the file keeps the newest
LOCK_SECONDS = 600.0  # how long to wait for another process that measures

Entry = dict[str, Any]


def directory() -> epath.Path:
    """`timesformer_jax` in $XDG_CACHE_HOME, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(cache) / "timesformer_jax"


def describe(case: Case, gradients: bool, device: jax.Device) -> dict[str, Any]:
    """Everything that the times depend on, as JSON values.

    Args:
      case: what is computed.
      gradients: whether its gradient is computed too.
      device: the device.
    """
    return {
        **case._asdict(),
        "shape": list(case.shape),
        "grid": list(case.grid),
        "gradients": gradients,
        "device": device.device_kind,
        "runtime": device.client.platform_version,
        **_versions(),
    }


@functools.cache
def _versions() -> dict[str, str | None]:
    """Of the libraries that the programs come from; of our sources, a hash."""
    ops = pathlib.Path(__file__).parents[1]
    sources = [*sorted(ops.rglob("*.py")), ops.with_name("attention.py")]
    content = b"".join(source.read_bytes() for source in sources)
    found: dict[str, str | None] = {"jax": jax.__version__, "jaxlib": jaxlib.__version__}
    for name in ("libtpu", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | {"sources": hashlib.sha256(content).hexdigest()}


def read(about: dict[str, Any]) -> Entry | None:
    """The entry that was measured under these conditions; None if there is none."""
    return _read_all().get(_key(about))


def keep(entry: Entry) -> None:
    """Adds or replaces the entry with the same `about`; logs a warning if it cannot be written."""
    entries = _read_all()
    entries.pop(_key(entry["about"]), None)
    newest = [*entries.items(), (_key(entry["about"]), entry)][-ENTRIES:]
    content = json.dumps(dict(newest), indent=1)
    try:
        directory().mkdir(parents=True, exist_ok=True)
        storage.write_atomically(directory() / NAME, content.encode())
    except OSError as e:
        logging.warning("what was measured of attention cannot be kept: %s", e)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Lets one process of the machine measure at a time. The lock ends with the process.

    Without the lock, because of a file system that has none or a process that does not end, the
    times may be disturbed, and two processes may measure the same.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            directory().mkdir(parents=True, exist_ok=True)
            descriptor = os.open(directory(), os.O_RDONLY)
            stack.callback(os.close, descriptor)
            _lock(descriptor)
        yield


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)
        else:
            return


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _read_all() -> dict[str, Entry]:
    """Every entry of the file; of a damaged file those that have the form of one."""
    try:
        found = json.loads((directory() / NAME).read_text())
    except (OSError, ValueError):  # there is none, or it is no JSON
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: entry for key, entry in entries if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("about"), dict)
        and isinstance(entry.get("tried"), dict)
        and all(isinstance(found, (int, float, str)) for found in entry["tried"].values())
        and isinstance(entry.get("chosen", ""), str)
    )
