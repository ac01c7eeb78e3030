"""From video files to batches. TensorFlow is imported by some of these modules."""

import os

# Of gs://, TensorFlow asks for 64 MiB more than is read; a record is a megabyte or two, and read
# alone. It reads this when it is imported.
os.environ.setdefault("GCS_READAHEAD_BUFFER_SIZE_BYTES", str(2 << 20))
