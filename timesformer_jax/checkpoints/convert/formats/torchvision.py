"""Names of torchvision's image ViTs (vit_b_16 and others)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from timesformer_jax.checkpoints.convert.formats.base import Naming, without_pre_logits
from timesformer_jax.checkpoints.convert.formats.torch_layout import TorchFormat
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile


class Torchvision(TorchFormat):
    name = "torchvision's ViT"
    naming = Naming(
        embeddings={"embedding/cls": "class_token", "embedding/space": "encoder.pos_embedding"},
        modules={"embedding/patch": "conv_proj", "norm": "encoder.ln", "head": "heads.head"},
        block="encoder.layers.encoder_layer_{}.",
        mlp={"mlp/norm": "ln_2", "mlp/fc1": "mlp.0", "mlp/fc2": "mlp.3"},
        attentions={
            "space": {
                "spatial": {
                    "norm": "ln_1",
                    "qkv": "self_attention.in_proj",
                    "proj": "self_attention.out_proj",
                }
            }
        },
    )

    def detect(self, names: Collection[str]) -> bool:
        return "conv_proj.weight" in names and "class_token" in names

    def module_parameters(self, path: str, name: str) -> dict[str, str]:
        if path.endswith("/qkv"):  # parameters of the attention module, not of a linear layer
            return {f"{path}/kernel": f"{name}_weight", f"{path}/bias": f"{name}_bias"}
        return super().module_parameters(path, name)

    def clip_fields(self, file: WeightsFile) -> dict[str, Any]:
        """The mean and standard deviation of ImageNet."""
        return {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    def normalise(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        """With the MLP's names of torchvision 0.14 and later, without a layer before the head."""
        arrays = {
            name.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3."): value
            for name, value in arrays.items()
        }
        return without_pre_logits(arrays, "heads.pre_logits.", "heads.head.")
