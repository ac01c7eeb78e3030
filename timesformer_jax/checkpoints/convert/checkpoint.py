"""A model's parameters between two formats, and what is known about them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from etils import epath
from flax import traverse_util

from timesformer_jax.checkpoints.files import LazyArray
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import TimeSformerConfig


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's parameters, not read yet, and what is known about them.

    Attributes:
      path: the file or directory that holds them.
      config: of the model.
      params: arrays in our layout, by path ("head/kernel").
      clip: the clips that the model expects.
      labels: class names, () if unknown.
      license: of the weights, "" if none is known.
      multilabel: whether a clip may have any number of the labels.
      license_note: how the license is known.
      training_config: the config of our own training run; empty for other checkpoints.
      step_folder: of a checkpoint of our own.
      is_image_model: whether the file holds an image model, which has no temporal parameters.
      has_head: whether the file has a classifier; otherwise a new one was drawn.
      tells_heads: whether the file tells config.num_heads; otherwise it was given or assumed.
    """

    path: str
    config: TimeSformerConfig
    params: dict[str, LazyArray]
    clip: ClipSpec
    labels: tuple[str, ...] = ()
    license: str = ""
    license_note: str = ""
    multilabel: bool = False
    training_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    step_folder: epath.Path | None = None
    is_image_model: bool = False
    has_head: bool = True
    tells_heads: bool = True

    @property
    def metadata(self) -> CheckpointMetadata:
        """What a checkpoint of ours says of this model."""
        return CheckpointMetadata(
            model=self.config,
            clip=self.clip,
            labels=self.labels,
            config=self.training_config,
            license=self.license,
            license_note=self.license_note,
            multilabel=self.multilabel,
        )

    def load(self, dtype: str = "float32") -> dict:
        """Reads the parameters; the result is as that of `models.timesformer.parameters`.

        Args:
          dtype: of the result, "float32" or "bfloat16".
        """
        # Copied: an alias of a memory-mapped file would change, or end, with the file.
        params = {path: jnp.array(array.load(), dtype) for path, array in self.params.items()}
        return traverse_util.unflatten_dict(params, sep="/")
