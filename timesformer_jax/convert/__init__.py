"""Checkpoints of other frameworks, in: `from_pretrained`. Each format has a map of its names."""

from __future__ import annotations

import dataclasses
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from timesformer_jax import checkpoints
from timesformer_jax.convert import release
from timesformer_jax.errors import InputError
from timesformer_jax.models.timesformer import (
    TimeSformer,
    TimeSformerConfig,
    new_head,
    with_parameters,
)

_CONTAINERS = ("model_state", "state_dict", "model")
_PREFIXES = ("module.", "model.")


def from_pretrained(path: str | os.PathLike, **overrides) -> TimeSformer:
    """The model that a checkpoint holds, shape and scheme read off the file.

    Reads our own checkpoint directories, the authors' release (`.pyth`) and image ViTs in timm's
    names (`.pth`, `.pt`, `.bin`, `.safetensors`), from which a video model starts as the paper
    does: `from_pretrained("vit.pth", attention="divided", num_frames=8, num_classes=10)` copies
    spatial attention to temporal attention and leaves the temporal linear layers at zero.

    Args:
      path: a file, or a directory this package's training wrote.
      **overrides: fields of `TimeSformerConfig` that the file does not tell (num_heads, if heads
        are not 64 channels wide) or that shall differ: image_size and num_frames resize the
        position embeddings, another num_classes starts a new head; both are logged.

    Raises:
      InputError: if the file is missing, damaged or of an unknown kind, or if an array is missing,
        left over or of another shape; the message names it.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        config, params = checkpoints.load_parameters(path)
        return _adapted(path, config, params, overrides)
    state = read_state_dict(path)
    try:
        source, params = _import(state, overrides)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    return _adapted(path, source, params, overrides)


def read_state_dict(path: str) -> dict[str, np.ndarray]:
    """The named arrays of a torch or safetensors file, without wrappers and prefixes.

    Raises:
      InputError: if the file is missing, cannot be read, or holds anything but tensors.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such checkpoint")
    state = _read_safetensors(path) if path.endswith(".safetensors") else _read_torch(path)
    for container in _CONTAINERS:
        if isinstance(state.get(container), dict):
            state = state[container]
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
    not_arrays = [name for name, value in state.items() if not hasattr(value, "shape")]
    if not_arrays or not state:
        what = f"{not_arrays[0]!r} is not a tensor" if not_arrays else "it is empty"
        raise InputError(f"{path}: not a state dict: {what}")
    return {name: np.asarray(value) for name, value in state.items()}


def _read_torch(path: str) -> dict:
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{path} needs torch to be read: pip install 'timesformer_jax[convert]'"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as e:
        first_line = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise InputError(
            f"{path}: not a torch file of tensors only, or damaged: {first_line}"
        ) from None
    if not isinstance(state, dict):
        raise InputError(f"{path}: holds a {type(state).__name__}; a state dict was expected")
    return state


def _read_safetensors(path: str) -> dict:
    try:
        import safetensors
        from safetensors.numpy import load_file
    except ImportError:
        raise InputError(
            f"{path} needs safetensors to be read: pip install 'timesformer_jax[convert]'"
        ) from None
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as e:
        raise InputError(f"{path}: not a safetensors file, or damaged: {e}") from None


def _import(state: dict[str, np.ndarray], overrides: dict) -> tuple[TimeSformerConfig, dict]:
    """A state dict in the release's or timm's names as (config, parameters) of the file's sizes."""
    structure = {
        key: value
        for key, value in overrides.items()
        if key not in ("image_size", "num_frames", "num_classes")
    }
    source = release.config_of(state, **structure)
    state = dict(state)
    if "head.weight" not in state:
        logging.warning("the file has no head: a new one of %d classes starts", source.num_classes)
        head = new_head(source)
        state["head.weight"], state["head.bias"] = np.asarray(head["kernel"]).T, head["bias"]
    if source.attention == "divided" and "time_embed" not in state:
        _image_to_video(state, source)
    elif source.scheme.time_embedding and "time_embed" not in state:
        state["time_embed"] = np.zeros((1, source.num_frames, source.hidden_size), np.float32)
    flat = {}
    for ours, theirs in release.names(source).items():
        if theirs not in state:
            raise InputError(f"{theirs} is missing; a {source.attention} model needs it")
        flat[ours] = release.to_ours(theirs, state.pop(theirs))
    if state:
        raise InputError(
            f"{next(iter(state))} has no place in a {source.attention} model"
            f" ({len(state)} such arrays); pass attention=... if the scheme was misread"
        )
    return source, traverse_util.unflatten_dict(flat, sep="/")


def _image_to_video(state: dict[str, np.ndarray], config: TimeSformerConfig) -> None:
    """Fills in what an image ViT lacks of a divided model, as the paper starts from one."""
    width = config.hidden_size
    state["time_embed"] = np.zeros((1, config.num_frames, width), np.float32)
    for i in range(config.depth):
        block = f"blocks.{i}"
        for kind in ("weight", "bias"):
            for part in ("norm1", "attn.qkv", "attn.proj"):
                if f"{block}.{part}.{kind}" in state:
                    state[f"{block}.temporal_{part}.{kind}"] = state[f"{block}.{part}.{kind}"]
        state[f"{block}.temporal_fc.weight"] = np.zeros((width, width), np.float32)
        state[f"{block}.temporal_fc.bias"] = np.zeros(width, np.float32)


def _adapted(path: str, source: TimeSformerConfig, params: dict, overrides: dict) -> TimeSformer:
    """The model of `source` with `overrides`: embeddings resized, the head replaced if need be."""
    config = dataclasses.replace(source, **overrides)
    params = jax.tree.map(jnp.asarray, params)
    if config.num_classes != source.num_classes:
        logging.warning(
            "%s: its head of %d classes is replaced by a new one of %d",
            path, source.num_classes, config.num_classes,
        )  # fmt: skip
        params["head"] = new_head(config)
    embedding = params["embedding"]
    if config.grid != source.grid and "space" in embedding:
        logging.warning("%s: position embedding resized, %s to %s", path, source.grid, config.grid)
        table = embedding["space"]
        patches = table[1:].reshape(*source.grid, -1)
        patches = jax.image.resize(patches, (*config.grid, patches.shape[-1]), "bicubic")
        embedding["space"] = jnp.concatenate([table[:1], patches.reshape(-1, patches.shape[-1])])
    if config.num_frames != source.num_frames and "time" in embedding:
        logging.warning(
            "%s: time embedding resized, %d to %d frames",
            path, source.num_frames, config.num_frames,
        )  # fmt: skip
        shape = (config.num_frames, config.hidden_size)
        embedding["time"] = jax.image.resize(embedding["time"], shape, "linear", antialias=False)
    return with_parameters(config, params)
