"""The program of an evaluation: class probabilities, averaged over the views of each video."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.models.timesformer import (
    TimeSformerConfig,
    class_probabilities,
    with_parameters,
)
from timesformer_jax.transforms.preprocess import preprocess

Probabilities = Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]


def make_probabilities(
    model: TimeSformerConfig, clip: ClipSpec, multilabel: bool = False
) -> Probabilities:
    """A function that predicts class probabilities, averaged over views.

    It takes parameters, frames (B, V, T, H, W, 3) uint8, crop_boxes (B, V, 3), and the frames of
    each record's clips that count, (B,), or None if all do. It returns (B, classes) float32: the
    mean over the V views of the softmax, as in the paper (the authors' release sums logits). Of
    multi-label models the mean of the sigmoids.
    """

    def probabilities(
        params: Any, frames: jax.Array, crop_boxes: jax.Array, lengths: jax.Array | None = None
    ) -> jax.Array:
        views = frames.shape[:2]
        frames = frames.reshape(-1, *frames.shape[2:])  # b v ... -> (b v) ...
        video = preprocess(frames, crop_boxes.reshape(-1, 3), clip, dtype=model.dtype)
        if lengths is not None:
            lengths = jnp.repeat(lengths, views[1])
        logits = with_parameters(model, params)(video, valid_frames=lengths)
        return class_probabilities(logits, multilabel).reshape(*views, -1).mean(axis=1)

    return probabilities


@functools.lru_cache(maxsize=2)
def make_step(
    model: TimeSformerConfig, clip: ClipSpec, mesh: Mesh, multilabel: bool = False
) -> jax.stages.Wrapped:
    """The jitted function from parameters and batch to probabilities, records and validity.

    Cached, so that a process compiles it once.
    """

    def step(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            probabilities = make_probabilities(model, clip, multilabel)
            lengths = batch.get("valid_frames")
            p = probabilities(params, batch["frames"], batch["crop_boxes"], lengths)
        return p, batch["record"], batch["valid"]

    # Replicated: every host computes the metrics of the whole split.
    return jax.jit(step, out_shardings=NamedSharding(mesh, P()))
