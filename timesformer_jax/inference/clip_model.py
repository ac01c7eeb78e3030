"""The model on clips of any number: crops of their own size, batches, one program for each."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.distributed.device_memory import memory_advice
from timesformer_jax.host_memory import require_memory_for
from timesformer_jax.models import tuning
from timesformer_jax.models.timesformer import class_probabilities, with_parameters
from timesformer_jax.transforms.preprocess import preprocess

# Clips in a batch on accelerators. A CPU computes a clip as fast alone as in a batch.
BATCH_SIZE = 8

# Frames (T, H, W, 3) uint8 and crop boxes (C, 3) of each clip, with one C for all. Sizes of the
# frames may differ, and with `ClipSpec.short` "mask" their number may be less than T.
ClipInputs = Sequence[tuple[np.ndarray, np.ndarray]]

# What a program computes of clips: arrays whose first axis is the clip.
Outputs = dict[str, np.ndarray]


class ClipModel:
    """Computes probabilities and features of decoded clips. It may be used from several threads.

    Args:
      metadata, params: of the checkpoint.
      crops: of each clip.
      batch_size: clips at a time, each with all its crops; None: `BATCH_SIZE`, or 1 on a CPU.
      attention_kernels: as for `tuning.using`.
    """

    def __init__(
        self,
        metadata: CheckpointMetadata,
        params: dict,
        crops: int,
        batch_size: int | None,
        attention_kernels: str,
    ):
        self._metadata, self._params, self._crops = metadata, params, crops
        self._kernels = attention_kernels
        self.batch_size = batch_size or (1 if jax.default_backend() == "cpu" else BATCH_SIZE)
        require_memory_for(
            self.batch_size, metadata.clip.frames, metadata.clip.crop, "--batch_size"
        )
        self._lock = threading.Lock()
        self._tuned: set[int] = set()  # sizes of batches that kernels are chosen for
        spec, dtype = metadata.clip, metadata.model.dtype
        self._prepare = jax.jit(lambda frames, boxes: preprocess(frames, boxes, spec, dtype=dtype))
        self._classify = jax.jit(self._probabilities)
        self._encode = jax.jit(self._features, static_argnames=("frames", "positions"))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While it is entered, no other thread computes; programs use the chosen kernels."""
        with (
            self._lock,
            tuning.using(self._kernels),
            memory_advice("lower --batch_size"),
        ):
            yield

    def inputs(self, frames: np.ndarray, crop_boxes: np.ndarray) -> jax.Array:
        """The crops of one clip, cropped, resized and normalised, as `model` takes them.

        Args:
          frames: (T, H, W, 3) uint8.
          crop_boxes: (C, 3), top, left and side in pixels.

        Returns:
          (C, T, S, S, 3) float32.
        """
        return self._prepare(np.broadcast_to(frames, (len(crop_boxes), *frames.shape)), crop_boxes)

    def classify(self, clips: ClipInputs) -> np.ndarray:
        """(n, classes) float32 probabilities of n clips, each the mean over its crops."""
        return self._in_batches(self._classify, clips)

    def encode(
        self,
        clips: ClipInputs,
        *,
        frames: bool = False,
        positions: bool = False,
    ) -> Outputs:
        """The features of n clips, as for `classify`: an entry for each field of `Features`.

        "clips" is (n, C, D), "frames" (n, C, T, D), "positions" (n, C, N, D), all float32. Of
        "frames", those that a shorter clip lacks are NaN.
        """
        program = functools.partial(self._encode, frames=frames, positions=positions)
        return self._in_batches(program, clips)

    def _in_batches(self, program: Callable, clips: ClipInputs) -> Any:
        """Runs a program on clips; batches have one size, and the last one is filled up.

        Few clips make a smaller batch, of a power of two, so that few sizes are compiled.
        """
        size = min(self.batch_size, 1 << (len(clips) - 1).bit_length())
        outputs = []
        for first in range(0, len(clips), size):
            batch = clips[first : first + size]
            inputs = [self.inputs(self._filled(frames), boxes) for frames, boxes in batch]
            inputs += [inputs[-1]] * (size - len(batch))
            lengths = self._lengths(batch, size)
            with self.alone():
                video = jnp.concatenate(inputs)
                self._choose_kernels(len(video))
                found = jax.device_get(program(self._params, video, lengths))
            outputs.append(jax.tree.map(lambda x: x[: len(batch)], found))  # noqa: B023
        return jax.tree.map(lambda *x: np.concatenate(x), *outputs)

    def _filled(self, frames: np.ndarray) -> np.ndarray:
        """A clip with `ClipSpec.short` "mask", filled up to T frames; any other as it is."""
        missing = self._metadata.clip.frames - len(frames)
        if self._metadata.clip.short != "mask" or missing <= 0:
            return frames
        return np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])

    def _lengths(self, batch: ClipInputs, size: int) -> np.ndarray | None:
        """(size * C,), the frames of each crop that count; None if all do for this checkpoint."""
        if self._metadata.clip.short != "mask":
            return None
        lengths = [len(frames) for frames, _ in batch]
        lengths += lengths[-1:] * (size - len(batch))
        return np.repeat(np.array(lengths, np.int32), self._crops)

    def _choose_kernels(self, clips: int) -> None:
        if clips not in self._tuned:
            spec, model = self._metadata.clip, self._metadata.model
            tuning.choose_kernels(
                model, clips, spec.frames, spec.crop, gradients=False, masked=spec.short == "mask"
            )
            self._tuned.add(clips)

    # ---- programs: (n * C, T, S, S, 3) normalised to outputs of n clips -------------------------

    def _probabilities(
        self, params: dict, video: jax.Array, lengths: jax.Array | None
    ) -> jax.Array:
        logits = with_parameters(self._metadata.model, params)(video, valid_frames=lengths)
        probabilities = class_probabilities(logits, self._metadata.multilabel)
        return probabilities.reshape(-1, self._crops, logits.shape[-1]).mean(axis=1)

    def _features(
        self,
        params: dict,
        video: jax.Array,
        lengths: jax.Array | None,
        frames: bool,
        positions: bool,
    ) -> dict[str, jax.Array]:
        tokens = with_parameters(self._metadata.model, params).tokens(video, lengths)
        valid = None if tokens.valid is None else tokens.valid[..., None]  # B T 1
        found = {"clips": tokens.cls}
        if frames:
            mean = tokens.patches.mean(axis=2)
            found["frames"] = mean if valid is None else jnp.where(valid, mean, jnp.nan)
        if positions:
            there = None if valid is None else valid[..., None]
            found["positions"] = tokens.patches.mean(axis=1, where=there)
        return {
            name: x.astype(jnp.float32).reshape(-1, self._crops, *x.shape[1:])
            for name, x in found.items()
        }
