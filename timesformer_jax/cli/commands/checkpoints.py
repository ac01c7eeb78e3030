"""Commands that convert, publish, export and list checkpoints."""

from __future__ import annotations

from timesformer_jax.cli.flags import Command, boolean, integer, string

LABELS_AND_LICENSE = (
    string("labels", None, "file of class names, one per line, in the order of the logits"),
    string("license", None, "license of the weights, to be written down"),
)
WRITTEN_DOWN = (
    *LABELS_AND_LICENSE,
    string("results", None, "results.json of timesformer evaluate, for the model card"),
    string("dtype", "float32", "of the arrays on disk: float32 or bfloat16, half the size"),
)

CHECKPOINTS = {
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
}
