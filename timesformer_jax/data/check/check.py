"""Checks data before training: prepared directories, or videos before they are prepared.

Every problem is printed as one line, errors and warnings (`data.problems`); no file is changed.
"""

import os
from collections.abc import Sequence

from timesformer_jax import ranges
from timesformer_jax.data.check.sources import holds_videos, require_prepared
from timesformer_jax.data.check.videos import check_videos
from timesformer_jax.data.problems import Problem
from timesformer_jax.data.records.quiet_import import import_prepared
from timesformer_jax.errors import InputError

# Problems printed of each source; their total number is always printed.
MAX_LINES = 200


def check(
    directories: Sequence[str | os.PathLike] = (),
    videos: str | os.PathLike | None = None,
    annotations: str | os.PathLike | None = None,
    dataset: str | None = None,
    labels: str | os.PathLike | None = None,
    multilabel: str | None = None,
    decode_fraction: float = 0.05,
    workers: int = 0,
    output: str | os.PathLike | None = None,
    follow: bool = False,
    validation_fraction: float = 0.1,
) -> None:
    """Prints the content of prepared directories or the properties of videos, and all problems.

    In a prepared directory every record is read, its checksums are verified, and it is compared
    with the index; the counts are compared with TFDS's description and with the manifest of each
    shard. Of videos the packets of every clip are read. All paths may be on gs://.

    Args:
      directories: prepared ones, or one folder of videos as `videos`.
      videos: the folder that holds the video files.
      annotations, dataset, labels, follow, multilabel, validation_fraction: of the videos; see
        `prepare.prepare`.
      decode_fraction: fraction of the clips whose frames are decoded. Which ones follows from
        their ids.
      workers: threads, or for videos processes; 0: one for each processor.
      output: a csv for the videos that cannot be used, with the columns of failures.csv.

    Raises:
      InputError: the arguments cannot be used, or, after everything is printed, there are errors.
    """
    ranges.check_given(decode_fraction=decode_fraction, workers=workers)
    if not videos and len(given := list(directories)) == 1 and holds_videos(given[0]):
        directories, videos = (), given[0]
    if bool(directories) == bool(videos):
        raise InputError("give prepared directories to check, or the folder of --videos")
    if not videos and (annotations or dataset or labels or output):
        raise InputError("annotations, dataset, labels and output go with --videos only")
    if videos:
        result = check_videos(
            videos, annotations, dataset, labels, decode_fraction, workers, output, follow,
            multilabel, validation_fraction,
        )  # fmt: skip
        counts = [_print(videos, *result)]
    else:
        for path in directories:
            require_prepared(path)
        import_prepared()  # TensorFlow, which the check of videos does not need
        from timesformer_jax.data.check.prepared import check_prepared

        counts = [
            _print(path, *check_prepared(path, decode_fraction, workers)) for path in directories
        ]
    if any(counts):
        raise InputError(", ".join(filter(None, counts)))


def _print(source: str | os.PathLike, summary: str, problems: Sequence[Problem]) -> str:
    """Prints the result of a check; returns the number of errors as text, empty for none."""
    errors = [problem for problem in problems if problem.is_error]
    ordered = [*errors, *(problem for problem in problems if not problem.is_error)]
    print(summary)
    print("\n".join(map(str, ordered[:MAX_LINES])) or "no problems")
    if len(problems) > MAX_LINES:
        print(f"... and {len(problems) - MAX_LINES} more")
    if not errors:
        return ""
    return f"{len(errors)} error{'s' * (len(errors) > 1)} in {source}"
