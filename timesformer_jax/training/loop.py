"""Training, from top to bottom: data, mesh, state, steps, checkpoints, results."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from absl import logging
from clu import metric_writers
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from timesformer_jax import storage
from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline
from timesformer_jax.data.prepare import demo
from timesformer_jax.data.records.open import absolute_source, open_split
from timesformer_jax.data.records.split import Split, take_fraction
from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.mesh import batch_rows, check_batch, make_mesh, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.models import tuning
from timesformer_jax.training import reporting, resume
from timesformer_jax.training.checks import check_config, check_model, model_config
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import (
    Metrics,
    TrainState,
    abstract_state,
    init_state,
    make_train_step,
)
from timesformer_jax.training.throughput import Profile, Throughput
from timesformer_jax.transforms.augmentation import Augmentation


class Preempted(Exception):
    """A signal ended the run, after its state was saved; `signal` is SIGTERM or SIGINT."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signal = signum


class Run(NamedTuple):
    """What a run is made of; it follows from the config and the data.

    Attributes:
      config: a recipe of `recipes`.
      train_split, eval_split: the data.
      metadata: of the checkpoints; has the model and its clips.
      mesh: the devices.
      optimizer: how the parameters change.
      target: shapes, dtypes and shardings of the state.
      train_step: the jitted training step.
      steps_per_epoch, total_steps: the length.
    """

    config: ConfigDict
    train_split: Split
    eval_split: Split
    metadata: CheckpointMetadata
    mesh: Mesh
    optimizer: optax.GradientTransformation
    target: TrainState
    train_step: Callable[..., tuple[TrainState, Metrics]]
    steps_per_epoch: int
    total_steps: int


class Outputs(NamedTuple):
    """Where a run writes, and what tells it to end.

    Attributes:
      checkpoints: gets the states.
      writer: gets the scalars.
      profile: traces some steps.
      stop_signal: of `hosts.termination`, a function of the finished steps.
    """

    checkpoints: Checkpoints
    writer: metric_writers.MetricWriter
    profile: Profile
    stop_signal: Callable[[int], int]


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains, evaluates and writes the results; resumes a run that was interrupted.

    Args:
      config: a recipe of `recipes`.
      workdir: gets checkpoints/, tensorboard/, recipe.json and results.json; on a disk or gs://.

    Returns:
      The content of results.json: top1 and top5 as fractions, the number of videos, the same for
      each class; the finished steps, the best step by validation, versions, devices, throughput.

    Raises:
      InputError: if the config, the data or the workdir cannot be used.
      Preempted: on SIGTERM or Ctrl-C, after saving.
    """
    check_config(config)
    workdir = storage.absolute(workdir)
    run = _make_run(config)
    with (
        jax.set_mesh(run.mesh),
        tuning.using(config.attention_kernels),
        contextlib.closing(_open_checkpoints(config, workdir)) as checkpoints,
        contextlib.closing(reporting.make_writer(workdir)) as writer,
        contextlib.closing(Profile(workdir / reporting.PROFILE, **config.profile)) as profile,
        hosts.termination() as stop_signal,
    ):
        _choose_kernels(run)  # while the devices' memory is empty
        outputs = Outputs(checkpoints, writer, profile, stop_signal)
        run, state, position = _start(run, checkpoints)
        reporting.write_recipe(workdir, run.metadata)
        step, total = int(state.step), run.total_steps
        if step >= total and (results := reporting.finished_results(workdir, step)):
            logging.info("nothing to do: %d of %d steps are done and evaluated", step, total)
            return results
        throughput = Throughput(run.metadata.model, config.batch_size, run.mesh)
        state, step = _train_steps(run, outputs, state, position, throughput)
        checkpoints.wait()
        results = _evaluate(run, outputs, state, step, config.eval.views, config.eval.crops)
        reporting.write_accuracy(writer, step, "final", results)
        about = reporting.provenance(step, config.name, checkpoints, throughput.clips_per_second())
        if jax.process_index() == 0:
            reporting.write_results(workdir, about | results.to_json())
        return about | results.to_json()


def train_and_report(config: ConfigDict, workdir: str, **processes: Any) -> None:
    """`train`, then prints a summary: the accuracy, and where the files are.

    `processes` are the arguments of `hosts.processes`.
    """
    with hosts.processes(**processes):
        try:
            results = train(config, workdir)
        except Preempted as e:
            if jax.process_index() == 0:
                print(e, file=sys.stderr)
            sys.exit(128 + e.signal)
        if jax.process_index() == 0:
            reporting.print_summary(results, workdir)


def _make_run(config: ConfigDict) -> Run:
    """Opens the data, checks that everything fits, and builds the training step."""
    augmentation = Augmentation(**config.augment)
    data = config.data
    if data.demo:
        hosts.once("demo", lambda: demo.prepare_demo(data.directory))
    train_split, eval_split = (
        open_split(data.directory, split, data.fps) for split in (data.train_split, data.eval_split)
    )
    train_split = take_fraction(train_split, data.train_fraction)
    short_side = int(min(train_split.height[0], train_split.width[0]))
    clip = ClipSpec(**config.clip, short_side=short_side)
    model = model_config(config, train_split.label_names)
    metadata = CheckpointMetadata(
        model, clip, train_split.label_names, _to_json(config),
        multilabel=train_split.targets is not None,
    )  # fmt: skip

    mesh = make_mesh(**config.mesh)
    check_model(mesh, model, clip)
    check_batch(mesh, config.batch_size, "--config.batch_size", config.accumulate_steps)
    check_batch(mesh, config.eval.batch_size, "--config.eval.batch_size")
    steps_per_epoch = pipeline.batches_per_epoch(train_split, config.batch_size)
    schedule = learning_rate(config.optimizer, config.batch_size, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)
    target = abstract_state(model, optimizer, mesh, ema=config.ema_decay > 0)
    train_step = make_train_step(
        model, clip, optimizer, schedule, target, mesh, config.seed, augmentation,
        trainable=config.optimizer.trainable, accumulate_steps=config.accumulate_steps,
        ema_decay=config.ema_decay,
    )  # fmt: skip
    return Run(
        config, train_split, eval_split, metadata, mesh, optimizer, target, train_step,
        steps_per_epoch, config.epochs * steps_per_epoch,
    )  # fmt: skip


def _choose_kernels(run: Run) -> None:
    config, clip = run.config, run.metadata.clip
    tuning.choose_kernels(
        run.metadata.model, config.batch_size // config.accumulate_steps, clip.frames, clip.crop,
        gradients=config.optimizer.trainable == "all",  # the head's need no attention's
    )  # fmt: skip


def _to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values, with the absolute path of its data.

    The kernels are no part of it: they are chosen for the device that a program runs on.
    """
    fields = json.loads(config.to_json())
    del fields["attention_kernels"]
    fields["data"]["directory"] = absolute_source(config.data.directory)
    return fields


def _open_checkpoints(config: ConfigDict, workdir: epath.Path) -> Checkpoints:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the workdir {workdir}: {e.strerror}") from e
    return Checkpoints(
        workdir / store.FOLDER, config.checkpoint.keep_newest, config.checkpoint.keep_best
    )


def _start(run: Run, checkpoints: Checkpoints) -> tuple[Run, TrainState, pipeline.IteratorState]:
    """The state and the data position to start at; the run with the license of its parameters."""
    state, position, metadata = resume.restore(checkpoints, run.target, run.metadata)
    if state is None or position is None:
        initial, metadata = resume.initial_parameters(run.config, metadata)
        state = init_state(initial, run.optimizer, run.target)
        position = pipeline.IteratorState()
    return run._replace(metadata=metadata), state, position


def _train_steps(
    run: Run,
    outputs: Outputs,
    state: TrainState,
    position: pipeline.IteratorState,
    throughput: Throughput,
) -> tuple[TrainState, int]:
    """Trains to the last step, saving, reporting and validating on the way.

    Returns:
      The last state, which is saved, and its step.
    """
    config, step, total = run.config, int(state.step), run.total_steps
    save_every = config.checkpoint.every_steps or run.steps_per_epoch
    validate_every = config.eval.every_epochs * run.steps_per_epoch
    batches = _train_batches(run, position)
    unreported: list[Metrics] = []
    with _progress_bar(step, total) as bar:
        if step and _is_due(step, validate_every) and step not in outputs.checkpoints.validation:
            _validate(run, outputs, state, step, bar)  # the interrupted run did not finish it
        while step < total:
            outputs.profile.before(step + 1)
            with throughput.waiting():
                batch, position = next(batches)
            state, metrics = run.train_step(state, put_batch(run.mesh, step_inputs(batch)))
            throughput.stepped(metrics)
            step += 1
            outputs.profile.after(step, metrics)
            bar.update()
            unreported.append(metrics)
            signum, validating = outputs.stop_signal(step), _is_due(step, validate_every)
            reporting_now = _is_due(step, config.log_every_steps) or step == total
            saving = _is_due(step, save_every) or validating or step == total or signum
            if reporting_now or saving:
                reporting.check_finite(unreported, state.params, step, outputs.checkpoints)
            if reporting_now:
                means = reporting.mean_metrics(unreported) | throughput.scalars()
                outputs.writer.write_scalars(step, {f"train/{k}": v for k, v in means.items()})
                bar.set_postfix_str(f"loss {means['loss']:.4f}", refresh=False)
                unreported = []
            if saving:
                outputs.checkpoints.save(step, state, resume.progress(position), run.metadata)
            if signum:
                raise _preempted(run, outputs, step, signum)
            if validating:
                with throughput.paused():
                    _validate(run, outputs, state, step, bar)
    return state, step


def _train_batches(run: Run, position: pipeline.IteratorState):
    config = run.config
    return pipeline.train_batches(
        run.train_split,
        run.metadata.clip,
        batch_size=config.batch_size,
        short_side_range=tuple(config.data.short_side_range),
        flip=config.data.flip,
        seed=config.seed,
        state=position,
        rows=batch_rows(run.mesh, config.batch_size),
    )


def _progress_bar(step: int, total: int) -> tqdm:
    return tqdm(
        total=total, initial=step, unit="step", desc="training", disable=jax.process_index() > 0
    )


def step_inputs(batch: pipeline.Batch) -> pipeline.Batch:
    """The arrays of a batch that the training step takes."""
    return {name: batch[name] for name in ("frames", "crop_boxes", "flip", "augment_seed", "label")}


def _is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if that is 0."""
    return every > 0 and step % every == 0


def _validate(run: Run, outputs: Outputs, state: TrainState, step: int, bar: tqdm) -> None:
    """Evaluates the centre crop of one clip a video, and records the accuracy."""
    results = _evaluate(run, outputs, state, step, views=1, crops=1)
    reporting.write_accuracy(outputs.writer, step, "validation", results)
    outputs.checkpoints.record_validation(step, results.scalars())
    if jax.process_index() == 0:
        bar.write(f"epoch {step // run.steps_per_epoch}: {results.summary()}")


def _evaluate(
    run: Run, outputs: Outputs, state: TrainState, step: int, views: int, crops: int
) -> Results | MultiLabelResults:
    """Evaluates a state that is saved, so that a signal may end the run after any batch."""
    return evaluate(
        state.best_params,
        run.metadata.model,
        run.metadata.clip,
        run.eval_split,
        run.mesh,
        batch_size=run.config.eval.batch_size,
        views=views,
        crops=crops,
        after_batch=functools.partial(_end_on_signal, run, outputs, step),
    )


def _end_on_signal(run: Run, outputs: Outputs, step: int) -> None:
    if signum := outputs.stop_signal(step):
        raise _preempted(run, outputs, step, signum)


def _preempted(run: Run, outputs: Outputs, step: int, signum: int) -> Preempted:
    """The exception that ends the run, once the state of `step` is on disk."""
    outputs.checkpoints.wait()
    return Preempted(
        f"asked to end: step {step} of {run.total_steps} is saved in "
        f"{outputs.checkpoints.directory}; run the same command again to go on",
        signum,
    )
