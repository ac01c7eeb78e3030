"""Training, from top to bottom: data, mesh, state, steps, checkpoints, results."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from timesformer_jax import storage
from timesformer_jax.checkpoints import store
from timesformer_jax.checkpoints.metadata import flatten_config
from timesformer_jax.checkpoints.store import Checkpoints
from timesformer_jax.data.input import pipeline
from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.device_memory import memory_advice
from timesformer_jax.distributed.mesh import batch_rows, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.models import tuning
from timesformer_jax.training import forecast, reporting, resume
from timesformer_jax.training.checks import check_config
from timesformer_jax.training.curves import Scalars
from timesformer_jax.training.run import Run, choose_kernels, make_run
from timesformer_jax.training.step import Metrics, TrainState, init_state
from timesformer_jax.training.throughput import Profile, Throughput

# What to do if the step does not fit the devices.
LESS_MEMORY = (
    "set --config.model.dtype=bfloat16, --config.model.remat=block or --config.accumulate_steps=2,"
    " or a smaller --config.batch_size; `timesformer plan` says what each needs"
)


class Preempted(Exception):
    """A signal ended the run, after its state was saved; `signal` is SIGTERM or SIGINT."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signal = signum


class Outputs(NamedTuple):
    """Where a run writes, and what tells it to end.

    Attributes:
      checkpoints: gets the states.
      scalars: gets the scalars.
      profile: traces some steps.
      stop_signal: of `hosts.termination`, a function of the finished steps.
    """

    checkpoints: Checkpoints
    scalars: Scalars
    profile: Profile
    stop_signal: Callable[[int], int]


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains, evaluates and writes the results; resumes a run that was interrupted.

    Args:
      config: a recipe of `recipes`; it is not changed.
      workdir: gets checkpoints/, tensorboard/, recipe.json (the config as it was used), curves.csv,
        curves.png, results.json and a model card, README.md; on a disk or gs://.

    Returns:
      The content of results.json: top1 and top5 as fractions, loss, the number of videos, the same
      for each class; the finished steps, the best step by validation, versions, devices,
      throughput.

    Raises:
      InputError: if the config, the data or the workdir cannot be used.
      Preempted: on SIGTERM or Ctrl-C, after saving.
    """
    check_config(config)
    workdir = storage.absolute(workdir)
    run = make_run(config, workdir)
    with (
        jax.set_mesh(run.mesh),
        tuning.using(config.attention_kernels),
        contextlib.closing(_open_checkpoints(config, workdir)) as checkpoints,
        contextlib.closing(Scalars(workdir)) as scalars,
        contextlib.closing(Profile(workdir / reporting.PROFILE, **config.profile)) as profile,
        hosts.termination() as stop_signal,
        memory_advice(LESS_MEMORY),
    ):
        choose_kernels(run)  # while the devices' memory is empty
        outputs = Outputs(checkpoints, scalars, profile, stop_signal)
        run, state, position, changes = _start(run, checkpoints)
        step, total = int(state.step), run.total_steps
        if step >= total and (results := reporting.finished_results(workdir, step)):
            reporting.tell_finished(step, total, changes)
            return results
        reporting.tell_changes(step, checkpoints, changes)
        reporting.write_recipe(workdir, run.metadata)
        scalars.begin(step, flatten_config(run.metadata.config))
        forecast.announce(
            run.config, run.metadata.model, run.train_split, run.eval_split, run.mesh,
            range(step, total),
        )  # fmt: skip
        throughput = Throughput(
            run.metadata.model, run.metadata.clip, run.config.optimizer.trainable,
            run.config.batch_size, run.mesh,
        )  # fmt: skip
        state, step = _train_steps(run, outputs, state, position, throughput)
        checkpoints.wait()
        results = _evaluate(run, outputs, state, step, config.eval.views, config.eval.crops)
        reporting.write_accuracy(scalars, step, "final", results)
        scalars.draw()
        about = reporting.provenance(step, config.name, checkpoints, throughput.clips_per_second())
        if jax.process_index() == 0:
            reporting.write_results(workdir, about | results.to_json(), run.metadata)
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


def _open_checkpoints(config: ConfigDict, workdir: epath.Path) -> Checkpoints:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the workdir {workdir}: {e.strerror}") from e
    return Checkpoints(
        workdir / store.FOLDER, config.checkpoint.keep_newest, config.checkpoint.keep_best
    )


def _start(
    run: Run, checkpoints: Checkpoints
) -> tuple[Run, TrainState, pipeline.IteratorState, resume.Changes]:
    """Where the run starts.

    Returns:
      The run, with the license of its parameters; the state and the data position to start at; and
      the fields of the config that are not as they were saved.
    """
    if found := resume.restore(checkpoints, run.target, run.metadata):
        return run._replace(metadata=found.metadata), found.state, found.position, found.changes
    initial, metadata = resume.initial_parameters(run.config, run.metadata, run.source)
    state = init_state(initial, run.optimizer, run.target)
    return run._replace(metadata=metadata, source=None), state, pipeline.IteratorState(), {}


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
    unreported: list[Metrics] = []
    with (
        contextlib.closing(_train_batches(run, position)) as batches,
        _progress_bar(step, total) as bar,
    ):
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
            if seconds := throughput.step_seconds(metrics):
                forecast.tell_time_left(seconds, total - step)
            signum, validating = outputs.stop_signal(step), _is_due(step, validate_every)
            reporting_now = _is_due(step, config.log_every_steps) or step == total
            saving = _is_due(step, save_every) or validating or step == total or signum
            if reporting_now or saving:
                reporting.check_finite(unreported, state.params, step, outputs.checkpoints)
            if reporting_now:
                means = reporting.mean_metrics(unreported) | throughput.scalars()
                outputs.scalars.write(step, {f"train/{k}": v for k, v in means.items()})
                bar.set_postfix_str(f"loss {means['loss']:.4f}", refresh=False)
                unreported = []
            if saving:
                outputs.scalars.save()
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
    # None: no bar unless the standard error is a terminal; the log has the steps too.
    return tqdm(
        total=total, initial=step, unit="step", desc="training",
        disable=jax.process_index() > 0 or None,
    )  # fmt: skip


def step_inputs(batch: pipeline.Batch) -> pipeline.Batch:
    """The arrays of a batch that the training step takes."""
    names = ("frames", "crop_boxes", "flip", "augment_seed", "label", "valid_frames")
    return {name: batch[name] for name in names if name in batch}


def _is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; never if that is 0."""
    return every > 0 and step % every == 0


def _validate(run: Run, outputs: Outputs, state: TrainState, step: int, bar: tqdm) -> None:
    """Evaluates the centre crop of one clip a video, and records the accuracy."""
    results = _evaluate(run, outputs, state, step, views=1, crops=1)
    reporting.write_accuracy(outputs.scalars, step, "validation", results)
    outputs.checkpoints.record_validation(step, results.scalars())
    if jax.process_index() == 0:
        bar.write(f"epoch {step // run.steps_per_epoch}: {results.summary()}")


def _evaluate(
    run: Run, outputs: Outputs, state: TrainState, step: int, views: int, crops: int
) -> Results | MultiLabelResults:
    """Evaluates a state that is saved.

    A signal therefore ends a run of one process after any batch; several finish the evaluation.
    """
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
