"""The training step: a pure function of state and batch, jitted over the mesh."""

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
from timesformer_jax.transforms.preprocess import crop, normalise, preprocess

# As `pipeline.train_batches` has it: frames (B, T, S, S, 3) uint8, crop_boxes (B, 3), flip (B,) and
# label (B,); for augmentation augment_seed (B,) uint32; valid_frames (B,) int32 where clips are
# filled up.
Batch = dict[str, jax.Array]
# Each () float32: loss, accuracy (of the clips' own labels), gradient_norm (before clipping) and
# learning_rate.
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What training changes; float32 except for the step and counters of the optimizer.

    Attributes:
      step: () int32, the number of finished steps.
      params: parameters as nested dicts by layer.
      opt_state: the state of the optimizer.
      ema: the exponential moving average of params, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any = None

    @property
    def best_params(self) -> Any:
        """The parameters to evaluate and predict with: the moving average where there is one."""
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
      ema: whether the state has a moving average of the parameters.
    """
    params = parameters_of(abstract(model))
    state = jax.eval_shape(lambda p: _new_state(p, optimizer, ema), params)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(mesh, state),
    )


def init_state(
    initial: Any, optimizer: optax.GradientTransformation, target: TrainState
) -> TrainState:
    """The state at step 0, sharded as `target`.

    Args:
      initial: the first parameters, or a function that draws them. The function is traced, so that
        each device makes its own shard only.
      optimizer: initialises its state.
      target: what `abstract_state` returned.
    """

    def new_state(params: Any) -> TrainState:
        return _new_state(params, optimizer, target.ema is not None)

    target_shardings = jax.tree.map(lambda x: x.sharding, target)
    if callable(initial):
        return jax.jit(lambda: new_state(initial()), out_shardings=target_shardings)()
    return jax.jit(new_state, out_shardings=target_shardings)(
        jax.device_put(initial, target_shardings.params)
    )


def _new_state(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    # A copy: the step donates the buffers of both.
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
    trainable: str = "all",
    accumulate_steps: int = 1,
    ema_decay: float = 0.0,
) -> jax.stages.Wrapped:
    """The jitted training step. It donates the state: do not use the old state after a call.

    Args:
      model, clip: what to train, on what clips.
      optimizer, schedule: how; the schedule is only reported.
      target: what `abstract_state` returned.
      mesh: the devices.
      seed: of drop path; the number of the step is folded in.
      augmentation: of the clips and labels; none by default.
      trainable: as for `optimizer.trained`; the other parameters get no gradient.
      accumulate_steps: microbatches, computed one after another to save memory; each device's
        clips must divide evenly. The result is that of the whole batch, but for drop path.
      ema_decay: of the moving average, where the state has one.

    Returns:
      A function of the state and a `Batch`, which returns the new state and the batch's `Metrics`.
    """
    inputs = _make_inputs(model, clip, augmentation, mesh)
    gradient = _make_gradient(model, accumulate_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        subset = trained(state.params, trainable)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            examples = inputs(batch)
            (loss, accuracy), grads = gradient(subset, state.params, examples, key)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = state.params | optax.apply_updates(subset, updates)
            norm = optax.tree.norm(grads)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        average = None if state.ema is None else _moving_average(state.ema, params, ema_decay)
        return TrainState(state.step + 1, params, opt_state, average), metrics

    state_shardings = jax.tree.map(lambda x: x.sharding, target)
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, None),  # None: the batch keeps its sharding
        out_shardings=(state_shardings, NamedSharding(mesh, P())),
        donate_argnums=0,
    )


class Examples(NamedTuple):
    """What the model is trained on.

    Attributes:
      video: (B, T, H, W, 3), normalised.
      targets: (B, classes) float32 probabilities with augmentation, else the labels.
      labels: the clips' own classes, (B,) int, or of multi-label data (B, classes) float32, 0 or 1.
      valid_frames: (B,) int, the frames of each clip that count; None: all.
    """

    video: jax.Array
    targets: jax.Array
    labels: jax.Array
    valid_frames: jax.Array | None = None


def _make_inputs(
    model: TimeSformerConfig, clip: ClipSpec, augmentation: Augmentation, mesh: Mesh
) -> Callable[[Batch], Examples]:
    """A function from a batch as it is loaded to cropped, augmented and normalised examples."""

    def inputs(batch: Batch) -> Examples:
        labels = targets = batch["label"]
        lengths = batch.get("valid_frames")
        frames = batch["frames"], batch["crop_boxes"]
        if not augmentation.on:
            video = preprocess(*frames, clip, batch["flip"], dtype=model.dtype)
            return Examples(video, targets, labels, lengths)
        video = crop(*frames, clip.crop, batch["flip"])
        with jax.named_scope("preprocessing"):
            video, targets = augment(
                video, labels, batch["augment_seed"], augmentation,
                fill=clip.mean, classes=model.num_classes, mesh=mesh,
            )  # fmt: skip
        if lengths is not None and augmentation.mixes:
            # As long as the longer of the two clips that it is mixed of.
            lengths = jnp.maximum(lengths, jnp.roll(lengths, 1))
        video = normalise(jnp.asarray(video), clip, model.dtype)
        return Examples(video, jnp.asarray(targets), labels, lengths)

    return inputs


def _make_gradient(model: TimeSformerConfig, accumulate_steps: int) -> Callable:
    """The gradient of the mean loss.

    A function of the trained parameters, all parameters, the examples and the key of drop path to
    ((loss, accuracy), gradient of the trained parameters).
    """

    def loss(
        trainable: Any, params: Any, examples: Examples, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        apply = with_parameters(model, params | trainable)
        logits = apply(examples.video, key=key, valid_frames=examples.valid_frames)
        targets, labels = examples.targets, examples.labels
        correct = logits.argmax(-1) == labels if labels.ndim == 1 else _hits(logits, labels)
        if labels.ndim == 2:
            losses = optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)
        elif targets.ndim == 2:
            losses = optax.softmax_cross_entropy(logits, targets)
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return losses.mean(), correct.mean(dtype=jnp.float32)

    gradient = jax.value_and_grad(loss, has_aux=True)
    return gradient if accumulate_steps == 1 else _accumulated(gradient, accumulate_steps)


def _hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """(B,) bool, whether the most probable class of a clip is one of its labels (B, classes)."""
    return jnp.take_along_axis(labels, logits.argmax(-1)[:, None], axis=1)[:, 0] > 0


def _accumulated(gradient: Callable, steps: int) -> Callable:
    """The mean of `gradient` over microbatches.

    Microbatch i holds the examples i, i + steps, ...: every device already holds its share of each.
    """

    def of_microbatch(
        trainable: Any, params: Any, examples: Examples, row: jax.Array, key: jax.Array
    ) -> Any:
        # The first row of microbatch i is i: each draws its own drop path.
        return gradient(trainable, params, examples, jax.random.fold_in(key, row[0]))

    def of_batch(trainable: Any, params: Any, examples: Examples, key: jax.Array) -> Any:
        size = len(examples.labels)
        mean = optax.microbatch(
            of_microbatch,
            argnums=(2, 3),
            microbatch_size=size // steps,
            accumulator=optax.microbatching.AccumulationType.MEAN,
        )
        return mean(trainable, params, examples, jnp.arange(size), key)

    return of_batch


@jax.named_scope("optimizer")
def _moving_average(average: Any, params: Any, decay: float) -> Any:
    # Not optax.incremental_update: its factors, decay and 1 - decay rounded to float32, do not add
    # up to 1, which biases the average: at 0.9999 by 1.6e-4 of its value after 40000 steps, where
    # this form has 1e-8.
    return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
