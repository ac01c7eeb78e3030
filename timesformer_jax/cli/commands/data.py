"""Commands that prepare videos as records, and check both."""

from __future__ import annotations

from timesformer_jax.cli.flags import Command, boolean, integer, number, string

MULTILABEL = string(
    "multilabel",
    None,
    "what separates several labels in the column label of the csv, such as ';'; none if a label"
    " holds such a character",
)

DATA = {
    "prepare": Command(
        "converts videos to TFRecord shards for training",
        "timesformer_jax.data.prepare.prepare:prepare",
        (
            string("videos", None, "folder of videos: one folder per class, or see --annotations"),
            string("output", None, "folder that the data set is written to"),
            string(
                "annotations",
                None,
                "csv file with columns path,label[,start,end,split], or the folder"
                " of the annotation files published with --dataset",
            ),
            string(
                "dataset",
                None,
                "kinetics400, kinetics600, something_v2, diving48, howto100m,"
                " ucf101 or hmdb51; by default none of these",
            ),
            string("labels", None, "file of class names, one a line; by default those that occur"),
            MULTILABEL,
            string("name", None, "name of the data set, used in file names"),
            integer("short_side", 256, "short side of the stored frames in pixels"),
            integer("quality", 90, "JPEG quality of the stored frames"),
            number("fps", None, "frames per second to resample to; by default the video's"),
            integer(
                "store_stride",
                None,
                "store only every n-th frame; by default 4 for Kinetics and HowTo100M, else 1",
            ),
            number(
                "segment_seconds",
                None,
                "length of the equal records that a clip is cut into; by default"
                " 8.53 for HowTo100M, else clips are not cut",
            ),
            integer("clips_per_shard", 32, "maximum number of clips per file"),
            integer("workers", 0, "number of processes; 0: one per core"),
            number(
                "validation_fraction",
                0.1,
                "fraction of the clips without a split that is used for validation",
            ),
            boolean(
                "resplit",
                "change labels and splits of a prepared --output to these, without decoding",
            ),
            integer("max_failures", None, "stop if more clips than this cannot be decoded"),
            string("runner", "local", "local, or beam (Apache Beam)"),
            string(
                "beam_options", "", "options of Beam, as in '--runner=DataflowRunner --project=p'"
            ),
            boolean("follow", "accept videos outside of --videos: paths with .., links"),
        ),
        required=("videos", "output"),
        meant=("videos", "output"),
    ),
    "check": Command(
        "finds errors in prepared directories, or in videos before they are prepared",
        "timesformer_jax.data.check.check:check",
        (
            string("videos", None, "folder of videos to check instead of prepared directories"),
            string("annotations", None, "annotations of the videos, as for prepare"),
            string("dataset", None, "data set of the videos, as for prepare"),
            string("labels", None, "file of class names, as for prepare"),
            MULTILABEL,
            number("decode_fraction", 0.05, "fraction of the clips whose frames are decoded"),
            integer("workers", 0, "number of threads, or processes for videos; 0: one per core"),
            number(
                "validation_fraction", 0.1, "fraction of the videos for validation, as for prepare"
            ),
            string("output", None, "csv file to write unusable videos to, with the reason"),
            boolean("follow", "accept videos outside of --videos: paths with .., links"),
        ),
        positional=("directories...",),
    ),
}
