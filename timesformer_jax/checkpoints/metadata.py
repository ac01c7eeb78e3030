"""What a checkpoint says about itself: everything that prediction needs besides the parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import traverse_util

from timesformer_jax.checkpoints import schema
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models import schemes
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
      license_note: how the license is known.
    """

    model: TimeSformerConfig
    clip: ClipSpec
    labels: tuple[str, ...]
    config: dict[str, Any]
    license: str = ""
    multilabel: bool = False
    license_note: str = ""

    def to_json(self) -> dict[str, Any]:
        """JSON values; "scheme_module" is the module that registered the attention scheme."""
        module = schemes.MODULES.get(self.model.attention, "")
        return dataclasses.asdict(self) | {"labels": list(self.labels), "scheme_module": module}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> CheckpointMetadata:
        """The inverse of `to_json`.

        Raises:
          KeyError, TypeError: if a field is missing or unknown.
          InputError: if a field has another type or is out of range, or the attention scheme is not
            registered.
        """
        fields = schema.json_object(fields, "metadata")
        scheme_module = schema.text(fields.get("scheme_module", ""), "scheme_module")
        _check_scheme(fields["model"], scheme_module)
        found = cls(
            model=schema.model_config(fields["model"]),
            clip=schema.clip_spec(fields["clip"]),
            labels=schema.label_names(fields["labels"]),
            config=schema.training_config(fields["config"]),
            license=schema.text(fields["license"], "license"),
            multilabel=schema.boolean(fields.get("multilabel", False), "multilabel"),
            license_note=schema.text(fields.get("license_note", ""), "license_note"),
        )
        if found.labels and len(found.labels) != found.model.num_classes:
            raise InputError(
                f"it has {len(found.labels)} labels for {found.model.num_classes} classes"
            )
        return found


def _check_scheme(model: Any, module: str) -> None:
    """Raises an InputError that names the module if a scheme of somebody's own is not registered.

    The module is not imported: that would run code because a file says so.
    """
    name = model.get("attention") if isinstance(model, dict) else None
    if not isinstance(name, str) or not module:
        return
    schemes.import_asked_for(name)
    if name not in schemes.SCHEMES:
        raise InputError(
            f"its attention scheme {name!r} is registered by {module}, which was not imported: "
            f"import it before the checkpoint is read (on the command line, "
            f"{schemes.IMPORT_VARIABLE}={module})"
        )


def flatten_config(config: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts as one dict with keys like "optimizer.name", as in the --config.* flags."""
    return traverse_util.flatten_dict(config, sep=".")
