"""Named models: `create("timesformer_base", num_classes=174)`."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from timesformer_jax.errors import InputError, did_you_mean
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig

_BASE = TimeSformerConfig()

PRESETS = {
    # The paper's three (table 2): clips of 8 x 224, 16 x 448 and 96 x 224.
    "timesformer_base": _BASE,
    "timesformer_hr": dataclasses.replace(_BASE, num_frames=16, image_size=448),
    "timesformer_l": dataclasses.replace(_BASE, num_frames=96),
    # Its other backbones: about 5 points below Base on K400, about 1 below, and about 3 below.
    "timesformer_vit_s": dataclasses.replace(_BASE, hidden_size=384, num_heads=6),
    "timesformer_vit_l": dataclasses.replace(_BASE, hidden_size=1024, depth=24, num_heads=16),
    "timesformer_p32": dataclasses.replace(_BASE, patch_size=32),
    # Learns a few classes from a few dozen videos from scratch, on a CPU in minutes.
    "timesformer_small": dataclasses.replace(
        _BASE, image_size=64, patch_size=8, hidden_size=96, depth=4, num_heads=4,
        drop_path=0.0, init="width_scaled",
    ),
    # Learns the embedded data set from scratch on a laptop's CPU.
    "timesformer_tiny": dataclasses.replace(
        _BASE, image_size=32, patch_size=8, hidden_size=64, depth=3, num_heads=4,
        drop_path=0.0, init="width_scaled",
    ),
}  # fmt: skip
"""The configs of the presets by their names, for 400 classes."""


def preset(name: str, **overrides: Any) -> TimeSformerConfig:
    """The config of a preset, with fields replaced.

    Args:
      name: of `PRESETS`.
      **overrides: fields of `TimeSformerConfig`.

    Raises:
      InputError: if there is no such preset, or no such field.
    """
    if name not in PRESETS:
        raise InputError(
            f"no preset {name!r}, there are: {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}"
        )
    fields = [field.name for field in dataclasses.fields(TimeSformerConfig)]
    for key in overrides:
        if key not in fields:
            raise InputError(
                f"no model field {key!r}, there are: {', '.join(fields)}{did_you_mean(key, fields)}"
            )
    return dataclasses.replace(PRESETS[name], **overrides)


def create(name: str, *, seed: int = 0, **overrides: Any) -> TimeSformer:
    """A preset's model with random parameters.

    Args:
      name: of `PRESETS`.
      seed: of the parameters.
      **overrides: fields of `TimeSformerConfig`, such as num_classes.

    Returns:
      A function of normalised clips, (B, T, H, W, 3) to (B, num_classes) logits.

    Raises:
      InputError: as `preset`.
    """
    return TimeSformer(preset(name, **overrides), rngs=nnx.Rngs(seed))
