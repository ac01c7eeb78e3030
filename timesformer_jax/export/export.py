"""`timesformer export`: a checkpoint as a program that needs neither this package nor its code."""

from __future__ import annotations

import json
import os
from typing import Any

from absl import logging

from timesformer_jax import storage
from timesformer_jax.checkpoints.convert import writer
from timesformer_jax.checkpoints.convert.reader import read
from timesformer_jax.errors import InputError
from timesformer_jax.export import onnx_file, saved_model, stablehlo
from timesformer_jax.export.program import program

WRITERS = {
    "onnx": onnx_file.write,
    "stablehlo": stablehlo.write,
    "saved_model": saved_model.write,
}


def export(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    to: str | None = None,
    preprocess: bool = False,
    labels: str | None = None,
    license: str | None = None,
    **overrides: Any,
) -> None:
    """Writes a checkpoint as a program. The number of clips in a batch is free in all formats.

    Args:
      checkpoint: as for `from_pretrained`.
      out: the file (onnx) or folder to write; it must not exist.
      to: "onnx", "stablehlo", "saved_model" (TensorFlow), or "hf", as `convert` writes it.
      preprocess: the program takes uint8 RGB frames of any size and gives probabilities.
      labels: file of class names, one a line, in place of the checkpoint's.
      license: of the weights, in place of the checkpoint's.
      overrides: num_frames and image_size, to which position embeddings are resized.

    Raises:
      InputError: if the checkpoint cannot be read or has no classifier, `out` exists, or the format
        cannot hold it.
    """
    out = os.path.abspath(out)
    if to == "hf":
        if preprocess:
            raise InputError("--to=hf writes weights, not a program: leave --preprocess out")
        return writer.convert(checkpoint, out, to="hf", labels=labels, license=license, **overrides)
    if to not in WRITERS:
        raise InputError(f"to must be one of {', '.join(WRITERS)} or hf, not {to!r}")
    beside = f"{os.path.splitext(out)[0]}.json" if to == "onnx" else None
    for path in filter(None, (out, beside)):
        if os.path.lexists(path):
            raise InputError(f"{path} exists; remove it or choose another destination")
    found = writer.relabelled(read(checkpoint, **overrides), labels, license)
    if found.is_image_model or not found.has_head:
        raise InputError(
            f"{checkpoint} has no classifier of videos, so an export could not tell classes: train "
            f"one with timesformer train --config.pretrained={checkpoint}"
        )
    exported = program(found.metadata, found.load(), preprocess)
    with writer.written_at(out) as partial:
        WRITERS[to](os.fspath(partial), exported)
    if beside is not None:
        card = json.dumps(exported.card, indent=2).encode()
        storage.write_atomically(storage.absolute(beside), card)
    logging.info("%s: %s written to %s", checkpoint, to, out)
    if exported.card["license"]:
        logging.info("license of the weights: %s", exported.card["license"])
