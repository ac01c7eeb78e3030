"""Checks of a training config, before anything is read or compiled."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jax.sharding import Mesh

from timesformer_jax.checkpoints.metadata import flatten_config
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import sampling
from timesformer_jax.errors import InputError
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops.kernels.select import check_name

if TYPE_CHECKING:  # planning runs where ml_collections is not installed
    from ml_collections import ConfigDict


def check_config(config: ConfigDict) -> None:
    """Raises InputError, naming the flag to change, if a value of a training config is invalid."""
    from timesformer_jax.recipes.fields import check_fields  # needs ml_collections

    check_fields(config)
    values = flatten_config(config.to_dict())
    check_name(values["attention_kernels"])
    sampling.check_short_side_range(tuple(values["data.short_side_range"]), values["clip.crop"])
    if not values["data.directory"]:
        raise InputError("say with --config.data.directory where the prepared data is")


def model_config(config: ConfigDict, labels: tuple[str, ...]) -> TimeSformerConfig:
    """The model of a config for data with these labels; num_classes 0 stands for their number."""
    fields = dict(config.model)
    fields["num_classes"] = fields["num_classes"] or len(labels)
    if fields["num_classes"] != len(labels):
        raise InputError(
            f"the data in {config.data.directory} has {len(labels)} labels, the config's model "
            f"{fields['num_classes']}; pass --config.model.num_classes={len(labels)}"
        )
    return TimeSformerConfig(**fields)


def check_model(mesh: Mesh, model: TimeSformerConfig, clip: ClipSpec) -> None:
    """Raises InputError, naming the flag to change, unless the mesh divides model and clips."""
    tensor, sequence = mesh.shape["tensor"], mesh.shape["sequence"]
    heads = [model.heads_and_width(layer)[0] for layer in model.scheme.layers]
    parts_of = [(math.gcd(*heads), "heads"), (model.mlp_size, "hidden units of an MLP")]
    for parts, name in parts_of:
        if parts % tensor:
            raise InputError(
                f"{parts} {name} cannot be divided among {tensor} devices; set "
                f"--config.mesh.tensor to a divisor of {parts}, {math.gcd(parts, tensor)} for one"
            )
    shared = [layer for layer in model.scheme.layers if layer.within == "clip"]
    own = math.gcd(*(model.heads_and_width(layer)[0] // tensor for layer in shared))
    if own % sequence:
        raise InputError(
            f"devices share the heads of attention {model.attention!r}, and {own} cannot be "
            f"divided among {sequence}; set --config.mesh.sequence to a divisor of {own}, "
            f"{math.gcd(own, sequence)} for one"
        )
    if clip.frames % sequence:
        raise InputError(
            f"{clip.frames} frames cannot be divided among {sequence} devices; set "
            f"--config.mesh.sequence to a divisor of {clip.frames}, "
            f"{math.gcd(sequence, clip.frames)} for one"
        )
