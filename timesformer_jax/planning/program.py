"""The programs of training and inference, from a config, for devices that need not exist."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.sampling import decoded_side
from timesformer_jax.distributed.mesh import BATCH_SPEC, check_batch, make_mesh
from timesformer_jax.distributed.sharding import batch_sharding, shardings
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.step import make_step
from timesformer_jax.models import tuning
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, parameters
from timesformer_jax.training.checks import check_model
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import TrainState, abstract_state, make_train_step
from timesformer_jax.transforms.augmentation import Augmentation

if TYPE_CHECKING:  # planning.memory is used where ml_collections is not installed
    from ml_collections import ConfigDict

CLASSES = 400  # if the config takes them from the data
WORKS = ("training", "inference")
_STEPS_PER_EPOCH = 1000  # depends on the data, and does not change the cost of a step


class Program(NamedTuple):
    """A step of training or inference that can be compiled; it holds shapes, no arrays.

    Attributes:
      model, clip: the model, and the clips that it sees.
      mesh: the devices.
      state: shapes, dtypes and shardings of the training state; of inference the parameters only.
      batch: shapes, dtypes and shardings of the inputs of all devices together.
      step: the jitted step.
      train: which parameters are trained, "all" or "head"; "none" for inference.
      parts: how many parts of a batch go through the model one after another.
      kernels: the config's attention_kernels. "auto" takes what `select.unmeasured_choice` says.
    """

    model: TimeSformerConfig
    clip: ClipSpec
    mesh: Mesh
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: jax.stages.Wrapped
    train: str
    parts: int
    kernels: str

    @property
    def work(self) -> str:
        """One of `WORKS`."""
        return "inference" if self.train == "none" else "training"

    @property
    def batch_size(self) -> int:
        """Clips of training, videos of inference."""
        return self.batch["frames"].shape[0]

    @property
    def clips(self) -> int:
        """Clips in a step: of inference, all views of its videos."""
        return math.prod(self.batch["crop_boxes"].shape[:-1])

    @property
    def frame_side(self) -> int:
        """Of the square frames that are decoded, in pixels."""
        return self.batch["frames"].shape[-2]

    @property
    def batch_multiple(self) -> int:
        """Every batch size must be a multiple of this."""
        return self.parts * math.prod(self.mesh.shape[axis] for axis in BATCH_SPEC[0])

    def lower(self) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh), tuning.using(self.kernels):
            held = self.state if self.work == "training" else self.state.params
            return self.step.lower(held, self.batch)


def batch_size_of(config: ConfigDict, work: str) -> int:
    """The batch size of a config: clips of training, videos of inference."""
    return config.batch_size if work == "training" else config.eval.batch_size


def build(
    config: ConfigDict, devices: list[jax.Device], batch_size: int, work: str = "training"
) -> Program:
    """The program of `config` on `devices`: a step of training, or a batch of its evaluation.

    The frames are squares as they are decoded from videos with a short side of 256 pixels, or of
    the largest in data.short_side_range if 256 is not in this range.

    Args:
      config: a recipe.
      devices: as many as its mesh has.
      batch_size: see `Program.batch_size`.
      work: one of `WORKS`.

    Raises:
      InputError: if the config's mesh or the batch does not fit the devices, or a field of the
        config is wrong.
    """
    if work not in WORKS:
        raise InputError(f"--work={work}: there are {' and '.join(WORKS)}")
    mesh = make_mesh(**config.mesh, devices=devices)
    low, high = config.data.short_side_range
    short_side = 256 if low <= 256 <= high else high
    clip = ClipSpec(**config.clip, short_side=short_side)
    fields = dict(config.model)
    model = TimeSformerConfig(**fields | {"num_classes": fields["num_classes"] or CLASSES})
    check_model(mesh, model, clip)
    if work == "inference":
        return _inference(config, model, clip, mesh, batch_size)
    check_batch(mesh, batch_size, "--config.batch_size", config.accumulate_steps)
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
    fields = {
        "frames": ((clip.frames, side, side, 3), jnp.uint8),
        "crop_boxes": ((3,), jnp.float32),
        "flip": ((), jnp.bool_),
        "augment_seed": ((), jnp.uint32),
        "label": ((), jnp.int32),
    } | _lengths(clip)
    batch = _batch(mesh, batch_size, fields)
    return Program(model, clip, mesh, state, batch, step, train, parts, config.attention_kernels)


def _inference(
    config: ConfigDict, model: TimeSformerConfig, clip: ClipSpec, mesh: Mesh, batch_size: int
) -> Program:
    """The program of `evaluate`; that of `predict` is the same for one video, on one device."""
    check_batch(mesh, batch_size, "--config.eval.batch_size")
    views, side = config.eval.views * config.eval.crops, clip.short_side
    fields = {
        "frames": ((views, clip.frames, side, side, 3), jnp.uint8),
        "crop_boxes": ((views, 3), jnp.float32),
        "record": ((), jnp.int32),
        "valid": ((), jnp.bool_),
    } | _lengths(clip)
    params = parameters(abstract(model))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        params,
        shardings(mesh, params),
    )
    batch = _batch(mesh, batch_size, fields)
    held = TrainState(None, params, None)  # type: ignore[arg-type]
    step = make_step(model, clip, mesh)
    return Program(model, clip, mesh, held, batch, step, "none", 1, config.attention_kernels)


def _lengths(clip: ClipSpec) -> dict[str, tuple[tuple[int, ...], Any]]:
    """What a batch has beside its clips where they are filled up."""
    return {"valid_frames": ((), jnp.int32)} if clip.short == "mask" else {}


def _batch(
    mesh: Mesh, size: int, fields: dict[str, tuple[tuple[int, ...], Any]]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the batches that the input pipeline yields."""
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
