"""Names of the authors' release, and of the timm and DeiT image ViTs that it starts from."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import numpy as np
from absl import logging

from timesformer_jax.checkpoints import schema
from timesformer_jax.checkpoints.convert.formats.base import Naming, shape_of, without_pre_logits
from timesformer_jax.checkpoints.convert.formats.torch_layout import TorchFormat
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import TimeSformerConfig

# Our schemes, and what the release and Hugging Face's port call them.
ATTENTION_TYPES = {
    "divided": "divided_space_time",
    "space": "space_only",
    "joint": "joint_space_time",
}
_SPATIAL = {"norm": "norm1", "qkv": "attn.qkv", "proj": "attn.proj"}
_TEMPORAL = {
    "norm": "temporal_norm1",
    "qkv": "temporal_attn.qkv",
    "proj": "temporal_attn.proj",
    "temporal_fc": "temporal_fc",
}


class Release(TorchFormat):
    name = "the authors' release"
    naming = Naming(
        embeddings={
            "embedding/cls": "cls_token",
            "embedding/space": "pos_embed",
            "embedding/time": "time_embed",
        },
        modules={"embedding/patch": "patch_embed.proj", "norm": "norm", "head": "head"},
        block="blocks.{}.",
        mlp={"mlp/norm": "norm2", "mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"},
        attentions={
            "divided": {"temporal": _TEMPORAL, "spatial": _SPATIAL},
            "space": {"spatial": _SPATIAL},
            "joint": {"joint": _SPATIAL},
        },
    )

    def detect(self, names: Collection[str]) -> bool:
        return "patch_embed.proj.weight" in names and "cls_token" in names

    def normalise(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        """Without a layer before the head and a distillation token, which image models may have."""
        arrays = without_pre_logits(arrays, "pre_logits.", "head.")
        if "dist_token" not in arrays:
            return arrays
        logging.warning(
            "dist_token and head_dist dropped: a TimeSformer has no distillation token; the "
            "image model's outputs came from both of its tokens"
        )
        dropped = ("dist_token", "head_dist")
        arrays = {k: v for k, v in arrays.items() if k.split(".")[0] not in dropped}
        if "pos_embed" in arrays:
            # Rows: classification token, distillation token, patches.
            _, rows, width = shape_of(arrays, "pos_embed", 3)
            load = arrays["pos_embed"].load
            arrays["pos_embed"] = LazyArray(
                (1, rows - 1, width), lambda: np.delete(load(), 1, axis=1)
            )
        return arrays

    def config_fields(self, file: WeightsFile) -> dict[str, Any]:
        arrays, cfg = file.arrays, str(file.metadata.get("cfg", ""))
        fields = super().config_fields(file)
        if heads := _timm_heads(file.metadata.get("config", {}).get("architecture")):
            fields["num_heads"] = heads
        if "num_heads" in file.metadata:
            fields["num_heads"] = file.metadata["num_heads"]
        if "time_embed" in arrays:
            fields["num_frames"] = shape_of(arrays, "time_embed", 3)[1]
            divided = any(".temporal_attn." in name for name in arrays)
            fields["attention"] = "divided" if divided else "joint"
        elif file.metadata.get("is_release") or "space_only" in cfg:
            # The names of a space-only TimeSformer are those of an image ViT.
            fields["attention"] = "space"
            if frames := re.search(r"\bNUM_FRAMES: ([0-9]{1,9})\b", cfg):
                fields["num_frames"] = int(frames[1])
        return fields

    def clip_fields(self, file: WeightsFile) -> dict[str, Any]:
        fields = super().clip_fields(file)
        cfg = file.metadata.get("cfg", "")
        if stride := re.search(r"\bSAMPLING_RATE: ([0-9]{1,9})\b", cfg):
            fields["frame_stride"] = schema.whole_number(int(stride[1]), "frame_stride")
        return fields

    def labels(self, file: WeightsFile) -> tuple[str, ...]:
        """The class names, which the authors' files lack and ours in their layout have."""
        return file.metadata.get("labels", ())


def _timm_heads(architecture: Any) -> int | None:
    """The heads of timm's ViTs whose heads do not have 64 channels."""
    large = isinstance(architecture, str) and re.match(r"vit_(huge|giant|gigantic)_", architecture)
    return 16 if large else None


def cfg_text(config: TimeSformerConfig, clip: ClipSpec) -> str:
    """The part of the release's YAML config that describes the model and its clips."""
    return (
        f"DATA:\n  NUM_FRAMES: {config.num_frames}\n  SAMPLING_RATE: {clip.frame_stride}\n"
        f"  TRAIN_CROP_SIZE: {config.image_size}\n"
        f"MODEL:\n  NUM_CLASSES: {config.num_classes}\n"
        f"TIMESFORMER:\n  ATTENTION_TYPE: {ATTENTION_TYPES[config.attention]}\n"
    )
