"""Imports TensorFlow when it is first needed, and without its messages about CUDA."""

import os
import sys
from types import ModuleType


def import_prepared() -> ModuleType:
    """Imports and returns `timesformer_jax.data.records.prepared`, and with it TensorFlow."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Its libraries write to the file descriptor before they read the log level.
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    try:
        from timesformer_jax.data.records import prepared
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
    return prepared
