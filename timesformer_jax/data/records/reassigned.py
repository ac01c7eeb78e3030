"""Splits and labels that differ from those that the shards were written for.

A shard is named for its split, and its records hold their class, but neither has to be decoded
again to change: `splits.json` of a prepared directory has each record's split and label by name,
and takes precedence over the indices. TFDS knows nothing of it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from etils import epath

from timesformer_jax.data.layout import INDEX_DTYPES, SPLITS_FILE
from timesformer_jax.data.records.split import Split, first_class
from timesformer_jax.errors import InputError


@dataclass(frozen=True)
class Reassigned:
    """The content of splits.json.

    labels: class names in order.
    splits: for each split, the label of each of its records by the record's id; of multi-label
      data a list of labels.
    clips: a fingerprint of the list of clips that it follows from.
    """

    labels: tuple[str, ...]
    splits: Mapping[str, Mapping[str, str | list[str]]]
    clips: str

    def to_json(self) -> bytes:
        fields = {"labels": self.labels, "splits": self.splits, "clips": self.clips}
        return (json.dumps(fields, indent=0) + "\n").encode()


def read_reassigned(directory: str) -> Reassigned | None:
    """Reads splits.json; None if there is none.

    Raises:
      InputError: it is damaged.
    """
    path = epath.Path(directory) / SPLITS_FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        splits = {name: dict(records) for name, records in found["splits"].items()}
        return Reassigned(tuple(found["labels"]), splits, found["clips"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it, and run `timesformer prepare --resplit` again"
        ) from error


def select_split(indexed: Sequence[Split], reassigned: Reassigned, name: str) -> Split:
    """The records of a split, from the indices of all shards.

    Raises:
      InputError: a record is in no index, or has no known label.
    """
    label_of = reassigned.splits[name]
    everything = join(indexed)
    everything = everything.take(np.array([i in label_of for i in everything.ids.tolist()], bool))
    if len(everything) != len(label_of):
        raise InputError(
            f"{SPLITS_FILE} has {len(label_of)} records of {name}, and the indices"
            f" {len(everything)} of them; run `timesformer prepare --resplit` again"
        )
    classes = {label: i for i, label in enumerate(reassigned.labels)}
    found = replace(everything, name=name, label_names=reassigned.labels)
    targets = np.zeros((len(found), len(classes)), bool)
    for row, record in enumerate(found.ids.tolist()):
        labels = label_of[record]
        for label in [labels] if isinstance(labels, str) else labels:
            if label not in classes:
                raise InputError(
                    f"{SPLITS_FILE} gives {record} the label {label!r}, which it does not list; run"
                    " `timesformer prepare --resplit` again"
                )
            targets[row, classes[label]] = True
    if everything.targets is None:
        return replace(found, label=first_class(targets))
    return replace(found, label=first_class(targets), targets=targets)


def join(splits: Sequence[Split]) -> Split:
    """All records of several splits of one data set, as one."""
    columns: dict[str, Any] = {
        column: np.concatenate([getattr(split, column) for split in splits])
        for column in ("ids", *INDEX_DTYPES)
    }
    if splits[0].targets is not None:
        columns["targets"] = np.concatenate([split.targets for split in splits])
    # Shards and videos are numbered within each split.
    for column, counts in {
        "shard": [len(split.files) for split in splits],
        "video": [1 + split.video.max(initial=-1) for split in splits],
    }.items():
        first = np.repeat(np.cumsum([0, *counts[:-1]]), [len(split) for split in splits])
        columns[column] = (columns[column] + first).astype(INDEX_DTYPES[column])
    files = tuple(file for split in splits for file in split.files)
    return replace(splits[0], files=files, **columns)
