"""The file names of a prepared directory, the columns of its indices, and a frame's place."""

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

# An entry of a file of places: where a stored frame is. `offset`: bytes from the beginning of the
# serialized record; `size`: bytes of the frame; `crc`: CRC-32C of these.
PLACE = np.dtype([("offset", "<u4"), ("size", "<u4"), ("crc", "<u4")])
DIGEST_BYTES = 32  # SHA-256, at the beginning and at the end of the file


def index_path(directory: str, split: str) -> str:
    return os.path.join(directory, f"{split}.index.npz")


def places_path(directory: str, split: str) -> str:
    return os.path.join(directory, f"{split}.places")
