"""Decodes in processes of their own: a video that crashes or hangs the decoder costs itself only.

A decoding process is a child without JAX (`child.py`). The sampling rule stays here: the child
tells how many ticks a clip has, is told which to decode, and sends their frames. Of a stream it is
told the ticks some at a time, and sends each frame once. Messages are JSON and the bytes of arrays,
so that nothing which comes from a child is code.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Pipe
from signal import Signals
from typing import Any, BinaryIO, Protocol

import numpy as np

from timesformer_jax.data.decode import clip as clip_lib
from timesformer_jax.data.decode.child import ERRORS
from timesformer_jax.data.decode.child import __name__ as SERVER
from timesformer_jax.data.decode.clip import DecodedClip
from timesformer_jax.data.decode.container import (
    VideoError,
    VideoInfo,
    video_errors,
    video_source,
)
from timesformer_jax.data.decode.stream import ClipStream, Gap, Shown, StreamedClip, assemble
from timesformer_jax.data.decode.timeline import Timeline
from timesformer_jax.data.decode.video import VideoFile
from timesformer_jax.storage import is_remote
from timesformer_jax.workers import HANG_SIGNAL, STALL_SECONDS

# Sampled ticks, or nothing if the sampling failed.
Sample = Callable[[int, float], np.ndarray]

# Ctrl-C reaches every process of the terminal or notebook; the parent ends its children itself.
IGNORE_SIGINT = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"

# Of a stream, the ticks that a child is told at a time.
TICKS = 32


class Stream(Protocol):
    """An open `ClipStream`, wherever it is decoded."""

    timeline: Timeline

    @property
    def gaps(self) -> tuple[Gap, ...]: ...

    def __iter__(self) -> Iterator[StreamedClip]: ...


def crash_reason(signal: str) -> str:
    """The reason of a clip on which the decoder crashed. signal: its name, SIGSEGV for example."""
    if signal == HANG_SIGNAL.name:
        return "the decoder hangs"
    return f"the decoder crashes: {signal}"


def open_stream(
    path: str | os.PathLike | BinaryIO,
    sample: Callable[[Timeline], Iterable[np.ndarray]],
    start: float | None = None,
    end: float | None = None,
    *,
    frame_range: tuple[int, int] | None = None,
    short_side: int | None = None,
    threads: int = 0,
) -> AbstractContextManager[Stream]:
    """A `ClipStream`; while decoding is isolated, it is decoded by a process of its own."""
    options: dict[str, Any] = {
        "short_side": short_side, "frame_range": frame_range, "threads": threads,
    }  # fmt: skip
    pool = _current()
    if pool is None:
        return ClipStream(path, sample, start, end, **options)
    return _stream(pool, path, [start, end, options], sample)


@contextlib.contextmanager
def _stream(pool: _Pool, video: Any, arguments: list, sample: Any) -> Iterator[Stream]:
    with _for_child(video) as path, pool.child() as child:
        stream = _ChildStream(child, [path, *arguments], sample)
        try:
            yield stream
        finally:
            if not stream.finished:  # the child is in the middle of it
                child.end()


def read_info(path: str | os.PathLike) -> VideoInfo:
    """The header of a video; while decoding is isolated, read by a process of its own.

    Raises:
      VideoError: as `VideoFile`.
    """
    pool = _current()
    if pool is None:
        with VideoFile(path) as video:
            return video.info
    with _for_child(path) as name, pool.child() as child:
        return VideoInfo(**child.ask("info", name))


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
    """`clip.decode_clip`; while decoding is isolated, in a process of its own."""
    pool = _current()
    options: dict[str, Any] = {
        "short_side": short_side, "frame_range": frame_range, "threads": threads,
    }  # fmt: skip
    if pool is None:
        return clip_lib.decode_clip(path, start, end, sample=sample, **options)
    with _for_child(path) as name, pool.child() as child:
        return child.decode([name, start, end, options], sample)


@contextlib.contextmanager
def isolated(stall_seconds: float = STALL_SECONDS) -> Iterator[None]:
    """While it is entered, the functions above decode in child processes, in all threads.

    A child is started when a thread needs one and none is free, and ends with this context.

    Args:
      stall_seconds: after which a decoder that gives nothing hangs, and is ended.
    """
    pool = _Pool(stall_seconds)
    _pools.append(pool)
    try:
        yield
    finally:
        _pools.remove(pool)
        pool.close()


def isolated_for(owner: object) -> None:
    """As `isolated`, for as long as an object lives, or this process."""
    context = isolated()
    context.__enter__()
    weakref.finalize(owner, context.__exit__, None, None, None)


@contextlib.contextmanager
def _for_child(video: str | os.PathLike | BinaryIO) -> Iterator[str]:
    """The path of a video as a child finds it, which stays in the folder that it started in.

    A child finds an open file among this process's; what is no plain file is copied to memory.
    """
    source = video_source(video)
    if isinstance(source, str):
        yield source if is_remote(source) else os.path.join(os.getcwd(), source)
        return
    raw = source.raw if isinstance(source, io.BufferedReader) else source
    with contextlib.ExitStack() as opened:
        # Of other classes, gzip's for example, the descriptor may give other bytes than `read`.
        if not isinstance(raw, io.FileIO):
            raw = opened.enter_context(open(os.memfd_create("video"), "w+b", buffering=0))
            with video_errors():
                source.seek(0)
                shutil.copyfileobj(source, raw)
        yield f"/proc/{os.getpid()}/fd/{raw.fileno()}"


def _current() -> _Pool | None:
    """The innermost pool; of a process that was forked off, not that of its parent."""
    return next((pool for pool in reversed(_pools) if pool.process == os.getpid()), None)


class _Pool:
    """Children that wait for a video."""

    def __init__(self, stall_seconds: float):
        self._stall_seconds = stall_seconds
        self._free: list[_Child] = []
        self._closed = False
        self.process = os.getpid()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def child(self) -> Iterator[_Child]:
        child = self._take_free() or _Child(self._stall_seconds)
        try:
            yield child
        except VideoError:
            self._put_back(child)
            raise
        except BaseException:  # it may have been interrupted in the middle of a message
            child.end()
            raise
        self._put_back(child)

    def _take_free(self) -> _Child | None:
        """A child that waits; None if all are busy. One that was killed meanwhile is dropped."""
        with self._lock:
            while self._free:
                child = self._free.pop()
                if child.is_running:
                    return child
                child.end()
        return None

    def _put_back(self, child: _Child) -> None:
        if child.ended:
            return
        with self._lock:
            if not self._closed:
                self._free.append(child)
                return
        child.end()

    def close(self) -> None:
        if self.process != os.getpid():
            return
        with self._lock:
            free, self._free, self._closed = self._free, [], True
        for child in free:
            child.end()


_pools: list[_Pool] = []


class _Child:
    """A decoding process, from the side of its parent."""

    def __init__(self, stall_seconds: float):
        self._connection, theirs = Pipe()
        with theirs:
            # -P: modules that lie in the current folder are not imported.
            code = f"{IGNORE_SIGINT}; from {SERVER} import main; main()"
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(stall_seconds)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": _search_path()},
            )
        self.ended = False

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def decode(self, request: list, sample: Sample | None) -> DecodedClip:
        found = self.ask("clip", *request)
        while "count" in found:  # the clip is open
            count, fps = found["count"], found["fps"]
            ticks = np.arange(count) if sample is None else sample(count, fps)
            self.send(ticks)
            found = self.answer()
        frames = self.receive(np.uint8).reshape(found["shape"])
        return DecodedClip(frames, found["rate"], found["ticks"], self.receive(np.float64))

    def ask(self, *request: Any) -> dict:
        """The answer to a request; see `child.serve`."""
        with self._errors():
            self._connection.send_bytes(json.dumps(request).encode())
        return self.answer()

    def send(self, ticks: Any) -> None:
        with self._errors():
            self._connection.send_bytes(np.asarray(ticks, np.int64).tobytes())

    def answer(self) -> dict:
        with self._errors():
            found = json.loads(self._connection.recv_bytes())
        for name, kind in ERRORS.items():
            if name in found:
                raise kind(found[name])
        return found

    def receive(self, dtype: Any) -> np.ndarray:
        """(n,), an array that follows an answer."""
        with self._errors():
            return np.frombuffer(self._connection.recv_bytes(), dtype)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise VideoError(self._how_it_ended()) from error

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


class _ChildStream:
    """A `ClipStream` in a child, from the side of its parent.

    Attributes:
      timeline: of the part.
      gaps: those of `ClipStream`, once all clips are there.
    """

    def __init__(self, child: _Child, arguments: list, sample: Any):
        self._child, self._sample = child, sample
        rate = child.ask("stream", *arguments)["rate"]
        times, indices = child.receive(np.float64), child.receive(np.int64)
        self.timeline = Timeline(times, indices, rate)
        self.gaps: tuple[Gap, ...] = ()
        self.finished = False

    def __iter__(self) -> Iterator[StreamedClip]:
        return assemble(self._sample(self.timeline), self._shown_at)

    def _shown_at(self, ticks: Iterator[int]) -> Iterator[Shown]:
        while some := list(itertools.islice(ticks, TICKS)):
            self._child.send(some)
            for tick in some:
                found = self._child.answer()
                rgb = self._child.receive(np.uint8).reshape(found["shape"])
                yield Shown(tick, rgb, found["damaged"])
        self._child.send([])
        self.gaps = tuple(Gap(*gap) for gap in self._child.answer()["gaps"])
        self.finished = True


def _search_path() -> str:
    """PYTHONPATH, with the folder of this package: it may be run without being installed."""
    here = os.fspath(pathlib.Path(__file__).parents[3])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
