"""The program of a training step, from a config, for devices that need not exist."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.sampling import decoded_side
from timesformer_jax.distributed.mesh import BATCH_SPEC, check_batch, make_mesh
from timesformer_jax.distributed.sharding import batch_sharding
from timesformer_jax.models.timesformer import TimeSformerConfig
from timesformer_jax.training.checks import check_model
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import TrainState, abstract_state, make_train_step
from timesformer_jax.transforms.augmentation import Augmentation

if TYPE_CHECKING:  # planning.memory is used where ml_collections is not installed
    from ml_collections import ConfigDict

CLASSES = 400  # if the config takes them from the data
_STEPS_PER_EPOCH = 1000  # depends on the data, and does not change the cost of a step


class Program(NamedTuple):
    """A training step that can be compiled; it holds shapes, no arrays.

    Attributes:
      model, clip: the model, and the clips that it is trained on.
      mesh: the devices.
      state: shapes, dtypes and shardings of the training state.
      batch: shapes, dtypes and shardings of the inputs of all devices together.
      step: the jitted training step.
      train: which parameters are trained, "all" or "head".
      parts: how many parts of a batch go through the model one after another.
    """

    model: TimeSformerConfig
    clip: ClipSpec
    mesh: Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: jax.stages.Wrapped
    train: str
    parts: int

    @property
    def batch_size(self) -> int:
        return self.batch["label"].shape[0]

    @property
    def batch_multiple(self) -> int:
        """Every batch size must be a multiple of this."""
        return self.parts * math.prod(self.mesh.shape[axis] for axis in BATCH_SPEC[0])

    @property
    def has_loops(self) -> bool:
        """Whether the program contains a loop: scanned layers, or parts of a batch."""
        return self.model.scan_layers or self.parts > 1

    def lower(self) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state, self.batch)


def build(config: ConfigDict, devices: list[jax.Device], batch_size: int) -> Program:
    """The training step of `config` on `devices`.

    The frames are squares as training decodes them from videos with a short side of 256 pixels, or
    of the largest in data.short_side_range if 256 is not in this range.

    Raises:
      InputError: if the config's mesh or the batch does not fit the devices, or a field of the
        config is wrong.
    """
    mesh = make_mesh(**config.mesh, devices=devices)
    check_batch(mesh, batch_size, "--config.batch_size", config.accumulate_steps)
    low, high = config.data.short_side_range
    short_side = 256 if low <= 256 <= high else high
    clip = ClipSpec(**config.clip, short_side=short_side)
    fields = dict(config.model)
    model = TimeSformerConfig(**fields | {"num_classes": fields["num_classes"] or CLASSES})
    check_model(mesh, model, clip)
    schedule = learning_rate(
        config.optimizer, config.optimizer.reference_batch_size, _STEPS_PER_EPOCH
    )
    optimizer = make_optimizer(config.optimizer, schedule)
    state = abstract_state(model, optimizer, mesh, ema=config.ema_decay > 0)
    train, parts = config.optimizer.trainable, config.accumulate_steps
    step = make_train_step(
        model, clip, optimizer, schedule, state, mesh, config.seed, Augmentation(**config.augment),
        trainable=train, accumulate_steps=parts, ema_decay=config.ema_decay,
    )  # fmt: skip
    side = decoded_side(clip.short_side, clip.crop, low)
    batch = _batch(mesh, batch_size, clip.frames, side)
    return Program(model, clip, mesh, state, batch, step, train, parts)


def _batch(mesh: Mesh, size: int, frames: int, side: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the batches that the input pipeline yields."""
    fields = {
        "frames": ((frames, side, side, 3), jnp.uint8),
        "crop_boxes": ((3,), jnp.float32),
        "flip": ((), jnp.bool_),
        "augment_seed": ((), jnp.uint32),
        "label": ((), jnp.int32),
    }
    return {
        name: jax.ShapeDtypeStruct(
            (size, *shape), dtype, sharding=batch_sharding(mesh, name, 1 + len(shape))
        )
        for name, (shape, dtype) in fields.items()
    }


def bytes_a_chip(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
