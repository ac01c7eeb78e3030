"""Commands that train a recipe and measure its accuracy."""

from __future__ import annotations

from timesformer_jax.cli.commands.shared import (
    ATTENTION_KERNELS,
    CHECKPOINT,
    CONFIG,
    VIEWS_OR_COVER,
)
from timesformer_jax.cli.flags import Command, integer, number, string, strings

PROCESSES = (
    string("coordinator", None, "host:port of process 0; by default detected"),
    integer("num_processes", None, "number of processes of this run; by default detected"),
    integer("process_id", None, "number of this process, from 0; by default detected"),
    number("startup_seconds", None, "how long to wait for all processes; by default 300"),
    number("heartbeat_seconds", None, "a process silent for this long is lost; by default 60"),
)

TRAINING = {
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
            *VIEWS_OR_COVER,
            integer(
                "batch_size",
                None,
                "videos per batch, with --views=cover clips; by default the config's",
            ),
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
}
