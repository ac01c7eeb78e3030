"""The table of commands: what each does, the function that does it, and its flags."""

from __future__ import annotations

from timesformer_jax.cli.flags import (
    Command,
    any_number,
    boolean,
    fraction,
    integer,
    number,
    string,
    strings,
)

CONFIG = string(
    "config",
    None,
    "a recipe, configs/k400_base.py or configs/k400_base.py:ARGUMENT=VALUE,...;"
    " --config.FIELD=VALUE changes a field of it",
)

CHECKPOINT = string("checkpoint", None, "a run's --workdir, WORKDIR/best, or one step of it")
VIEWS = (
    integer("views", 1, "clips along each video, their probabilities averaged", minimum=1),
    integer("crops", 3, "3 squares of each clip (left, centre, right), or 1", minimum=1),
)
MEASURING = (
    string("dtype", None, "float32 or bfloat16; by default bfloat16, on a CPU float32"),
    number("seconds", 60.0, "skips what is predicted to run longer"),
    number("minutes", 5.0, "after which nothing more begins"),
    number("memory", None, "GiB; what the device has"),
    string("json", None, "file for all figures"),
)
PROCESSES = (
    string("coordinator", None, "host:port of process 0; by default what the cluster tells"),
    integer("num_processes", None, "processes of this run, likewise", minimum=1),
    integer("process_id", None, "which of them this is, from 0, likewise"),
    number("startup_seconds", None, "to wait for all processes; by default 300"),
    number("heartbeat_seconds", None, "of silence after which a process is lost; by default 60"),
)

COMMANDS = {
    "prepare": Command(
        "videos to TFRecord shards that training reads",
        "timesformer_jax.data.prepare.prepare:prepare",
        (
            string("videos", None, "folder of videos: a folder a class, or as --annotations says"),
            string("output", None, "folder to write the data set to"),
            string(
                "annotations",
                None,
                "csv with columns path,label[,start,end,split]; or the"
                " folder of the files that the publisher of --dataset gives",
            ),
            string(
                "dataset",
                None,
                "kinetics400, kinetics600, something_v2, diving48, howto100m,"
                " ucf101 or hmdb51; by default your own",
            ),
            string("labels", None, "file of class names, one a line; by default those found"),
            string("name", None, "name of the data set, for its files"),
            integer("short_side", 256, "pixels that the short side is scaled to", minimum=1),
            integer("quality", 90, "JPEG quality of the stored frames", minimum=1),
            number("fps", None, "frames a second to resample to; by default as the video has them"),
            integer(
                "store_stride",
                None,
                "store every n-th frame only; by default 4 for Kinetics and HowTo100M, else 1",
                minimum=1,
            ),
            number(
                "segment_seconds",
                None,
                "cut clips into equal records of about so many seconds; by"
                " default 8.53 for HowTo100M, else whole",
            ),
            integer("clips_per_shard", 32, "clips a file, at most", minimum=1),
            integer("workers", 0, "processes; 0 for one a core"),
            fraction("validation_fraction", 0.1, "share held out where no split is given"),
            integer("max_failures", None, "end when more clips than this cannot be decoded"),
            string("runner", "local", "local, or beam for Apache Beam"),
            string("beam_options", "", "of Beam, '--runner=DataflowRunner --project=p ...'"),
        ),
        required=("videos", "output"),
    ),
    "check": Command(
        "finds what is wrong with prepared directories, or with videos before that",
        "timesformer_jax.data.check.check:check",
        (
            string("videos", None, "folder of videos to check, in place of prepared directories"),
            string("annotations", None, "of the videos, as prepare takes them"),
            string("dataset", None, "of the videos, as prepare takes it"),
            string("labels", None, "of the videos, as prepare takes them"),
            fraction("decode_fraction", 0.05, "of the clips, whose frames are decoded too"),
            integer("workers", 0, "threads, or for videos processes; 0 for one a core"),
            string("output", None, "csv file for the videos that cannot be used, and why"),
        ),
        positional=("directories...",),
    ),
    "train": Command(
        "trains a recipe, or goes on with it, and evaluates",
        "timesformer_jax.training.loop:train_and_report",
        (CONFIG, string("workdir", None, "folder for checkpoints, logs and results"), *PROCESSES),
        required=("config", "workdir"),
    ),
    "evaluate": Command(
        "accuracy of a checkpoint over a prepared split",
        "timesformer_jax.evaluation.multi_view:evaluate_checkpoint",
        (
            CHECKPOINT,
            string("data", None, "folder of records, or tfds:NAME; by default its training data"),
            string("split", None, "by default the one its config evaluates on"),
            any_number("fps", None, "frame rate of records that do not say theirs"),
            *VIEWS,
            integer("batch_size", None, "videos at a time; by default the config's", minimum=1),
            string("output", None, "JSON file for the results"),
            *PROCESSES,
        ),
        required=("checkpoint",),
    ),
    "predict": Command(
        "the most probable classes of video files",
        "timesformer_jax.inference.predict:predict",
        (
            CHECKPOINT,
            *VIEWS,
            number("start", None, "look at the part of each video from here, in seconds"),
            number("end", None, "up to here"),
            integer("top", 5, "classes to print", minimum=1),
        ),
        required=("checkpoint",),
        positional=("videos...",),
    ),
    "plan": Command(
        "what a recipe needs of hardware that need not be there: memory, time, largest batch",
        "timesformer_jax.planning:plan",
        (
            CONFIG,
            string("topology", None, "v5e:4x4, v5p:2x2x4, v6e:4x4, h100:8, cpu:8"),
            boolean("find_batch", "search the largest batch that fits"),
            boolean("quick", "TPU: compile sooner, optimising less"),
            number("memory", None, "GiB a chip; its own"),
            string("json", None, "file for all figures"),
        ),
        required=("config", "topology"),
    ),
    "convert": Command(
        "convert a checkpoint to our format, Hugging Face's or the release's",
        "timesformer_jax.checkpoints.convert:convert",
        (
            string("to", "native", "native, hf (a transformers directory) or release (.pyth)"),
            string("resize", "bicubic", "of position embeddings: bicubic, or official"),
            string("labels", None, "file of class names, one a line, in the order of the logits"),
            string("attention", None, "scheme, where an image ViT becomes a video model"),
            integer("num_heads", None, "heads, where the file does not tell", minimum=1),
            integer("num_classes", None, "start a new head of so many classes", minimum=1),
            integer("num_frames", None, "resize the time embedding", minimum=1),
            integer("image_size", None, "resize the position embedding", minimum=1),
        ),
        positional=("src", "dst"),
    ),
    "benchmark input": Command(
        "clips a second that the data gives, and where the time goes",
        "timesformer_jax.benchmark.input:benchmark_input",
        (
            string("data", None, "folder of records, or tfds:NAME; by default the config's"),
            string("synthetic", None, "folder for videos to make, prepare and measure on"),
            string("split", "train", "of the data"),
            CONFIG,
            integer("frames", None, "frames of a clip; 8 where there is no --config", minimum=1),
            integer("frame_stride", None, "distance between them at 30 fps; 32", minimum=1),
            integer("crop", None, "side of a clip in pixels; 224", minimum=1),
            strings(
                "short_side_range",
                "range of the scaled short side; 256,320",
            ),
            integer("batch_size", None, "clips; 16", minimum=1),
            integer("batches", 200, "to measure", minimum=1),
            boolean("reference", "compare with simplejpeg and OpenCV"),
            string("json", None, "file for the figures"),
        ),
    ),
    "benchmark attention": Command(
        "time and memory of every attention scheme by length and size of the clip",
        "timesformer_jax.benchmark.attention:benchmark_attention",
        (
            strings("schemes", "divided, joint, ...; by default all"),
            strings("frames", "of the clips; by default 8,16,32,64,96"),
            strings("sides", "of the clips, in pixels; by default 224,336,448,560"),
            string("preset", "timesformer_base", "the model"),
            integer("depth", None, "blocks; by default the preset's", minimum=1),
            integer("batch_size", 1, "clips a run", minimum=1),
            boolean("quick", "one block, up to 32 frames of 224"),
            boolean(
                "choose",
                "times the kernels; programs then use the fastest",
            ),
            *MEASURING,
        ),
    ),
    "benchmark model": Command(
        "clips a second, memory and MFU of inference and of the training step, by batch size",
        "timesformer_jax.benchmark.model:benchmark_model",
        (
            strings("presets", "by default timesformer_base"),
            strings("works", "by default inference,training"),
            strings("batch_sizes", "by default 1, 2, 4, ... while the rate grows"),
            string("remat", "none", "of the training step: none, outputs, block or offload"),
            *MEASURING,
        ),
    ),
    "benchmark flags": Command(
        "what each of XLA's flags gains, every one in a process of its own",
        "timesformer_jax.benchmark.flags:benchmark_flags",
        (
            string("preset", "timesformer_base", "the model"),
            string("work", "training", "training or inference"),
            integer("batch_size", None, "clips; 32, on a CPU 1", minimum=1),
            string("dtype", None, "float32 or bfloat16; by default bfloat16, on a CPU float32"),
            integer("rounds", 2, "runs with the flag and without", minimum=1),
            number("minutes", 8.0, "after which no further flag is begun"),
            string("json", None, "file for all figures"),
        ),
    ),
}
