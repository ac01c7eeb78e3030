"""How PyTorch keeps the arrays of a vision transformer, whatever it calls them.

Linear weights are (out, in), the patch convolution is (D, 3, P, P), and the classification token
and the embeddings carry leading axes of 1. Shared by all formats but the JAX ViTs'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from absl import logging

from timesformer_jax.checkpoints.convert.files import Stored
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import TimeSformerConfig


def to_ours(ours: str, value: np.ndarray) -> np.ndarray:
    """One of their arrays in our layout; a view where that is possible.

    Args:
      ours: our path of the parameter.
      value: their array.
    """
    if ours == "embedding/patch/kernel":
        return value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])  # d c p q -> (p q c) d
    if ours == "embedding/cls":
        return value.reshape(-1)
    if ours in ("embedding/space", "embedding/time"):
        return value[0]
    value = value.T if ours.endswith("/kernel") else value
    return value.reshape(*value.shape[:-1], 3, -1) if "/qkv/" in ours else value


def to_theirs(ours: str, value: np.ndarray, config: TimeSformerConfig) -> np.ndarray:
    """The inverse of `to_ours`."""
    if ours == "embedding/patch/kernel":
        p = config.patch_size
        return value.reshape(p, p, 3, -1).transpose(3, 2, 0, 1)  # (p q c) d -> d c p q
    if ours == "embedding/cls":
        return value[None, None]
    if ours in ("embedding/space", "embedding/time"):
        return value[None]
    if "/qkv/" in ours:
        value = value.reshape(*value.shape[:-2], -1)
    return value.T if ours.endswith("/kernel") else value


def shape_of(state: Mapping[str, Stored], name: str, rank: int) -> tuple[int, ...]:
    """The shape of an array that a format cannot do without.

    Raises:
      InputError: if it is missing or has not `rank` axes.
    """
    if name not in state:
        raise InputError(f"{name} is missing; this is no whole TimeSformer or ViT")
    shape = tuple(state[name].shape)
    if len(shape) != rank:
        raise InputError(f"{name} has shape {shape}; {rank} axes were expected")
    return shape


def fields(
    state: Mapping[str, Stored], *, patch: str, space: str, mlp: str, block: str
) -> dict[str, Any]:
    """The fields of a config that the shapes tell.

    Args:
      state: the arrays, in PyTorch's layout.
      patch, space, mlp: names of the patch convolution, of the position embedding and of the first
        block's wider linear layer.
      block: pattern of a block's names; group 1 is its number.
    """
    width, channels, height, across = shape_of(state, patch, 4)
    rows = shape_of(state, space, 3)[1]
    return sizes(
        patch=(height, across, channels),
        patch_name=patch,
        rows=rows,
        rows_name=space,
        width=width,
        mlp=shape_of(state, mlp, 2)[0],
        depth=depth(state, block),
    )


def sizes(
    *,
    patch: tuple[int, int, int],
    patch_name: str,
    rows: int,
    rows_name: str,
    width: int,
    mlp: int,
    depth: int,
) -> dict[str, Any]:
    """`fields` from plain numbers, whichever the layout; `patch` is (height, width, channels)."""
    if patch[0] != patch[1] or patch[2] != 3:
        raise InputError(
            f"{patch_name} takes patches of {patch[0]} x {patch[1]} in {patch[2]} channels; "
            "square patches of RGB frames were expected"
        )
    side = math.isqrt(max(rows - 1, 0))
    if side < 1 or side * side != rows - 1:
        raise InputError(f"{rows_name} has {rows} rows; one and a square were expected")
    return {
        "image_size": side * patch[0],
        "patch_size": patch[0],
        "hidden_size": width,
        "depth": depth,
        "mlp_ratio": mlp / width,
    }


def depth(state: Collection[str], pattern: str) -> int:
    """Blocks that the names number; group 1 of `pattern` is a block's number."""
    return 1 + max((int(m[1]) for name in state if (m := re.match(pattern, name))), default=-1)


def weights_and_biases(modules: dict[str, str]) -> dict[str, str]:
    """A map of modules, our path to their name, as a map of their parameters."""
    out = {}
    for ours, theirs in modules.items():
        weight = "scale" if ours.split("/")[-1] == "norm" else "kernel"
        out[f"{ours}/{weight}"] = f"{theirs}.weight"
        out[f"{ours}/bias"] = f"{theirs}.bias"
    return out


def without_pre_logits(state: dict[str, Stored], pre_logits: str, head: str) -> dict[str, Stored]:
    """Drops a hidden layer before the head, and the head, which means nothing without it."""
    if not any(name.startswith(pre_logits) for name in state):
        return state
    logging.warning("%s* and the head behind it dropped: a TimeSformer has none", pre_logits)
    return {k: v for k, v in state.items() if not k.startswith((pre_logits, head))}
