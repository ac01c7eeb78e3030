"""Checks data before they are trained on: prepared directories, or raw videos before that.

What is wrong is listed, a line each; nothing is changed.
"""

import os
from collections.abc import Sequence

from timesformer_jax.data.annotations import hash_of
from timesformer_jax.data.prepare.shards import import_records
from timesformer_jax.errors import InputError

# Problems shown of each source, the first; their number is always said.
MOST_LINES = 200


def check(
    directories: Sequence[str | os.PathLike] = (),
    videos: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    dataset: str | None = None,
    labels: str | os.PathLike | None = None,
    decode: float = 0.05,
    workers: int = 0,
    output: str | os.PathLike | None = None,
) -> None:
    """Prints what prepared directories hold, or raw videos are, and what is wrong with them.

    Of a prepared directory every record is read with its checksums and compared with the index,
    and the counts with TFDS's description and with what `prepare` noted of each shard. Of raw
    videos the packets of every clip are read. All paths may be on gs://.

    Args:
      directories: prepared ones; none if `videos` is given.
      videos: the folder that holds the video files.
      annotations, dataset, labels: of the videos, as `prepare.prepare` takes them.
      decode: share of the clips whose frames are decoded; which ones follows from their ids.
      workers: threads, or for videos processes; 0: as many as there are processors.
      output: a csv for the videos that cannot be used, of the columns of failures.csv.

    Raises:
      InputError: nothing to check, or what cannot be; and, after all is printed, that there are
        problems.
    """
    if not 0 <= decode <= 1:
        raise InputError(f"decode is {decode}; give the share of the clips, from 0 to 1")
    if workers < 0:
        raise InputError(f"workers is {workers}; give 1 or more, or 0 for all processors")
    if bool(directories) == bool(videos):
        raise InputError("give prepared directories to check, or the folder of --videos")
    if not videos and (annotations or dataset or labels or output):
        raise InputError("annotations, dataset, labels and output go with --videos only")
    if videos:
        from timesformer_jax.data.check.videos import check_videos

        found = check_videos(videos, annotations, dataset, labels, decode, workers, output)
        bad = [_print(videos, *found)]
    else:
        import_records()  # TensorFlow, which raw videos are checked without
        from timesformer_jax.data.check.prepared import check_prepared

        bad = [_print(path, *check_prepared(path, decode, workers)) for path in directories]
    if any(bad):
        raise InputError(", ".join(filter(None, bad)))


def _print(source: str | os.PathLike, summary: str, problems: Sequence[str]) -> str:
    """Prints what was found; returns how much of it is wrong, empty for nothing."""
    print(summary)
    print("\n".join(problems[:MOST_LINES]) or "no problems")
    if len(problems) > MOST_LINES:
        print(f"... and {len(problems) - MOST_LINES} more")
    if not problems:
        return ""
    return f"{len(problems)} problem{'s' * (len(problems) > 1)} in {source}"


def is_chosen(clip: str, share: float) -> bool:
    """Whether a clip, by its id, is of the share that is decoded: the same on every machine."""
    return int.from_bytes(hash_of(clip)[:8]) < share * 2**64


def table(rows: Sequence[Sequence[object]]) -> str:
    """Lines of columns, the first aligned left, the others right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    )
