"""Names and config.json of TimesformerForVideoClassification in Hugging Face transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from timesformer_jax.checkpoints import schema
from timesformer_jax.checkpoints.convert.formats.base import Naming, shape_of
from timesformer_jax.checkpoints.convert.formats.release import ATTENTION_TYPES
from timesformer_jax.checkpoints.convert.formats.torch_layout import TorchFormat
from timesformer_jax.checkpoints.files import LazyArray, WeightsFile
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig

MULTILABEL = "multi_label_classification"  # transformers' name, in config.json
_TIME = "timesformer.embeddings.time_embeddings"
_SPATIAL = {
    "norm": "layernorm_before",
    "qkv": "attention.attention.qkv",
    "proj": "attention.output.dense",
}
_TEMPORAL = {
    "norm": "temporal_layernorm",
    "qkv": "temporal_attention.attention.qkv",
    "proj": "temporal_attention.output.dense",
    "temporal_fc": "temporal_dense",
}


class HuggingFace(TorchFormat):
    name = "Hugging Face's Timesformer"
    naming = Naming(
        embeddings={
            "embedding/cls": "timesformer.embeddings.cls_token",
            "embedding/space": "timesformer.embeddings.position_embeddings",
            "embedding/time": _TIME,
        },
        modules={
            "embedding/patch": "timesformer.embeddings.patch_embeddings.projection",
            "norm": "timesformer.layernorm",
            "head": "classifier",
        },
        block="timesformer.encoder.layer.{}.",
        mlp={
            "mlp/norm": "layernorm_after",
            "mlp/fc1": "intermediate.dense",
            "mlp/fc2": "output.dense",
        },
        attentions={
            "divided": {"temporal": _TEMPORAL, "spatial": _SPATIAL},
            "space": {"spatial": _SPATIAL},
            "joint": {"joint": _SPATIAL},
        },
    )

    def detect(self, names: Collection[str]) -> bool:
        # A saved TimesformerModel, which has no head, lacks the prefix "timesformer.".
        qkv = re.compile(r"(timesformer\.)?encoder\.layer\.\d+\.attention\.attention\.qkv")
        return any(
            name.endswith("embeddings.patch_embeddings.projection.weight") for name in names
        ) and any(qkv.match(name) for name in names)

    def normalise(self, arrays: dict[str, LazyArray]) -> dict[str, LazyArray]:
        """With the prefix "timesformer.", which a saved TimesformerModel lacks."""
        if any(name.startswith("timesformer.") for name in arrays):
            return arrays
        return {f"timesformer.{name}": value for name, value in arrays.items()}

    def config_fields(self, file: WeightsFile) -> dict[str, Any]:
        """From the arrays and from config.json, which tells heads and a space-only model's frames.

        Raises:
          InputError: if config.json asks for arithmetic that our model does not have.
        """
        arrays, config = file.arrays, file.metadata.get("config", {})
        _check_arithmetic(config)
        fields = super().config_fields(file)
        divided = any(".temporal_attention." in name for name in arrays)
        fields["attention"] = "divided" if divided else "joint" if _TIME in arrays else "space"
        if _TIME in arrays:
            fields["num_frames"] = shape_of(arrays, _TIME, 3)[1]
        elif "num_frames" in config:
            fields["num_frames"] = schema.whole_number(config["num_frames"], "num_frames")
        add_heads_and_check_shapes(config, fields)
        return fields

    def labels(self, file: WeightsFile) -> tuple[str, ...]:
        """The class names in config.json; () if they are the placeholders LABEL_0, LABEL_1, ..."""
        id2label = file.metadata.get("config", {}).get("id2label")
        labels = schema.labels_by_index(id2label, "id2label in config.json")
        return () if labels == _placeholders(len(labels)) else labels


def _check_arithmetic(config: dict[str, Any]) -> None:
    for key, expected in {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}.items():
        if config.get(key, expected) != expected:
            raise InputError(
                f"config.json says {key} = {config[key]!r}; this TimeSformer computes with "
                f"{expected!r} only, so the weights would give other numbers"
            )


def add_heads_and_check_shapes(config: dict[str, Any], fields: dict[str, Any]) -> None:
    """Adds the heads that config.json tells; it must tell the shape that the arrays have.

    transformers builds the model from config.json and could not load the arrays.
    """
    if "num_attention_heads" in config:
        name = "num_heads (num_attention_heads in config.json)"
        fields["num_heads"] = schema.whole_number(config["num_attention_heads"], name)
    told = {
        "image_size": "image_size", "patch_size": "patch_size", "hidden_size": "hidden_size",
        "depth": "num_hidden_layers", "num_frames": "num_frames",
    }  # fmt: skip
    for field, key in told.items():
        if key in config and field in fields and config[key] != fields[field]:
            raise InputError(
                f"config.json says {key} = {schema.shown(config[key])}, and the arrays "
                f"{fields[field]}; correct config.json"
            )


def config_json(
    config: TimeSformerConfig, labels: Sequence[str], multilabel: bool = False
) -> dict[str, Any]:
    """config.json of a model; transformers fills in its defaults for the other fields."""
    labels = labels or _placeholders(config.num_classes)
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "model_type": "timesformer",
        "attention_type": ATTENTION_TYPES[config.attention],
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "num_frames": config.num_frames,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "drop_path_rate": 0,  # transformers accepts whole numbers only
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": MULTILABEL if multilabel else "single_label_classification",
    }


def preprocessor_json(clip: ClipSpec) -> dict[str, Any]:
    """preprocessor_config.json, for the image processor of transformers."""
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": clip.crop},
        "do_center_crop": True,
        "crop_size": {"height": clip.crop, "width": clip.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(clip.mean),
        "image_std": list(clip.std),
    }


def _placeholders(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))
