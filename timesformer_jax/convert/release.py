"""Names and layouts of the authors' release, and of the timm / DeiT image ViTs it starts from.

A map from our parameters to theirs serves both directions. Their linear weights are (out, in),
the patch convolution is (D, 3, P, P), and embeddings carry a leading axis of 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig

# A scheme's attentions, and what the release calls their (norm, attention, further linear).
_TEMPORAL = ("temporal_norm1", "temporal_attn", "temporal_fc")
_SPATIAL = ("norm1", "attn", None)
ATTENTIONS = {
    "divided": {"temporal": _TEMPORAL, "spatial": _SPATIAL},
    "space": {"spatial": _SPATIAL},
    "joint": {"joint": _SPATIAL},
}


def names(config: TimeSformerConfig) -> dict[str, str]:
    """Our parameter paths ("blocks/0/mlp/fc1/kernel") to the release's names."""
    if config.attention not in ATTENTIONS:
        raise InputError(f"the authors' release has no scheme {config.attention!r}")
    out = {"embedding/cls": "cls_token"}
    if config.position_embedding != "none":
        out["embedding/space"] = "pos_embed"
    if config.position_embedding == "space_time" and config.scheme.time_embedding:
        out["embedding/time"] = "time_embed"
    modules = {"embedding/patch": "patch_embed.proj", "norm": "norm", "head": "head"}
    for i in range(config.depth):
        ours, theirs = f"blocks/{i}", f"blocks.{i}"
        for step, (norm, attention, further) in ATTENTIONS[config.attention].items():
            modules[f"{ours}/attention/{step}/norm"] = f"{theirs}.{norm}"
            modules[f"{ours}/attention/{step}/qkv"] = f"{theirs}.{attention}.qkv"
            modules[f"{ours}/attention/{step}/proj"] = f"{theirs}.{attention}.proj"
            if further:
                modules[f"{ours}/attention/{step}/fc"] = f"{theirs}.{further}"
        modules[f"{ours}/mlp/norm"] = f"{theirs}.norm2"
        modules[f"{ours}/mlp/fc1"] = f"{theirs}.mlp.fc1"
        modules[f"{ours}/mlp/fc2"] = f"{theirs}.mlp.fc2"
    for ours, theirs in modules.items():
        weight = "scale" if ours.split("/")[-1] == "norm" else "kernel"
        out[f"{ours}/{weight}"] = f"{theirs}.weight"
        out[f"{ours}/bias"] = f"{theirs}.bias"
    return out


def to_ours(theirs: str, value: np.ndarray) -> np.ndarray:
    """One of their arrays in our layout."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])  # d c p q -> (p q c) d
    if theirs == "cls_token":
        return value.reshape(-1)
    if value.ndim == 3:
        return value[0]
    return value.T if value.ndim == 2 else value


def config_of(state: Mapping[str, np.ndarray], **overrides) -> TimeSformerConfig:
    """The model that a state dict holds, its shape read off the arrays.

    An image ViT has neither `time_embed` nor temporal attention; so has a space-only TimeSformer.
    It is taken for space-only unless `attention` is among the overrides.

    Raises:
      InputError: if a needed array is missing or its shape makes no sense.
    """
    for key in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        if key not in state:
            raise InputError(f"{key} is missing: this is no TimeSformer or ViT checkpoint we know")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    if side * side != state["pos_embed"].shape[1] - 1:
        raise InputError(
            f"pos_embed has {state['pos_embed'].shape[1]} rows; one and a square was expected"
        )
    blocks = {int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))}
    found = {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "depth": max(blocks) + 1,
        "num_heads": max(width // 64, 1),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / width,
        "attention": "space",
    }
    if "head.weight" in state:
        found["num_classes"] = state["head.weight"].shape[0]
    if "time_embed" in state:
        found["num_frames"] = state["time_embed"].shape[1]
        temporal = "blocks.0.temporal_attn.qkv.weight" in state
        found["attention"] = "divided" if temporal else "joint"
    return TimeSformerConfig(**found | overrides)
