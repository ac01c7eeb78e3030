"""Names and layout of the JAX ViTs: `.npz` of google-research/vision_transformer and augreg.

Linear kernels are (in, out), as ours. The attention's kernels are split into query, key and value,
with an axis for the heads. The patch convolution is (P, P, 3, D).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from timesformer_jax.checkpoints.convert.formats.base import (
    Format,
    Naming,
    image_size,
    shape_of,
    weight_name,
    with_joined_qkv,
    without_pre_logits,
)
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile
from timesformer_jax.models.timesformer import TimeSformerConfig

_SPACE = "Transformer/posembed_input/pos_embedding"
_ATTENTION = "MultiHeadDotProductAttention_1"


class JaxViT(Format):
    """`normalise` stacks query, key and value to one array "qkv", (..., 3, h, d)."""

    name = "the JAX ViT"
    naming = Naming(
        embeddings={"embedding/cls": "cls", "embedding/space": _SPACE},
        modules={
            "embedding/patch": "embedding",
            "norm": "Transformer/encoder_norm",
            "head": "head",
        },
        block="Transformer/encoderblock_{}/",
        mlp={
            "mlp/norm": "LayerNorm_2",
            "mlp/fc1": "MlpBlock_3/Dense_0",
            "mlp/fc2": "MlpBlock_3/Dense_1",
        },
        attentions={
            "space": {
                "spatial": {
                    "norm": "LayerNorm_0",
                    "qkv": f"{_ATTENTION}/qkv",
                    "proj": f"{_ATTENTION}/out",
                }
            }
        },
    )

    def detect(self, names: Collection[str]) -> bool:
        return "embedding/kernel" in names and any(
            name.startswith("Transformer/encoderblock_") for name in names
        )

    def module_parameters(self, path: str, name: str) -> dict[str, str]:
        weight = weight_name(path)
        return {f"{path}/{weight}": f"{name}/{weight}", f"{path}/bias": f"{name}/bias"}

    def to_jax(self, path: str, value: np.ndarray) -> np.ndarray:
        if path == "embedding/patch/kernel":
            return value.reshape(-1, value.shape[-1])  # p q c d -> (p q c) d
        if "/qkv/" in path:
            return value.reshape(*value.shape[:-2], -1)  # ... 3 h k -> ... 3 (h k)
        if path.endswith("/proj/kernel"):
            return value.reshape(-1, value.shape[-1])  # h k d -> (h k) d
        if path == "embedding/space":
            return value[0]
        return value.reshape(-1) if path == "embedding/cls" or path.endswith("/bias") else value

    def from_jax(self, path: str, value: np.ndarray, config: TimeSformerConfig) -> np.ndarray:
        heads, width = config.num_heads, config.hidden_size
        shapes = {
            "embedding/patch/kernel": (config.patch_size, config.patch_size, 3, width),
            "embedding/cls": (1, 1, width),
            "embedding/space": (1, -1, width),
        }
        if path in shapes:
            return value.reshape(shapes[path])
        if "/qkv/" in path:
            return value.reshape(*value.shape[:-1], heads, -1)
        return value.reshape(heads, -1, width) if path.endswith("/proj/kernel") else value

    def normalise(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        """With query, key and value stacked, and without a layer before the head."""
        out = with_joined_qkv(arrays, "/", _stack, self.name)
        return without_pre_logits(out, "pre_logits/", "head/")

    def clip_fields(self, file: WeightsFile) -> dict[str, Any]:
        """To [-1, 1], as these models were trained."""
        return {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def config_fields(self, file: WeightsFile) -> dict[str, Any]:
        arrays, block = file.arrays, self.naming.block.format(0)
        height, across, channels, width = shape_of(arrays, "embedding/kernel", 4)
        rows = shape_of(arrays, _SPACE, 3)[1]
        mlp = shape_of(arrays, f"{block}MlpBlock_3/Dense_0/kernel", 2)[1]
        fields = {
            "image_size": image_size((height, across, channels), "embedding/kernel", rows, _SPACE),
            "patch_size": height,
            "hidden_size": width,
            "depth": self.depth(arrays),
            "mlp_ratio": mlp / width,
            "num_heads": shape_of(arrays, f"{block}{_ATTENTION}/qkv/kernel", 4)[2],
        }
        if "head/kernel" in arrays:
            fields["num_classes"] = shape_of(arrays, "head/kernel", 2)[1]
        return fields


def _stack(parts: list[LazyArray]) -> LazyArray:
    """Stacks (..., h, d) arrays to (..., 3, h, d)."""
    *leading, heads, channels = parts[0].shape
    return LazyArray(
        (*leading, 3, heads, channels), lambda: np.stack([part.load() for part in parts], axis=-3)
    )
