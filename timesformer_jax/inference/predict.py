"""`timesformer predict`: the most probable classes of video files."""

from __future__ import annotations

import contextlib
import functools
import sys
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from timesformer_jax.data.annotations import read_labels
from timesformer_jax.data.decode import VideoError
from timesformer_jax.data.input.sampling import Views
from timesformer_jax.errors import InputError, PartlyDone
from timesformer_jax.inference.appended import AppendedFile
from timesformer_jax.inference.predictions import Settings, Writer, choose_format
from timesformer_jax.inference.predictor import Predictor
from timesformer_jax.inference.sources import Source, find


def predict(
    videos: Sequence[str],
    checkpoint: str,
    views: Views = 1,
    crops: int = 3,
    start: float | None = None,
    end: float | None = None,
    top: int = 5,
    threshold: float | None = None,
    attention_kernels: str = "auto",
    labels: str | None = None,
    json: bool = False,
    csv: bool = False,
    output: str | None = None,
    batch_size: int | None = None,
    workers: int = 0,
    follow: bool = False,
) -> None:
    """Prints the most probable classes of each video, or of its part [start, end) seconds.

    Each result is written as soon as it is known. With an `output` of an earlier run, the videos
    that it has are passed over.

    Args:
      videos, follow: files, folders and globs, as for `sources.find`.
      checkpoint, views, crops, attention_kernels, batch_size: as for `Predictor`.
      start, end: seconds.
      top: classes of a video.
      threshold: only classes with at least this probability, for a multi-label checkpoint.
      labels: a file of class names, one a line, in place of the checkpoint's.
      json, csv: one JSON object, or one row, a video, instead of text.
      output: a file to write to, instead of the standard output.
      workers: threads that decode; 0: one per core.

    Raises:
      InputError: if there is no video, or something cannot be used.
      PartlyDone: after all videos, if some could not be read; each was named before.
    """
    if not videos:
        raise InputError("no video given: timesformer predict VIDEO... --checkpoint=DIR")
    form = choose_format(json, csv, output)
    sources = find(videos, start, end, follow)
    names = None if labels is None else read_labels(labels)
    predictor = Predictor(
        checkpoint, views, crops, attention_kernels, labels=names, batch_size=batch_size
    )
    classes = zlib.crc32("\n".join(predictor.labels).encode())
    settings = Settings(
        checkpoint, predictor.fingerprint, views, crops, start, end, threshold, classes
    )
    writer = Writer(form, settings, min(top, len(predictor.labels)))
    with _opened(writer, output) as (write, done):

        def take(source: Source, probabilities: Any) -> None:
            best = predictor.top(probabilities.mean(axis=0), top)
            shown = [p for p in best if threshold is None or p.probability >= threshold]
            write(writer.line(source.id, shown))

        left = remaining(sources, done, output)
        compute_all(predictor, predictor.classify, left, take, workers, quiet=_is_watched(output))


def remaining(sources: Sequence[Source], done: Container[str], output: str | None) -> list[Source]:
    """The videos that an output lacks; says how many it has."""
    left = [source for source in sources if source.id not in done]
    if len(left) < len(sources):
        say(f"{output} has {len(sources) - len(left)} of {len(sources)} videos already")
    return left


def compute_all(
    predictor: Predictor,
    compute: Callable[[list], Any],
    sources: Sequence[Source],
    take: Callable[[Source, Any], None],
    workers: int,
    quiet: bool = False,
) -> None:
    """Computes something of every video, and names those that cannot be read.

    Args:
      compute: as for `Predictor.stream`.
      sources: the videos.
      take: called with each video that could be read and what was computed, in order.
      workers: threads that decode; 0: one per core.
      quiet: no progress.

    Raises:
      PartlyDone: after all videos, if some could not be read.
    """
    reads = [
        functools.partial(
            predictor.read, s.path, s.start, s.end, frame_range=s.frame_range, threads=1
        )
        for s in sources
    ]
    failed = 0
    outputs = predictor.stream(compute, reads, workers or None)
    # None: no progress unless the standard error is a terminal.
    with tqdm(total=len(sources), unit="video", disable=quiet or None) as bar:
        for source, found in zip(sources, outputs, strict=True):
            if isinstance(found, VideoError):
                failed += 1
                say(f"{source.id}: {found}")
            else:
                take(source, found)
            bar.update()
    if failed:
        raise PartlyDone(
            f"{failed} of {len(sources)} videos could not be read; they are named above"
        )


@contextlib.contextmanager
def _opened(writer: Writer, output: str | None) -> Iterator[tuple[Callable[[str], None], set[str]]]:
    """A function that writes a line, and the videos that the output has already."""
    if output is None:
        if writer.header is not None:
            print(writer.header)
        yield functools.partial(print, flush=True), set()
        return
    with AppendedFile(output, writer.beginning) as file:
        done = writer.videos(output, file.lines)
        if writer.header is not None and not file.lines:
            file.append(writer.header)
        yield file.append, done


def _is_watched(output: str | None) -> bool:
    """Whether the results themselves appear on the terminal."""
    return output is None and sys.stdout.isatty()


def say(line: str) -> None:
    """Prints a line to the standard error, beside a progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        print(line, file=sys.stderr)
