"""What runs in a decoding process: it decodes what its parent asks for (`isolated.py`).

A watchdog runs while it decodes, and not while it waits for the parent, which may be slow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from timesformer_jax.data.decode.clip import decode_clip
from timesformer_jax.data.decode.container import VideoError
from timesformer_jax.data.decode.stream import ClipStream
from timesformer_jax.data.decode.video import VideoFile
from timesformer_jax.errors import InputError
from timesformer_jax.workers import watch

# What a child tells of, and its parent raises.
ERRORS: dict[str, type[Exception]] = {
    "VideoError": VideoError,
    "InputError": InputError,
    "ValueError": ValueError,
}


def main() -> None:
    with contextlib.suppress(EOFError, OSError):
        _Server(Connection(int(sys.argv[1])), float(sys.argv[2])).serve()


class _Server:
    def __init__(self, connection: Connection, stall_seconds: float):
        self._connection, self._stall_seconds = connection, stall_seconds

    def serve(self) -> None:
        """Answers requests, [kind, arguments...], until the parent is gone."""
        answers: dict[str, Callable[..., None]] = {
            "clip": self._clip, "stream": self._stream, "info": self._info,
        }  # fmt: skip
        while True:
            kind, *arguments = json.loads(self._connection.recv_bytes())
            watch(self._stall_seconds)
            try:
                answers[kind](*arguments)
            except tuple(ERRORS.values()) as error:
                name = next(name for name, kind in ERRORS.items() if isinstance(error, kind))
                self._send({name: str(error)})
            finally:
                watch(0)

    def _clip(self, path: str, start: float, end: float, options: dict[str, Any]) -> None:
        def sample(count: int, fps: float) -> np.ndarray:
            self._send({"count": count, "fps": fps})
            return self._ticks()

        clip = decode_clip(path, start, end, sample=sample, **options)
        about = {"shape": clip.frames.shape, "rate": clip.fps, "ticks": clip.num_frames}
        self._send(about, clip.frames, clip.times)

    def _stream(self, path: str, start: float, end: float, options: dict[str, Any]) -> None:
        with ClipStream(path, lambda timeline: (), start, end, **options) as stream:
            timeline = stream.timeline
            self._send({"rate": timeline.fps}, timeline.times, timeline.frame_indices)
            for frame in stream.shown_at(self._all_ticks()):
                about = {"shape": frame.rgb.shape, "damaged": bool(frame.damaged)}
                self._send(about, frame.rgb)
            self._send({"gaps": stream.gaps})

    def _info(self, path: str) -> None:
        with VideoFile(path) as video:
            self._send(dataclasses.asdict(video.info))

    def _all_ticks(self) -> Iterator[int]:
        while len(ticks := self._ticks()):
            yield from ticks.tolist()

    def _ticks(self) -> np.ndarray:
        watch(0)
        ticks = np.frombuffer(self._connection.recv_bytes(), np.int64)
        watch(self._stall_seconds)
        return ticks

    def _send(self, about: dict, *arrays: np.ndarray) -> None:
        watch(0)
        self._connection.send_bytes(json.dumps(about).encode())
        for array in arrays:
            self._connection.send_bytes(np.ascontiguousarray(array).data.cast("B"))
        watch(self._stall_seconds)
