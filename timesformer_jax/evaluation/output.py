"""Writes the results of an evaluation: JSON, a csv row a video, a picture of the confusion."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from timesformer_jax import storage
from timesformer_jax.errors import InputError, install
from timesformer_jax.evaluation.metrics import MultiLabelResults, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names beside the picture are legible up to this many classes.
MOST_NAMED = 60


def check_outputs(paths: Sequence[str]) -> None:
    """Raises InputError unless all can be written; before the work, so that none is lost."""
    for path in paths:
        storage.check_output("--output", path, WRITERS)
        if storage.extension(path) == ".png":
            _figure()


def write(results: Results | MultiLabelResults, path: str, about: Mapping[str, Any]) -> None:
    """Writes the results to a file, whole or not at all; the end of its name tells the format.

    Args:
      results: what to write.
      path: x.json: `about`, the accuracy, the confusion matrix and all predictions; x.csv: a row a
        video with its truth, its prediction and all probabilities; x.png: the confusion matrix, or
        the average precision of each class of multi-label results.
      about: more fields of the JSON file.
    """
    content = WRITERS[storage.extension(path)](results, about)
    with storage.disk_errors(path):
        storage.write_atomically(storage.absolute(path), content)


def _json(results: Results | MultiLabelResults, about: Mapping[str, Any]) -> bytes:
    content = {**about, **results.to_json(), "labels": list(results.labels)}
    if isinstance(results, Results):
        content["confusion"] = results.confusion().tolist()
    content["predictions"] = [
        named | {"probabilities": [float(f"{value:.6g}") for value in p]}
        for named, p in zip(_named(results), results.probabilities)
    ]
    return (json.dumps(content) + "\n").encode()


def _named(results: Results | MultiLabelResults) -> Iterator[dict[str, Any]]:
    """Of each video the id and the label, and the prediction where there is one label a video."""
    if isinstance(results, MultiLabelResults):
        for name, truth in zip(results.ids.tolist(), results.truth):
            yield {"id": name, "labels": [results.labels[i] for i in np.flatnonzero(truth)]}
        return
    for name, truth, predicted in zip(results.ids.tolist(), results.truth, results.predicted):
        names = {"label": results.labels[truth], "prediction": results.labels[predicted]}
        yield {"id": name} | names


def _csv(results: Results | MultiLabelResults, about: Mapping[str, Any]) -> bytes:
    del about
    text = io.StringIO()
    named = list(_named(results))
    if isinstance(results, MultiLabelResults):
        fields = [(row["id"], "; ".join(row["labels"])) for row in named]
        head = ["id", "labels"]
    else:
        head = ["id", "label", "prediction", "rank"]
        ranks = (1 + results.ranks).tolist()
        fields = [(*row.values(), rank) for row, rank in zip(named, ranks)]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([*head, *(f"p({label})" for label in results.labels)])
    for row, p in zip(fields, results.probabilities):
        rows.writerow([*row, *(f"{value:.6g}" for value in p)])
    return text.getvalue().encode("utf-8", "backslashreplace")


def _png(results: Results | MultiLabelResults, about: Mapping[str, Any]) -> bytes:
    del about
    figure = _draw_confusion(results) if isinstance(results, Results) else _draw_precision(results)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()


def _draw_precision(results: MultiLabelResults) -> Figure:
    """A bar for the average precision of each class that a video has."""
    rows = np.flatnonzero(results.truth.any(axis=0))[::-1]  # the first class is on top
    figure = _figure()(figsize=(7, 2 + 0.28 * min(len(rows), MOST_NAMED)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(rows)), results.average_precision[rows])
    axes.set(xlim=(0, 1), xlabel="average precision", title=results.summary())
    axes.title.set_fontsize(9)
    named = [results.labels[row] for row in rows] if len(rows) <= MOST_NAMED else []
    axes.set_yticks(range(len(named)), named)
    return figure


def _draw_confusion(results: Results) -> Figure:
    """Each row of the confusion matrix as shares of the videos of its class."""
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
    return figure


def _figure() -> type[Figure]:
    """matplotlib's Figure, which needs no screen and changes no settings of a notebook."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise InputError(f"a picture needs the package matplotlib: {install('data')}") from e
    return Figure


WRITERS: dict[str, Callable[[Any, Mapping[str, Any]], bytes]] = {
    ".json": _json,
    ".csv": _csv,
    ".png": _png,
}
