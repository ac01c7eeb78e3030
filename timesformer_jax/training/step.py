"""The training step: one pure function of state and batch, jitted over the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from timesformer_jax.augmentation import OFF, Augmentation, augment
from timesformer_jax.distributed.mesh import BATCH
from timesformer_jax.distributed.sharding import shardings
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, with_parameters
from timesformer_jax.models.timesformer import parameters as parameters_of
from timesformer_jax.preprocessing import ClipSpec, crop, normalise

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that training changes: step () int32, parameters and optimizer state."""

    step: jax.Array
    params: Any
    opt_state: Any


def abstract_state(
    model: TimeSformerConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing."""
    params = parameters_of(abstract(model))
    state = jax.eval_shape(
        lambda p: TrainState(jnp.zeros((), jnp.int32), p, optimizer.init(p)), params
    )
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(mesh, state),
    )


def init_state(
    initial: Any, optimizer: optax.GradientTransformation, target: TrainState
) -> TrainState:
    """The state at step 0, each array made or put where it shall lie.

    Args:
      initial: the first parameters, or a function that draws them; it is traced, so that none is
        made on a device it is not for.
      optimizer: whose state is begun.
      target: what `abstract_state` gave.
    """

    def begin(params: Any) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    places = jax.tree.map(lambda x: x.sharding, target)
    if callable(initial):
        return jax.jit(lambda: begin(initial()), out_shardings=places)()
    return jax.jit(begin, out_shardings=places)(jax.device_put(initial, places.params))


def make_train_step(
    model: TimeSformerConfig,
    clip: ClipSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    target: TrainState,
    mesh: Mesh,
    seed: int,
    augmentation: Augmentation = OFF,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step. It gives the state's memory to the new state: do not use the old one.

    Args:
      model, clip: what to train, on what clips.
      optimizer, schedule: how; the schedule is only reported.
      target: what `abstract_state` gave.
      mesh: the devices.
      seed: of drop path; each step folds its number in.
      augmentation: of the clips and labels; off by default, and then it costs nothing.

    Returns:
      A function of the state and a batch (frames (B, T, S, S, 3) uint8, windows (B, 3), flip (B,)
      and label (B,), and draw (B,) uint32 where there is augmentation) to the new state and the
      batch's metrics: loss, accuracy (of the clips' own labels), gradient_norm (of the raw
      gradient) and learning_rate, each () float32.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        video = crop(batch["frames"], batch["windows"], clip.crop, batch["flip"])
        if augmentation.on:
            video, targets = augment(
                video, batch["label"], batch["draw"], augmentation,
                fill=clip.mean, classes=model.num_classes, mesh=mesh,
            )  # fmt: skip
        video = normalise(video, clip)

        def loss_of(params):
            logits = with_parameters(model, params)(video, key=key)
            if augmentation.on:
                losses = optax.softmax_cross_entropy(logits, targets)
            else:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), logits

        (loss, logits), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "accuracy": (logits.argmax(-1) == batch["label"]).mean(dtype=jnp.float32),
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    state_shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )
