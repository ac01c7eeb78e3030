"""Names of the authors' release, and of the timm / DeiT image ViTs it starts from.

The map from our parameters to theirs serves both directions; the layout is PyTorch's.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from absl import logging

from timesformer_jax.checkpoints.convert import torch_layout
from timesformer_jax.checkpoints.convert.files import File, Stored
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig

NAME = "the authors' release"
SCHEMES = {
    "divided": "divided_space_time",
    "space": "space_only",
    "joint": "joint_space_time",
}
# A scheme's attentions, and what the release calls their (norm, attention, further linear).
_TEMPORAL = ("temporal_norm1", "temporal_attn", "temporal_fc")
_SPATIAL = ("norm1", "attn", None)
_ATTENTIONS = {
    "divided": {"temporal": _TEMPORAL, "spatial": _SPATIAL},
    "space": {"spatial": _SPATIAL},
    "joint": {"joint": _SPATIAL},
}

to_ours, to_theirs = torch_layout.to_ours, torch_layout.to_theirs


def recognises(names: Collection[str]) -> bool:
    return "patch_embed.proj.weight" in names and "cls_token" in names


def names(config: TimeSformerConfig) -> dict[str, str]:
    """Our parameter paths ("blocks/0/mlp/fc1/kernel") to the release's names.

    Raises:
      InputError: if the release has no such scheme.
    """
    if config.attention not in _ATTENTIONS:
        raise InputError(f"{NAME} has no {config.attention} attention, only {', '.join(SCHEMES)}")
    out = {"embedding/cls": "cls_token", "embedding/space": "pos_embed"}
    if config.scheme.time_embedding:
        out["embedding/time"] = "time_embed"
    modules = {"embedding/patch": "patch_embed.proj", "norm": "norm", "head": "head"}
    for i in range(config.depth):
        ours, theirs = f"blocks/{i}", f"blocks.{i}"
        for step, (norm, attention, further) in _ATTENTIONS[config.attention].items():
            modules[f"{ours}/attention/{step}/norm"] = f"{theirs}.{norm}"
            modules[f"{ours}/attention/{step}/qkv"] = f"{theirs}.{attention}.qkv"
            modules[f"{ours}/attention/{step}/proj"] = f"{theirs}.{attention}.proj"
            if further:
                modules[f"{ours}/attention/{step}/temporal_fc"] = f"{theirs}.{further}"
        modules[f"{ours}/mlp/norm"] = f"{theirs}.norm2"
        modules[f"{ours}/mlp/fc1"] = f"{theirs}.mlp.fc1"
        modules[f"{ours}/mlp/fc2"] = f"{theirs}.mlp.fc2"
    return out | torch_layout.weights_and_biases(modules)


def tidy(state: dict[str, Stored]) -> dict[str, Stored]:
    """Without what distilled and pre-trained image models have and a TimeSformer has not."""
    state = torch_layout.without_pre_logits(state, "pre_logits.", "head.")
    if "dist_token" in state:
        logging.warning(
            "dist_token and head_dist dropped: a TimeSformer has no distillation token; the "
            "image model's outputs came from both of its tokens"
        )
        state = {
            k: v for k, v in state.items() if k.split(".")[0] not in ("dist_token", "head_dist")
        }
        if "pos_embed" in state:
            # Rows: classification token, distillation token, patches.
            _, rows, width = torch_layout.shape_of(state, "pos_embed", 3)
            load = state["pos_embed"].load
            state["pos_embed"] = Stored((1, rows - 1, width), lambda: np.delete(load(), 1, axis=1))
    return state


def fields(file: File) -> dict[str, Any]:
    """The config's fields that the file tells; `attention` is not among an image ViT's."""
    state, cfg = file.state, str(file.about.get("cfg", ""))
    found = torch_layout.fields(
        state,
        patch="patch_embed.proj.weight",
        space="pos_embed",
        mlp="blocks.0.mlp.fc1.weight",
        block=r"blocks\.(\d+)\.",
    )
    if "head.weight" in state:
        found["num_classes"] = torch_layout.shape_of(state, "head.weight", 2)[0]
    if "num_heads" in file.about:
        found["num_heads"] = int(file.about["num_heads"])
    if "time_embed" in state:
        found["num_frames"] = torch_layout.shape_of(state, "time_embed", 3)[1]
        temporal = any(".temporal_attn." in name for name in state)
        found["attention"] = "divided" if temporal else "joint"
    elif file.about.get("video") or "space_only" in cfg:
        # By its names a space-only TimeSformer is an image ViT; only its wrapping tells.
        found["attention"] = "space"
        if frames := re.search(r"\bNUM_FRAMES: (\d+)", cfg):
            found["num_frames"] = int(frames[1])
    return found


def cfg_text(config: TimeSformerConfig) -> str:
    """The part of the release's yaml config that describes the model."""
    return (
        f"DATA:\n  NUM_FRAMES: {config.num_frames}\n  TRAIN_CROP_SIZE: {config.image_size}\n"
        f"MODEL:\n  NUM_CLASSES: {config.num_classes}\n"
        f"TIMESFORMER:\n  ATTENTION_TYPE: {SCHEMES[config.attention]}\n"
    )
