"""Multi-view evaluation: the probabilities of a video's views are averaged, as in the paper.

A long video counts once too, by the paper's protocol for HowTo100M: the probabilities of clips that
do not overlap are averaged, whether it was prepared in pieces of a clip each or is covered here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from timesformer_jax import ranges
from timesformer_jax.checkpoints.load import load
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.checkpoints.sources import full_name
from timesformer_jax.clip_spec import ClipSpec
from timesformer_jax.data.input.pipeline import clips_a_row, eval_batches, eval_in_flight, eval_rows
from timesformer_jax.data.input.sampling import COVER, Views
from timesformer_jax.data.records.open import open_split
from timesformer_jax.data.records.split import Split
from timesformer_jax.distributed import hosts
from timesformer_jax.distributed.device_memory import memory_advice
from timesformer_jax.distributed.mesh import batch_rows, check_batch, make_mesh, put_batch
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results, VideoMeans, by_name
from timesformer_jax.evaluation.output import check_outputs, write
from timesformer_jax.evaluation.step import make_step
from timesformer_jax.host_memory import require_memory_for
from timesformer_jax.models import tuning
from timesformer_jax.models.timesformer import TimeSformerConfig

LESS_MEMORY = "lower --batch_size (in training --config.eval.batch_size) or --views"


def evaluate(
    params: Any,
    model: TimeSformerConfig,
    clip: ClipSpec,
    split: Split,
    mesh: Mesh,
    *,
    batch_size: int,
    views: Views = 1,
    crops: int = 3,
    after_batch: Callable[[], None] = lambda: None,
) -> Results | MultiLabelResults:
    """Accuracy over a split; of a multi-label split the average precision.

    Args:
      params: parameters on `mesh`.
      model, clip: the model, and the clips it expects.
      split: a prepared split. Every video counts once, on any number of hosts, with the mean
        probabilities of its records.
      mesh: the devices.
      batch_size: videos at a time, of all devices together; with views "cover" clips.
      views: clips along a video; "cover" for those of `sampling.covering_indices`.
      crops: 3 for left, centre and right; 1 for the centre only.
      after_batch: called after each batch; an exception ends the evaluation.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        clips = batch_size * clips_a_row(views) * crops
        tuning.choose_kernels(
            model, clips, clip.frames, clip.crop, gradients=False, masked=clip.short == "mask"
        )
    step = make_step(model, clip, mesh, split.targets is not None)
    rows = batch_rows(mesh, batch_size)
    batches = eval_batches(split, clip, batch_size=batch_size, views=views, crops=crops, rows=rows)
    progress = tqdm(
        batches,
        desc=f"evaluating {split.name}",
        total=-(-eval_rows(split, clip, views) // batch_size),
        unit="batch",
        disable=jax.process_index() > 0,
        leave=False,
    )
    found = VideoMeans(split.video, model.num_classes)
    for batch in progress:
        names = ("frames", "crop_boxes", "record", "valid", "valid_frames")
        arrays = put_batch(mesh, {name: batch[name] for name in names if name in batch})
        with memory_advice(LESS_MEMORY):
            p, record, valid = jax.device_get(step(params, arrays))
        found.add(p[valid], record[valid])
        after_batch()
    videos, averaged = split.take(found.first), found.means()
    if videos.targets is None:
        return Results(split.label_names, videos.ids, videos.label, averaged, views, crops)
    return MultiLabelResults(split.label_names, videos.ids, videos.targets, averaged, views, crops)


def evaluate_checkpoint(
    checkpoint: str,
    data: str | None = None,
    split: str | None = None,
    fps: float | None = None,
    views: Views = 1,
    crops: int = 3,
    batch_size: int | None = None,
    output: Sequence[str] = (),
    attention_kernels: str = "auto",
    **processes: Any,
) -> None:
    """Evaluates a checkpoint and prints a table of its accuracy by class.

    Args:
      checkpoint: a path or name, as for `checkpoints.load`.
      data: as for `open_split`; by default the data it was trained on.
      split: by default the evaluation split of its config.
      fps: frame rate of records that do not store theirs; by default, on the data it was trained
        on, that of its config.
      views, crops: as for `evaluate`.
      batch_size: videos at a time, with views "cover" clips; by default that of its config.
      output: files for the results, each .json, .csv or .png; see `output.write`.
      attention_kernels: "auto", "xla" or the name of a kernel, see docs/kernels.md.
      processes: the arguments of `hosts.processes`.

    Raises:
      InputError: if something cannot be read, or the data's labels are not the checkpoint's.
    """
    ranges.check_given(views=None if views == COVER else views, crops=crops)
    ranges.check_given(batch_size=batch_size, fps=fps)
    check_outputs(output)
    with tuning.using(attention_kernels), hosts.processes(**processes):
        mesh = make_mesh()
        metadata, params = load(checkpoint, sharding=NamedSharding(mesh, P()))
        # Converted weights have no config.
        batch_size = batch_size or metadata.config.get("eval", {}).get("batch_size", 8)
        evaluated = _open_data(checkpoint, metadata, data, split, fps)
        evaluated = match_labels(metadata, evaluated)
        check_batch(mesh, batch_size, "--batch_size")
        parts = jax.device_count()
        clip = metadata.clip
        there = eval_rows(evaluated, clip, views)
        batch_size = min(batch_size, -(-there // parts) * parts)  # no more than there are
        own = batch_size * clips_a_row(views) // jax.process_count()
        require_memory_for(own, clip.frames, clip.crop, "--batch_size or --views")
        rows = len(batch_rows(mesh, batch_size))
        if jax.process_index() == 0:
            logging.info("input pipeline: %s", eval_in_flight(evaluated, clip, rows, views, crops))
        results = evaluate(
            params, metadata.model, metadata.clip, evaluated, mesh,
            batch_size=batch_size, views=views, crops=crops,
        )  # fmt: skip
        if jax.process_index() > 0:
            return
        print(results.table())
        about = {"checkpoint": full_name(checkpoint), "split": evaluated.name}
        for path in output:
            write(results, path, about)
            print(f"written to {path}")


def _open_data(
    checkpoint: str,
    metadata: CheckpointMetadata,
    data: str | None,
    split: str | None,
    fps: float | None,
) -> Split:
    """The split to evaluate on; what is None is as in the checkpoint's config."""
    trained_on = metadata.config.get("data", {})
    split = split or trained_on.get("eval_split", "validation")
    if data:
        return open_split(data, split, fps)
    if not trained_on.get("directory"):
        raise InputError(f"{checkpoint} was not trained here: say with --data what to evaluate on")
    return open_split(trained_on["directory"], split, fps or trained_on.get("fps"))


def match_labels(metadata: CheckpointMetadata, split: Split) -> Split:
    """The split with the checkpoint's classes, which are found by their names.

    Raises:
      InputError: if the checkpoint does not have every label of the data.
    """
    labels, names = split.label_names, metadata.labels
    if metadata.multilabel != (split.targets is not None):
        many = "any number of labels" if metadata.multilabel else "one label"
        raise InputError(
            f"the checkpoint is for {many} a video and the data is not;"
            " prepare it with --multilabel as the training data was"
        )
    if labels == names:
        return split
    if not names and len(labels) == metadata.model.num_classes:
        logging.warning("the checkpoint names no classes: the data's are taken in their order")
        return split
    classes = by_name(labels, names)
    if classes is None:
        raise InputError(
            f"the data has {len(labels)} labels ({_first_few(labels)}), the checkpoint "
            f"{metadata.model.num_classes} ({_first_few(names)}): the checkpoint must have all of "
            "them; prepare the data with the checkpoint's labels"
        )
    if len(labels) < len(names):
        logging.warning(
            "the data has %d of the checkpoint's %d labels; the others count as wrong predictions",
            len(labels), len(names),
        )  # fmt: skip
    targets = split.targets
    if targets is not None:
        targets = np.zeros((len(split), len(names)), bool)
        targets[:, classes] = split.targets
    label = classes[split.label]
    return dataclasses.replace(split, label=label, targets=targets, label_names=names)


def _first_few(labels: tuple[str, ...]) -> str:
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "") or "without names"
