"""`validation.json` beside the checkpoints of a run: the accuracy of each evaluated step."""

from __future__ import annotations

import json

from etils import epath

from timesformer_jax import storage
from timesformer_jax.errors import InputError

FILE = "validation.json"

# By step: "top1" and perhaps "top5", or "mAP".
Accuracies = dict[int, dict[str, float]]


def score(accuracy: dict[str, float]) -> float:
    """By which the best checkpoint is chosen."""
    return accuracy["mAP"] if "mAP" in accuracy else accuracy["top1"]


def write(directory: epath.Path, accuracies: Accuracies) -> None:
    content = json.dumps(accuracies, indent=2) + "\n"
    storage.write_atomically(directory / FILE, content.encode())


def read(directory: epath.Path) -> Accuracies:
    """The accuracies in a directory; {} if none was written.

    Raises:
      InputError: if the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text()).items()
        accuracies = {int(step): {k: float(x) for k, x in v.items()} for step, v in found}
        for accuracy in accuracies.values():
            score(accuracy)
        return accuracies
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise InputError(
            f"{path} is damaged; remove it: training then continues, but does not know which "
            "checkpoint was best so far"
        ) from None
