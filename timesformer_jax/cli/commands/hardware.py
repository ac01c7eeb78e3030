"""Commands that predict or measure time and memory."""

from __future__ import annotations

from timesformer_jax.cli.commands.shared import ATTENTION_KERNELS, CONFIG
from timesformer_jax.cli.flags import Command, boolean, integer, number, string, strings

MEASURING = (
    ATTENTION_KERNELS,
    string("dtype", None, "float32 or bfloat16; by default float32 on a CPU, else bfloat16"),
    number("seconds", 60.0, "skip a measurement that is predicted to take longer"),
    number("minutes", 5.0, "start no measurement after this time"),
    number("memory", None, "GiB of memory; by default the device's"),
    string("json", None, "JSON file to write the results to"),
)

HARDWARE = {
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
            integer("video_seconds", 10, "length of the synthetic videos"),
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
