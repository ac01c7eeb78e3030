"""What a run writes beside its checkpoints, and what a checkpoint that leaves it takes along."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

from absl import logging
from etils import epath

from timesformer_jax import storage
from timesformer_jax.checkpoints import schema, validation
from timesformer_jax.checkpoints.metadata import CheckpointMetadata
from timesformer_jax.data.input.sampling import COVER, Views
from timesformer_jax.errors import InputError

FOLDER = "checkpoints"  # of a workdir
# In a workdir.
CARD, CURVES, RECIPE, RESULTS = "README.md", "curves.png", "recipe.json", "results.json"
_METRICS = {"top1": "top-1", "top5": "top-5", "mAP": "mAP"}


class Evaluation(NamedTuple):
    """The accuracy of a checkpoint.

    Attributes:
      name: what was evaluated, for a table.
      split: of the data.
      metrics: fractions by name: "top-1" and perhaps "top-5", or "mAP".
      videos: their number; 0 if it is not known.
      views, crops: clips a video and squares a clip, whose probabilities were averaged.
    """

    name: str
    split: str
    metrics: dict[str, float]
    videos: int
    views: Views
    crops: int


class RunFiles(NamedTuple):
    """Files of the run that a checkpoint is of.

    Attributes:
      evaluations: of this checkpoint, the final one first.
      pictures: names and bytes of the curves, if they were drawn.
    """

    evaluations: tuple[Evaluation, ...] = ()
    pictures: dict[str, bytes] = {}  # noqa: RUF012 (never changed)


def read(step_folder: epath.Path | None, metadata: CheckpointMetadata) -> RunFiles:
    """The files of the run that a checkpoint lies in; nothing of a checkpoint of no run.

    Args:
      step_folder: WORKDIR/checkpoints/STEP.
      metadata: of this step.
    """
    if step_folder is None or step_folder.parent.name != FOLDER or not metadata.config:
        return RunFiles()
    workdir, step = step_folder.parent.parent, int(step_folder.name)
    split = str(metadata.config.get("data", {}).get("eval_split") or "validation")
    found = []
    if (workdir / RESULTS).exists():
        try:
            results = _json_file(workdir / RESULTS)
            if results.get("step") == step:
                found.append(_evaluation(results, "at the end of training", split))
        except InputError as e:
            logging.warning("%s is left out: %s", workdir / RESULTS, e)
    if accuracy := validation.read(step_folder.parent).get(step):
        found.append(Evaluation("during training", split, _metrics(accuracy), 0, views=1, crops=1))
    curves = workdir / CURVES
    return RunFiles(tuple(found), {CURVES: curves.read_bytes()} if curves.exists() else {})


def evaluated(path: str | os.PathLike) -> Evaluation:
    """The accuracy in a results.json of `timesformer evaluate`.

    Raises:
      InputError: if it is no such file.
    """
    try:
        return _evaluation(_json_file(epath.Path(path)), "evaluated", "")
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def _evaluation(fields: dict[str, Any], name: str, split: str) -> Evaluation:
    try:
        views = fields["views"]
        return Evaluation(
            name, str(fields.get("split", split)), _metrics(fields),
            int(fields["videos"]), views if views == COVER else int(views), int(fields["crops"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise InputError(
            "it holds no results; give a file of timesformer evaluate --output=results.json"
        ) from None


def public_recipe(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the paths of folders on the machine where it was trained."""
    data = config.get("data", {})
    directory = str(data.get("directory", ""))
    pretrained = str(config.get("pretrained", ""))
    if os.path.isabs(pretrained):
        pretrained = os.path.basename(pretrained)
    if storage.is_remote(directory) or os.path.isabs(directory):
        directory = os.path.basename(directory.rstrip("/"))
    return config | {"pretrained": pretrained, "data": data | {"directory": directory}}


def _json_file(path: epath.Path) -> dict[str, Any]:
    try:
        return schema.json_object(json.loads(path.read_text()), path.name)
    except FileNotFoundError:
        raise InputError("no such file") from None
    except (OSError, ValueError, RecursionError):
        raise InputError("it cannot be read: it holds no JSON object") from None


def _metrics(fields: dict[str, Any]) -> dict[str, float]:
    """The accuracy by the names of a table."""
    found = {shown: float(fields[name]) for name, shown in _METRICS.items() if name in fields}
    if not found:
        raise KeyError(*_METRICS)
    return found
