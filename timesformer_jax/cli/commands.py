"""The table of commands: what each does, the function that does it, and its flags."""

from __future__ import annotations

from timesformer_jax.cli.flags import (
    Command,
    boolean,
    integer,
    integer_or,
    number,
    string,
    strings,
)

CONFIG = string(
    "config",
    None,
    "recipe: its name, such as finetune or k400_base:ARGUMENT=VALUE,...; a config file of your"
    " own; or the recipe.json of a run. --config.FIELD=VALUE changes a field",
)

CHECKPOINT = string(
    "checkpoint",
    None,
    "a run's --workdir, WORKDIR/best or one step, a file, or a name; see docs/checkpoints.md",
)
CROPS = integer("crops", 3, "square crops per clip: 3 (left, centre, right) or 1")
VIEWS = (integer("views", 1, "clips per video, whose probabilities are averaged"), CROPS)
ATTENTION_KERNELS = string(
    "attention_kernels", "auto", "auto for the fastest on the device, xla, or the name of a kernel"
)
MULTILABEL = string(
    "multilabel",
    None,
    "what separates several labels in the column label of the csv, such as ';'; none if a label"
    " holds such a character",
)
PART = (
    number("start", None, "start of the part of each video to look at, in seconds"),
    number("end", None, "end of this part, in seconds"),
)
LABELS_AND_LICENSE = (
    string("labels", None, "file of class names, one per line, in the order of the logits"),
    string("license", None, "license of the weights, to be written down"),
)
WRITTEN_DOWN = (
    *LABELS_AND_LICENSE,
    string("results", None, "results.json of timesformer evaluate, for the model card"),
    string("dtype", "float32", "of the arrays on disk: float32 or bfloat16, half the size"),
)
MANY_VIDEOS = (
    integer("batch_size", None, "clips at a time; by default 8, or 1 on a CPU"),
    integer("workers", 0, "videos that are decoded at the same time; 0: one per core"),
    boolean("follow", "accept videos outside of a folder: paths with .., links"),
)
MEASURING = (
    ATTENTION_KERNELS,
    string("dtype", None, "float32 or bfloat16; by default float32 on a CPU, else bfloat16"),
    number("seconds", 60.0, "skip a measurement that is predicted to take longer"),
    number("minutes", 5.0, "start no measurement after this time"),
    number("memory", None, "GiB of memory; by default the device's"),
    string("json", None, "JSON file to write the results to"),
)
PROCESSES = (
    string("coordinator", None, "host:port of process 0; by default detected"),
    integer("num_processes", None, "number of processes of this run; by default detected"),
    integer("process_id", None, "number of this process, from 0; by default detected"),
    number("startup_seconds", None, "how long to wait for all processes; by default 300"),
    number("heartbeat_seconds", None, "a process silent for this long is lost; by default 60"),
)

COMMANDS = {
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
    "train": Command(
        "trains a recipe, or resumes its training, and evaluates it",
        "timesformer_jax.training.loop:train_and_report",
        (CONFIG, string("workdir", None, "folder for checkpoints, logs and results"), *PROCESSES),
        required=("config", "workdir"),
        meant=("config", "workdir"),
    ),
    "sweep": Command(
        "trains a recipe for each of several values of its fields, and compares the results",
        "timesformer_jax.training.sweep:sweep",
        (
            CONFIG,
            string("workdir", None, "folder for the runs, each in a folder of its own"),
            *PROCESSES,
        ),
        required=("config", "workdir"),
        meant=("config", "workdir"),
        sweeps=True,
    ),
    "evaluate": Command(
        "measures the accuracy of a checkpoint on a split",
        "timesformer_jax.evaluation.multi_view:evaluate_checkpoint",
        (
            CHECKPOINT,
            string("data", None, "folder of records, or tfds:NAME; by default the training data"),
            string("split", None, "split of the data; by default the config's evaluation split"),
            number("fps", None, "frame rate of records that do not store theirs"),
            *VIEWS,
            integer("batch_size", None, "videos per batch; by default the config's"),
            strings(
                "output",
                "files for the results, such as results.json,videos.csv,confusion.png: all of"
                " them, a row per video, or the confusion matrix as a picture",
            ),
            ATTENTION_KERNELS,
            *PROCESSES,
        ),
        required=("checkpoint",),
        meant=("checkpoint",),
    ),
    "predict": Command(
        "prints the most probable classes of video files",
        "timesformer_jax.inference.predict:predict",
        (
            CHECKPOINT,
            integer_or(
                "cover",
                "views",
                1,
                "clips per video, whose probabilities are averaged; cover: clips that do not"
                " overlap, along the whole video of any length",
            ),
            CROPS,
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
            number("start", None, "start of the part of the video to look at, in seconds"),
            number("end", None, "end of this part, in seconds"),
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
            number("start", None, "start of the part of the video to look at, in seconds"),
            number("end", None, "end of this part, in seconds"),
            integer("top", 5, "number of classes to show, each with a map of its own"),
            ATTENTION_KERNELS,
        ),
        required=("checkpoint",),
        meant=("checkpoint",),
        positional=("file",),
    ),
    "plan": Command(
        "predicts memory, time and largest batch of a recipe on hardware you do not have",
        "timesformer_jax.planning.command:plan",
        (
            CONFIG,
            string(
                "topology",
                None,
                "the devices, such as v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8 or cpu:8",
            ),
            string("work", "training", "training, or inference (evaluate and predict)"),
            boolean("find_batch", "search for the largest batch that fits"),
            boolean("find_frames", "search for the longest clip that fits"),
            boolean("quick", "on a TPU, compile faster with fewer optimisations"),
            number("memory", None, "GiB of memory per device; by default the device's"),
            string("json", None, "JSON file to write the results to"),
            string("hlo", None, "file to write the compiled program to, as text"),
        ),
        required=("config", "topology"),
        meant=("config", "topology"),
    ),
    "convert": Command(
        "converts a checkpoint to our format, Hugging Face's or the paper's release's",
        "timesformer_jax.checkpoints.convert:convert",
        (
            string(
                "to",
                "native",
                "output format: native, hf (a transformers directory) or release (.pyth)",
            ),
            string("resize", "bicubic", "how position embeddings are resized: bicubic or official"),
            *WRITTEN_DOWN,
            boolean("allow_nonfinite", "convert numbers that are infinite or not a number, too"),
            string("attention", None, "attention scheme, if the checkpoint is an image ViT"),
            integer("num_heads", None, "number of heads, if the file does not store it"),
            integer(
                "num_classes", None, "replace the classifier by a new one for this many classes"
            ),
            integer("num_frames", None, "resize the time embedding to this many frames"),
            integer("image_size", None, "resize the position embedding to this image size"),
        ),
        positional=("src", "dst"),
    ),
    "push": Command(
        "puts a checkpoint with a model card on the Hugging Face Hub",
        "timesformer_jax.checkpoints.push:push",
        (
            boolean("private", "make a new repository private"),
            string("revision", None, "branch to upload to; by default the main one"),
            string("output", None, "folder to write what would be uploaded to; uploads nothing"),
            *WRITTEN_DOWN,
        ),
        positional=("checkpoint", "repo"),
    ),
    "export": Command(
        "writes a checkpoint as ONNX, StableHLO or a SavedModel, to run without this package",
        "timesformer_jax.export.export:export",
        (
            string("to", None, "format: onnx, stablehlo, saved_model or hf (as convert writes it)"),
            boolean("preprocess", "take uint8 frames of any size, and give probabilities"),
            *LABELS_AND_LICENSE,
            integer("num_frames", None, "frames of a clip, if not the checkpoint's"),
            integer("image_size", None, "side of a clip in pixels, if not the checkpoint's"),
        ),
        required=("to",),
        positional=("checkpoint", "out"),
    ),
    "checkpoints": Command(
        "lists the published checkpoints that are known by name",
        "timesformer_jax.checkpoints.catalogue:print_pretrained",
        (),
    ),
    "benchmark input": Command(
        "measures the input's clips per second and where the time goes",
        "timesformer_jax.benchmark.input:benchmark_input",
        (
            string("data", None, "folder of records, or tfds:NAME; by default the config's"),
            string(
                "synthetic",
                None,
                "folder to make synthetic videos in, which are measured instead of --data",
            ),
            string("split", "train", "split of the data"),
            CONFIG,
            integer("frames", None, "frames per clip; by default the config's, or 8"),
            integer(
                "frame_stride",
                None,
                "distance between frames at 30 fps; by default the config's, or 32",
            ),
            integer("crop", None, "side of a clip in pixels; by default the config's, or 224"),
            strings(
                "short_side_range", "range of the short side; by default the config's, or 256,320"
            ),
            integer("batch_size", None, "clips per batch; by default the config's, or 16"),
            integer("batches", 200, "number of batches to measure"),
            boolean("reference", "also measure a loop over simplejpeg and OpenCV"),
            string("json", None, "JSON file to write the results to"),
        ),
        meant=("data",),
    ),
    "benchmark attention": Command(
        "measures time and memory of each attention scheme by length and size of the clip",
        "timesformer_jax.benchmark.attention:benchmark_attention",
        (
            strings("schemes", "attention schemes, such as divided,joint; by default all"),
            strings("frames", "numbers of frames; by default 8,16,32,64,96"),
            strings("sides", "sides of the frames in pixels; by default 224,336,448,560"),
            string("preset", "timesformer_base", "preset of the model"),
            integer("depth", None, "number of blocks; by default the preset's"),
            integer("batch_size", 1, "clips per batch"),
            boolean("quick", "measure one block, at 224 pixels and up to 32 frames"),
            *MEASURING,
        ),
    ),
    "benchmark model": Command(
        "measures clips per second, memory and MFU of inference and training by batch size",
        "timesformer_jax.benchmark.model:benchmark_model",
        (
            strings("presets", "presets of the model; by default timesformer_base"),
            strings("workloads", "inference, training or both; by default both"),
            strings(
                "batch_sizes", "clips per batch; by default 1, 2, 4, ... while throughput grows"
            ),
            string("remat", "none", "what training recomputes: none, outputs, block or offload"),
            *MEASURING,
        ),
    ),
}
