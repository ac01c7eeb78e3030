"""Training, from top to bottom: data, mesh, state, steps, checkpoints, results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from clu import metric_writers
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

import timesformer_jax
from timesformer_jax import storage
from timesformer_jax.checkpoints import convert
from timesformer_jax.checkpoints import store as ckpt
from timesformer_jax.checkpoints.metadata import flatten_config
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input import pipeline, sampling
from timesformer_jax.data.prepare import demo
from timesformer_jax.data.records.open import absolute_source, open_split
from timesformer_jax.data.records.split import take_fraction
from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.mesh import (
    batch_rows,
    check_batch,
    check_model,
    make_mesh,
    put_batch,
)
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import Results
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig, parameters
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import TrainState, abstract_state, init_state, make_train_step
from timesformer_jax.training.throughput import Profile, Speed
from timesformer_jax.transforms.augmentation import Augmentation

# In a workdir.
TENSORBOARD, PROFILE, RESULTS, RECIPE = "tensorboard", "profile", "results.json", "recipe.json"


class Preempted(Exception):
    """The run was asked to end and did, its state saved; `signal` is SIGTERM or SIGINT."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signal = signum


def train(config: ConfigDict, workdir: str | os.PathLike) -> dict[str, Any]:
    """Trains, evaluates and writes the results; goes on where an earlier call was cut off.

    Args:
      config: a recipe of `recipes`.
      workdir: gets checkpoints/, tensorboard/, recipe.json and results.json; on a disk or gs://.

    Returns:
      What results.json holds: top1 and top5 as fractions, the videos counted, and per class; the
      steps done, the best step by validation, and what it was computed with, how fast.

    Raises:
      InputError: if something given cannot be used.
      Preempted: on SIGTERM or Ctrl-C, after saving.
    """
    _check(config)
    workdir = storage.absolute(workdir)
    augmentation = Augmentation(**config.augment)
    # The data, and what it says of the model and its clips.
    if config.data.demo:
        hosts.once("demo", lambda: demo.prepare_demo(config.data.directory))
    data = config.data
    train_split, eval_split = (
        open_split(data.directory, split, data.fps) for split in (data.train_split, data.eval_split)
    )
    train_split = take_fraction(train_split, data.fraction)
    short_side = int(min(train_split.height[0], train_split.width[0]))
    clip = ClipSpec(**config.clip, short_side=short_side)
    model = model_config(config, train_split.label_names)
    metadata = ckpt.CheckpointMetadata(model, clip, train_split.label_names, _plain(config))

    # The mesh, the step, and the shapes of the state.
    mesh = make_mesh(**config.mesh)
    check_model(mesh, model, clip)
    check_batch(mesh, config.batch_size, "--config.batch_size", config.accumulate_steps)
    check_batch(mesh, config.eval.batch_size, "--config.eval.batch_size")
    per_epoch = pipeline.batches_per_epoch(train_split, config.batch_size)
    total = config.epochs * per_epoch
    schedule = learning_rate(config.optimizer, config.batch_size, per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)
    target = abstract_state(model, optimizer, mesh, ema=config.ema > 0)
    step = make_train_step(
        model, clip, optimizer, schedule, target, mesh, config.seed, augmentation,
        train=config.optimizer.train, accumulate_steps=config.accumulate_steps, ema=config.ema,
    )  # fmt: skip

    with (
        jax.set_mesh(mesh),
        contextlib.closing(_checkpoints(config, workdir)) as checkpoints,
        contextlib.closing(_writer(workdir)) as writer,
        contextlib.closing(Profile(workdir / PROFILE, **config.profile)) as profile,
        hosts.termination() as asked_to_end,
    ):
        # Go on from the newest checkpoint, or begin.
        state, position, metadata = _restore(checkpoints, target, metadata)
        if state is None:
            initial, metadata = _initial(config, metadata)
            state = init_state(initial, optimizer, target)
            position = pipeline.IteratorState()
        _keep_recipe(workdir, metadata)
        done = int(state.step)
        if done >= total and (results := _finished(workdir, done)):
            logging.info("nothing to do: %d of %d steps are done and evaluated", done, total)
            return results

        def ended(by: int) -> Preempted:
            checkpoints.wait()
            return Preempted(
                f"asked to end: step {done} of {total} is saved in {checkpoints.directory}; "
                "run the same command again to go on",
                by,
            )

        def end_if_asked() -> None:  # after a batch of an evaluation, whose step is saved
            if ending := asked_to_end(done):
                raise ended(ending)

        def validate() -> None:
            found = _evaluate(config, state, model, clip, eval_split, mesh, end_if_asked)
            _report(writer, done, "validation", found)
            checkpoints.record_validation(done, found.to_json()["top1"], found.to_json()["top5"])
            if jax.process_index() == 0:
                bar.write(f"epoch {done // per_epoch}: {found.summary()}")

        # Train.
        batches = pipeline.train_batches(
            train_split,
            clip,
            batch_size=config.batch_size,
            short_side_range=tuple(config.data.short_side_range),
            flip=config.data.flip,
            seed=config.seed,
            position=position,
            rows=batch_rows(mesh, config.batch_size),
        )
        speed = Speed(model, config.batch_size, mesh)
        save_every = config.checkpoint.every_steps or per_epoch
        validate_every = config.eval.every_epochs * per_epoch
        window: list[dict[str, jax.Array]] = []
        bar = tqdm(
            total=total, initial=done, unit="step", desc="training", disable=jax.process_index() > 0
        )
        with bar:
            if done and _due(done, validate_every) and done not in checkpoints.validation:
                validate()  # which an earlier call did not come to
            while done < total:
                profile.before(done + 1)
                with speed.waiting():
                    batch, position = next(batches)
                state, metrics = step(state, put_batch(mesh, _for_step(batch)))
                speed.stepped(metrics)
                done += 1
                profile.after(done, metrics)
                bar.update()
                window.append(metrics)
                ending, validating = asked_to_end(done), _due(done, validate_every)
                reporting = _due(done, config.log_every_steps) or done == total
                saving = _due(done, save_every) or validating or done == total or ending
                if reporting or saving:
                    _check_finite(window, state.params, done, checkpoints)
                if reporting:
                    means = _mean(window) | speed.scalars()
                    writer.write_scalars(done, {f"train/{k}": v for k, v in means.items()})
                    bar.set_postfix_str(f"loss {means['loss']:.4f}", refresh=False)
                    window = []
                if saving:
                    checkpoints.save(done, state, _progress(position), metadata)
                if ending:
                    raise ended(ending)
                if validating:
                    with speed.paused():
                        validate()
        checkpoints.wait()

        # Evaluate, from all views, and write down what came out.
        found = _evaluate(config, state, model, clip, eval_split, mesh, end_if_asked, final=True)
        _report(writer, done, "final", found)
        about = {
            "step": done,
            "best": _best(checkpoints),
            "config": config.name,
            "versions": {m.__name__: m.__version__ for m in (timesformer_jax, jax, flax)},
            "devices": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
            "clips_per_second": speed.clips_per_second(),
        }
        if jax.process_index() == 0:
            found.save(workdir / RESULTS, **about)
        return about | found.to_json()


def train_and_report(config: ConfigDict, workdir: str, **processes: Any) -> None:
    """`train`, then a few lines that say how good the model is and where everything lies.

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
            _print(results, workdir)


def _print(results: dict[str, Any], workdir: str) -> None:
    best = ""
    if results["best"]:
        best = (
            f", the best in validation {results['best']['step']} "
            f"(--checkpoint={os.path.join(workdir, ckpt.BEST)})"
        )
    print(
        f"top-1 {results['top1']:.2%}  top-5 {results['top5']:.2%}  of {results['videos']} videos, "
        f"{results['views']} x {results['crops']} views\n"
        f"results      {os.path.join(workdir, RESULTS)}\n"
        f"checkpoint   {os.path.join(workdir, ckpt.FOLDER, str(results['step']))}{best}\n"
        f"TensorBoard  tensorboard --logdir {os.path.join(workdir, TENSORBOARD)}"
    )


def model_config(config: ConfigDict, labels: tuple[str, ...]) -> TimeSformerConfig:
    """The model of a recipe on data of these labels; num_classes 0 takes as many as there are."""
    fields = dict(config.model)
    fields["num_classes"] = fields["num_classes"] or len(labels)
    if fields["num_classes"] != len(labels):
        raise InputError(
            f"the data in {config.data.directory} has {len(labels)} labels, the config's model "
            f"{fields['num_classes']}; pass --config.model.num_classes={len(labels)}"
        )
    return TimeSformerConfig(**fields)


def _plain(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON values, its data found from any folder."""
    fields = json.loads(config.to_json())
    fields["data"]["directory"] = absolute_source(config.data.directory)
    return fields


def _check(config: ConfigDict) -> None:
    """Refuses what could only fail, or pass for a result, later."""
    least = {
        "epochs": 1, "batch_size": 1, "log_every_steps": 1, "eval.batch_size": 1, "eval.views": 1,
        "eval.every_epochs": 0, "checkpoint.keep": 1, "checkpoint.keep_best": 0,
        "checkpoint.every_steps": 0, "optimizer.weight_decay": 0, "optimizer.clip_norm": 0,
        "accumulate_steps": 1, "ema": 0,
        "profile.start_step": 1, "profile.steps": 0,
    }  # fmt: skip
    values = flatten_config(config.to_dict())
    for name, bound in least.items():
        if not bound <= values[name] < math.inf:
            raise InputError(f"--config.{name} must be at least {bound}, not {values[name]}")
    if values["ema"] >= 1:
        raise InputError(f"--config.ema must be below 1, 0.9999 for one, not {values['ema']}")
    if not 0 < values["optimizer.learning_rate"] < math.inf:
        rate = values["optimizer.learning_rate"]
        raise InputError(f"--config.optimizer.learning_rate must be above 0, not {rate}")
    if values["eval.crops"] not in (1, 3):
        raise InputError(f"--config.eval.crops must be 1 or 3, not {values['eval.crops']}")
    sampling.check_short_side_range(tuple(values["data.short_side_range"]), values["clip.crop"])
    if not values["data.directory"]:
        raise InputError("say with --config.data.directory where the prepared data is")


def _due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps, 0 for never, is after this one."""
    return every > 0 and step % every == 0


def _keep_recipe(workdir: epath.Path, metadata: ckpt.CheckpointMetadata) -> None:
    if jax.process_index() == 0:
        content = json.dumps(metadata.config, indent=2) + "\n"
        storage.write_atomically(workdir / RECIPE, content.encode())


def _checkpoints(config: ConfigDict, workdir: epath.Path) -> ckpt.Checkpoints:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the workdir {workdir}: {e.strerror}") from e
    return ckpt.Checkpoints(
        workdir / ckpt.FOLDER, config.checkpoint.keep, config.checkpoint.keep_best
    )


def _best(checkpoints: ckpt.Checkpoints) -> dict[str, Any] | None:
    """The best step by validation, and how good it was."""
    step = checkpoints.best_step()
    return None if step is None else {"step": step} | checkpoints.validation[step]


def _writer(workdir: epath.Path) -> metric_writers.MetricWriter:
    return metric_writers.create_default_writer(
        os.fspath(workdir / TENSORBOARD),
        just_logging=jax.process_index() > 0,
        asynchronous=False,
    )


def _restore(
    checkpoints: ckpt.Checkpoints, target: TrainState, metadata: ckpt.CheckpointMetadata
) -> tuple[TrainState | None, pipeline.IteratorState | None, ckpt.CheckpointMetadata]:
    """State, position and metadata to go on with; the first two None if there is no checkpoint."""

    def read(step: int) -> tuple[ckpt.CheckpointMetadata, TrainState, dict[str, Any]]:
        saved = checkpoints.metadata(step)
        _check_same_run(checkpoints, metadata, saved)
        return saved, *checkpoints.restore(step, target)

    found = checkpoints.read_newest(read)
    if found is None:
        return None, None, metadata
    step, (saved, state, progress) = found
    checkpoints.set_aside_after(step)
    logging.info("going on from step %d of %s", step, checkpoints.directory)
    for name, (now, before) in _changes(metadata, saved).items():
        logging.warning("this run goes on with another %s: %s, it was %s", name, now, before)
    state = state._replace(step=jax.device_put(np.int32(step), target.step.sharding))
    metadata = dataclasses.replace(metadata, license=saved.license)
    return state, pipeline.IteratorState(**progress["position"]), metadata


def _check_same_run(
    checkpoints: ckpt.Checkpoints, metadata: ckpt.CheckpointMetadata, saved: ckpt.CheckpointMetadata
) -> None:
    # How the model is run may change, what it computes may not.
    ours, theirs = (
        dataclasses.asdict(dataclasses.replace(c.model, remat="none", scan_layers=False))
        for c in (metadata, saved)
    )
    changed = [f"{k} is {ours[k]}, saved was {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    changed += [] if saved.labels == metadata.labels else ["the labels are others"]
    fixed = ("batch_size", "seed", "ema", "optimizer.name", "optimizer.train", "data.fraction")
    others = _changes(metadata, saved)
    changed += [f"{k} is {v[0]}, saved was {v[1]}" for k, v in others.items() if k in fixed]
    if changed:
        raise InputError(
            f"{checkpoints.directory} belongs to another run ({'; '.join(changed)}); "
            "choose another --workdir, or that run's config"
        )


def _changes(
    metadata: ckpt.CheckpointMetadata, saved: ckpt.CheckpointMetadata
) -> dict[str, tuple[Any, Any]]:
    """The fields of the config that differ, by name: now, and when it was saved."""
    ours, theirs = flatten_config(metadata.config), flatten_config(saved.config)
    return {k: (ours[k], theirs.get(k)) for k in ours if ours[k] != theirs.get(k)}


def _progress(position: pipeline.IteratorState) -> dict[str, Any]:
    return {"position": dataclasses.asdict(position)}


def _initial(
    config: ConfigDict, metadata: ckpt.CheckpointMetadata
) -> tuple[Any, ckpt.CheckpointMetadata]:
    """The first parameters, or a function that draws them; and the metadata with their license."""
    if not config.pretrained:
        model = metadata.model
        return lambda: parameters(TimeSformer(model, rngs=nnx.Rngs(config.seed))), metadata
    if not storage.absolute(config.pretrained).exists():
        raise InputError(
            f"there is no checkpoint {config.pretrained} to start from: say with "
            "--config.pretrained=FILE where it is, or with --config.pretrained= to start from none"
        )
    # Whatever the checkpoint was made for gives way to what the recipe asks for.
    fields = dataclasses.asdict(metadata.model)
    try:
        source = convert.read(config.pretrained, **fields)
    except convert.SizeMismatch as e:
        flags = " ".join(f"--config.model.{name}={value}" for name, value in e.found.items())
        raise InputError(f"{e}: pass {flags}") from None
    logging.info("starting from %s", config.pretrained)
    return source.load(), dataclasses.replace(metadata, license=source.license)


def _for_step(batch: pipeline.Batch) -> pipeline.Batch:
    return {name: batch[name] for name in ("frames", "crop_boxes", "flip", "augment_seed", "label")}


def _check_finite(
    window: list[dict[str, jax.Array]], params: Any, done: int, checkpoints: ckpt.Checkpoints
) -> None:
    """Stops at the first of the steps up to `done`, the window's, that left finite numbers."""
    wrong = (
        f"{name.replace('_', ' ')} is {metrics[name]} at step {step}, at learning rate "
        f"{metrics['learning_rate']:g}"
        for step, metrics in enumerate(jax.device_get(window), done - len(window) + 1)
        for name in ("loss", "gradient_norm")
        if not np.isfinite(metrics[name])
    )
    what = next(wrong, None)
    if what is None and not _finite(params):
        what = f"parameters are not finite after step {done}"
    if what is None:
        return
    last = checkpoints.latest_step()
    kept = "no checkpoint was saved before"
    if last is not None:
        kept = f"the last good checkpoint is {checkpoints.directory / str(last)}"
    raise InputError(
        f"the {what}: lower --config.optimizer.learning_rate or set --config.optimizer.clip_norm; "
        f"{kept}"
    )


@jax.jit
def _finite(params: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]).all()


def _mean(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    values = jax.device_get(window)
    return {name: float(np.mean([v[name] for v in values])) for name in values[0]}


def _evaluate(
    config: ConfigDict, state: TrainState, model, clip, split, mesh, after_batch, final=False
) -> Results:
    """All the recipe's views at the end, the centre of one clip on the way."""
    return evaluate(
        state.best_params,
        model,
        clip,
        split,
        mesh,
        batch_size=config.eval.batch_size,
        views=config.eval.views if final else 1,
        crops=config.eval.crops if final else 1,
        after_batch=after_batch,
    )


def _report(writer: metric_writers.MetricWriter, step: int, name: str, found: Results) -> None:
    values = found.to_json()
    writer.write_scalars(step, {f"{name}/top1": values["top1"], f"{name}/top5": values["top5"]})
    writer.flush()


def _finished(workdir: epath.Path, step: int) -> dict[str, Any] | None:
    """The results of `step`, if they are written."""
    path = workdir / RESULTS
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    return results if results["step"] == step else None
