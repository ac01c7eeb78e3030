"""The training step: one pure function of state and batch, jitted over the mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.distributed.sharding import shardings
from timesformer_jax.models.timesformer import TimeSformerConfig, abstract, with_parameters
from timesformer_jax.models.timesformer import parameters as parameters_of
from timesformer_jax.training.optimizer import trained
from timesformer_jax.transforms.augment import augment
from timesformer_jax.transforms.augmentation import OFF, Augmentation
from timesformer_jax.transforms.preprocess import crop, normalise

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that training changes; all but the step float32.

    Attributes:
      step: () int32, how many were done.
      params: parameters as nested dicts by layer.
      opt_state: the optimizer's.
      ema: the moving average of params, or None where none is kept.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def best_params(self) -> Any:
        """What to evaluate and to predict with: the moving average where there is one."""
        return self.params if self.ema is None else self.ema


def abstract_state(
    model: TimeSformerConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; allocates nothing.

    Args:
      model, optimizer: what is trained, and how.
      mesh: the devices.
      ema: whether a moving average of the parameters is kept.
    """
    params = parameters_of(abstract(model))
    state = jax.eval_shape(lambda p: _begin(p, optimizer, ema), params)
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
        return _begin(params, optimizer, target.ema is not None)

    places = jax.tree.map(lambda x: x.sharding, target)
    if callable(initial):
        return jax.jit(lambda: begin(initial()), out_shardings=places)()
    return jax.jit(begin, out_shardings=places)(jax.device_put(initial, places.params))


def _begin(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    # The average in memory of its own: a step is given the memory of both.
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_train_step(
    model: TimeSformerConfig,
    clip: ClipSpec,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    target: TrainState,
    mesh: Mesh,
    seed: int,
    augmentation: Augmentation = OFF,
    *,
    train: str = "all",
    accumulate_steps: int = 1,
    ema: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The jitted step. It gives the state's memory to the new state: do not use the old one.

    Args:
      model, clip: what to train, on what clips.
      optimizer, schedule: how; the schedule is only reported.
      target: what `abstract_state` gave.
      mesh: the devices.
      seed: of drop path; each step folds its number in.
      augmentation: of the clips and labels; off by default, and then it costs nothing.
      train: which parameters are `optimizer.trained`, as the optimizer was told. Of the others no
        gradient is computed.
      accumulate_steps: parts in which a batch goes through the model, for the memory of one part;
        each device's clips must divide evenly. But for drop path's draws the step is that of the
        whole batch.
      ema: how much the moving average keeps of itself in a step, where the state has one.

    Returns:
      A function of the state and a batch (frames (B, T, S, S, 3) uint8, crop_boxes (B, 3), flip
      (B,) and label (B,), and augment_seed (B,) uint32 where there is augmentation) to the new
      state and the batch's metrics: loss, accuracy (of the clips' own labels), gradient_norm (of
      the raw gradient) and learning_rate, each () float32.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        video = crop(batch["frames"], batch["crop_boxes"], clip.crop, batch["flip"])
        targets = batch["label"]
        if augmentation.on:
            video, targets = augment(
                video, batch["label"], batch["augment_seed"], augmentation,
                fill=clip.mean, classes=model.num_classes, mesh=mesh,
            )  # fmt: skip
        examples = normalise(video, clip), targets, batch["label"]

        def loss_of(params: Any, examples: tuple, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            video, targets, labels = examples
            logits = with_parameters(model, state.params | params)(video, key=key)
            if augmentation.on:
                losses = optax.softmax_cross_entropy(logits, targets)
            else:
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean(), (logits.argmax(-1) == labels).mean(dtype=jnp.float32)

        gradient = jax.value_and_grad(loss_of, has_aux=True)
        if accumulate_steps > 1:
            gradient = _in_parts(gradient, accumulate_steps)
        changing = trained(state.params, train)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (loss, accuracy), grads = gradient(changing, examples, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = state.params | optax.apply_updates(changing, updates)
        average = None
        if state.ema is not None:
            average = jax.tree.map(lambda a, p: a + (1 - ema) * (p - a), state.ema, params)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, opt_state, average), metrics

    state_shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, None),  # a batch as it was put
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


def _in_parts(function: Callable, parts: int) -> Callable:
    """The mean of `function` of (parameters, examples, key) over `parts` of the examples, in turn.

    Part i has examples i, i + parts, ...: every device then holds its share of every part already.
    """

    def mean(params: Any, examples: Any, key: jax.Array) -> Any:
        def add(total: Any, part: tuple) -> tuple[Any, None]:
            examples, i = part
            found = function(params, examples, jax.random.fold_in(key, i))
            return jax.tree.map(jnp.add, total, found), None

        divided = jax.tree.map(
            lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), examples
        )
        one = jax.tree.map(lambda x: x[0], divided)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, one, key))
        total, _ = jax.lax.scan(add, zeros, (divided, jnp.arange(parts)))
        return jax.tree.map(lambda x: x / parts, total)

    return mean
