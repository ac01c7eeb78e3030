"""Writes the results of an evaluation: JSON, a csv row a video, a picture of the confusion."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from timesformer_jax import storage
from timesformer_jax.errors import InputError
from timesformer_jax.evaluation.metrics import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names beside the picture are legible up to this many classes.
MOST_NAMED = 60


def check_outputs(paths: Sequence[str]) -> None:
    """Raises InputError unless all can be written; before the work, so that none is lost."""
    for path in paths:
        if os.path.splitext(path)[1] not in WRITERS:
            raise InputError(f"--output={path}: the name must end in {', '.join(WRITERS)}")
        if storage.is_remote(path):
            continue
        if os.path.isdir(path):
            raise InputError(f"--output={path} is a folder; give the name of a file in it")
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise InputError(f"the folder of --output={path} does not exist")
        if path.endswith(".png"):
            _figure()


def write(results: Results, path: str, about: Mapping[str, Any]) -> None:
    """Writes the results to a file, whole or not at all; the end of its name tells the format.

    Args:
      results: what to write.
      path: x.json: `about`, the accuracy, the confusion matrix and all predictions; x.csv: a row a
        video with its truth, its prediction and all probabilities; x.png: the confusion matrix.
      about: more fields of the JSON file.
    """
    content = WRITERS[os.path.splitext(path)[1]](results, about)
    with storage.disk_errors(path):
        storage.write_atomically(storage.absolute(path), content)


def _json(results: Results, about: Mapping[str, Any]) -> bytes:
    rows = zip(results.ids.tolist(), results.truth, results.predicted, results.probabilities)
    predictions = [
        {
            "id": name,
            "label": results.labels[truth],
            "prediction": results.labels[predicted],
            "probabilities": [float(f"{value:.6g}") for value in p],
        }
        for name, truth, predicted, p in rows
    ]
    content = (
        {**about, **results.to_json()}
        | {"labels": list(results.labels), "confusion": results.confusion().tolist()}
        | {"predictions": predictions}
    )
    return (json.dumps(content) + "\n").encode()


def _csv(results: Results, about: Mapping[str, Any]) -> bytes:
    del about
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["id", "label", "prediction", "rank", *(f"p({x})" for x in results.labels)])
    ranks = (1 + results.ranks).tolist()
    for row, name in enumerate(results.ids.tolist()):
        names = results.labels[results.truth[row]], results.labels[results.predicted[row]]
        rows.writerow([name, *names, ranks[row], *(f"{p:.6g}" for p in results.probabilities[row])])
    return text.getvalue().encode()


def _png(results: Results, about: Mapping[str, Any]) -> bytes:
    """Each row of the confusion matrix as shares of the videos of its class."""
    del about
    counts, classes = results.confusion(), len(results.labels)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    side = 3 + min(classes, MOST_NAMED) * 0.28
    figure = _figure()(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the videos of the class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="label", title=results.summary())
    axes.title.set_fontsize(9)
    if classes <= MOST_NAMED:
        axes.set_xticks(range(classes), results.labels, rotation=90)
        axes.set_yticks(range(classes), results.labels)
    if classes <= 20:
        for (row, column), count in zip(zip(*counts.nonzero()), counts[counts.nonzero()]):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _figure() -> type[Figure]:
    """matplotlib's Figure, which needs no screen and changes no settings of a notebook."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError("a picture needs the package matplotlib: pip install '.[data]'") from e
    return Figure


WRITERS: dict[str, Callable[[Results, Mapping[str, Any]], bytes]] = {
    ".json": _json,
    ".csv": _csv,
    ".png": _png,
}
