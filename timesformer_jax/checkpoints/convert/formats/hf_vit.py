"""Names of the image ViTs in Hugging Face transformers, such as google/vit-base-patch16-224."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from absl import logging

from timesformer_jax.checkpoints.convert.formats.base import Naming, with_joined_qkv
from timesformer_jax.checkpoints.convert.formats.hf import HuggingFace, add_heads_and_check_shapes
from timesformer_jax.checkpoints.convert.formats.torch_layout import TorchFormat
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile

_ATTENTION = "attention.attention"


class HuggingFaceViT(HuggingFace):
    """`normalise` concatenates query, key and value.

    Their config.json says layer_norm_eps = 1e-12; the JAX ViTs that they are copies of were trained
    with 1e-6, as ours compute.
    """

    name = "Hugging Face's ViT"
    naming = Naming(
        embeddings={
            "embedding/cls": "vit.embeddings.cls_token",
            "embedding/space": "vit.embeddings.position_embeddings",
        },
        modules={
            "embedding/patch": "vit.embeddings.patch_embeddings.projection",
            "norm": "vit.layernorm",
            "head": "classifier",
        },
        block="vit.encoder.layer.{}.",
        mlp=HuggingFace.naming.mlp,
        attentions={"space": HuggingFace.naming.attentions["space"]},
    )

    def detect(self, names: Collection[str]) -> bool:
        return any(
            f"{prefix}encoder.layer.0.{_ATTENTION}.query.weight" in names
            and f"{prefix}embeddings.patch_embeddings.projection.weight" in names
            for prefix in ("vit.", "")
        )

    def normalise(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        """With the prefix "vit.", which a saved ViTModel lacks, and without its pooler."""
        if not any(name.startswith("vit.") for name in arrays):
            arrays = {f"vit.{name}": value for name, value in arrays.items()}
        if any(name.startswith("vit.pooler.") for name in arrays):
            logging.warning("pooler.* dropped: a TimeSformer has none")
            arrays = {k: v for k, v in arrays.items() if not k.startswith("vit.pooler.")}
        return with_joined_qkv(arrays, ".", _concatenate, self.name)

    def config_fields(self, file: WeightsFile) -> dict[str, Any]:
        fields = TorchFormat.config_fields(self, file)
        add_heads_and_check_shapes(file.metadata.get("config", {}), fields)
        return fields


def _concatenate(parts: list[LazyArray]) -> LazyArray:
    """Concatenates arrays along their first axis."""
    first, *rest = parts[0].shape or (0,)
    return LazyArray(
        (3 * first, *rest), lambda: np.concatenate([part.load() for part in parts], axis=0)
    )
