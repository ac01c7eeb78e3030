"""Training, from top to bottom: data, mesh, state, steps, checkpoints, results."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import sys
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import metric_writers
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from timesformer_jax import checkpoints as ckpt
from timesformer_jax import convert
from timesformer_jax.augmentation import Augmentation
from timesformer_jax.data import demo, pipeline, records, sampling
from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.mesh import batch_rows, check_batch, make_mesh, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import Results
from timesformer_jax.evaluation.multi_view import evaluate
from timesformer_jax.models.timesformer import TimeSformer, TimeSformerConfig, parameters
from timesformer_jax.preprocessing import ClipSpec
from timesformer_jax.training.optimizer import learning_rate, make_optimizer
from timesformer_jax.training.step import TrainState, abstract_state, init_state, make_train_step

# In a workdir.
TENSORBOARD, RESULTS, RECIPE = "tensorboard", "results.json", "recipe.json"


class Preempted(Exception):
    """The run was asked to end and did, its state saved; `signal` is SIGTERM or SIGINT."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signal = signum


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, evaluates and writes the results; goes on where an earlier call was cut off.

    Args:
      config: a recipe of `recipes`.
      workdir: gets checkpoints/, tensorboard/ and results.json.

    Returns:
      What results.json holds: top1 and top5 as fractions, the videos counted, and per class.

    Raises:
      InputError: if something given cannot be used.
      Preempted: on SIGTERM or Ctrl-C, after saving.
    """
    _check(config)
    augmentation = Augmentation(**config.augment)
    # The data, and what it says of the model and its clips.
    if config.data.demo:
        hosts.once("demo", lambda: demo.prepare_demo(config.data.directory))
    data = config.data
    train_split, eval_split = (
        records.open_split(data.directory, split, data.fps)
        for split in (data.train_split, data.eval_split)
    )
    short_side = int(min(train_split.height[0], train_split.width[0]))
    clip = ClipSpec(**config.clip, short_side=short_side)
    model = model_config(config, train_split.label_names)
    card = ckpt.Card(model, clip, train_split.label_names, _plain(config))

    # The mesh, the step, and the shapes of the state.
    mesh = make_mesh(**config.mesh)
    check_batch(mesh, config.batch_size, "--config.batch_size")
    check_batch(mesh, config.eval.batch_size, "--config.eval.batch_size")
    per_epoch = pipeline.batches_per_epoch(train_split, config.batch_size)
    total = config.epochs * per_epoch
    schedule = learning_rate(config.optimizer, config.batch_size, per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule)
    target = abstract_state(model, optimizer, mesh)
    step = make_train_step(
        model, clip, optimizer, schedule, target, mesh, config.seed, augmentation
    )

    with (
        jax.set_mesh(mesh),
        contextlib.closing(_checkpoints(config, workdir)) as checkpoints,
        contextlib.closing(_writer(workdir)) as writer,
        hosts.termination() as asked_to_end,
    ):
        # Go on from the newest checkpoint, or begin.
        state, position, card = _restore(checkpoints, target, card)
        if state is None:
            initial, card = _initial(config, card)
            state = init_state(initial, optimizer, target)
            position = pipeline.Position()
        _keep_recipe(workdir, card)
        done = int(state.step)
        if done >= total and (results := _finished(workdir, done)):
            logging.info("nothing to do: %d of %d steps are done and evaluated", done, total)
            return results

        # Train.
        batches = pipeline.train_batches(
            train_split,
            clip,
            batch_size=config.batch_size,
            jitter=tuple(config.data.jitter),
            flip=config.data.flip,
            seed=config.seed,
            position=position,
            rows=batch_rows(mesh, config.batch_size),
        )
        window: list[dict[str, jax.Array]] = []
        bar = tqdm(
            total=total, initial=done, unit="step", desc="training", disable=jax.process_index() > 0
        )
        with bar:
            while done < total:
                batch, position = next(batches)
                state, metrics = step(state, put_batch(mesh, _for_step(batch)))
                done += 1
                bar.update()
                window.append(metrics)
                if done % config.log_every_steps == 0 or done == total:
                    means = _mean(window)
                    if not np.isfinite(means["loss"]):
                        raise InputError(
                            f"the loss is {means['loss']} by step {done}, at learning rate "
                            f"{means['learning_rate']:g}: lower --config.optimizer.learning_rate; "
                            f"the last checkpoint is step {checkpoints.latest_step()}"
                        )
                    writer.write_scalars(done, {f"train/{k}": v for k, v in means.items()})
                    bar.set_postfix_str(f"loss {means['loss']:.4f}", refresh=False)
                    window = []
                ending = asked_to_end(done)
                if done % (config.checkpoint.every_steps or per_epoch) == 0 or ending:
                    checkpoints.save(done, state, _progress(position), card)
                if ending:
                    checkpoints.wait()
                    raise Preempted(
                        f"asked to end: step {done} of {total} is saved in "
                        f"{checkpoints.directory}; run the same command again to go on",
                        ending,
                    )
                every = config.eval.every_epochs * per_epoch
                if every and done % every == 0 and done < total:
                    found = _evaluate(config, state, model, clip, eval_split, mesh, final=False)
                    _report(writer, done, "validation", found)
                    if jax.process_index() == 0:
                        bar.write(f"epoch {done // per_epoch}: {found.summary()}")
        if checkpoints.latest_step() != done:
            checkpoints.save(done, state, _progress(position), card)
        checkpoints.wait()

        # Evaluate, from all views, and write down what came out.
        found = _evaluate(config, state, model, clip, eval_split, mesh, final=True)
        _report(writer, done, "final", found)
        if jax.process_index() == 0:
            found.save(os.path.join(workdir, RESULTS), step=done)
        return {"step": done} | found.to_json()


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
    print(
        f"top-1 {results['top1']:.2%}  top-5 {results['top5']:.2%}  of {results['videos']} videos, "
        f"{results['views']} x {results['crops']} views\n"
        f"results      {os.path.join(workdir, RESULTS)}\n"
        f"checkpoint   {os.path.join(workdir, ckpt.FOLDER, str(results['step']))}\n"
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
    fields["data"]["directory"] = records.resolved(config.data.directory)
    return fields


def _check(config: ConfigDict) -> None:
    """Refuses what could only fail, or pass for a result, later."""
    least = {
        "epochs": 1, "batch_size": 1, "log_every_steps": 1, "eval.batch_size": 1, "eval.views": 1,
        "eval.every_epochs": 0, "checkpoint.keep": 1, "checkpoint.every_steps": 0,
        "optimizer.weight_decay": 0,
    }  # fmt: skip
    values = ckpt.flat(config.to_dict())
    for name, bound in least.items():
        if not bound <= values[name] < math.inf:
            raise InputError(f"--config.{name} must be at least {bound}, not {values[name]}")
    if not 0 < values["optimizer.learning_rate"] < math.inf:
        rate = values["optimizer.learning_rate"]
        raise InputError(f"--config.optimizer.learning_rate must be above 0, not {rate}")
    if values["eval.crops"] not in (1, 3):
        raise InputError(f"--config.eval.crops must be 1 or 3, not {values['eval.crops']}")
    sampling.check_jitter(tuple(values["data.jitter"]), values["clip.crop"])
    if not values["data.directory"]:
        raise InputError("say with --config.data.directory where the prepared data is")


def _keep_recipe(workdir: str, card: ckpt.Card) -> None:
    if jax.process_index() == 0:
        with open(os.path.join(workdir, RECIPE), "w") as f:
            json.dump(card.config, f, indent=2)
            f.write("\n")


def _checkpoints(config: ConfigDict, workdir: str) -> ckpt.Checkpoints:
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as e:
        raise InputError(f"cannot make the workdir {workdir}: {e.strerror}") from e
    return ckpt.Checkpoints(os.path.join(workdir, ckpt.FOLDER), config.checkpoint.keep)


def _writer(workdir: str) -> metric_writers.MetricWriter:
    return metric_writers.create_default_writer(
        os.path.join(workdir, TENSORBOARD),
        just_logging=jax.process_index() > 0,
        asynchronous=False,
    )


def _restore(
    checkpoints: ckpt.Checkpoints, target: TrainState, card: ckpt.Card
) -> tuple[TrainState | None, pipeline.Position | None, ckpt.Card]:
    """State, position and card to go on with; the first two None if there is no checkpoint."""
    latest = checkpoints.latest_step()
    if latest is None:
        return None, None, card
    saved = checkpoints.card(latest)
    ours, theirs = dataclasses.asdict(card.model), dataclasses.asdict(saved.model)
    changed = [f"{k} is {ours[k]}, saved was {theirs[k]}" for k in ours if ours[k] != theirs[k]]
    changed += [] if saved.labels == card.labels else ["the labels are others"]
    ours, theirs = ckpt.flat(card.config), ckpt.flat(saved.config)
    others = {k: (ours[k], theirs.get(k)) for k in ours if ours[k] != theirs.get(k)}
    fixed = ("batch_size", "seed", "optimizer.name")
    changed += [f"{k} is {v[0]}, saved was {v[1]}" for k, v in others.items() if k in fixed]
    if changed:
        raise InputError(
            f"{checkpoints.directory} belongs to another run ({'; '.join(changed)}); "
            "choose another --workdir, or that run's config"
        )
    state, progress = checkpoints.restore(latest, target)
    logging.info("going on from step %d of %s", latest, checkpoints.directory)
    for name, (now, before) in others.items():
        logging.warning("this run goes on with another %s: %s, it was %s", name, now, before)
    state = state._replace(step=jax.device_put(np.int32(latest), target.step.sharding))
    card = dataclasses.replace(card, license=saved.license)
    return state, pipeline.Position(**progress["position"]), card


def _progress(position: pipeline.Position) -> dict[str, Any]:
    return {"position": dataclasses.asdict(position)}


def _initial(config: ConfigDict, card: ckpt.Card) -> tuple[Any, ckpt.Card]:
    """The first parameters, or a function that draws them; and the card with their license."""
    if not config.pretrained:
        model = card.model
        return lambda: parameters(TimeSformer(model, rngs=nnx.Rngs(config.seed))), card
    # Whatever the checkpoint was made for gives way to what the recipe asks for.
    fields = dataclasses.asdict(card.model)
    source = convert.read(config.pretrained, **fields)
    logging.info("starting from %s", config.pretrained)
    return source.load(), dataclasses.replace(card, license=source.license)


def _for_step(batch: pipeline.Batch) -> pipeline.Batch:
    return {name: batch[name] for name in ("frames", "windows", "flip", "draw", "label")}


def _mean(window: list[dict[str, jax.Array]]) -> dict[str, float]:
    values = jax.device_get(window)
    return {name: float(np.mean([v[name] for v in values])) for name in values[0]}


def _evaluate(
    config: ConfigDict, state: TrainState, model, clip, split, mesh, *, final: bool
) -> Results:
    """All the recipe's views at the end, the centre of one clip on the way."""
    return evaluate(
        state.params,
        model,
        clip,
        split,
        mesh,
        batch_size=config.eval.batch_size,
        views=config.eval.views if final else 1,
        crops=config.eval.crops if final else 1,
    )


def _report(writer: metric_writers.MetricWriter, step: int, name: str, found: Results) -> None:
    values = found.to_json()
    writer.write_scalars(step, {f"{name}/top1": values["top1"], f"{name}/top5": values["top5"]})
    writer.flush()


def _finished(workdir: str, step: int) -> dict[str, Any] | None:
    """The results of `step`, if they are written."""
    path = os.path.join(workdir, RESULTS)
    if not os.path.exists(path):
        return None
    with open(path) as f:
        results = json.load(f)
    return results if results["step"] == step else None
