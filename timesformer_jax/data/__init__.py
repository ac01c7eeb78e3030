"""From video files to batches. Some of these modules import TensorFlow."""

import os

# From gs://, TensorFlow reads 64 MiB ahead by default. Records have one or two megabytes, and are
# read one by one. TensorFlow reads the variable when it is imported.
os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(2 << 20))
