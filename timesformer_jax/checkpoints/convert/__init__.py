"""Reads checkpoints of any format (`from_pretrained`) and writes them in another (`convert`)."""

from __future__ import annotations

import os
from typing import Any

from timesformer_jax.checkpoints.convert.reader import SizeMismatch, adapted, open_checkpoint, read
from timesformer_jax.checkpoints.convert.writer import convert
from timesformer_jax.models.timesformer import TimeSformer, with_parameters

__all__ = ["SizeMismatch", "adapted", "convert", "from_pretrained", "open_checkpoint", "read"]


def from_pretrained(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    resize: str = "bicubic",
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> TimeSformer:
    """Loads a model from a checkpoint; its config comes from the file.

    Reads our own checkpoint directories, the authors' release (`.pyth`), Hugging Face directories,
    and image ViTs with the names of timm, DeiT, torchvision (torch or safetensors) or the JAX ViT
    (`.npz`). A video model starts from an image ViT as in the paper:
    `from_pretrained("vit.pth", attention="divided", num_frames=8, num_classes=10)` copies spatial
    attention to temporal attention and sets `temporal_fc` to zero.

    Args:
      source: a file or directory, or a name (see `list_pretrained`).
      revision: a branch, tag or commit of a name on the Hugging Face Hub.
      resize: how position embeddings are resized: "bicubic" (linear in time), or "official", as
        the release resizes those of image ViTs; this scrambles space and is there for parity only.
      allow_nonfinite: load parameters that are infinite or not a number.
      **overrides: fields of `TimeSformerConfig` that the file does not tell (num_heads, if heads
        do not have 64 channels) or that shall differ. image_size and num_frames resize the
        position embeddings; another num_classes starts a new head; both are logged. With
        dtype="bfloat16" the parameters are bfloat16 too, in half the memory: for inference. To
        train, keep them float32 and set the dtype in the recipe.

    Raises:
      InputError: if the file is missing, damaged or of an unknown format, or if an array is
        missing, left over or of another shape; the message names it.
    """
    checkpoint = read(
        source, resize, revision=revision, allow_nonfinite=allow_nonfinite, **overrides
    )
    dtype = overrides.get("dtype", "float32")
    model = with_parameters(checkpoint.config, checkpoint.load(dtype))
    model.labels, model.clip = checkpoint.labels, checkpoint.clip
    return model
