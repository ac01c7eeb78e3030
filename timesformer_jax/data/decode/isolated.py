"""Decodes in processes of their own: a video that crashes or hangs the decoder costs itself only.

A decoding process is a child without JAX. The sampling rule stays here: the child tells how many
ticks a clip has, is told which to decode, and sends their frames. Messages are JSON and the bytes
of arrays, so that nothing which comes from a child is code.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from signal import Signals
from typing import Any, BinaryIO

import numpy as np

from timesformer_jax.data.decode import clip as clip_lib
from timesformer_jax.data.decode.clip import DecodedClip
from timesformer_jax.data.decode.container import VideoError
from timesformer_jax.errors import InputError
from timesformer_jax.workers import HANG_SIGNAL, STALL_SECONDS, watch

# Sampled ticks, or nothing if the sampling failed.
Sample = Callable[[int, float], np.ndarray]


def crash_reason(signal: str) -> str:
    """The reason of a clip on which the decoder crashed. signal: its name, SIGSEGV for example."""
    if signal == HANG_SIGNAL.name:
        return "the decoder hangs"
    return f"the decoder crashes: {signal}"


def decode_clip(
    path: str | os.PathLike | BinaryIO,
    start: float | None = None,
    end: float | None = None,
    *,
    short_side: int | None = None,
    sample: Sample | None = None,
    frame_range: tuple[int, int] | None = None,
    threads: int = 0,
) -> DecodedClip:
    """`video.decode_clip`; inside `isolated`, a path is decoded by a process of its own."""
    pool = _pool
    options: dict[str, Any] = {
        "short_side": short_side, "frame_range": frame_range, "threads": threads,
    }  # fmt: skip
    if pool is None or not isinstance(path, str | os.PathLike):
        return clip_lib.decode_clip(path, start, end, sample=sample, **options)
    with pool.child() as child:
        return child.decode([os.fspath(path), start, end, options], sample)


@contextlib.contextmanager
def isolated(stall_seconds: float = STALL_SECONDS) -> Iterator[None]:
    """While it is entered, `decode_clip` decodes in child processes, in all threads.

    A child is started when a thread needs one and none is free, and ends with this context.

    Args:
      stall_seconds: after which a decoder that gives nothing hangs, and is ended.
    """
    global _pool
    if _pool is not None:
        yield
        return
    _pool = pool = _Pool(stall_seconds)
    try:
        yield
    finally:
        _pool = None
        pool.close()


class _Pool:
    """Children that wait for a video."""

    def __init__(self, stall_seconds: float):
        self._stall_seconds = stall_seconds
        self._free: list[_Child] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def child(self) -> Iterator[_Child]:
        with self._lock:
            child = self._free.pop() if self._free else None
        child = child or _Child(self._stall_seconds)
        try:
            yield child
        except VideoError:
            if not child.ended:
                self._put_back(child)
            raise
        except BaseException:  # it may have been interrupted in the middle of a message
            child.end()
            raise
        self._put_back(child)

    def _put_back(self, child: _Child) -> None:
        with self._lock:
            self._free.append(child)

    def close(self) -> None:
        with self._lock:
            free, self._free = self._free, []
        for child in free:
            child.end()


_pool: _Pool | None = None


class _Child:
    """A decoding process, from the side of its parent."""

    def __init__(self, stall_seconds: float):
        self._connection, theirs = Pipe()
        with theirs:
            # -P: modules that lie in the current folder are not imported.
            command = [sys.executable, "-P", "-c", f"from {__name__} import main; main()"]
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(stall_seconds)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": _search_path()},
            )
        self.ended = False

    def decode(self, request: list, sample: Sample | None) -> DecodedClip:
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            found = self._answer()
            while "count" in found:  # the clip is open
                count, fps = found["count"], found["fps"]
                ticks = np.arange(count) if sample is None else sample(count, fps)
                self._connection.send_bytes(np.asarray(ticks, np.int64).tobytes())
                found = self._answer()
            frames = np.frombuffer(self._connection.recv_bytes(), np.uint8)
            times = np.frombuffer(self._connection.recv_bytes(), np.float64)
        except (EOFError, OSError) as error:
            raise VideoError(self._how_it_ended()) from error
        return DecodedClip(frames.reshape(found["shape"]), found["rate"], found["ticks"], times)

    def _answer(self) -> dict:
        found = json.loads(self._connection.recv_bytes())
        for name, kind in ERRORS.items():
            if name in found:
                raise kind(found[name])
        return found

    def _how_it_ended(self) -> str:
        self.ended = True
        self._connection.close()
        status = self._process.wait()
        if status < 0:
            return crash_reason(Signals(-status).name)
        return f"the decoder ends with status {status}"

    def end(self) -> None:
        self.ended = True
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _search_path() -> str:
    """PYTHONPATH, with the folder of this package: it may be run without being installed."""
    here = os.fspath(pathlib.Path(__file__).parents[3])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


# ---- in the child -------------------------------------------------------------------------------

# What a child tells of, and its parent raises.
ERRORS: dict[str, type[Exception]] = {
    "VideoError": VideoError,
    "InputError": InputError,
    "ValueError": ValueError,
}


def serve(connection: Connection, stall_seconds: float) -> None:
    """Decodes what the parent asks for, until it is gone."""
    while True:
        path, start, end, options = json.loads(connection.recv_bytes())

        def sample(count: int, fps: float) -> np.ndarray:
            watch(0)  # the parent's own work is not watched
            connection.send_bytes(json.dumps({"count": count, "fps": fps}).encode())
            ticks = np.frombuffer(connection.recv_bytes(), np.int64)
            watch(stall_seconds)
            return ticks

        try:
            watch(stall_seconds)
            clip = clip_lib.decode_clip(path, start, end, sample=sample, **options)
        except tuple(ERRORS.values()) as error:
            kind = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
            _send(connection, {kind: str(error)})
            continue
        finally:
            watch(0)
        about = {"shape": clip.frames.shape, "rate": clip.fps, "ticks": clip.num_frames}
        _send(connection, about, clip.frames, clip.times)


def _send(connection: Connection, about: dict, *arrays: np.ndarray) -> None:
    connection.send_bytes(json.dumps(about).encode())
    for array in arrays:
        connection.send_bytes(np.ascontiguousarray(array).data.cast("B"))


def main() -> None:
    with contextlib.suppress(EOFError, OSError, KeyboardInterrupt):
        serve(Connection(int(sys.argv[1])), float(sys.argv[2]))
