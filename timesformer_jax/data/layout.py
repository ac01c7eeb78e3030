"""The file names of a prepared directory, and the columns of its indices."""

import os

import numpy as np

LABELS_FILE = "labels.txt"
INFO_FILE = "dataset_info.json"

SPLITS_FILE = "splits.json"
OPTIONS_FILE = "prepare.json"
FAILURES_FILE = "failures.csv"
UNLISTED_FILE = "unlisted.txt"
MANIFESTS = "manifests"

# The columns of an index, except `id`.
INDEX_DTYPES = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int64,
    "num_frames": np.int32,
    "fps": np.float32,
    "stride": np.int32,
    "height": np.int32,
    "width": np.int32,
    "label": np.int32,
    "video": np.int32,
}
# (k, 2) int32: a row of the index and a class, for each label of multi-label data.
TARGETS = "targets"


def index_path(directory: str, split: str) -> str:
    return os.path.join(directory, f"{split}.index.npz")
