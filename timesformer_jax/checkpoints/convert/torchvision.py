"""Names of torchvision's image ViTs (vit_b_16 and its like); the layout is PyTorch's."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timesformer_jax.checkpoints.convert import torch_layout
from timesformer_jax.checkpoints.convert.files import File, Stored
from timesformer_jax.models.timesformer import TimeSformerConfig

NAME = "torchvision's ViT"
_LAYER = "encoder.layers.encoder_layer_"

to_ours, to_theirs = torch_layout.to_ours, torch_layout.to_theirs


def recognises(names: Collection[str]) -> bool:
    return "conv_proj.weight" in names and "class_token" in names


def names(config: TimeSformerConfig) -> dict[str, str]:
    """Our parameter paths to torchvision's names; an image model is space-only."""
    out = {"embedding/cls": "class_token", "embedding/space": "encoder.pos_embedding"}
    modules = {"embedding/patch": "conv_proj", "norm": "encoder.ln", "head": "heads.head"}
    for i in range(config.depth):
        ours, theirs = f"blocks/{i}", f"{_LAYER}{i}"
        attention = f"{ours}/attention/spatial"
        modules[f"{attention}/norm"] = f"{theirs}.ln_1"
        modules[f"{attention}/proj"] = f"{theirs}.self_attention.out_proj"
        # Parameters of the attention itself, not of a linear layer of its own.
        out[f"{attention}/qkv/kernel"] = f"{theirs}.self_attention.in_proj_weight"
        out[f"{attention}/qkv/bias"] = f"{theirs}.self_attention.in_proj_bias"
        modules[f"{ours}/mlp/norm"] = f"{theirs}.ln_2"
        modules[f"{ours}/mlp/fc1"] = f"{theirs}.mlp.0"
        modules[f"{ours}/mlp/fc2"] = f"{theirs}.mlp.3"
    return out | torch_layout.weights_and_biases(modules)


def tidy(state: dict[str, Stored]) -> dict[str, Stored]:
    """With the MLP's names of torchvision 0.14 and later, and without a layer before the head."""
    state = {
        name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3."): value
        for name, value in state.items()
    }
    return torch_layout.without_pre_logits(state, "heads.pre_logits.", "heads.head.")


def fields(file: File) -> dict[str, Any]:
    """The config's fields that the file tells."""
    state = file.state
    found = torch_layout.fields(
        state,
        patch="conv_proj.weight",
        space="encoder.pos_embedding",
        mlp=f"{_LAYER}0.mlp.0.weight",
        block=rf"{_LAYER}(\d+)\.",
    )
    if "heads.head.weight" in state:
        found["num_classes"] = torch_layout.shape_of(state, "heads.head.weight", 2)[0]
    return found
