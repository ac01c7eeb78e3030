"""The known published data sets, and the function that reads the clips of any data set."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from timesformer_jax import ranges
from timesformer_jax.data.annotations import (
    custom,
    diving48,
    howto100m,
    kinetics,
    something_v2,
    ucf_hmdb,
)
from timesformer_jax.data.annotations.clips import (
    Clip,
    ParsedAnnotations,
    Row,
    assign_splits,
    label_names,
)
from timesformer_jax.data.annotations.files import AnnotationFiles, Location, annotation_files
from timesformer_jax.data.annotations.listing import Listing
from timesformer_jax.data.annotations.videos import VideoFolder, walk
from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.storage import as_text

# Arguments: the folder of videos, the annotations, and the label names or None.
Reader = Callable[[VideoFolder, AnnotationFiles, Sequence[str] | None], ParsedAnnotations]


class Dataset(NamedTuple):
    """A published data set.

    read: its reader. published_counts: clips of each split, as its publisher states.
    store_stride: default of `prepare.prepare`, suited to the clips that the paper trains with.
    segment_seconds: length of the segments that its videos are cut into; None: they are not cut.
    """

    read: Reader
    published_counts: Mapping[str, int]
    store_stride: int = 1
    segment_seconds: float | None = None


# On Kinetics and HowTo100M the paper's recipes sample every 4th to every 32nd frame. On the other
# data sets a clip spans the whole of a short video, and may need any frame.
_STRIDE = 4

DATASETS = {
    "kinetics400": Dataset(
        kinetics.read,
        # arXiv 1808.01340, table 1 (train); arXiv 1705.06950: 50 clips a class for validation.
        {"train": 246_245, "validation": 20_000},
        store_stride=_STRIDE,
    ),
    "kinetics600": Dataset(
        kinetics.read,
        # arXiv 1808.01340, table 1: train, and 50 clips a class for validation.
        {"train": 392_622, "validation": 30_000},
        store_stride=_STRIDE,
    ),
    "something_v2": Dataset(
        something_v2.read,
        # The data set's page: 220,847 videos in all.
        {"train": 168_913, "validation": 24_777, "test": 27_157},
    ),
    "diving48": Dataset(
        diving48.read,
        # The lists of version 2, in which labels were corrected.
        {"train": 15_027, "test": 1_970},
    ),
    "howto100m": Dataset(
        howto100m.read,
        # The TimeSformer paper, section 4.6, which rounds.
        {"train": 85_000, "test": 35_000},
        store_stride=_STRIDE,
        # The span of a clip of 8 frames with stride 32, at 30 frames per second.
        segment_seconds=8 * 32 / 30,
    ),
    "ucf101": Dataset(
        ucf_hmdb.read_ucf101,
        # The length of trainlist01.txt and testlist01.txt.
        {"train": 9_537, "test": 3_783},
    ),
    "hmdb51": Dataset(
        ucf_hmdb.read_hmdb51,
        # 70 videos for training and 30 for testing of each of 51 classes, in each split.
        {"train": 3_570, "test": 1_530},
    ),
}


def read(
    videos: Location,
    annotations: Location | Sequence[Location] | None = None,
    labels: Sequence[str] | None = None,
    validation_fraction: float = 0.1,
    dataset: str | None = None,
    follow: bool = False,
    multilabel: str | None = None,
) -> Listing:
    """Lists the clips of a data set. Clips whose file is missing are listed too.

    Args:
      videos: the folder that holds the video files, local or on gs://.
      annotations: for a published data set, the folder of its annotation files, or files in it. For
        custom data, a csv with a header and the columns path (relative to `videos`) and label, and
        optionally start, end (seconds) and split. None: one folder per class,
        `VIDEOS/label/x.mp4` or `VIDEOS/{train,validation,test}/label/x.mp4`, in which files
        without one of VIDEO_EXTENSIONS are ignored.
      labels: the allowed labels in class order. None: the publisher's, or the labels that occur,
        sorted; a label that occurs outside of train only is an error then.
      validation_fraction: share of the clips of each label without a split that is used for
        validation; the others are used for training.
      dataset: one of DATASETS; None: custom data.
      follow: accept paths that lead out of the folder `videos`, absolute, by ".." or by symbolic
        links.
      multilabel: for a csv, what separates several labels in its column; see `custom.read_csv`.

    Raises:
      InputError: a path that leads out of the folder, no clips, no labels, an invalid row, a label
        that is not allowed, a clip listed twice, a file's name that is not UTF-8.
    """
    ranges.check("validation_fraction", validation_fraction)
    known = published_dataset(dataset)
    folder = walk(videos, follow)
    files = None if annotations is None else annotation_files(annotations)
    if multilabel is not None and (known is not None or files is None):
        raise InputError("--multilabel is for a csv of annotations; give one, or leave it out")
    if files is None and folder.outside:
        link, target = next(iter(folder.outside.items()))
        raise _outside_error(f"{videos}/{link}", target, videos)
    parsed = _parse(dataset, known, folder, files, labels, multilabel)
    if not follow:
        _require_inside(parsed.rows, folder, videos)
    order = parsed.labels if labels is None else tuple(labels)
    clips = sorted(_valid_clips(parsed.rows, labels), key=lambda clip: clip.id)
    if not any(clip.names for clip in clips):
        raise InputError(f"no clip of {files.where if files else videos} has a label; give some")
    missing = tuple(clip.id for clip in clips if not folder.contains(clip.path))
    if files is not None and len(missing) == len(clips):
        raise _none_here_error(clips, files, videos)
    clips = assign_splits(clips, validation_fraction)
    if order is None:
        _require_trained_labels(clips)
    used = {clip.path for clip in clips}
    return Listing(
        clips=tuple(clips),
        labels=order or label_names(clips),
        missing=missing,
        unlisted=tuple(as_text(path) for path in folder.videos if path not in used),
        published_counts=_published_counts(parsed, known),
        notes=(*folder.notes, *parsed.notes),
    )


def _require_inside(rows: Sequence[Row], folder: VideoFolder, videos: Location) -> None:
    for where, clip in rows:
        if (target := folder.leads_to(clip.path)) is not None:
            raise _outside_error(f"{where}: {clip.path}", target, videos)


def _outside_error(what: str, target: str, videos: Location) -> InputError:
    return InputError(
        f"{what} leads out of {videos}, to {target}; add --follow (follow=True) if that is meant"
    )


def _none_here_error(clips: Sequence[Clip], files: AnnotationFiles, videos: Location) -> InputError:
    return InputError(
        f"none of the {len(clips)} clips of {files.where} is in {videos} (first:"
        f" {clips[0].path}); give the folder that holds them"
    )


def published_dataset(name: str | None) -> Dataset | None:
    """The data set of this name; None for None, which means custom data.

    Raises:
      InputError: there is no such data set.
    """
    if name is None:
        return None
    if name not in DATASETS:
        raise InputError(
            f"no data set '{name}', there are: {', '.join(DATASETS)}; leave the data set out for a"
            f" folder per class or a csv{did_you_mean(name.lower(), DATASETS, cutoff=0.3)}"
        )
    return DATASETS[name]


def _parse(
    dataset: str | None,
    known: Dataset | None,
    folder: VideoFolder,
    files: AnnotationFiles | None,
    labels: Sequence[str] | None,
    multilabel: str | None,
) -> ParsedAnnotations:
    if known is None:
        return custom.read_folders(folder) if files is None else custom.read_csv(files, multilabel)
    if files is None:
        raise InputError(f"{dataset} needs its annotations; give the folder of its files")
    parsed = known.read(folder, files, labels)
    if not parsed.rows:
        raise InputError(f"{files.where} lists no clip with a label; give the complete annotations")
    return parsed


def _published_counts(parsed: ParsedAnnotations, known: Dataset | None) -> Mapping[str, int]:
    if parsed.published_counts is not None:
        return parsed.published_counts
    return known.published_counts if known else {}


def _valid_clips(rows: Sequence[Row], labels: Sequence[str] | None) -> list[Clip]:
    allowed = None if labels is None else frozenset(labels)
    seen: dict[str, str] = {}
    for where, clip in rows:
        try:
            clip.path.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the name of the video {as_text(clip.path)} is not UTF-8; rename it"
            ) from error
        for name in clip.names:
            if len(name.splitlines()) != 1:
                raise InputError(f"{where}: the label {name!r} is not one line; rename it")
            if allowed is not None and name not in allowed:
                raise InputError(f"{where}: label '{name}' is not in the label file; add it there")
        if clip.id in seen:
            raise InputError(f"{where}: {clip.id} is listed twice (first: {seen[clip.id]})")
        seen[clip.id] = where
    return [clip for _, clip in rows]


def _require_trained_labels(clips: Sequence[Clip]) -> None:
    """Refuses a label that occurs outside of train only: it is probably misspelt."""
    trained = {name for clip in clips if clip.split == "train" for name in clip.names}
    for clip in clips:
        if trained and (unknown := [name for name in clip.names if name not in trained]):
            raise InputError(
                f"unknown label '{unknown[0]}': {clip.id} is for {clip.split}, and no clip of"
                " train has it; correct it, or name all labels in a label file"
            )
