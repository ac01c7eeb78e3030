"""Hides the messages that TensorFlow writes about the machine while it is imported."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# The CUDA libraries that both JAX and TensorFlow register are reported as errors and warnings.
_MESSAGE = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog|I0000 |[EW]0000 .*\bregister"
)
# TensorFlow looks for a GPU on every machine. That there is none is no error.
_NO_GPU = re.compile(rb"E0000 .*failed call to cuInit")
# Of NVIDIA's driver, and of Windows' subsystem for Linux.
_GPUS = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/dxg")


@contextlib.contextmanager
def hide_tensorflow_messages() -> Iterator[None]:
    """Hides TensorFlow's messages on the standard error while the block imports TensorFlow.

    The block's other output on the standard error is written when the block ends.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # TensorFlow's libraries write to the file descriptor before they read the log level.
    sys.stderr.flush()
    with tempfile.TemporaryFile() as written, os.fdopen(os.dup(2), "wb") as stderr:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            written.seek(0)
            hidden = (_MESSAGE,) if _has_gpu() else (_MESSAGE, _NO_GPU)
            stderr.writelines(
                line for line in written if not any(pattern.match(line) for pattern in hidden)
            )


def _has_gpu() -> bool:
    """Whether there is an NVIDIA device, usable or not: then nothing about it is hidden."""
    return any(glob.glob(pattern) for pattern in _GPUS)
