"""Checkpoints of any format, in (`from_pretrained`) and out (`convert`)."""

from __future__ import annotations

import os
from typing import Any

from timesformer_jax.checkpoints.convert.checkpoint import SizeMismatch, read
from timesformer_jax.checkpoints.convert.write import convert
from timesformer_jax.models.timesformer import TimeSformer, with_parameters

__all__ = ["SizeMismatch", "convert", "from_pretrained", "read"]


def from_pretrained(
    path: str | os.PathLike, *, resize: str = "bicubic", **overrides: Any
) -> TimeSformer:
    """The model that a checkpoint holds, shape and scheme read off the file.

    Reads our own checkpoint directories, the authors' release (`.pyth`), Hugging Face directories,
    and image ViTs in timm's, DeiT's, torchvision's (torch or safetensors) and the JAX ViT's names
    (`.npz`), from which a video model starts as the paper's does:
    `from_pretrained("vit.pth", attention="divided", num_frames=8, num_classes=10)` copies spatial
    attention to temporal attention and leaves the temporal linear layers at zero.

    Args:
      path: a file or directory.
      resize: how embeddings become larger or smaller: "bicubic" (linear in time), or "official" as
        the release does to image ViTs, which scrambles space and is there for parity only.
      **overrides: fields of `TimeSformerConfig` that the file does not tell (num_heads, if heads
        are not 64 channels wide) or that shall differ: image_size and num_frames resize the
        position embeddings, another num_classes starts a new head; both are logged.

    Raises:
      InputError: if the file is missing, damaged or of an unknown kind, or if an array is missing,
        left over or of another shape; the message names it.
    """
    checkpoint = read(path, resize, **overrides)
    return with_parameters(checkpoint.config, checkpoint.load())
