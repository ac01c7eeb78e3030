"""Loads any checkpoint for prediction, evaluation and analysis: the one way in for all of them."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.convert.reader import read
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.sources import locate
from timesformer_jax.errors import InputError


def load(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    sharding: Sharding | None = None,
    needs_head: bool = True,
    allow_nonfinite: bool = False,
    **overrides: Any,
) -> tuple[CheckpointMetadata, dict]:
    """The metadata and parameters of a checkpoint of any kind.

    Args:
      source: where it is, as for `from_pretrained`: a run of ours or one of its steps, a Hugging
        Face directory, a file (the authors' `.pyth`, timm, DeiT, torchvision, JAX ViT `.npz`), or
        a name (see `list_pretrained`). A path that exists goes before a name.
      revision: a branch, tag or commit of a name on the Hugging Face Hub; `NAME@REVISION` as the
        source says the same.
      sharding: of every parameter; by default, the first device of this process.
      needs_head: refuse a file without a classifier, whose classes would be random, and an image
        model, whose classes are not those of videos. Features need none.
      allow_nonfinite: load parameters that are infinite or not a number.
      **overrides: fields of `TimeSformerConfig`, as for `from_pretrained`.

    Returns:
      The metadata, and nested dicts of arrays as `models.timesformer.parameters` gives them:
      float32, or bfloat16 if that is the `dtype` asked for.

    Raises:
      InputError: one line that says what was looked for, or what is wrong with the file.
    """
    found = locate(source, revision)
    if found.is_native and not overrides:
        return store.load_parameters(found.path, sharding, allow_nonfinite=allow_nonfinite)
    checkpoint = read(found, allow_nonfinite=allow_nonfinite, **overrides)
    is_headless = checkpoint.is_image_model or not checkpoint.has_head
    if needs_head and is_headless and "num_classes" not in overrides:
        what = "is an image model, and knows no classes of videos" * checkpoint.is_image_model
        raise InputError(
            f"{source} {what or 'has no classifier, so it cannot tell classes'}: train one with "
            f"timesformer train --config.pretrained={source}"
        )
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    dtype = overrides.get("dtype", "float32")
    return checkpoint.metadata, jax.device_put(checkpoint.load(dtype), sharding)
