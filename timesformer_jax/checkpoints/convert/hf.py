"""Names and config.json of Hugging Face transformers' port, TimesformerForVideoClassification.

The map from our parameters to theirs serves both directions; the layout is PyTorch's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from timesformer_jax.checkpoints.convert import torch_layout
from timesformer_jax.checkpoints.convert.files import File, Stored
from timesformer_jax.checkpoints.convert.release import SCHEMES
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig

NAME = "Hugging Face's Timesformer"
# A scheme's attentions, and what the port calls their (norm, attention, further linear).
_TEMPORAL = ("temporal_layernorm", "temporal_attention", "temporal_dense")
_SPATIAL = ("layernorm_before", "attention", None)
_ATTENTIONS = {
    "divided": {"temporal": _TEMPORAL, "spatial": _SPATIAL},
    "space": {"spatial": _SPATIAL},
    "joint": {"joint": _SPATIAL},
}
_PATCH = "timesformer.embeddings.patch_embeddings.projection.weight"
_SPACE = "timesformer.embeddings.position_embeddings"
_TIME = "timesformer.embeddings.time_embeddings"

to_ours, to_theirs = torch_layout.to_ours, torch_layout.to_theirs


def recognises(names: Collection[str]) -> bool:
    # TimesformerModel, without a head, is saved without the outer name.
    return any(
        name.endswith("embeddings.patch_embeddings.projection.weight") for name in names
    ) and any(
        re.match(r"(timesformer\.)?encoder\.layer\.\d+\.attention\.attention\.qkv", n)
        for n in names
    )


def names(config: TimeSformerConfig) -> dict[str, str]:
    """Our parameter paths ("blocks/0/mlp/fc1/kernel") to the port's names.

    Raises:
      InputError: if the port has no such scheme.
    """
    if config.attention not in _ATTENTIONS:
        raise InputError(f"{NAME} has no {config.attention} attention, only {', '.join(SCHEMES)}")
    out = {"embedding/cls": "timesformer.embeddings.cls_token", "embedding/space": _SPACE}
    if config.scheme.time_embedding:
        out["embedding/time"] = _TIME
    modules = {
        "embedding/patch": _PATCH.removesuffix(".weight"),
        "norm": "timesformer.layernorm",
        "head": "classifier",
    }
    for i in range(config.depth):
        ours, theirs = f"blocks/{i}", f"timesformer.encoder.layer.{i}"
        for step, (norm, attention, further) in _ATTENTIONS[config.attention].items():
            modules[f"{ours}/attention/{step}/norm"] = f"{theirs}.{norm}"
            modules[f"{ours}/attention/{step}/qkv"] = f"{theirs}.{attention}.attention.qkv"
            modules[f"{ours}/attention/{step}/proj"] = f"{theirs}.{attention}.output.dense"
            if further:
                modules[f"{ours}/attention/{step}/temporal_fc"] = f"{theirs}.{further}"
        modules[f"{ours}/mlp/norm"] = f"{theirs}.layernorm_after"
        modules[f"{ours}/mlp/fc1"] = f"{theirs}.intermediate.dense"
        modules[f"{ours}/mlp/fc2"] = f"{theirs}.output.dense"
    return out | torch_layout.weights_and_biases(modules)


def tidy(state: dict[str, Stored]) -> dict[str, Stored]:
    """With the outer name, which a saved TimesformerModel lacks."""
    whole = any(name.startswith("timesformer.") for name in state)
    return state if whole else {f"timesformer.{name}": value for name, value in state.items()}


def fields(file: File) -> dict[str, Any]:
    """The config's fields that the arrays and, for heads and scheme, config.json tell."""
    state, config = file.state, file.about.get("config", {})
    _check_arithmetic(config)
    found = torch_layout.fields(
        state,
        patch=_PATCH,
        space=_SPACE,
        mlp="timesformer.encoder.layer.0.intermediate.dense.weight",
        block=r"timesformer\.encoder\.layer\.(\d+)\.",
    )
    temporal = any(".temporal_attention." in name for name in state)
    found["attention"] = "divided" if temporal else "joint" if _TIME in state else "space"
    if _TIME in state:
        found["num_frames"] = torch_layout.shape_of(state, _TIME, 3)[1]
    elif "num_frames" in config:
        found["num_frames"] = config["num_frames"]
    if "classifier.weight" in state:
        found["num_classes"] = torch_layout.shape_of(state, "classifier.weight", 2)[0]
    if "num_attention_heads" in config:
        found["num_heads"] = config["num_attention_heads"]
    return found


def _check_arithmetic(config: dict[str, Any]) -> None:
    for key, expected in {"hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True}.items():
        if config.get(key, expected) != expected:
            raise InputError(
                f"config.json says {key} = {config[key]!r}; this TimeSformer computes with "
                f"{expected!r} only, so the weights would give other numbers"
            )


def labels(file: File) -> tuple[str, ...]:
    """The class names in config.json; none if they are the placeholders LABEL_0, LABEL_1, ..."""
    by_index = {int(k): str(v) for k, v in file.about.get("config", {}).get("id2label", {}).items()}
    found = tuple(by_index[i] for i in sorted(by_index))
    return () if found == _placeholders(len(found)) else found


def config_json(config: TimeSformerConfig, labels: Sequence[str]) -> dict[str, Any]:
    """config.json of a model; the port fills in what is left out with its defaults."""
    labels = labels or _placeholders(config.num_classes)
    return {
        "architectures": ["TimesformerForVideoClassification"],
        "model_type": "timesformer",
        "attention_type": SCHEMES[config.attention],
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
        "drop_path_rate": 0,  # the port accepts whole numbers only
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "dtype": "float32",
    }


def preprocessor_json(clip: ClipSpec) -> dict[str, Any]:
    """preprocessor_config.json: what the port's image processor does to frames."""
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
