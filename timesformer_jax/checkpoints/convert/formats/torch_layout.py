"""The layout of a vision transformer's parameters in PyTorch, shared by its libraries."""

from __future__ import annotations

from typing import Any

import numpy as np

from timesformer_jax.checkpoints.convert.formats.base import (
    Format,
    image_size,
    shape_of,
    weight_name,
)
from timesformer_jax.checkpoints.files import WeightsFile
from timesformer_jax.models.timesformer import TimeSformerConfig


class TorchFormat(Format):
    """A format of a PyTorch library.

    Linear weights are (out, in), the patch convolution is (D, 3, P, P), and the classification
    token and the embeddings have leading axes of size 1.
    """

    def module_parameters(self, path: str, name: str) -> dict[str, str]:
        return {f"{path}/{weight_name(path)}": f"{name}.weight", f"{path}/bias": f"{name}.bias"}

    def to_jax(self, path: str, value: np.ndarray) -> np.ndarray:
        if path == "embedding/patch/kernel":
            return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])  # d c p q -> (p q c) d
        if path == "embedding/cls":
            return value.reshape(-1)
        if path in ("embedding/space", "embedding/time"):
            return value[0]
        value = value.T if path.endswith("/kernel") else value
        return value.reshape(*value.shape[:-1], 3, -1) if "/qkv/" in path else value

    def from_jax(self, path: str, value: np.ndarray, config: TimeSformerConfig) -> np.ndarray:
        if path == "embedding/patch/kernel":
            p = config.patch_size
            return value.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)  # (p q c) d -> d c p q
        if path == "embedding/cls":
            return value[None, None]
        if path in ("embedding/space", "embedding/time"):
            return value[None]
        if "/qkv/" in path:
            value = value.reshape(*value.shape[:-2], -1)
        return value.T if path.endswith("/kernel") else value

    def config_fields(self, file: WeightsFile) -> dict[str, Any]:
        """The fields that the arrays' shapes tell of any model; subclasses add theirs."""
        arrays, naming = file.arrays, self.naming
        space = naming.embeddings["embedding/space"]
        patch = naming.modules["embedding/patch"] + ".weight"
        mlp = naming.block.format(0) + naming.mlp["mlp/fc1"] + ".weight"
        head = naming.modules["head"] + ".weight"
        width, channels, height, across = shape_of(arrays, patch, 4)
        rows = shape_of(arrays, space, 3)[1]
        fields = {
            "image_size": image_size((height, across, channels), patch, rows, space),
            "patch_size": height,
            "hidden_size": width,
            "depth": self.depth(arrays),
            "mlp_ratio": shape_of(arrays, mlp, 2)[0] / width,
        }
        if head in arrays:
            fields["num_classes"] = shape_of(arrays, head, 2)[0]
        return fields
