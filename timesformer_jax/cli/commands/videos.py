"""Commands that apply a checkpoint to video files."""

from __future__ import annotations

from timesformer_jax.cli.commands.shared import ATTENTION_KERNELS, CHECKPOINT, VIEWS, VIEWS_OR_COVER
from timesformer_jax.cli.flags import Command, boolean, integer, number, string, strings

PART = (
    number("start", None, "start of the part of a video to look at, in seconds"),
    number("end", None, "end of this part, in seconds"),
)
MANY_VIDEOS = (
    integer("batch_size", None, "clips at a time; by default 8, or 1 on a CPU"),
    integer("workers", 0, "videos that are decoded at the same time; 0: one per core"),
    boolean("follow", "accept videos outside of a folder: paths with .., links"),
)

VIDEOS = {
    "predict": Command(
        "prints the most probable classes of video files",
        "timesformer_jax.inference.predict:predict",
        (
            CHECKPOINT,
            *VIEWS_OR_COVER,
            *PART,
            integer("top", 5, "number of classes to print"),
            number("threshold", None, "print only classes with at least this probability"),
            string("labels", None, "file of class names, one per line, for checkpoints without"),
            boolean("json", "print JSON Lines: one JSON object per video"),
            boolean("csv", "print CSV: one row per video"),
            string(
                "output",
                None,
                "file to write to, .jsonl or .csv; run again with the same file to go on after a"
                " run that was stopped",
            ),
            *MANY_VIDEOS,
            ATTENTION_KERNELS,
        ),
        required=("checkpoint",),
        meant=("checkpoint",),
        positional=("videos...",),
    ),
    "features": Command(
        "writes the feature vectors of video files to a table",
        "timesformer_jax.inference.features:features",
        (
            CHECKPOINT,
            string(
                "output",
                None,
                "table to write, .parquet or .npz; run again with the same file to go on after a"
                " run that was stopped",
            ),
            *VIEWS,
            *PART,
            boolean("frames", "also the mean of the patches of every frame"),
            boolean("positions", "also the mean of the patches of every position over the frames"),
            string("annotations", None, "clips of the folder and their labels, as for prepare"),
            string("dataset", None, "data set of the annotations, as for prepare"),
            string("labels", None, "file of class names of the annotations, as for prepare"),
            *MANY_VIDEOS,
            ATTENTION_KERNELS,
        ),
        required=("checkpoint", "output"),
        meant=("checkpoint",),
        positional=("videos...",),
    ),
    "timeline": Command(
        "finds what happens when in a long video",
        "timesformer_jax.inference.timeline_command:timeline",
        (
            CHECKPOINT,
            number(
                "stride", None, "seconds between clips; by default a quarter of what a clip spans"
            ),
            number(
                "window",
                None,
                "seconds that a clip spans, for checkpoints whose clips are as long as the video",
            ),
            number(
                "switch_cost",
                1.1,
                "nats that a change of the class must gain to be a new segment; 0: no smoothing",
            ),
            strings(
                "output", "files to write: .json, .csv, .vtt (subtitles) or .html, with commas"
            ),
            integer("crops", 1, "square crops per clip: 1, or 3 (left, centre, right)"),
            *PART,
            ATTENTION_KERNELS,
        ),
        required=("checkpoint",),
        meant=("checkpoint",),
        positional=("video",),
    ),
    "explain": Command(
        "writes a page that shows what a prediction looks at, in space and time",
        "timesformer_jax.inference.explain:explain",
        (
            CHECKPOINT,
            string(
                "output",
                None,
                "the page; by default the video's name with .html, if no file has it",
            ),
            string("video", None, "MP4 file to write the clip to, with the heat over it"),
            string(
                "class",
                None,
                "name or number of the class to show first; by default rollout, for any class",
            ),
            *PART,
            integer("top", 5, "number of classes to show, each with a map of its own"),
            ATTENTION_KERNELS,
        ),
        required=("checkpoint",),
        meant=("checkpoint",),
        positional=("file",),
    ),
}
