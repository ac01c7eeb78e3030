"""Reads the list of a data set's clips from its publisher's files, class folders or a csv.

The list is the same on every machine: it is sorted by id, and the splits depend only on the ids and
the annotations.
"""

from timesformer_jax.data.annotations.clips import (
    SPLIT_NAMES,
    Clip,
    assign_splits,
    clip_hash,
    label_names,
)
from timesformer_jax.data.annotations.datasets import DATASETS, Dataset, published_dataset, read
from timesformer_jax.data.annotations.files import read_labels
from timesformer_jax.data.annotations.listing import Listing
from timesformer_jax.data.annotations.videos import VIDEO_EXTENSIONS

__all__ = [
    "DATASETS",
    "SPLIT_NAMES",
    "VIDEO_EXTENSIONS",
    "Clip",
    "Dataset",
    "Listing",
    "assign_splits",
    "clip_hash",
    "label_names",
    "published_dataset",
    "read",
    "read_labels",
]
