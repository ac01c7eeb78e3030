"""What a checkpoint says about itself: everything that prediction needs besides the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import traverse_util

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import TimeSformerConfig


@dataclasses.dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says about itself.

    Attributes:
      model: shape and attention scheme of the model.
      clip: frames, size, sampling, normalisation and channel order of the training clips.
      labels: class names, in the order of the logits.
      config: the whole training config as nested dicts; empty for weights trained elsewhere.
      license: of the weights, "" if none is known; fine-tuned weights inherit it.
      multilabel: whether a clip may have any number of the labels: probabilities are then the
        sigmoid of each logit, not the softmax of all.
    """

    model: TimeSformerConfig
    clip: ClipSpec
    labels: tuple[str, ...]
    config: dict[str, Any]
    license: str = ""
    multilabel: bool = False

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"labels": list(self.labels)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CheckpointMetadata:
        """The inverse of `to_json`.

        Raises:
          KeyError, TypeError: if a field is missing or unknown.
        """
        return cls(
            model=TimeSformerConfig(**fields["model"]),
            clip=ClipSpec(**fields["clip"]),
            labels=tuple(fields["labels"]),
            config=fields["config"],
            license=fields["license"],
            multilabel=fields.get("multilabel", False),
        )


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts as one dict with keys like "optimizer.name", as in the --config.* flags."""
    return traverse_util.flatten_dict(config, sep=".")
