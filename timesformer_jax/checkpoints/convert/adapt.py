"""Changes a checkpoint to another attention scheme, image size, clip length or head."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util

from timesformer_jax.checkpoints.convert.checkpoint import Checkpoint
from timesformer_jax.checkpoints.files import LazyArray
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.errors import InputError
from timesformer_jax.models.embedding import resize_space, resize_time
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, new_head, parameters

RESIZES = ("bicubic", "official")


def adapt(source: Checkpoint, target: TimeSformerConfig, resize: str = "bicubic") -> Checkpoint:
    """The checkpoint as a model of another config.

    Args:
      source: a checkpoint.
      target: the config to adapt to. Its attention may differ if the source is an image model or
        space-only. Every attention layer of a block then starts as a copy of the spatial one, and
        every `temporal_fc` at zero, so that the video model starts as the image model.
      resize: how position embeddings are resized. "bicubic": in two dimensions, and linearly in
        time. "official": as the release does, by nearest neighbours over the flattened patches;
        this scrambles space and is there for parity only.

    Raises:
      InputError: if the source cannot become the target.
    """
    params, labels = dict(source.params), source.labels
    if target.attention != source.config.attention:
        params = _copy_spatial_attention(params, source.config, target)
    if target.num_classes != source.config.num_classes:
        logging.warning(
            "%s: its head of %d classes is replaced by a new one of %d",
            source.path, source.config.num_classes, target.num_classes,
        )  # fmt: skip
        params |= lazy_new_head(target)
        source, labels = dataclasses.replace(source, multilabel=False), ()
    return dataclasses.replace(
        source,
        config=target,
        params=_adapt_embeddings(params, source, target, resize),
        clip=_adapt_clip(source.clip, source.config, target),
        labels=labels,
    )


def frame_stride(num_frames: int) -> int:
    """The frame stride of the paper's models for a number of frames."""
    return {8: 32, 16: 16, 96: 4}.get(num_frames, max(256 // num_frames, 1))


@functools.lru_cache(maxsize=8)
def parameter_shapes(config: TimeSformerConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by path."""
    flat = traverse_util.flatten_dict(parameters(abstract(config)), sep="/")
    return {path: tuple(value.shape) for path, value in flat.items()}


def lazy_new_head(config: TimeSformerConfig) -> dict[str, LazyArray]:
    """The parameters of a newly initialised head by path."""
    head = {f"head/{name}": np.asarray(value) for name, value in new_head(config).items()}
    return {
        path: LazyArray(value.shape, functools.partial(np.asarray, value))
        for path, value in head.items()
    }


def _copy_spatial_attention(
    params: dict[str, LazyArray], source: TimeSformerConfig, target: TimeSformerConfig
) -> dict[str, LazyArray]:
    """Every attention layer of the target as a copy of the spatial one; the rest of it zero."""
    if source.attention != "space":
        raise InputError(
            f"a {source.attention} model cannot become a {target.attention} one, only an image "
            "model or a space-only one can; leave attention out"
        )
    out = {path: value for path, value in params.items() if "/attention/" not in path}
    for path, shape in parameter_shapes(target).items():
        block, is_attention, layer_and_part = path.partition("/attention/")
        if is_attention:
            part = layer_and_part.partition("/")[2]
            out[path] = params.get(f"{block}/attention/spatial/{part}") or _zeros(shape)
    return out


def _adapt_embeddings(
    params: dict[str, LazyArray], source: Checkpoint, target: TimeSformerConfig, resize: str
) -> dict[str, LazyArray]:
    """Drops, resizes or adds position embeddings."""
    params, shapes = dict(params), parameter_shapes(target)
    for name, old, new in (
        ("space", source.config.grid, target.grid),
        ("time", (source.config.num_frames,), (target.num_frames,)),
    ):
        path = f"embedding/{name}"
        if path not in shapes:
            if params.pop(path, None):
                logging.warning("%s: %s embedding dropped", source.path, name)
        elif path not in params:
            params[path] = _zeros(shapes[path])  # it adds nothing until it is trained
        elif old != new:
            logging.warning(
                "%s: %s embedding resized (%s), %s to %s", source.path, name, resize, old, new
            )
            load = functools.partial(_load_resized, params[path].load, old, new, resize)
            params[path] = LazyArray(shapes[path], load)
    return params


def _adapt_clip(clip: ClipSpec, source: TimeSformerConfig, target: TimeSformerConfig) -> ClipSpec:
    if target.num_frames != source.num_frames:
        is_papers = clip.frame_stride == frame_stride(source.num_frames)
        clip = clip.with_frames(target.num_frames)
        if is_papers:
            clip = dataclasses.replace(clip, frame_stride=frame_stride(target.num_frames))
    if target.image_size != source.image_size:
        short_side = max(clip.short_side, target.image_size)
        clip = dataclasses.replace(clip, crop=target.image_size, short_side=short_side)
    return clip


def _zeros(shape: tuple[int, ...]) -> LazyArray:
    return LazyArray(shape, functools.partial(np.zeros, shape, np.float32))


def _load_resized(
    load: Callable[[], np.ndarray], old: tuple[int, ...], new: tuple[int, ...], resize: str
) -> np.ndarray:
    """A position embedding for another grid (rows, columns), or another length (frames,)."""
    table, method = jnp.asarray(load()), "nearest" if resize == "official" else "bicubic"
    if len(old) == 1:
        return np.asarray(resize_time(table, new[0], method))
    if resize == "official":
        # The patches are resized as if they were a sequence: 196 to 784 takes patch i // 4.
        patches = resize_time(table[1:], math.prod(new), method)
        return np.asarray(jnp.concatenate([table[:1], patches]))
    return np.asarray(resize_space(table, (old[0], old[1]), (new[0], new[1]), method))
