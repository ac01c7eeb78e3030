"""Names and layouts of the JAX ViTs: `.npz` of google-research/vision_transformer and augreg.

Linear kernels are (in, out) as ours; the attention's are split by head and by query, key and
value; the patch convolution is (P, P, 3, D).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from timesformer_jax.checkpoints.convert import torch_layout
from timesformer_jax.checkpoints.convert.files import File, Stored
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig

NAME = "the JAX ViT"
_BLOCK = "Transformer/encoderblock_"
_SPACE = "Transformer/posembed_input/pos_embedding"
_QKV = ("query", "key", "value")


def recognises(names: Collection[str]) -> bool:
    return "embedding/kernel" in names and any(name.startswith(_BLOCK) for name in names)


def names(config: TimeSformerConfig) -> dict[str, str]:
    """Our parameter paths to theirs, query, key and value joined; an image model is space-only."""
    out = {"embedding/cls": "cls", "embedding/space": _SPACE}
    modules = {
        "embedding/patch": "embedding",
        "norm": "Transformer/encoder_norm",
        "head": "head",
    }
    for i in range(config.depth):
        ours, theirs = f"blocks/{i}", f"{_BLOCK}{i}"
        attention = f"{ours}/attention/spatial"
        modules[f"{attention}/norm"] = f"{theirs}/LayerNorm_0"
        modules[f"{attention}/qkv"] = f"{theirs}/MultiHeadDotProductAttention_1/qkv"
        modules[f"{attention}/proj"] = f"{theirs}/MultiHeadDotProductAttention_1/out"
        modules[f"{ours}/mlp/norm"] = f"{theirs}/LayerNorm_2"
        modules[f"{ours}/mlp/fc1"] = f"{theirs}/MlpBlock_3/Dense_0"
        modules[f"{ours}/mlp/fc2"] = f"{theirs}/MlpBlock_3/Dense_1"
    for ours, theirs in modules.items():
        weight = "scale" if ours.split("/")[-1] == "norm" else "kernel"
        out[f"{ours}/{weight}"] = f"{theirs}/{weight}"
        out[f"{ours}/bias"] = f"{theirs}/bias"
    return out


def to_ours(ours: str, value: np.ndarray) -> np.ndarray:
    if ours == "embedding/patch/kernel":
        return value.reshape(-1, value.shape[-1])  # p q c d -> (p q c) d
    if "/qkv/" in ours:
        return value.reshape(*value.shape[:-2], -1)  # ... 3 h k -> ... 3 (h k)
    if ours.endswith("/proj/kernel"):
        return value.reshape(-1, value.shape[-1])  # h k d -> (h k) d
    if ours == "embedding/space":
        return value[0]
    return value.reshape(-1) if ours == "embedding/cls" or ours.endswith("/bias") else value


def to_theirs(ours: str, value: np.ndarray, config: TimeSformerConfig) -> np.ndarray:
    heads, width = config.num_heads, config.hidden_size
    shapes = {
        "embedding/patch/kernel": (config.patch_size, config.patch_size, 3, width),
        "embedding/cls": (1, 1, width),
        "embedding/space": (1, -1, width),
    }
    if ours in shapes:
        return value.reshape(shapes[ours])
    if "/qkv/" in ours:
        return value.reshape(*value.shape[:-1], heads, -1)
    return value.reshape(heads, -1, width) if ours.endswith("/proj/kernel") else value


def tidy(state: dict[str, Stored]) -> dict[str, Stored]:
    """With query, key and value joined as one array "qkv", and without a layer before the head."""
    split = tuple(f"/{part}/" for part in _QKV)
    joined = {k: v for k, v in state.items() if not any(part in k for part in split)}
    for name in state:
        if "/query/" in name:
            parts = [name.replace("/query/", f"/{part}/") for part in _QKV]
            for part in parts:
                if part not in state:
                    raise InputError(f"{part} is missing; {NAME} needs it beside {name}")
            joined[name.replace("/query/", "/qkv/")] = _stacked([state[part] for part in parts])
    return torch_layout.without_pre_logits(joined, "pre_logits/", "head/")


def _stacked(parts: list[Stored]) -> Stored:
    # Before the head axis: (D, h, k) to (D, 3, h, k), biases (h, k) to (3, h, k).
    *leading, heads, channels = parts[0].shape
    return Stored(
        (*leading, 3, heads, channels), lambda: np.stack([part.load() for part in parts], axis=-3)
    )


def fields(file: File) -> dict[str, Any]:
    """The config's fields that the file tells; heads have an axis of their own."""
    state = file.state
    qkv = f"{_BLOCK}0/MultiHeadDotProductAttention_1/qkv/kernel"
    *patch, width = torch_layout.shape_of(state, "embedding/kernel", 4)
    found = torch_layout.sizes(
        patch=tuple(patch),
        patch_name="embedding/kernel",
        rows=torch_layout.shape_of(state, _SPACE, 3)[1],
        rows_name=_SPACE,
        width=width,
        mlp=torch_layout.shape_of(state, f"{_BLOCK}0/MlpBlock_3/Dense_0/kernel", 2)[1],
        depth=torch_layout.depth(state, rf"{_BLOCK}(\d+)/"),
    )
    found["num_heads"] = torch_layout.shape_of(state, qkv, 4)[2]
    if "head/kernel" in state:
        found["num_classes"] = torch_layout.shape_of(state, "head/kernel", 2)[1]
    return found
